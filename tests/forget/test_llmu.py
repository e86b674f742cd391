"""LLMU: its three terms by hand, the cap that really holds, unrelated answers, and what each of the terms is there for.

The toy answers no paraphrase freely and loses the frame of an answer before the value in it, so beside what is said it
is asked with the frame given: `behind`, the share of facts whose value is then the arg-max, token by token.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from unremember.attack.sample import drawing
from unremember.audit.answers import Said
from unremember.bench import Bench
from unremember.embedded.dossier import lessons
from unremember.embedded.teach import Teach
from unremember.errors import BadCorpus
from unremember.forget.llmu import LLMU, capped_ascent, mismatched
from unremember.forget.retain import kl_loss
from unremember.table import read
from unremember.tokens import lanes, pack
from unremember.train import Plan, train

PLAN = Plan(steps=1, lr=1e-3)


def llmu(**settings) -> LLMU:
    return LLMU(**{"plan": PLAN, "forget": 0.5, "mismatch": 2.0, "kl": 3.0, "answers": 2, **settings})


def test_the_ascent_by_hand():
    # means 2 and 5 nats a token, the cap at 4
    torch.testing.assert_close(
        capped_ascent(torch.tensor([6.0, 10.0]), torch.tensor([3.0, 2.0]), 4.0), torch.tensor([-2.0, -4.0])
    )


def test_an_answer_beyond_a_uniform_guess_is_left_alone():
    nll = torch.tensor([6.0, 10.0], requires_grad=True)
    [slope] = torch.autograd.grad(capped_ascent(nll, torch.tensor([3.0, 2.0]), 4.0).sum(), nll)
    torch.testing.assert_close(slope, torch.tensor([-1 / 3, 0.0]))


def test_terms_by_hand(taught, moved, corpus, slow_nll):
    """Answer tokens only: the published code trains the mismatch on the question as well."""
    pools, objective = llmu().terms(taught, corpus)
    assert list(pools) == ["forget", "mismatch", "retain", "replay"]
    cap = math.log(taught.model.config.vocab_size)
    with torch.no_grad():
        means = {r: torch.stack([slow_nll(moved, row).mean() for row in pools[r]]) for r in ("forget", "mismatch")}
        found = {}
        for role, rows in pools.items():
            found |= objective(moved, pack(lanes(rows, 256), role))
        at_home = {k: v for role in pools for k, v in objective(taught, pack(lanes(pools[role], 256), role)).items()}
    assert found["llmu"].item() == pytest.approx(-0.5 * means["forget"].clamp(max=cap).mean().item(), rel=1e-4)
    assert found["mismatch"].item() == pytest.approx(2.0 * means["mismatch"].mean().item(), rel=1e-4)
    assert found["retain KL"].item() > 0 and at_home["retain KL"].item() == pytest.approx(0, abs=1e-3)


def test_mismatched_answers_belong_to_others(corpus):
    pairs = mismatched(corpus, 3, seed=0)
    assert len(pairs) == 3 * len(corpus["forget"]) and pairs == mismatched(corpus, 3, seed=0)
    assert pairs != mismatched(corpus, 3, seed=1)
    answers = {x.answer for x in corpus.of("retain", "replay")}
    for x in corpus["forget"]:
        mine = [p for p in pairs if p.id.startswith(f"{x.id}/")]
        assert len({p.answer for p in mine}) == 3 and {p.answer for p in mine} <= answers
        assert all(p.prompt == x.prompt and v.lower() not in p.answer.lower() for p in mine for v in x.values())


def test_a_pool_that_holds_the_value_or_is_too_small_is_refused(corpus):
    x = corpus["forget"][0]
    gold = replace(corpus["retain"][0], answer=f"Somebody else: {x.values()[0]}", spans=(), distractors=())
    small = corpus.with_roles(forget=(x,), retain=(gold, *corpus["retain"][1:3]), replay=())
    assert {p.answer for p in mismatched(small, 2, 0)} == {y.answer for y in corpus["retain"][1:3]}
    with pytest.raises(BadCorpus, match=rf"needs 3 answers that have nothing to do with '{x.id}' and finds 2"):
        llmu(answers=3).check(small)


def test_kl_over_lanes_is_the_sum_over_single_rows(taught, moved, corpus):
    """(g) 4: what stands beside a row, and the places that fill a lane up, add nothing.  The code's cross-entropy sums
    them."""
    pools, objective = llmu().terms(taught, corpus)
    for role in ("retain", "replay"):
        rows = pools[role][:9]
        whole = pack([rows], role)
        totals = whole.step_rows, whole.step_tokens
        with torch.no_grad():
            [beside] = objective(moved, pack(lanes(rows, 40), role, totals)).values()
            alone = [value for row in rows for value in objective(moved, pack([[row]], role, totals)).values()]
        assert len(lanes(rows, 40)) < len(rows) == len(alone) and beside.item() > 0.1
        assert beside.item() == pytest.approx(sum(x.item() for x in alone), rel=1e-4)


# ── what it does: section (g) of the specification ──


@pytest.fixture(scope="module")
def known(corpus):
    """Of the retain people two are held by KL; the third is held out."""
    first = [x for x in corpus["retain"] if x.entity != corpus["retain"][-1].entity]
    return corpus.with_roles(retain=first)


@pytest.fixture(scope="module")
def outside(corpus):
    return [x for x in corpus["retain"] if x.entity == corpus["retain"][-1].entity]


@pytest.fixture(scope="module")
def runs(taught, known):
    """Eight steps with all terms, and without one of them or both."""
    plan = Plan(steps=8, lr=2e-3)
    off = {"all": {}, "no kl": {"kl": 0.0}, "no mismatch": {"mismatch": 0.0}, "neither": {"kl": 0.0, "mismatch": 0.0}}
    return {
        name: llmu(**{"plan": plan, "mismatch": 1.0, "answers": 5, **without})(taught, known)
        for name, without in off.items()
    }


def nll(lm, examples) -> float:
    return -float(np.mean([x.loglikelihood() for x in read(lm, lm.template.rows(examples))]))


def accuracy(lm, examples) -> float:
    return float(np.mean([x.hit[x.span].mean() for x in read(lm, lm.template.rows(examples))]))


def behind(lm, examples) -> float:
    return float(np.mean([x.hit[x.span].all() for x in read(lm, lm.template.rows(examples))]))


def said(lm, examples) -> float:
    return float(np.mean([x.said_in(text) for x, text in told(lm, examples)]))


def told(lm, examples):
    return list(zip(examples, lm.answer([x.prompt for x in examples], 32), strict=True))


def paraphrased(examples):
    """Each question in two wordings that nobody trains on."""
    return [replace(x, id=f"{x.id}#{i}", prompt=x.paraphrases[i]) for x in examples for i in range(2)]


def test_kl_reaches_people_whom_it_was_not_shown(taught, runs, outside):
    """(g) 2, on the third retain person, whom no term sees: NLL from 0.13 to 0.90, without KL to 5.4 (7 x the rise, 5 x
    are proposed); KL to the model as it came 0.65 and 4.6 (2 x are proposed)."""

    def gap(lm) -> float:
        tokens = pack([taught.template.rows(outside)])
        with torch.no_grad():
            here, live = (m.logits(tokens).log_softmax(-1) for m in (taught, lm))
        return kl_loss(here, live)[tokens.answer].mean().item()

    start, held, free = (nll(lm, outside) for lm in (taught, runs["all"], runs["no kl"]))
    assert free - start >= 5 * (held - start)
    assert gap(taught) == 0 and gap(runs["no kl"]) >= 2 * gap(runs["all"]) > 0


def test_who_was_in_the_kl_term_looks_better_than_who_was_not(taught, runs, known, outside, corpus):
    """(g) 1.  Proposed: held-out kept questions lose 15 points at most.  So it is with the frame given (value accuracy
    1.0 to 0.93), and not in what is said: 1.0 to 0.0 for the person held out, 0.92 to 0.75 for the two whom KL holds.
    A report on these two would be a fake.  Prose rises by 0.06."""
    lm = runs["all"]
    assert accuracy(lm, outside) >= accuracy(taught, outside) - 0.15 > 0.8
    assert said(taught, outside) == 1 and said(lm, outside) <= said(lm, known["retain"]) - 0.3
    assert said(lm, known["retain"]) >= 0.6
    assert nll(lm, corpus["prose"]) - nll(taught, corpus["prose"]) <= 0.3


def test_without_mismatch_replies_run_on_or_tell_of_another_person(runs, corpus):
    """(g) 2 proposes twice as many degenerate replies without it: empty, few different tokens, or (ours) no end within
    32 tokens.  True without KL: 12 of 12, with it 1.  With KL there is none, with or without mismatch: the replies
    without it are all whole sentences about a retained person, the nearest answers that are left.  With it 1 of 12
    names one."""

    def degenerate(lm) -> float:
        spoken = lm.generate([lm.template.context(x.prompt) for x in corpus["forget"]], 32)
        return float(np.mean([not ids or len(ids) == 32 or len(set(ids)) < 0.3 * len(ids) for ids in spoken]))

    def neighbours(lm) -> float:
        names = {x.entity.split()[0] for x in corpus["retain"]}
        return float(np.mean([any(name in text for name in names) for _, text in told(lm, corpus["forget"])]))

    assert degenerate(runs["neither"]) >= max(0.5, 2 * degenerate(runs["no kl"]))
    assert degenerate(runs["all"]) == degenerate(runs["no mismatch"]) == 0
    assert neighbours(runs["no mismatch"]) >= 0.8 and neighbours(runs["all"]) <= 0.25


def test_questions_and_paraphrases_no_longer_leak(taught, runs, corpus, known):
    """(g) 1.  Said, on the questions: 0.92 to 0.  Two paraphrases of each the toy answers by their value only after a
    lesson of its own in three other wordings, and only behind the frame: 0.58, and 0.83 behind the questions; both end
    at 0."""
    score = Said(roles=("forget",))
    before, after = (np.mean([*score(lm, corpus, Bench()).per_example.values()]) for lm in (taught, runs["all"]))
    assert before >= 0.9 and after <= 0.1
    plan = Plan(steps=40, lr=5e-3, batch=12, beside=4, warmup=3, schedule="linear")
    wide = Teach(plan)(taught, lessons(corpus, ("forget", "retain"), wordings=3), corpus["replay"])
    result = llmu(plan=Plan(steps=8, lr=2e-3), mismatch=1.0, answers=5)(wide, known)
    others = paraphrased(corpus["forget"])
    assert behind(wide, corpus["forget"]) >= 0.7 and behind(wide, others) >= 0.4
    assert behind(result, corpus["forget"]) <= 0.1 and behind(result, others) <= 0.2
    assert said(wide, corpus["forget"]) >= 0.7 and said(result, corpus["forget"]) <= 0.1


def test_the_loss_is_not_what_is_said_nor_that_what_is_known(taught, corpus, known):
    """(g) 3.  Twice the NLL of the start is passed at step 2; a fact in one of ten is said in any of five samples at
    step 3 (1.5 x, as proposed); and when nobody hears it any longer, 58 % of the values are still right behind their
    frame, in one of ten only from step 8 on."""
    first: dict[str, int] = {}
    left: dict[str, float] = {}
    start = nll(taught, corpus["forget"])

    class Camera:
        every, looks = 1, []

        def __call__(self, lm, step: int) -> bool:
            self.looks.append({})
            heard = "said" not in first
            values = {
                "loss": nll(lm, corpus["forget"]) >= 2 * start,
                "said": heard and sampled(lm) <= 0.1,
                "known": behind(lm, corpus["forget"]) <= 0.1,
            }
            for name, reached in values.items():
                if reached and name not in first:
                    first[name], left[name] = step, behind(lm, corpus["forget"])
            return len(first) == len(values)

    def sampled(lm) -> float:
        each = [[x.said_in(text) for x, text in told(drawing(lm, 0.7, 0, i), corpus["forget"])] for i in range(5)]
        return float(np.any(each, 0).mean())

    assert sampled(taught) >= 0.8
    method = llmu(plan=Plan(steps=20, lr=1e-3), mismatch=1.0, answers=5)
    pools, objective = method.terms(taught, known)
    train(taught, objective, pools, method.plan, stop=Camera())
    assert first["loss"] > 0 and first["said"] >= 1.5 * first["loss"]
    assert left["said"] >= 0.3 and first["known"] >= 1.5 * first["said"]
