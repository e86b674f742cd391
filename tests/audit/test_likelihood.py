"""Extraction likelihood over every prefix: the fast way and the slow one say the same, and the fast one is fast."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unremember.audit import prefixes
from unremember.audit.likelihood import ExtractionLikelihood, overlap
from unremember.audit.prefixes import from_prefixes
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus


def raw(lm, examples) -> list[tuple[int, ...]]:
    return [lm.template.row(x.id, "", x.answer).ids[:-1] for x in examples]


def slow(lm, ids: tuple[int, ...], cut: int) -> tuple[int, ...]:
    """One generation, as anybody would write it."""
    return lm.generate([ids[:cut]], len(ids) - cut)[0] if cut < len(ids) else ()


@pytest.fixture
def passes(monkeypatch):
    """Counts the tokens of every branch that is decoded."""
    counted: list[int] = []
    real = prefixes.decode

    def watch(*given):
        said = real(*given)
        counted.extend(map(len, said))
        return said

    monkeypatch.setattr(prefixes, "decode", watch)
    return counted


# ── the same as the slow way ──


@pytest.mark.parametrize("which", ["taught", "tiny", "uniform", "moved"])
def test_every_continuation_is_that_of_a_generation_of_its_own(which, request, corpus):
    """A memoriser, a stranger, one that ties everywhere, and one in between; answers with names in common, and prose."""
    lm = request.getfixturevalue(which)
    people = corpus.of("forget", "holdout")
    texts = [*raw(lm, [*people[:4], *people[-3:]]), raw(lm, corpus["prose"][:1])[0][:24]]
    found = from_prefixes(lm, texts, [range(1, len(ids) + 1) for ids in texts], Bench(budget=200, batch=7))
    for ids, said in zip(texts, found, strict=True):
        assert said == {cut: slow(lm, ids, cut) for cut in range(1, len(ids) + 1)}


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(90, 99), min_size=2, max_size=9), min_size=1, max_size=6), st.integers(8, 60))
def test_texts_that_share_beginnings(tiny, texts, budget):
    """Few words, so that texts run into one another; some are beginnings of others, some occur twice."""
    texts = [tuple(ids) for ids in texts]
    found = from_prefixes(tiny, texts, [range(1, len(ids) + 1) for ids in texts], Bench(budget=budget, batch=2))
    for ids, said in zip(texts, found, strict=True):
        assert said == {cut: slow(tiny, ids, cut) for cut in range(1, len(ids) + 1)}


def test_an_end_mark_inside_a_text_ends_what_is_said(memoriser, small):
    """Two answers, one behind the other with the end mark between: greedy decoding stops there, whatever the text says."""
    first, second = raw(memoriser, small["forget"][:2])
    both = (*first, memoriser.tokenizer.eos_token_id, *second)
    [said] = from_prefixes(memoriser, [both], [range(1, len(first) + 1)], Bench())
    assert all(tail == first[cut:] for cut, tail in said.items())
    assert said == {cut: slow(memoriser, both, cut) for cut in said}


def test_a_branch_that_runs_into_another_text_goes_on_there(memoriser, small, passes):
    """A wrong word where the memoriser knows a longer text: it says that text, of which nothing needs to be decoded."""
    known = raw(memoriser, small["forget"])[0]
    wrong = (*known[:3], raw(memoriser, small["forget"])[1][0], *known[4:])
    [said, _] = from_prefixes(memoriser, [wrong, known], [(1, 2, 3), (1,)], Bench())
    assert said == {cut: known[cut:] for cut in (1, 2, 3)} and passes == []


def test_caches_that_cannot_be_cut_are_not_cut(tiny, small, monkeypatch):
    """Sliding windows and recurrent states: the branches are then decoded from their tokens."""
    texts = raw(tiny, small["forget"])
    cuts = [range(1, len(ids)) for ids in texts]
    fast = from_prefixes(tiny, texts, cuts, Bench())
    monkeypatch.setattr(prefixes, "plain", lambda *_: False)
    monkeypatch.setattr(prefixes, "_decode", lambda *_: pytest.fail("cut"))
    assert from_prefixes(tiny, texts, cuts, Bench()) == fast


@pytest.mark.parametrize("n", [1, 3, 10])
def test_el_is_the_mean_over_all_prefixes(moved, corpus, n):
    few = Corpus({"forget": corpus["prose"][:1] if n == 10 else corpus["forget"][:5]})
    found = ExtractionLikelihood(n=n)(moved, few, Bench()).per_example
    for x, ids in zip(few["forget"], raw(moved, few["forget"]), strict=True):
        each = [overlap(slow(moved, ids, cut), ids[cut:], n) for cut in range(1, len(ids) - n + 1)]
        assert len(each) == len(ids) - n and found[x.id] == pytest.approx(np.mean(each), abs=1e-12)


def test_bf16_differs_at_near_ties_only(taught, never, corpus):
    """Measured: no EL of 20 differs on the toy; on the default model, untaught, by at most 0.006 (benchmarks.extraction)."""
    few = Corpus({role: corpus[role][:5] for role in ("forget", "holdout")})
    for lm in (replace(taught, precision="bf16"), replace(never, precision="bf16")):
        found = ExtractionLikelihood()(lm, few, Bench()).per_example
        reference = {
            x.id: np.mean([overlap(slow(lm, ids, cut), ids[cut:], 3) for cut in range(1, len(ids) - 2)])
            for x, ids in zip(few.of("forget", "holdout"), raw(lm, few.of("forget", "holdout")), strict=True)
        }
        gaps = np.array([abs(found[key] - reference[key]) for key in found])
        assert np.mean(gaps) <= 0.02 and np.mean(gaps > 1e-9) <= 0.2


# ── cheap ──


def test_a_text_known_by_heart_is_read_once_and_nothing_is_decoded(memoriser, small, passes, monkeypatch):
    forwards = []
    real = type(memoriser.model).forward
    monkeypatch.setattr(type(memoriser.model), "forward", lambda *a, **k: forwards.append(1) or real(*a, **k))
    found = ExtractionLikelihood()(memoriser, Corpus({"forget": small["prose"]}), Bench())
    assert set(found.per_example.values()) == {1.0} and len(forwards) == 1 and passes == []


def test_one_branch_a_miss(never, corpus, passes):
    """Decoded rows are the misses, not the prefixes.  Measured: 159 of 344 prefixes, 1032 tokens instead of 2847."""
    texts = raw(never, corpus["holdout"])
    from_prefixes(never, texts, [range(1, len(ids)) for ids in texts], Bench())
    best = [never.model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist() for ids in texts]
    misses = {ids[:t] for ids, top in zip(texts, best, strict=True) for t in range(1, len(ids)) if top[t - 1] != ids[t]}
    said = sum(len(slow(never, ids, cut)) for ids in texts for cut in range(1, len(ids)))
    assert 0 < len(passes) <= len(misses) and sum(passes) * 2 < said


def test_what_is_known_is_not_decoded_again(never, corpus, passes):
    texts, bench = raw(never, corpus["holdout"][:4]), Bench()
    coarse = from_prefixes(never, texts, [range(1, len(ids), 4) for ids in texts], bench)
    all_cuts = [range(1, len(ids)) for ids in texts]
    fine = from_prefixes(never, texts, all_cuts, bench)
    before = len(passes)
    assert from_prefixes(never, texts, all_cuts, bench) == fine and len(passes) == before
    assert all(said.items() <= more.items() for said, more in zip(coarse, fine, strict=True))


# ── bad input ──


def test_broken_weights_are_no_score(tiny, small):
    lm = tiny.copy()
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite; its weights are broken"):
        ExtractionLikelihood()(lm, small, Bench())


def test_too_short_and_too_long_answers_are_named(tiny):
    four = Corpus({"forget": [Example("four", "", "The cat sat."), Example("more", "", "The cat sat on a table.")]})
    with pytest.raises(BadCorpus, match="EL_4 needs answers of more than 4 tokens; too short: four"):
        ExtractionLikelihood(n=4)(tiny, four, Bench())
    with pytest.raises(BadCorpus, match="the model's context is 256"):
        ExtractionLikelihood()(tiny, Corpus({"forget": [Example("long", "", "cat " * 300)]}), Bench())
