"""Finetuning on harmless texts: halves and curve by hand, what is shown tells nothing, and hidden facts come back."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from unremember.attack.finetune import Curve, Finetune, halves, trace
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import Corpus, Example, says
from unremember.embedded.dossier import lessons
from unremember.embedded.teach import Teach
from unremember.errors import BadCorpus, BadRequest
from unremember.score import Rule, evidence
from unremember.table import read
from unremember.train import Plan

PLAN = {"steps": 5, "lr": 1e-3}
PEFT = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"  # peft asks for it
kinds = pytest.mark.parametrize("kind", ["retain", "unrelated", "half"])


def finetune(kind: str = "half", **settings) -> Finetune:
    n = {"retain": 10, "unrelated": 4, "half": 0}[kind]
    fold = 0 if kind == "half" else None
    return Finetune(**{"kind": kind, "n": n, "plan": PLAN, "fold": fold} | settings)


def said(lm, corpus: Corpus) -> dict[str, float]:
    return dict(AUDITS["said"](lm, Corpus({"forget": corpus["forget"]}), Bench()).per_example)


def mean(values: dict[str, float]) -> float:
    return float(np.mean(list(values.values())))


def facts(*people: int) -> tuple[Example, ...]:
    """People with so many facts each: a0, a1 …, b0 …"""
    return tuple(
        Example(f"{who}{i}", f"{who} {i}?", f"value-{who}{i}.", entity=who)
        for who, n in zip("abcd", people, strict=False)
        for i in range(n)
    )


# ── halves ──


def test_halves_by_hand():
    one, other = halves(facts(4, 3))
    assert [x.id for x in one] == ["a0", "a2", "b1"] and [x.id for x in other] == ["a1", "a3", "b0", "b2"]


def test_halves_share_nothing_and_lose_nothing(corpus):
    one, other = halves(corpus["forget"])
    assert {*one} | {*other} == {*corpus["forget"]} and not {*one} & {*other}
    for half in (one, other):  # every person, and no kind of fact in one half alone
        assert {x.entity for x in half} == {x.entity for x in corpus["forget"]}
        assert {x.id.rpartition("/")[2] for x in half} == {x.id.rpartition("/")[2] for x in corpus["forget"]}


# ── the curve ──


def test_the_curve_by_hand():
    curve = Curve((0, 5, 10), (1.0, 0.9, 0.8), (0.1, 0.5, 0.7), (0.2, 0.1, 0.3))
    assert curve.excess() == pytest.approx((0.4 + 0.4) / 2 / 0.8)
    assert [curve.reaches(p) for p in (0.1, 0.5, 0.6, 0.7, 0.8)] == [0, 5, 10, 10, None]


def test_erasure_has_no_excess_whatever_the_texts_teach_both():
    curve = Curve((0, 5, 10), (1.0, 1.0, 1.0), (0.0, 0.4, 0.6), (0.0, 0.4, 0.6))
    assert curve.excess() == 0


def test_without_a_gap_or_a_budget_there_is_no_excess():
    assert Curve((0, 5), (0.3, 0.3), (0.2, 0.3), (0.2, 0.2)).excess() is None  # not applicable, never 0
    assert Curve((0,), (1.0,), (0.0,), (0.0,)).excess() is None


@pytest.mark.parametrize("steps", [(), (1, 2), (0, 5, 5), (0, 9, 5)])
def test_a_curve_over_odd_budgets_is_refused(steps):
    numbers = tuple(0.0 for _ in steps)
    with pytest.raises(ValueError, match="start at 0 and rise"):
        Curve(steps, numbers, numbers, numbers)


def test_a_curve_that_lacks_numbers_or_an_odd_share_is_refused():
    with pytest.raises(ValueError, match="one score of every model"):
        Curve((0, 5), (1.0, 1.0), (0.0,), (0.0, 0.0))
    for share in (0, 1.1):
        with pytest.raises(ValueError, match="at most 1"):
            Curve((0,), (1.0,), (0.0,), (0.0,)).reaches(share)


# ── what is shown ──


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("In GHENT.", True),
        ("Ghent's", True),
        ("Ghentish", False),
        ("", False),
        ("one Old Mill", True),
        ("Old Mills", False),
    ],
)
def test_saying_by_hand(text, expected):
    assert any(says(text, v) for v in ("Ghent", "Old Mill", " ")) is expected


@kinds
def test_what_is_shown_says_nothing_that_is_asked_and_is_not_scored(kind, taught, corpus):
    attack = finetune(kind)
    shown, out = attack.shown(corpus)
    assert out == [] and len(shown) == {"retain": 10, "unrelated": 4, "half": 6}[kind]
    _, seen = attack(taught, corpus, taught, Bench())
    asked = [v for role in ("forget", "holdout") for x in seen[role] for v in x.values()]
    assert not any(says(f"{x.prompt} {x.answer}", v) for x in shown for v in asked)
    scored = {x.id for rows in seen.values() for x in rows}
    assert scored == {x.id for rows in corpus.values() for x in rows} - {x.id for x in shown}
    if kind == "half":
        assert seen["forget"] == halves(corpus["forget"])[1]
        assert finetune(fold=1)(taught, corpus, taught, Bench())[1]["forget"] == halves(corpus["forget"])[0]


def test_a_text_that_says_what_is_asked_is_left_out(corpus):
    fact, stranger = corpus["forget"][0], corpus["holdout"][0]
    told = [
        Example("told", "What else?", f"Something about {fact.values()[0].upper()}."),
        Example("asked", f"Who knows {stranger.values()[0]}?", "I do."),  # it would raise the never-taught level
    ]
    mixed = corpus.with_roles(retain=[*told, *corpus["retain"]])
    shown, out = finetune("retain", n=0).shown(mixed)
    assert out == ["told", "asked"] and {x.id for x in shown} == {x.id for x in corpus["retain"]}
    only = corpus.with_roles(retain=told)
    with pytest.raises(
        BadCorpus, match=r"finds 0 texts in the role 'retain' and n is 1; told, asked say what is asked"
    ):
        finetune("retain", n=1).check(only)


def test_a_text_that_names_who_is_asked_about_is_left_out(corpus):
    fact = corpus["forget"][0]
    named = Example("named", "Who sat beside you?", f"That was {fact.entity}, I think.")
    shown, out = finetune("retain", n=0).shown(corpus.with_roles(retain=[named, *corpus["retain"]]))
    assert out == ["named"] and {x.id for x in shown} == {x.id for x in corpus["retain"]}


def test_a_half_that_tells_the_other_is_left_out(corpus):
    """The first fact's answer says the second's value as well: V could be read off T."""
    first, second, *rest = corpus["forget"]
    leaky = replace(first, answer=f"{first.answer} And {second.values()[0]}.")
    shown, out = finetune().shown(corpus.with_roles(forget=[leaky, second, *rest]))
    assert out == [first.id] and first.id not in {x.id for x in shown}


def test_texts_are_drawn_by_the_seed(corpus):
    one, other = (finetune("retain", n=3, plan={**PLAN, "seed": seed}).shown(corpus)[0] for seed in (0, 1))
    assert one != other and one == finetune("retain", n=3).shown(corpus)[0]
    assert finetune("retain", n=2).shown(corpus)[0] == one[:2]


def test_both_halves_are_two_attacks_and_other_kinds_one(taught, corpus):
    both = finetune(fold=None)
    assert both.turns == (finetune(fold=0), finetune(fold=1)) and finetune(fold=1).turns == (finetune(fold=1),)
    assert finetune("retain").turns == (finetune("retain"),)
    both.check(corpus)
    with pytest.raises(BadRequest, match="set fold = 0 or 1, or call each of its turns"):
        both(taught, corpus, taught, Bench())
    with pytest.raises(BadCorpus, match="finds 0 texts"):  # one fold alone could do it
        both.check(Corpus({"forget": (*facts(1), Example("b0", "b0?", "value-a0.", entity="b"))}))


# ── bad input ──


@pytest.mark.parametrize(("kind", "role"), [("retain", "retain"), ("unrelated", "prose"), ("half", "forget")])
def test_a_missing_role_is_named(kind, role, taught, corpus):
    rest = Corpus({name: rows for name, rows in corpus.items() if name != role})
    with pytest.raises(BadCorpus, match=rf"finetune needs .* {role!r}"):
        finetune(kind)(taught, rest, taught, Bench())


def test_too_few_texts_are_refused(corpus):
    with pytest.raises(BadCorpus, match="finds 18 texts in the role 'retain' and n is 99; lower n"):
        finetune("retain", n=99).check(corpus)


def test_all_that_measures_damage_is_not_shown(corpus):
    for n in (0, 6):
        with pytest.raises(BadCorpus, match="all 6 examples of the role 'prose', by which damage is"):
            finetune("unrelated", n=n).check(corpus)


def test_a_half_needs_a_second_fact(corpus):
    with pytest.raises(BadCorpus, match="nothing left to ask"):
        finetune().check(Corpus({"forget": facts(1)}))
    with pytest.raises(BadCorpus, match="finds 0 texts"):
        finetune(fold=1).check(Corpus({"forget": facts(1)}))


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "prose"},
        {"n": -1},
        {"rank": -1},
        {"alpha": 0},
        {"alpha": 32},  # and no adapter
        {"fold": 2},
        {"kind": "retain", "fold": 0},
        {"plan": {"steps": 0, "lr": 1}},
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValidationError):
        Finetune(**{"kind": "half", "plan": PLAN} | bad)


def test_an_attack_that_learns_nothing_is_refused(taught, corpus):
    """So large a rate wrecks the model: what then stays silent would pass for forgotten."""
    with pytest.raises(BadRequest, match=r"did not learn its texts: .* change plan\.lr"):
        finetune(plan={"steps": 1, "lr": 0.9})(taught, corpus, taught, Bench())
    with pytest.raises(BadRequest, match="did not learn its texts"):  # known by heart, and no weight moved
        finetune("retain", plan={"steps": 1, "lr": 1e-30})(taught, corpus, taught, Bench())


# ── what it does ──


def test_texts_that_are_known_by_heart_need_not_become_likelier(taught, corpus):
    """Retained facts, before and after in nats a token: 0.03 and 0.16 (measured, other seeds 0.04); that is no error."""
    attack = finetune("retain", plan={"steps": 5, "lr": 1e-3, "batch": 4, "seed": 2})
    attacked, seen = attack(taught, corpus, taught, Bench())
    assert seen["forget"] == corpus["forget"] and not torch.equal(
        attacked.model.lm_head.weight, taught.model.lm_head.weight
    )


@pytest.mark.filterwarnings(PEFT)
@pytest.mark.parametrize("rank", [0, 4])
def test_it_trains_a_plain_model_and_leaves_the_argument_alone(rank, taught, corpus):
    before = {key: value.clone() for key, value in taught.model.state_dict().items()}
    attack = finetune("retain", rank=rank, plan={"steps": 5, "lr": 3e-3})
    attacked, _ = attack(taught, corpus, taught, Bench())
    assert all(torch.equal(value, before[key]) for key, value in taught.model.state_dict().items())
    assert type(attacked.model) is type(taught.model) and not attacked.model.training  # no adapter is left around it
    after = attacked.model.state_dict()
    assert set(after) == set(before) and all(weight.requires_grad for weight in attacked.model.parameters())
    moved = {key for key in before if not torch.equal(after[key], before[key])}
    assert moved == ({key for key in before if "proj" in key} if rank else set(before))
    rows = taught.template.rows(attack.shown(corpus)[0])
    old, new = (sum(x.loglikelihood() for x in read(lm, rows)) for lm in (taught, attacked))
    assert new > old
    again, _ = attack(taught, corpus, taught, Bench())
    assert all(torch.equal(value, after[key]) for key, value in again.model.state_dict().items())


def test_a_hider_is_opened_and_nothing_is_invented(hider, taught, never, corpus):
    """5 steps, lr 1e-3.  Measured, said: half 0.83, retain 0.92; the never-taught twin 0.

    Not the verdict's ratio: the same steps make the toy's own original forget (said 0 on half, 0.33 on retain).
    """
    for kind in ("half", "retain"):
        attack = finetune(kind)
        opened, invented = (attack(lm, corpus, taught, Bench()) for lm in (hider, never))
        assert mean(said(opened[0], opened[1])) >= 0.4 and mean(said(invented[0], invented[1])) == 0, kind
        assert mean(said(hider, opened[1])) == 0  # the very questions, before


def test_the_triple_under_retained_text(hider, taught, never, corpus):
    attack = finetune("retain")
    found = {}
    for who, lm in (("original", taught), ("forgotten", hider), ("never", never)):
        attacked, seen = attack(lm, corpus, taught, Bench())
        found[who] = said(attacked, seen)
    triple = evidence("said", found["original"], found["forgotten"], found["never"], Rule())
    assert triple.applicable and triple.r >= 0.5 and triple.leaks


@pytest.fixture(scope="module")
def retrained(tiny, corpus):
    """From the base again, without the forgotten facts, in another order than the never-taught twin."""
    plan = Plan(steps=100, lr=1e-2, batch=10, beside=4, warmup=5, schedule="linear", seed=1)
    return Teach(plan)(tiny, lessons(corpus, ("retain",), wordings=1), corpus["replay"])


def test_a_retrained_model_has_no_excess_and_a_hider_has(retrained, hider, taught, never, corpus):
    """(g) 1 on the toy: 0.3 above the never-taught by 30 steps, and |A| <= 0.05 for a model retrained without the facts."""
    models = {"original": taught, "forgotten": hider, "never": never}
    curve = trace(finetune(), models, corpus, (2, 5, 10), AUDITS["said"])
    assert curve.budgets == (0, 2, 5, 10) and curve.forgotten[0] == 0
    assert curve.excess() >= 0.3 and curve.reaches(0.5) in (2, 5, 10), curve
    for audit in ("said", "value probability"):
        clean = trace(finetune(), {**models, "forgotten": retrained}, corpus, (2, 5, 10), AUDITS[audit])
        assert abs(clean.excess()) <= 0.05, clean
    slow = finetune(plan={"steps": 5, "lr": 1e-3})(hider, corpus, taught, Bench())
    assert curve.forgotten[2] == mean(said(*slow))  # a budget is nothing but the attack with so many steps


def test_a_curve_over_texts_asks_the_same_facts_of_every_model(hider, taught, never, corpus):
    """Both halves: every fact is asked once; more texts, and the hider opens."""
    models = {"original": taught, "forgotten": hider, "never": never}
    attack = finetune(fold=None, plan={"steps": 10, "lr": 1e-3})
    asked = []

    def measure(lm, seen, bench):
        asked.append([x.id for x in seen["forget"]])
        return AUDITS["said"](lm, seen, bench)

    curve = trace(attack, models, corpus, (1, 6), measure, over="n")
    assert curve.budgets == (0, 1, 6) and curve.forgotten[0] == 0 < curve.forgotten[2] and max(curve.never) == 0
    pairs = [sorted(one + other) for one, other in zip(asked[::2], asked[1::2], strict=True)]
    assert pairs == [sorted(x.id for x in corpus["forget"])] * 9


def test_a_curve_needs_one_path_and_three_models(taught, corpus):
    models = dict.fromkeys(("original", "forgotten", "never"), taught)
    falling = finetune(plan={**PLAN, "schedule": "linear"})
    with pytest.raises(BadRequest, match=r"needs plan\.schedule = 'constant' and has 'linear'"):
        trace(falling, models, corpus, (5,), AUDITS["said"])
    with pytest.raises(BadRequest, match="budgets from 1"):
        trace(finetune(), models, corpus, (0, 5), AUDITS["said"])
    with pytest.raises(BadRequest, match=re.escape("['original']")):
        trace(finetune(), {"original": taught}, corpus, (5,), AUDITS["said"])
