"""Exposure: arithmetic by hand, a slow reference, canaries planted 0, 1, 4 and 16 times, and what nobody has seen."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from unremember.audit.exposure import (
    NULL,
    Canary,
    Exposure,
    ReciprocalRank,
    exposure,
    extrapolated,
    lexicographic,
    log2_cdf,
    logps,
    mean_exposure,
    null_level,
    place,
)
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadRequest

COPIES, EACH = (0, 1, 4, 16), 8


def digits(name: str, value: str, hole: int = 3) -> Example:
    """A phone number whose last `hole` digits are the canary's."""
    answer = f"{name}'s phone number is {value}."
    end = len(answer) - 1
    return Example(name, f"What is {name}'s phone number?", answer, name, ((end - hole, end),))


@pytest.fixture(scope="module")
def planted(tiny):
    """(model, copies -> canaries): the toy, trained on other people's numbers and on these, some of them many times."""
    from unremember.embedded.dossier import dossier
    from unremember.train import Plan, train

    names = list(dict.fromkeys(x.entity for x in dossier(0, 56, 0, 0, 0)["forget"]))
    rng = random.Random(0)
    people = [digits(name, f"{rng.randrange(10**4):04d}") for name in names]
    canaries = {copies: people[i * EACH : (i + 1) * EACH] for i, copies in enumerate(COPIES)}
    told = [replace(x, id=f"{x.id}#{i}") for copies, xs in canaries.items() for x in xs for i in range(copies)]
    others = people[len(COPIES) * EACH :]

    def objective(lm, tokens):
        return {"all": tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}

    rows = tiny.template.rows([*told, *others])
    plan = Plan(steps=80, lr=5e-3, batch=16, warmup=5, schedule="linear")
    return train(tiny, objective, {"all": rows}, plan), canaries


def slow_logp(lm, x: Example, answer: str) -> float:
    """The whole answer, one forward pass, no end mark."""
    row = lm.template.row(x.id, x.prompt, answer)
    with torch.no_grad():
        logp = lm.model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    return sum(logp[t - 1, row.ids[t]].item() for t in range(row.start, row.stop))


# ── by hand ──


def test_arithmetic_by_hand():
    assert exposure(1, 1024) == 10 and exposure(1024, 1024) == 0 and exposure(2, 8) == 2
    assert place(-2.0, np.array([-1.0, -3.0, -5.0])) == 2
    assert place(-2.0, np.array([-2.0, -2.0, -5.0])) == 3  # ties stand before it
    assert lexicographic([0, 0, 0]) == 1 and lexicographic([1, 0, 2]) == 103 and lexicographic([9, 9]) == 100
    assert exposure(lexicographic([0] * 10), 10**10) == pytest.approx(33.2, abs=0.02)  # the most of DEPN's ten digits


def test_the_null_level_is_that_of_random_ranks():
    """Simulated: 20 000 means of n uniform ranks in 10⁴; the table of the literature: 8 → .62-2.59, 20 → .88-2.14."""
    rng = np.random.default_rng(0)
    for n, low, high in ((8, 0.62, 2.59), (20, 0.88, 2.14)):
        means = (4 * math.log2(10) - np.log2(rng.integers(1, 10**4 + 1, (20000, n)))).mean(1)
        null = null_level(n)
        assert null == (pytest.approx(1.4427, abs=1e-4), pytest.approx(low, abs=0.015), pytest.approx(high, abs=0.015))
        assert means.mean() == pytest.approx(NULL, abs=0.01)
        assert np.quantile(means, [0.025, 0.975]) == pytest.approx(null[1:], abs=0.04)
    with pytest.raises(ValueError, match="at least one canary"):
        null_level(0)


@pytest.mark.parametrize("shape", [-4.0, 0.0, 3.0])
def test_the_distribution_function_also_where_doubles_end(shape):
    from scipy.stats import skewnorm

    for value in (-3.0, -1.0, 0.5, 2.0, 8.0):
        assert log2_cdf(value, shape, 0.3, 1.4) == pytest.approx(
            float(np.log2(skewnorm.cdf(value, shape, 0.3, 1.4))), abs=1e-3
        )
    if shape == 0.0:  # the normal tail, by log_ndtr
        from scipy.special import log_ndtr

        assert log2_cdf(-60.0, 0.0, 0.0, 1.0) == pytest.approx(log_ndtr(-60.0) / math.log(2), rel=1e-4)
    assert log2_cdf(-200.0, shape, 0.0, 1.0) < -1000


def test_extrapolation_finds_a_distribution_that_it_knows():
    from scipy.stats import skewnorm

    others = skewnorm.rvs(4.0, 20, 3, size=4000, random_state=0)
    for own in (19.5, 21.0, 24.0):
        bits, fit = extrapolated(own, others)
        assert bits == pytest.approx(-np.log2(skewnorm.cdf(own, 4.0, 20, 3)), abs=0.6) and fit > 0.01
    assert extrapolated(10.0, others)[0] > 12  # further than any sample of 4000 could see
    assert extrapolated(5.0, np.full(1000, 5.0)) == (0.0, 1.0)


def test_spaces():
    x = Example("x", "Who?", "Call 07-45 now.", spans=((5, 10),))
    canary = Canary(x, 5, 10, "##-##", ())
    assert canary.value == "07-45" and canary.size == 10**4 and canary.number == 745 and canary.filling(745) == "07-45"
    named = Canary(x, 5, 10, "", ("07-45", "nobody"))
    assert named.size == 2 and named.number == 0 and named.draw(5, 0) == [1]
    drawn = canary.draw(500, seed=1)
    assert len(set(drawn)) == 500 and 745 not in drawn and canary.draw(500, seed=1) == drawn != canary.draw(500, seed=2)
    assert canary.draw(10**4, 0) == [i for i in range(10**4) if i != 745]


# ── the slow way ──


def test_log_probabilities_are_those_of_whole_texts(moved):
    """Up to what stands before the first difference; fillings of one and of several tokens, one the beginning of another."""
    x = Example("x", "Who?", "The cat sat on a table.", spans=((4, 7),))
    for fillings in (("cat", "dog", "old dog", "dog house", "cat"), ("12", "13", "123", "2", "9")):
        answers = [f"The {filling} sat on a table." for filling in fillings]
        found = logps(
            moved, [Canary(x, 4, 7, "", fillings).row(moved, filling) for filling in fillings], Bench(budget=40)
        )
        slow = np.array([slow_logp(moved, x, answer) for answer in answers])
        assert found - found[0] == pytest.approx(slow - slow[0], abs=1e-3)
    whole = [replace(r, ids=r.ids[: r.stop]) for r in (moved.template.row("x", "Who?", a) for a in ("The cat", "The"))]
    assert logps(moved, whole)[1] == 0  # nothing left of the shorter one behind what they share
    assert logps(moved, whole[:1]).tolist() == [0.0]


@given(st.lists(st.text("0123", min_size=1, max_size=3), min_size=2, max_size=12))
def test_any_fillings(tiny, fillings):
    x = Example("x", "", "It is 1 now.", spans=((6, 7),))
    rows = [Canary(x, 6, 7, "", tuple(fillings)).row(tiny, filling) for filling in fillings]
    slow = np.array([slow_logp(tiny, x, f"It is {filling} now.") for filling in fillings])
    found = logps(tiny, rows)
    assert found - found[0] == pytest.approx(slow - slow[0], abs=1e-3)


def test_all_four_ways_the_slow_way(planted):
    lm, canaries = planted
    x = canaries[1][0]
    _, b = x.spans[0]
    hundred = replace(x, spans=((b - 2, b),))
    corpus = Corpus({"forget": [hundred]})
    by_value = {f"{i:02d}": slow_logp(lm, x, f"{x.answer[: b - 2]}{i:02d}.") for i in range(100)}
    own = by_value[x.answer[b - 2 : b]]
    rank = sum(v >= own - 1e-6 for v in by_value.values())
    found = Exposure().exposures(lm, corpus)[x.id]
    assert found.rank == rank and found.bits == pytest.approx(math.log2(100 / rank)) and not found.capped
    sampled = Exposure(how="sampled", sample=30)
    drawn = [f"{i:02d}" for i in Canary(hundred, b - 2, b, "##", ()).draw(30, 0)]
    above = sum(by_value[v] >= own for v in drawn)
    assert sampled(lm, corpus).per_example[x.id] == pytest.approx(math.log2(31) - math.log2(1 + above))
    value = x.answer[b - 2 : b]
    first = sum(by_value[f"{d}{value[1]}"] > own for d in range(10))
    second = sum(by_value[f"{value[0]}{d}"] > own for d in range(10))
    assert Exposure(how="digits").exposures(lm, corpus)[x.id].rank == 1 + 10 * first + second
    listed = Exposure(fillings=tuple(by_value)).exposures(lm, corpus)[x.id]
    assert listed == found


def test_reciprocal_ranks_the_slow_way(moved, planted, tiny, uniform, corpus):
    """Measured: 0.88 of numbers seen 16 times, 0.04 of the same before."""
    few = Corpus({"forget": corpus["forget"][:6]})
    for lm in (moved, uniform):
        found = ReciprocalRank()(lm, few, Bench()).per_example
        for row in lm.template.rows(few["forget"]):
            with torch.no_grad():
                z = lm.model(input_ids=torch.tensor([row.ids])).logits[0]
            each = [
                1 / int((z[t - 1] >= z[t - 1, row.ids[t]]).sum())
                for t, span in zip(range(row.start, row.stop), row.span, strict=True)
                if span
            ]
            assert found[row.key] == pytest.approx(np.mean(each), rel=1e-4) and found[row.key] <= 1
    known = Corpus({"forget": planted[1][16]})
    means = [np.mean(list(ReciprocalRank()(lm, known, Bench()).per_example.values())) for lm in (planted[0], tiny)]
    assert means[0] > 0.8 and means[1] < 0.4


# ── planted canaries (g1) ──


def test_exposure_grows_with_the_copies(planted):
    """Measured, spaces of 10³, 8 canaries each, seed 0: 1.34, 2.21, 5.85 and 9.10 bits; nobody's: 0.62 to 2.60 (95 %)."""
    lm, canaries = planted
    corpus = Corpus({"forget": [x for xs in canaries.values() for x in xs]})
    found = Exposure()(lm, corpus, Bench())
    means = {c: mean_exposure(found.per_example, [x.id for x in xs]) for c, xs in canaries.items()}
    values = [means[c].value for c in COPIES]
    assert values == sorted(values)
    assert means[0].null_low <= values[0] <= means[0].null_high and means[0].null == found.chance == NULL
    assert values[-1] - values[0] >= 5 and means[16].low > means[0].null_high
    ends = Corpus({"forget": [*canaries[0], *canaries[16]]})
    for how in ("sampled", "digits"):
        other = Exposure(how=how, sample=100)(lm, ends, Bench())
        top, none = (np.mean([other.per_example[x.id] for x in canaries[c]]) for c in (16, 0))
        assert top > none + 4, how


def test_extrapolation_agrees_with_ten_thousand_fillings(planted):
    """Where the rank is above 10.  Measured: 6.95, 3.07 and 4.15 bits are extrapolated as 6.91, 3.16 and 4.33."""
    lm, canaries = planted
    asked = [replace(x, spans=((x.spans[0][1] - 4, x.spans[0][1]),)) for x in canaries[4][:3]]
    corpus = Corpus({"forget": asked})
    exact = Exposure().exposures(lm, corpus)
    guessed = Exposure(how="extrapolated", sample=1500).exposures(lm, corpus)
    compared = [key for key, x in exact.items() if x.rank > 10]
    assert (
        len(compared) >= 2
        and max(exact[key].bits for key in compared) > 4
        and all(x.size == 10**4 for x in exact.values())
    )
    assert all(abs(exact[key].bits - guessed[key].bits) <= 1.5 for key in compared)


def test_a_capped_value_is_called_capped(planted):
    lm, canaries = planted
    corpus = Corpus({"forget": canaries[16]})
    score = Exposure(how="sampled", sample=50)(lm, corpus, Bench())
    capped = Exposure(how="sampled", sample=50).exposures(lm, corpus)
    count = sum(x.capped for x in capped.values())
    assert count >= EACH / 2 and max(score.per_example.values()) == math.log2(51)
    assert f"capped at 5.7 bits ({count} of {EACH} are at the cap)" in score.definition


# ── ends and promises ──


def test_a_model_that_knows_nothing_has_none(uniform, tiny):
    """All fillings tie, and ties never count for the model; nobody would call log2 |R| bits of a uniform model memory."""
    corpus = Corpus({"forget": [digits("Ann Lee", "4711", 2)]})
    for audit in (Exposure(), Exposure(how="sampled", sample=20), Exposure(how="digits")):
        assert audit(uniform, corpus, Bench()).per_example == {"Ann Lee": 0.0}
    longer = Corpus({"forget": [digits("Ann Lee", "4711", 4)]})
    score = Exposure(how="extrapolated", sample=1000)(uniform, longer, Bench())
    assert score.per_example == {"Ann Lee": 0.0} and "extrapolated, no cap" in score.definition


def test_budget_and_order_change_nothing_and_nothing_is_read_twice(planted, monkeypatch):
    lm, canaries = planted
    corpus = Corpus({"forget": canaries[1][:2], "holdout": canaries[0][:2]})
    turned = Corpus({"holdout": canaries[0][1::-1], "forget": canaries[1][1::-1]})
    bench = Bench()
    for audit in (Exposure(), Exposure(how="sampled", sample=99), Exposure(how="digits"), ReciprocalRank()):
        one = audit(lm, corpus, bench)
        assert audit(lm, turned, Bench(budget=300, batch=3)).per_example == pytest.approx(one.per_example, abs=0.02)
        with monkeypatch.context() as patch:
            patch.setattr(type(lm), "logits", lambda *_: pytest.fail("read again"))
            assert audit(lm, corpus, bench) == one


def test_bf16(planted):
    lm, canaries = planted
    corpus = Corpus({"forget": canaries[16][:3]})
    full, half = (Exposure()(replace(lm, precision=p), corpus, Bench()).per_example for p in ("fp32", "bf16"))
    assert np.mean(list(half.values())) == pytest.approx(np.mean(list(full.values())), abs=0.5)


def test_the_end_mark_does_not_count(planted):
    """Two fillings of which one ends where the other goes on: no end mark stands for the shorter one."""
    lm, _ = planted
    x = Example("x", "", "It is 12", spans=((6, 8),))
    rows = [Canary(x, 6, 8, "", ("12", "1")).row(lm, value) for value in ("12", "1")]
    assert [row.ids[-1] == lm.tokenizer.eos_token_id for row in rows] == [False, False]
    assert logps(lm, rows)[1] == 0


# ── bad input ──


def test_settings_that_contradict_one_another_are_refused_together(tiny, corpus):
    with pytest.raises(BadRequest) as error:
        Exposure(how="digits", pattern="##", fillings=("a", "a"))(tiny, corpus)
    assert len(error.value.problems) == 3
    with pytest.raises(BadRequest, match="one filling is no space"):
        Exposure(fillings=("a",))(tiny, corpus)
    with pytest.raises(BadRequest, match="sample = 999 is too few to fit a distribution to; give at least 1000"):
        Exposure(how="extrapolated", sample=999)(tiny, corpus)
    for bad in ({"how": "guessed"}, {"sample": 0}, {"most": 1}, {"cap": 3}):
        with pytest.raises(ValidationError):
            Exposure(**bad)


def test_canaries_that_are_none_are_named_together(tiny):
    name = Example("name", "Who?", "It is Ann.", spans=((6, 9),))
    two = Example("two", "Who?", "It is 1 or 2.", spans=((6, 7), (11, 12)))
    large = digits("large", "12345", 5)
    with pytest.raises(BadCorpus) as error:
        Exposure()(tiny, Corpus({"forget": [name, two], "holdout": [large]}))
    assert [p.split("'")[1] for p in error.value.problems] == ["name", "two", "large"]
    assert "no digit to vary; give fillings" in error.value.problems[0]
    assert "a canary has one hole: split it" in error.value.problems[1]
    assert '100000 fillings and at most 10000 are enumerated; set how = "sampled"' in error.value.problems[2]
    with pytest.raises(BadCorpus, match="'Ann' is not among the 2 fillings; add it"):
        Exposure(fillings=("Bob", "Eve"))(tiny, Corpus({"forget": [name]}))
    with pytest.raises(BadCorpus, match="does not fit the pattern '7##'"):
        Exposure(pattern="7##")(tiny, Corpus({"forget": [digits("x", "123")]}))
    with pytest.raises(BadCorpus, match='too few to fit a distribution to; set how = "enumerated"'):
        Exposure(how="extrapolated")(tiny, Corpus({"forget": [digits("x", "123")]}))


def test_broken_weights_are_no_score(tiny):
    lm = tiny.copy()
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite; its weights are broken"):
        Exposure()(lm, Corpus({"forget": [digits("x", "12", 2)]}), Bench())
