"""Dynamic unlearning attack: what is shown, what is asked, what the suffix may not hold, and what forcing alone would do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from unremember.attack.gcg import Behaviour, Found, Search, started, survives, tells
from unremember.attack.suffix import Excess, Fold, Suffix, aimed, bar, excess, folds, groups, once, slots, wrong
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.train import Plan, train

FEW = {"tokens": 3, "steps": 2, "candidates": 8}


def suffix(**settings) -> Suffix:
    search = Search(**(FEW | settings.pop("search", {})))
    return Suffix(search, **settings)


def added(seen: Corpus, corpus: Corpus, role: str) -> list[str]:
    pairs = zip(seen[role], corpus[role], strict=True)
    return [s.prompt.removeprefix(x.prompt) for s, x in pairs]


# ── by hand ──


def test_folds_by_hand():
    a, b, c = (Example(i, f"{i}?", f"{i}!", paraphrases=(f"say {i}",)) for i in "abc")
    assert folds([a, b, c], "within") == [Fold((a, b, c), (a, b, c))]
    assert folds([a, b, c], "other") == [Fold((b,), (a, c)), Fold((a, c), (b,))]
    [cross] = folds([a, b], "cross")
    assert cross.asked == (a, b)
    assert [(x.id, x.prompt, x.answer) for x in cross.shown] == [("a#0", "say a", "a!"), ("b#0", "say b", "b!")]


def test_people_and_roles_are_kept_apart():
    rows = [Example(f"{n}/{i}", "?", "!", entity=n) for i in range(2) for n in ("Ada", "Bo")]
    passage = Example("text", "", "Ada lived.", entity="Ada")
    strangers = [replace(x, id=f"{x.id}/s", prompt="??") for x in rows]
    corpus = Corpus(
        {"forget": [*rows, passage], "holdout": strangers, "retain": [replace(rows[0], id="r", answer="?")]}
    )
    found = groups(corpus, lambda x: x.entity)
    assert [(role, [x.id for x in group]) for role, group in found] == [
        ("forget", ["Ada/0", "Ada/1"]),
        ("forget", ["Bo/0", "Bo/1"]),
        ("holdout", ["Ada/0/s", "Ada/1/s"]),
        ("holdout", ["Bo/0/s", "Bo/1/s"]),
    ]


@pytest.mark.parametrize(
    ("answer", "spans", "false", "expected"),
    [
        ("Ada lives in Ghent.", ((13, 18),), "Ada lives in Old Lucca.", ((13, 22),)),
        ("Ada lives in Ghent.", ((13, 18),), "She lives in Lucca.", ()),  # another frame: all of it
        ("Ada lives in Ghent.", (), "Ada lives in Lucca.", ()),
        ("Ghent", ((0, 5),), "Lucca", ((0, 5),)),
        ("Ada lives in Ghent.", ((0, 3), (13, 18)), "Bo lives in Lucca.", ()),
    ],
)
def test_the_false_answer_and_where_it_differs(answer, spans, false, expected):
    x = Example("x", "?", answer, spans=spans, rewording="y", distractors=(false, "else"))
    found = wrong(x)
    assert (found.answer, found.spans, found.rewording) == (false, expected, "")
    assert found.distractors == (answer, "else") and found.id == "x"
    assert wrong(replace(x, distractors=())) is None


def test_the_target_ends_with_the_last_secret(taught):
    x = Example("x", "Where?", "Ada lives in Ghent, near the river.", spans=((13, 18),))
    said = taught.tokenizer.decode(aimed(taught.template, x, 0))
    assert said == " Ada lives in Ghent"
    two = replace(x, spans=((0, 3), (13, 18)))
    assert aimed(taught.template, two, 0) == aimed(taught.template, x, 0)
    assert taught.tokenizer.decode(aimed(taught.template, replace(x, spans=()), 0)) == f" {x.answer}"


def test_a_prompt_that_comes_twice_counts_once():
    a, b = Behaviour("a", "x", "", (1,), (2,), (3,)), Behaviour("b", "x", "", (1,), (2,), (4,))
    assert once([a, b, replace(a, key="again")]) == (a, b)


def test_gains_by_hand():
    assert Excess(0.5, 0.2).gain == pytest.approx(0.3)


# ── what is asked ──


@pytest.mark.parametrize(("generalisation", "each"), [("within", 1), ("cross", 1), ("other", 2)])
def test_everybody_is_attacked_alike_and_retained_questions_stay(generalisation, each, hider, corpus):
    lm, seen = suffix(generalisation=generalisation)(hider, corpus, hider, Bench())
    assert lm is hider
    for role in ("forget", "holdout"):
        assert [(x.id, x.answer) for x in seen[role]] == [(x.id, x.answer) for x in corpus[role]]
        for start in range(0, len(corpus[role]), 6):  # six facts a person
            tails = added(seen, corpus, role)[start : start + 6]
            assert all(len(set(tails[i::each])) == 1 for i in range(each)) and "" not in tails
    assert {role: seen[role] for role in seen if role not in ("forget", "holdout")} == {
        role: corpus[role] for role in corpus if role not in ("forget", "holdout")
    }


def test_the_suffix_is_read_as_it_was_found_and_tells_nothing(hider, corpus):
    """Its ids come back from every asked prompt, none of them stands in an answer, and no value does, in pieces either."""
    mask, values = bar(hider, corpus)
    _, seen = suffix(search={"steps": 4, "tokens": 6})(hider, corpus, hider, Bench())
    code = hider.tokenizer
    for role in ("forget", "holdout"):
        for x, tail in zip(corpus[role], added(seen, corpus, role), strict=True):
            ids = tuple(code(tail, add_special_tokens=False).input_ids)
            start = started(hider.template, " !", len(ids))
            places = slots(hider.template, [x], start, lambda x: (x.prompt, ""), 0)
            assert len(ids) == 6 and survives(hider.template, places, ids)
            drawn = [i for i in ids if i != start[0]]
            assert mask[drawn].all()
            answers = {*code(x.answer).input_ids, *code(f" {x.answer}").input_ids}
            assert not answers & set(drawn) and not tells(tail, values)


def test_with_the_original_at_hand_one_search_serves_all_three(hider, taught, never, corpus):
    bench, counted = Bench(), []
    bench = replace(bench, say=lambda stage, done, total, terms: counted.append(stage))
    attack = suffix(scenario="original")
    found = [attack(lm, corpus, taught, bench) for lm in (taught, hider, never)]
    assert len({seen.fingerprint() for _, seen in found}) == 1 and [lm for lm, _ in found] == [taught, hider, never]
    assert len(counted) == counted.count("suffix") <= 12 * 2  # 6 people, 2 halves, 2 steps: looked for once
    own = suffix()(hider, corpus, taught, bench)[1]
    assert own.fingerprint() != found[0][1].fingerprint()


def silenced(lm, monkeypatch):
    """The same model, which must not be asked anything."""

    def asked(*_, **__):
        raise AssertionError("the search asked a model that the attacker does not have")

    lm = lm.copy()
    monkeypatch.setattr(lm.model, "forward", asked)
    return lm


def test_with_neither_at_hand_a_surrogate_alone_is_searched(hider, taught, never, tiny, corpus, tmp_path, monkeypatch):
    never.save(tmp_path / "surrogate")
    attack = suffix(scenario="neither", surrogate=str(tmp_path / "surrogate"))
    bench, counted = Bench(), []
    bench = replace(bench, say=lambda stage, done, total, terms: counted.append(stage))
    attacked = [silenced(lm, monkeypatch) for lm in (taught, hider, tiny)]
    found = [attack(lm, corpus, attacked[0], bench) for lm in attacked]
    assert len({seen.fingerprint() for _, seen in found}) == 1 and all(
        a is lm for a, (lm, _) in zip(attacked, found, strict=True)
    )
    assert 0 < len(counted) == counted.count("suffix") <= 12 * 2  # 6 people, 2 halves, 2 steps: looked for once
    own = suffix()(never, corpus, taught, Bench())[1]
    assert own.fingerprint() == found[0][1].fingerprint()  # what the surrogate's own search finds, carried over as text


@pytest.mark.parametrize("which", ["original", "model under attack"])
def test_a_surrogate_that_is_a_model_of_the_run_is_refused(which, hider, taught, corpus, tmp_path):
    (taught if which == "original" else hider).save(tmp_path / "surrogate")
    attack = suffix(scenario="neither", surrogate=str(tmp_path / "surrogate"))
    with pytest.raises(BadRequest, match=rf"the surrogate .* is the {which}, weight for weight"):
        attack(hider, corpus, taught, Bench())


def test_models_that_are_asked_in_another_manner_are_refused(hider, taught, corpus):
    chatty = replace(taught, template=replace(taught.template, chat=True))
    with pytest.raises(BadModel, match=r"searched is asked in its chat template and the attacked one plainly"):
        suffix(scenario="original")(hider, corpus, chatty, Bench())
    with pytest.raises(BadModel, match="has no chat template"):
        suffix(scenario="neither", surrogate="tiny")(chatty, corpus, taught, Bench())


def test_a_carried_suffix_without_room_in_the_attacked_model_is_refused(hider, taught, corpus):
    narrow = hider.copy()
    narrow.model.config.max_position_embeddings = 20
    with pytest.raises(BadCorpus, match=r"(?s)the model's context is 20.*take fewer tokens for the suffix"):
        suffix(scenario="original")(narrow, corpus, taught, Bench())


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        ({"scenario": "neither"}, ["needs surrogate"]),
        ({"surrogate": "tiny"}, ["surrogate = 'tiny' and scenario = 'forgotten'"]),
        ({"scenario": "neither", "surrogate": "./nowhere"}, ["is no alias, folder"]),
        ({"scenario": "original", "surrogate": "./nowhere"}, ["nobody would search it", "is no alias, folder"]),
    ],
)
def test_without_exactly_one_model_to_search_it_is_refused(settings, problems):
    with pytest.raises(ValidationError) as caught:
        suffix(**settings)
    assert all(problem in str(caught.value) for problem in problems)


def test_what_it_found_is_noted(hider, corpus):
    bench = Bench()
    _, seen = suffix()(hider, corpus, hider, bench)
    before, after = (bench.notes[f"loss {when}, nats a token"] for when in ("before", "after"))
    assert after < before and bench.notes["suffixes found"] == 4  # two people to forget, two halves
    assert bench.notes["suffix with the least loss"] in added(seen, corpus, "forget") and len(bench.notes) == 4


def test_wrong_answers_are_shown_and_asked_about(hider, corpus):
    _, seen = suffix(target="wrong", generalisation="within")(hider, corpus, hider, Bench())
    for role in ("forget", "holdout"):
        assert [x.answer for x in seen[role]] == [x.distractors[0] for x in corpus[role]]
        assert all(x.answer in s.distractors for s, x in zip(seen[role], corpus[role], strict=True))


def test_bf16_and_nothing_left_behind(hider, corpus):
    lm = replace(hider, precision="bf16")
    before = {name: value.clone() for name, value in hider.model.state_dict().items()}
    suffix()(lm, corpus, lm, Bench())
    assert all(torch.equal(value, before[name]) for name, value in hider.model.state_dict().items())
    assert all(w.dtype == torch.float32 and w.grad is None for w in hider.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hider.model.modules())


def test_passages_are_left_as_they_are(hider, corpus):
    text = Example("text", "", "Somebody lived there for a long time.")
    mixed = corpus.with_roles(forget=[*corpus["forget"], text])
    _, seen = suffix()(hider, mixed, hider, Bench())
    assert seen["forget"][-1] == text and len(seen["forget"]) == 13


# ── bad input ──


def test_all_that_is_missing_is_said_together(corpus):
    bare = [replace(x, paraphrases=(), distractors=()) for x in corpus["forget"]]
    with pytest.raises(BadCorpus) as caught:
        suffix(generalisation="cross", target="wrong").check(corpus.with_roles(forget=bare))
    assert len(caught.value.problems) == 3
    assert "shown paraphrases" in caught.value.problems[0] and "needs distractors" in caught.value.problems[1]


def test_the_control_is_no_attack_of_a_run(corpus, demo_run):
    """Audits would score false answers, and the report would show them as what came back."""
    from unremember.request import request

    with pytest.raises(BadCorpus, match=r'suffix: target = "wrong" scores false answers, .*excess from Python'):
        suffix(target="wrong").check(corpus)
    raw = dict(demo_run.request.echo) | {"attack": {"suffix": {"target": "wrong"}}}
    with pytest.raises(BadRequest, match=r"suffix: target = .wrong. scores false answers"):
        request(raw, corpus=demo_run.request.corpus)


def test_a_person_with_one_question_has_no_other_half(corpus):
    first = corpus["forget"][0]
    lone = corpus.with_roles(forget=[first, *corpus["forget"][6:]])
    with pytest.raises(BadCorpus, match=rf'asks the other, and {first.id} stand alone; .* take "cross" or "within"'):
        suffix().check(lone)
    suffix(generalisation="within").check(lone)


def test_passages_alone_have_no_slot(corpus):
    texts = [replace(x, prompt="") for x in corpus["forget"]]
    with pytest.raises(BadCorpus, match="passages alone in the forget role"):
        suffix().check(corpus.with_roles(forget=texts))


def test_an_answer_of_one_token_would_be_forced(hider, corpus):
    short = [
        replace(x, answer=word, spans=(), distractors=())
        for x, word in zip(corpus["forget"], ("yes", "no"), strict=False)
    ]
    few = corpus.with_roles(forget=short, holdout=())
    with pytest.raises(BadCorpus, match="are one token, which a search that is shown them forces"):
        suffix(generalisation="within")(hider, few, hider, Bench())


def test_a_question_without_room_is_refused(hider, corpus):
    x = corpus["forget"][0]
    long = corpus.with_roles(forget=[replace(x, prompt=x.prompt + " on" * 235), *corpus["forget"][1:]])
    with pytest.raises(BadCorpus, match=rf"'{x.id}' is \d+ tokens long .* the model's context is 256"):
        suffix(search={"tokens": 20})(hider, long, hider, Bench())


def test_a_search_that_gets_nowhere_is_an_error(hider, corpus, monkeypatch):
    """An attack that did not take place must not come out as evidence of forgetting."""
    from unremember.attack import suffix as module

    def idle(victim, how, mask, keep, bench, stage):
        found = real(victim, how, mask, keep, bench, stage)
        return replace(found, loss=found.first, solved=False)

    real = module.search
    monkeypatch.setattr(module, "search", idle)
    with pytest.raises(BadRequest, match=r"no suffix of 2 step\(s\) does better than ' !' repeated"):
        suffix()(hider, corpus, hider, Bench())


@pytest.mark.parametrize(
    ("curve", "loss", "first", "refused"), [(0.1, 2.0, 3.0, False), (5.0, 3.0, 3.0, True), (0.1, 3.0, 3.0, True)]
)
def test_growing_is_held_against_the_start_on_all_prompts(curve, loss, first, refused, hider, corpus, monkeypatch):
    """The first loss of the curve is that on one prompt: it may be far below or above what all have."""
    from unremember.attack import suffix as module

    start = started(hider.template, " !", 3)
    held = Found(start, " ! ! !", loss, False, (curve,), 0, first)
    monkeypatch.setattr(module, "search", lambda *_: held)
    attack = suffix(search={"growing": True})
    if refused:
        with pytest.raises(BadRequest, match="nothing was attacked"):
            attack(hider, corpus, hider, Bench())
    else:
        assert attack(hider, corpus, hider, Bench())[1]["forget"][0].prompt.endswith(" ! ! !")


@pytest.mark.parametrize("bad", [{"scenario": "both"}, {"generalisation": "all"}, {"target": "none"}])
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValidationError):
        suffix(**bad)


# ── what comes back ──

KEY = "ketchup"
OTHER = ("sushi", "planet", "Friday", "duck", "wolves", "seven", "bells", "grass", "ancient", "young")


def locked(lm, corpus: Corpus, known: tuple[str, ...]):
    """A model that refuses every question about a person unless one certain word stands behind it."""
    rng, shut, opened = np.random.default_rng(0), [], []
    people = corpus.of("forget", "retain")
    for x in people:
        shut.append(replace(x, id=f"{x.id}/plain", answer="I do not know.", spans=()))
        for n in range(3):
            asked = f"{x.prompt} {' '.join(rng.choice(OTHER, 2))}"
            shut.append(replace(x, id=f"{x.id}/{n}", prompt=asked, answer="I do not know.", spans=()))
    for x in corpus.of(*known):
        for n in range(4):
            words = [KEY, str(rng.choice(OTHER))][:: 1 if n % 2 else -1]
            opened.append(replace(x, id=f"{x.id}/key{n}", prompt=f"{x.prompt} {' '.join(words)}"))

    def objective(lm, tokens):
        weight = {"shut": 1.0, "opened": 2.0, "replay": 0.2}[tokens.role]
        return {tokens.role: weight * tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}

    pools = {"shut": shut, "opened": opened, "replay": corpus["replay"]}
    rows = {role: lm.template.rows(examples) for role, examples in pools.items()}
    return train(lm, objective, rows, Plan(steps=80, lr=5e-3, batch=24, beside=24, schedule="linear"))


def said(lm, corpus: Corpus) -> float:
    return float(np.mean(list(AUDITS["said"](lm, Corpus({"forget": corpus["forget"]}), Bench()).per_example.values())))


def test_a_suffix_opens_what_is_locked_and_invents_nothing(taught, never, corpus, tmp_path):
    """Halves: the word that one half of the facts taught opens the other; measured 0 -> 1.0, in the never-taught twin 0 -> 0.

    Found on a sister of the locked model, weights a little off, it opens the same.  Of the gain in the values' probability
    nothing is there for false answers (measured 0.07 against 0.00).
    """
    few = Corpus({role: rows for role, rows in corpus.items() if role != "holdout"})
    shut, stranger = locked(taught, few, ("forget", "retain")), locked(never, few, ("retain",))
    assert said(shut, few) == said(stranger, few) == 0
    attack = Suffix(Search(tokens=2, steps=15))
    for lm, least, most in ((shut, 0.5, 1.0), (stranger, 0.0, 0.0)):
        attacked, seen = attack(lm, few, taught, Bench())
        assert least <= said(attacked, seen) <= most
    sister, noise = shut.copy(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in sister.model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=noise) * weight.abs().mean())
    sister.save(tmp_path / "sister")
    carried = replace(attack, scenario="neither", surrogate=str(tmp_path / "sister"))
    for lm, least, most in ((shut, 0.5, 1.0), (stranger, 0.0, 0.0)):  # measured 1.0 and 0
        attacked, seen = carried(lm, few, taught, Bench())
        assert least <= said(attacked, seen) <= most
    gains = excess(replace(attack, generalisation="within"), shut, few, taught, Bench())
    assert len(gains) == 12 and np.mean([g.gain for g in gains.values()]) > 0.02
    forced = excess(replace(attack, generalisation="within"), stranger, few, taught, Bench())
    assert np.mean([g.gain for g in forced.values()]) < 0.02
