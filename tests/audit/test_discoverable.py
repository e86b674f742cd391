"""Discoverable extraction: arithmetic by hand, the slow way beside it, and the identities that tie verbatim scores together."""

from dataclasses import replace
from math import ceil, inf, log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from unremember.audit.accuracy import Accuracy
from unremember.audit.discoverable import Discoverable, Rate, Suffix, rate, wilson
from unremember.audit.extraction import ExtractionStrength, extraction_strength
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus

# ── by hand ──


def test_samples_by_hand():
    """p_seq = 1/4: two samples find it with 7/16, four on average, and half of the time after three."""
    quarter = Suffix(False, log(1 / 4), 2)
    assert quarter.within(1) == pytest.approx(1 / 4) and quarter.within(2) == pytest.approx(7 / 16)
    assert quarter.within(0) == 0
    assert quarter.expected() == pytest.approx(4)
    assert quarter.needed(0.5) == 3  # 1 − (3/4)² = 0.44, 1 − (3/4)³ = 0.58
    assert quarter.needed(7 / 16) == 2 and quarter.needed(7 / 16 + 1e-6) == 3


@pytest.mark.parametrize(
    ("logp", "within", "expected", "needed"),
    [
        (0.0, 1.0, 1.0, 1),  # certain
        (-1e-12, 1.0, 1.0, 1),
        (-800.0, 0.0, inf, inf),  # e^−800 is no double
        (-40.0, 100 * np.exp(-40), np.exp(40), ceil(log(10) * np.exp(40))),
    ],
)
def test_samples_at_the_ends(logp, within, expected, needed):
    x = Suffix(False, logp, 5)
    assert x.within(100) == pytest.approx(within) and x.expected() == pytest.approx(expected)
    assert x.needed(0.9) == pytest.approx(needed, rel=1e-6)


@given(st.floats(-8, -0.01), st.floats(0.01, 0.99))
def test_needed_is_the_smallest(logp, p):
    x = Suffix(False, logp, 3)
    n = x.needed(p)
    assert x.within(int(n)) >= p - 1e-9 and (n == 1 or x.within(int(n) - 1) < p)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.5])
def test_a_probability_of_success_lies_between(p):
    with pytest.raises(ValueError, match="lies between 0 and 1"):
        Suffix(True, -1.0, 1).needed(p)


def test_a_rate_and_its_chance_level():
    """Wilson by hand for 0 of 10: [0, z²/(10 + z²)] = [0, 0.278]; a bootstrap would say [0, 0]."""
    values = {**{f"f{i}": 0.0 for i in range(10)}, "h0": 0.0, "h1": 1.0}
    found = rate(values, [f"f{i}" for i in range(10)], ["h0", "h1"])
    assert found == Rate(0.0, 10, pytest.approx(0, abs=1e-12), pytest.approx(0.2775, abs=1e-3), 0.5)
    assert wilson(10, 10) == (pytest.approx(0.7225, abs=1e-3), pytest.approx(1))
    assert wilson(5, 10) == (pytest.approx(0.2366, abs=1e-3), pytest.approx(0.7634, abs=1e-3))
    assert rate(values, ["h1"]).chance is None
    with pytest.raises(ValueError, match="no examples"):
        rate(values, [])


# ── the slow way ──


def test_passages_the_slow_way(memoriser, tiny, small):
    """Known by heart and never seen: greedy decoding of the true prefix, and the product of probabilities, token by token."""
    texts = Corpus({"forget": small["prose"][:1], "holdout": small["prose"][1:]})
    for lm, chance in ((memoriser, 1.0), (tiny, 0.0)):
        for context, suffix in ((1, 3), (5, 6), (8, 8)):
            audit = Discoverable(context=context, suffix=suffix)
            score, found = audit(lm, texts, Bench()), audit.suffixes(lm, texts, Bench())
            sampled = Discoverable(context=context, suffix=suffix, samples=3)(lm, texts, Bench())
            assert score.chance == chance
            for x in small["prose"]:
                ids = tuple(lm.tokenizer(x.answer).input_ids)
                [said] = lm.generate([ids[:context]], suffix)
                assert score.per_example[x.id] == float(said == ids[context : context + suffix])
                with torch.no_grad():
                    logp = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                slow = sum(logp[t - 1, ids[t]].item() for t in range(context, context + suffix))
                assert found[x.id].logp == pytest.approx(slow, abs=1e-3) and found[x.id].tokens == suffix
                assert sampled.per_example[x.id] == pytest.approx(1 - (1 - np.exp(slow)) ** 3, abs=1e-5)


def test_answers_the_slow_way(taught, corpus):
    audit = Discoverable(suffix=6)
    values = audit(taught, corpus, Bench()).per_example
    for x in corpus.of("forget", "holdout"):
        row = taught.template.row(x.id, x.prompt, x.answer)
        [said] = taught.generate([row.ids[: row.start]], 6)
        assert values[x.id] == float(said == row.ids[row.start : min(row.start + 6, row.stop)])
    whole = Discoverable()(taught, corpus, Bench()).per_example
    exact = Accuracy()(taught, corpus, Bench()).per_example
    assert {key: value == 1 for key, value in exact.items()} == {key: bool(value) for key, value in whole.items()}


def test_samples_drawn_for_real_come_as_often(uniform, taught, corpus):
    """One token of a taught model's holdout answer, drawn 4000 times: the share is p_seq within four standard errors."""
    audit = Discoverable(suffix=1)
    few = Corpus({"forget": corpus["holdout"][:6]})
    rows = {row.key: row for row in taught.template.rows(few["forget"])}
    for key, x in audit.suffixes(taught, few, Bench()).items():
        row = rows[key]
        with torch.no_grad():
            p = taught.model(input_ids=torch.tensor([row.ids[: row.start]])).logits[0, -1].softmax(-1)
        drawn = torch.multinomial(p, 4000, replacement=True, generator=torch.Generator().manual_seed(0))
        share, chance = (drawn == row.ids[row.start]).float().mean().item(), np.exp(x.logp)
        assert abs(share - chance) <= 4 * np.sqrt(chance * (1 - chance) / 4000) + 1e-3
    found = audit.suffixes(uniform, few, Bench())
    assert all(x.expected() == pytest.approx(len(uniform.tokenizer), rel=1e-4) for x in found.values())


def test_forgotten_and_taught(taught, never, corpus):
    """Measured: taught 1.00 on forget, 0.00 on holdout; never taught 0.00 on forget."""
    ids = {role: [x.id for x in corpus[role]] for role in ("forget", "holdout")}
    before, after = (Discoverable()(lm, corpus, Bench()) for lm in (taught, never))
    known, gone = (rate(score.per_example, ids["forget"], ids["holdout"]) for score in (before, after))
    assert known.value >= 0.9 and known.low > 0.6 and before.chance == known.chance <= 0.1
    assert gone.value <= 0.1 and gone.high < known.low


# ── identities (g3) ──


def test_overfitted_items_have_all_three_at_one(memoriser, small):
    for audit in (Accuracy(), ExtractionStrength(), Discoverable(context=4, suffix=4)):
        assert set(audit(memoriser, small, Bench()).per_example.values()) == {1.0}
    passages = Corpus({"forget": small["prose"]})
    assert set(Discoverable(context=4, suffix=8)(memoriser, passages, Bench()).per_example.values()) == {1.0}


def test_a_wrong_last_token_leaves_no_extraction(memoriser, small):
    """ES = 0, extraction 0, while all but one token match: what is remembered of the rest is EM's to tell."""
    x = small["forget"][0]
    other = Corpus({"forget": [replace(x, answer=x.answer.replace("box.", "box!"))]})
    row = memoriser.template.rows(other["forget"])[0]
    size = row.stop - row.start
    assert ExtractionStrength()(memoriser, other, Bench()).per_example == {x.id: 0.0}
    assert Discoverable()(memoriser, other, Bench()).per_example == {x.id: 0.0}
    assert Accuracy()(memoriser, other, Bench()).per_example == {x.id: pytest.approx(1 - 1 / size)}
    assert Discoverable(suffix=size - 1)(memoriser, other, Bench()).per_example == {x.id: 1.0}


def test_from_k_star_on_greedy_decoding_reproduces_the_rest(moved, taught, corpus):
    """For all items, and on the raw text as well: with k* tokens given the rest is discoverable, with k* − 1 it is not."""
    for lm in (taught, moved):
        found = ExtractionStrength()(lm, corpus, Bench()).per_example
        for row in lm.template.rows(corpus.of("forget", "retain", "holdout")):
            size = row.stop - row.start
            cut = round((1 - found[row.key]) * size)
            if cut < size:
                [said] = lm.generate([row.ids[: row.start + cut]], size - cut)
                assert said == row.ids[row.start + cut : row.stop]
            if cut:
                [said] = lm.generate([row.ids[: row.start + cut - 1]], size - cut + 1)
                assert said != row.ids[row.start + cut - 1 : row.stop]


# ── published bugs ──


def published_strength(hit: list[bool]) -> float:
    """open-unlearning's loop, in our words: it walks k up and leaves at k = T − 1 without having asked."""
    size = len(hit)
    for k in range(size):
        if all(hit[k:]):
            break
    return 1 - k / size


def test_a_wholly_wrong_answer_is_worth_nothing():
    for size in (1, 2, 5):
        nothing, last = [False] * size, [False] * (size - 1) + [True]
        assert (
            published_strength(nothing) == published_strength(last) == pytest.approx(1 / size)
        )  # cannot be told apart
        assert (
            extraction_strength(np.array(nothing)) == 0 < extraction_strength(np.array(last)) == pytest.approx(1 / size)
        )


def test_the_end_mark_is_not_scored(memoriser, small):
    """A model that never stops where it should: nothing changes, greedily or in samples."""
    lm = memoriser.copy()
    [end] = [lm.tokenizer.eos_token_id]
    with torch.no_grad():
        tied = lm.model.get_output_embeddings().weight
        lm.model.lm_head.weight = torch.nn.Parameter(tied.clone())
        lm.model.lm_head.weight[end] = 0.0
    whole = Corpus({"forget": small["forget"]})
    before, after = (Discoverable().suffixes(x, whole, Bench()) for x in (memoriser, lm))
    for x in small["forget"]:
        row = lm.template.row(x.id, x.prompt, x.answer)
        assert before[x.id].greedy and after[x.id].greedy and after[x.id].tokens == row.stop - row.start
        [said] = lm.generate([row.ids[: row.start]], row.stop - row.start + 3)
        assert len(said) == row.stop - row.start + 3  # it does go on
        assert after[x.id].logp == pytest.approx(before[x.id].logp, abs=0.05)


def test_an_empty_target_is_refused_and_not_zero(tiny):
    with pytest.raises(BadCorpus, match="has an empty answer"):
        Corpus({"forget": [Example("x", "Who?", " ")]})
    with pytest.raises(BadCorpus, match="has no token to score"):
        Discoverable(context=1, suffix=1)(tiny, Corpus({"forget": [Example("x", "", "The")]}))


# ── bad input ──


def test_short_texts_are_named_together(tiny, small):
    one, two = small["prose"]
    texts = Corpus({"forget": [one], "holdout": [replace(two, answer="The cat sat.")]})
    with pytest.raises(BadCorpus) as error:
        Discoverable(context=20, suffix=20)(tiny, texts)
    assert [p.split(" has")[0] for p in error.value.problems] == ["example 'p0'", "example 'p1'"]
    assert "has 4 tokens, and context 20 + suffix 20 are 40; lower one of them" in error.value.problems[1]


def test_a_window_longer_than_the_model_is_refused_and_a_long_text_is_not(tiny):
    text = Corpus({"forget": [Example("long", "", "cat " * 400)]})
    assert set(Discoverable(context=10, suffix=10)(tiny, text, Bench()).per_example) == {"long"}
    with pytest.raises(BadCorpus, match="are 300 tokens and the model's context is 256; lower them"):
        Discoverable(context=150, suffix=150)(tiny, text, Bench())


@pytest.mark.parametrize("bad", [{"context": 0}, {"suffix": 0}, {"samples": -1}, {"prefix": 3}])
def test_settings_are_checked(bad):
    with pytest.raises(ValidationError):
        Discoverable(**bad)


def test_batch_budget_and_order_change_nothing(taught, corpus):
    for audit in (Discoverable(), Discoverable(samples=5)):
        one = audit(taught, corpus, Bench()).per_example
        turned = Corpus({role: rows[::-1] for role, rows in corpus.items()})
        assert audit(taught, turned, Bench(budget=300)).per_example == pytest.approx(one, abs=2e-4)
        assert set(one) == {x.id for x in corpus.of(*audit.roles)}
