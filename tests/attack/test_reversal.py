"""Reversal: the extrapolation by hand, what the attacker must have, and a hider that is opened without its original."""

import gc
import inspect

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from unremember.attack import reversal as module
from unremember.attack.reversal import Reversal, aimless, along, direction, fit, same
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.score import Rule, evidence

PLAN = {"steps": 5, "lr": 3e-4}
ASCENT = {"knowledge": "objective", "objective": "ascent", "plan": PLAN}
REFUSAL = {**ASCENT, "objective": "refusal", "strength": 1.0}


def said(lm, corpus: Corpus) -> dict[str, float]:
    return dict(AUDITS["said"](lm, Corpus({"forget": corpus["forget"]}), Bench()).per_example)


def away(here: torch.Tensor, there: torch.Tensor, strength: float) -> torch.Tensor:
    return along(here, direction(here, there), strength)


def mean(values: dict[str, float]) -> float:
    return float(np.mean(list(values.values())))


# ── arithmetic ──


def test_the_step_by_hand():
    here, there = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 5.0])
    assert away(here, there, 0.5).tolist() == [1.5, 2.0, 2.0]
    assert here.tolist() == [1.0, 2.0, 3.0]


def test_it_is_the_negative_of_a_task_vector():
    """θ' = θ − λ · (U(θ) − θ), and λ = −1 would be U(θ) itself."""
    here, there = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.allclose(away(here, there, 0.7), here - 0.7 * (there - here))
    assert torch.allclose(away(here, there, -1.0), there, atol=1e-6)


def test_a_straight_unlearning_is_undone_exactly():
    """If forgetting moved θ_o by v, and going on moves it by v again, λ = 1 is back at θ_o."""
    original, v = torch.randn(5), torch.randn(5)
    assert torch.allclose(away(original + v, original + 2 * v, 1.0), original, atol=1e-6)


def test_types_stay_and_it_is_reckoned_in_float32():
    out = away(torch.tensor([1.0]).bfloat16(), torch.tensor([1.0 + 2**-7]).bfloat16(), 2.0)
    assert out.dtype == torch.bfloat16 and float(out) == 1.0 - 2**-6
    whole = torch.tensor([3])  # whole numbers are copied
    out = away(whole, torch.tensor([7]), 2.0)
    assert out.item() == 3 and out.data_ptr() != whole.data_ptr()
    assert away(torch.tensor([True]), torch.tensor([False]), 2.0).item() is True


def test_odd_weights_are_refused():
    one = {"w": torch.zeros(2)}
    with pytest.raises(BadModel, match="different names"):
        fit(one, {"v": torch.zeros(2)})
    with pytest.raises(BadModel, match=r"shape \(2,\) here and \(3,\) there"):
        fit(one, {"w": torch.zeros(3)})
    fit(one, {"w": torch.ones(2)})


def test_a_step_beyond_all_numbers_is_refused(hider, taught, corpus):
    with pytest.raises(BadModel, match=r"embed_tokens.* is not finite after a step .*lower strength"):
        Reversal(knowledge="base", base="tiny", strength=1e39)(hider, corpus, taught, Bench())


def test_the_control_is_as_long_and_goes_elsewhere():
    gap = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    one, again, other = (aimless(gap, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert float(one.norm()) == pytest.approx(float(gap.norm())) and torch.equal(one, again)
    for a, b in ((one, gap), (one, other)):
        assert abs(float((a * b).sum() / a.norm() / b.norm())) < 4 / gap.numel() ** 0.5
    assert not aimless(torch.zeros(3), torch.Generator()).any()


def test_sameness_is_of_all_weights():
    one = {"a": torch.zeros(2), "b": torch.ones(1)}
    assert same(one, {key: value.clone() for key, value in one.items()})
    assert not same(one, {"a": torch.zeros(2)}) and not same(one, {**one, "b": torch.zeros(1)})


# ── what the attacker has ──


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"knowledge": "objective"}, "needs an objective"),
        ({"knowledge": "objective", "objective": "ascent"}, "and a plan"),
        ({"knowledge": "objective", "objective": "ascent", "plan": PLAN, "base": "tiny"}, "say which of them"),
        ({"knowledge": "base"}, "needs base"),
        ({"knowledge": "base", "base": "tiny", "plan": PLAN}, "takes no objective and no plan"),
        ({"knowledge": "base", "base": "./nowhere"}, "is no alias, folder"),
        ({"knowledge": "original", "base": "tiny"}, "Input should be 'objective' or 'base'"),
        # what would do nothing
        ({"knowledge": "base", "base": "tiny", "refusal": "No."}, "'No.' is trained by objective = 'refusal' alone"),
        ({**ASCENT, "refusal": "No."}, "'No.' is trained by objective = 'refusal' alone"),
        ({**ASCENT, "plan": {**PLAN, "stop": "probability"}}, "no level to stop at"),
        ({**ASCENT, "plan": {**PLAN, "beside": 2}}, "there is one role"),
        ({**ASCENT, "seed": 1}, "seed = 1 draws the control's directions, and control is false"),
    ],
)
def test_without_exactly_one_knowledge_or_with_what_does_nothing_it_is_refused(settings, problem):
    with pytest.raises(ValidationError, match=problem):
        Reversal(strength=1.0, **settings)


@pytest.mark.parametrize("strength", [0, -1, float("inf"), float("nan")])
def test_bad_strengths_are_refused(strength):
    with pytest.raises(ValidationError):
        Reversal(**{**REFUSAL, "strength": strength})


def test_the_original_as_a_base_is_refused(taught, tiny, hider, corpus, tmp_path):
    taught.save(tmp_path / "original")
    attack = Reversal(knowledge="base", base=str(tmp_path / "original"), strength=1.0)
    with pytest.raises(BadRequest, match="is the original, weight for weight"):
        attack(hider, corpus, taught, Bench())


def test_the_original_has_no_part_in_it(hider, taught, never, corpus):
    """Whatever stands in its place, the same weights come out."""
    one, other = (Reversal(**REFUSAL)(hider, corpus, original, Bench())[0] for original in (taught, never))
    assert same(one.model.state_dict(), other.model.state_dict())
    assert list(inspect.signature(Reversal.__call__).parameters)[:4] == ["self", "lm", "corpus", "original"]
    assert Reversal(**REFUSAL).alone and not Reversal(knowledge="base", base="tiny", strength=1.0).alone


def test_a_missing_role_is_named_and_a_base_needs_no_public_rows(taught, corpus):
    rest = Corpus({role: rows for role, rows in corpus.items() if role != "relearn"})
    with pytest.raises(BadCorpus, match=r"reversal needs .* 'relearn'"):
        Reversal(**REFUSAL)(taught, rest, taught, Bench())
    Reversal(knowledge="base", base="tiny", strength=0.1).check(rest)
    with pytest.raises(BadCorpus, match=r"reversal needs .* 'forget'"):
        Reversal(**REFUSAL).check(Corpus({"relearn": corpus["relearn"]}))


@pytest.mark.parametrize(("role", "kind"), [("forget", "forgotten"), ("holdout", "held-out")])
def test_public_rows_that_tell_are_refused(role, kind, corpus):
    fact = corpus[role][0]
    told = Example("told", "What else?", f"It is {fact.values()[0].upper()}.")
    with pytest.raises(
        BadCorpus,
        match=rf"reversal: the relearn role contains the {kind} value of {fact.id}.*; .* take those examples out",
    ):
        Reversal(**REFUSAL).check(corpus.with_roles(relearn=[*corpus["relearn"], told]))


def test_passages_cannot_be_refused(taught, corpus):
    texts = corpus.with_roles(relearn=[Example("text", "", "Only some prose here.")])
    with pytest.raises(BadCorpus, match="there are only passages"):
        Reversal(**REFUSAL).check(texts)
    Reversal(**{**REFUSAL, "objective": "ascent"})(taught, texts, taught, Bench())


def test_a_step_that_is_lost_in_rounding_is_refused(taught, corpus):
    with pytest.raises(BadRequest, match="moved no weight"):
        Reversal(**{**REFUSAL, "strength": 1e-30})(taught, corpus, taught, Bench())


# ── what it does ──


@pytest.mark.parametrize("knowledge", ["objective", "base"])
def test_arguments_stay_and_what_was_shown_is_not_scored(knowledge, hider, taught, corpus):
    settings = REFUSAL if knowledge == "objective" else {"knowledge": "base", "base": "tiny", "strength": 0.1}
    before = {key: value.clone() for key, value in hider.model.state_dict().items()}
    attacked, seen = Reversal(**settings)(hider, corpus, taught, Bench())
    assert all(torch.equal(value, before[key]) for key, value in hider.model.state_dict().items())
    assert not same(attacked.model.state_dict(), before) and not attacked.model.training
    assert attacked.model.lm_head.weight is attacked.model.model.embed_tokens.weight  # tied, still
    assert ("relearn" in seen) is (knowledge == "base")
    assert {role: seen[role] for role in seen} == {role: corpus[role] for role in seen}


def test_a_model_that_is_its_own_base_stays_as_it_is(tiny, taught, corpus):
    """A control that was never finetuned at all: it has no direction, and nothing to say."""
    attacked, _ = Reversal(knowledge="base", base="tiny", strength=0.3)(tiny, corpus, taught, Bench())
    assert same(attacked.model.state_dict(), tiny.model.state_dict())


@pytest.mark.parametrize(
    "settings",
    [REFUSAL, {"knowledge": "base", "base": "tiny", "strength": 0.3}],
    ids=["refusal on public rows", "base"],
)
def test_a_hider_is_opened_and_nothing_is_invented(settings, hider, taught, never, corpus):
    """Measured, said: refusal λ = 1: original 0.92, hider 0 -> 1.00, never 0; base λ = 0.3: 0.67, 0 -> 0.75, 0."""
    found = {}
    for who, lm in (("original", taught), ("forgotten", hider), ("never", never)):
        found[who] = said(Reversal(**settings)(lm, corpus, taught, Bench())[0], corpus)
    assert mean(said(hider, corpus)) == 0
    assert mean(found["forgotten"]) >= 0.4 and mean(found["never"]) == 0
    triple = evidence("said", found["original"], found["forgotten"], found["never"], Rule())
    assert triple.applicable and triple.r >= 0.5 and triple.leaks


def test_a_random_direction_of_the_same_length_opens_nothing(hider, taught, corpus):
    """Five of them, tensor by tensor as long: what opens the hider is the direction, not the distance."""
    bench, random = Bench(), Bench()
    real = Reversal(**REFUSAL)(hider, corpus, taught, bench)[0].model.state_dict()
    here = hider.model.state_dict()
    for seed in range(5):
        out, _ = Reversal(**REFUSAL, control=True, seed=seed)(hider, corpus, taught, random)
        assert mean(said(out, corpus)) <= 0.1
        for name, weight in out.model.state_dict().items():
            step, other = weight - here[name], real[name] - here[name]
            assert float(step.norm()) == pytest.approx(float(other.norm()), rel=1e-2), name
            assert abs(float((step * other).sum() / step.norm() / other.norm())) < 0.6, name
        assert random.notes == pytest.approx(bench.notes, rel=1e-3)


def test_the_note_says_how_far_it_went(hider, taught, corpus):
    bench = Bench()
    out, _ = Reversal(knowledge="base", base="tiny", strength=0.3)(hider, corpus, taught, bench)
    # a table that is the head is there once
    new, old = (torch.cat([w.detach().flatten() for w in lm.model.parameters()]) for lm in (out, hider))
    share = float((new - old).norm() / old.norm())
    assert bench.notes == {"length of the step beside the weights": pytest.approx(share, rel=1e-4)}


@pytest.mark.parametrize("settings", [REFUSAL, {"knowledge": "base", "base": "tiny", "strength": 0.1}])
def test_of_weights_there_is_one_set_beside_the_two_that_come_in(settings, hider, taught, corpus, monkeypatch):
    """Counted at every tensor's step: what was further along and what comes out are one set together, but for a tensor."""

    def held() -> int:
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    seen: list[int] = []

    def watched(*given):
        seen.append(held())
        return along(*given)

    monkeypatch.setattr(module, "along", watched)
    gc.collect()
    before = held()
    out, _ = Reversal(**settings)(hider, corpus, taught, Bench())
    weights = [w.nbytes for w in hider.model.parameters()]
    assert len(seen) == len(out.model.state_dict())
    # a step, and then the table, which goes with the head that shares it
    assert max(seen) - before < sum(weights) + 1.1 * max(weights) < 2 * sum(weights)
