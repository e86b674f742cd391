"""The audits one by one: arithmetic worked by hand, and the published bugs that must not come back."""

from dataclasses import replace
from functools import partial
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unremember.audit import AUDITS, answers
from unremember.audit.accuracy import Accuracy
from unremember.audit.answers import Rouge, Said
from unremember.audit.choice import Choice
from unremember.audit.extraction import ExtractionStrength, extraction_strength
from unremember.audit.likelihood import ExtractionLikelihood, overlap
from unremember.audit.probability import Probability
from unremember.audit.prose import Distinct, Prose
from unremember.audit.truth_ratio import TruthRatio, truth_ratio
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus
from unremember.preference import options, share
from unremember.table import read


def logps(lm, ids: tuple[int, ...]) -> torch.Tensor:
    """(T - 1, V): the obvious forward pass, without any of our machinery."""
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)[:-1]


# ── extraction strength ──


@pytest.mark.parametrize(
    ("hits", "expected"),
    [
        ("1111", 1.0),
        ("1110", 0.0),  # one wrong last token: no prefix makes the rest come out
        ("0000", 0.0),  # open-unlearning says 1/T
        ("0111", 0.75),
        ("1011", 0.5),
        ("0001", 0.25),
        ("1", 1.0),
        ("0", 0.0),
    ],
)
def test_extraction_strength_by_hand(hits, expected):
    assert extraction_strength(np.array([x == "1" for x in hits])) == expected


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_extraction_strength_is_the_longest_right_ending(hits):
    ending = next((i for i, hit in enumerate(reversed(hits)) if not hit), len(hits))
    assert extraction_strength(np.array(hits)) == pytest.approx(ending / len(hits))


def test_greedy_decoding_from_there_gives_the_rest(taught, corpus):
    """The meaning of k*, on known and on unknown facts: from k* on the rest comes by itself, from k* − 1 it does not."""
    found = ExtractionStrength()(taught, corpus, Bench()).per_example
    rows = {row.key: row for row in taught.template.rows(corpus.of("forget", "retain", "holdout"))}
    assert sum(0 < x < 1 for x in found.values()) > 0 and 1 in found.values()
    for key, row in rows.items():
        answer = row.ids[row.start : row.stop]
        cut = round((1 - found[key]) * len(answer))
        if cut < len(answer):
            [said] = taught.generate([row.ids[: row.start + cut]], len(answer) - cut)
            assert said == answer[cut:]
        if cut:
            [said] = taught.generate([row.ids[: row.start + cut - 1]], len(answer) - cut + 1)
            assert said != answer[cut - 1 :]


# ── extraction likelihood ──


@pytest.mark.parametrize(
    ("said", "truth", "n", "expected"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 2, 1.0),
        ([1, 2, 9, 4], [1, 2, 3, 4], 2, 1 / 3),  # of 12, 29, 94 only 12 is there
        ([1, 2, 1, 2], [1, 2, 3, 4], 2, 2 / 3),  # 12 counts twice, as printed in the paper
        ([3, 4, 1, 2], [1, 2, 3, 4], 2, 2 / 3),  # the place does not matter
        ([1, 2], [1, 2, 3], 3, 0.0),  # stopped early: no n-gram at all
        ([1, 2, 3], [1, 2, 3, 4, 5, 6], 3, 1.0),  # stopped early: its one n-gram is right
        ([], [1, 2, 3], 1, 0.0),
        ([1, 2, 3], [1, 2], 3, 0.0),
    ],
)
def test_overlap_by_hand(said, truth, n, expected):
    assert overlap(said, truth, n) == pytest.approx(expected)


@pytest.mark.parametrize("stride", [1, 3])
def test_el_is_the_mean_over_prefixes(tiny, small, stride):
    """Prefix by prefix, one at a time, as the formula is printed."""
    found = ExtractionLikelihood(n=2, stride=stride)(tiny, small, Bench()).per_example
    for x in small.of("forget", "holdout"):
        ids = tuple(tiny.tokenizer(x.answer).input_ids)
        each = []
        for cut in range(1, len(ids) - 2 + 1, stride):
            [said] = tiny.generate([ids[:cut]], len(ids) - cut)
            each.append(overlap(said, ids[cut:], 2))
        assert found[x.id] == pytest.approx(np.mean(each))


def test_el_needs_more_tokens_than_an_n_gram_has(tiny):
    four = Example("four", "Who?", "The cat sat.")  # The| cat| sat|.
    with pytest.raises(BadCorpus, match=r"EL_4 needs answers of more than 4 tokens; too short: four"):
        ExtractionLikelihood(n=4)(tiny, Corpus({"forget": [four]}))
    found = ExtractionLikelihood(n=3, stride=1)(tiny, Corpus({"forget": [four]})).per_example
    [said] = tiny.generate([tiny.tokenizer("The").input_ids], 3)
    assert found["four"] == float(said == tuple(tiny.tokenizer(" cat sat.").input_ids))  # one prefix, one 3-gram


# ── accuracy ──


def test_exact_match_drops_no_token(taught, corpus):
    """Some published code drops the last labelled token 'to ignore EOS' where there is none."""
    found = Accuracy()(taught, corpus, Bench()).per_example
    for row in taught.template.rows(corpus.of("forget", "retain", "holdout")):
        best = logps(taught, row.ids[: row.stop]).argmax(-1)[row.start - 1 :]
        answer = torch.tensor(row.ids[row.start : row.stop])
        assert len(best) == len(answer)
        assert found[row.key] == pytest.approx((best == answer).float().mean().item())


def test_memorisation_accuracy_starts_at_the_second_token(taught, corpus):
    found = Accuracy(raw=True)(taught, corpus, Bench()).per_example
    for x in corpus.of("forget", "holdout"):
        ids = tuple(taught.tokenizer(x.answer).input_ids)
        right = logps(taught, ids).argmax(-1) == torch.tensor(ids[1:])
        assert len(right) == len(ids) - 1
        assert found[x.id] == pytest.approx(right.float().mean().item())


# ── probability ──


def test_probability_is_a_geometric_mean_over_its_part(taught, corpus):
    whole = Probability("answer")(taught, corpus, Bench()).per_example
    value = Probability("span")(taught, corpus, Bench()).per_example
    for row in taught.template.rows(corpus["forget"]):
        own = logps(taught, row.ids)[range(row.start - 1, row.stop - 1), row.ids[row.start : row.stop]]
        assert whole[row.key] == pytest.approx(own.mean().exp().item(), rel=1e-3)
        assert value[row.key] == pytest.approx(own[torch.tensor(row.span)].mean().exp().item(), rel=1e-3)


def test_without_a_span_the_value_is_the_answer(tiny, corpus):
    bare = Corpus({"forget": [replace(x, spans=()) for x in corpus["forget"]]})
    whole = Probability("answer")(tiny, corpus, Bench()).over([x.id for x in corpus["forget"]])
    assert Probability("span")(tiny, bare, Bench()).per_example == pytest.approx(whole, rel=1e-4)


# ── right against wrong ──


def test_choice_compares_each_option_a_token(tiny, small):
    """An option is judged by its mean log-probability a token, not by its sum: long ones are not punished."""
    [x] = small["world"]
    found = options(tiny, (x,), partial(read, tiny))[x.id]
    for text, value in zip((x.answer, *x.distractors), found, strict=True):
        row = tiny.template.row("", x.prompt, text)
        own = logps(tiny, row.ids)[range(row.start - 1, row.stop - 1), row.ids[row.start : row.stop]]
        assert value == pytest.approx(own.mean().item(), rel=1e-3)
    assert Choice()(tiny, small, Bench()).per_example[x.id] == pytest.approx(share(found))


def test_a_tie_is_wrong(monkeypatch, tiny, small):
    values = {"win": [-1.0, -2.0, -3.0], "tie": [-1.0, -1.0, -2.0], "lose": [-2.0, -1.0, -3.0]}
    monkeypatch.setattr("unremember.audit.choice.options", lambda *_: {k: np.array(v) for k, v in values.items()})
    score = Choice(accuracy=True)(tiny, small, Bench())
    assert score.per_example == {"win": 1.0, "tie": 0.0, "lose": 0.0}
    assert score.chance == pytest.approx(1 / 3)


def test_truth_ratio_by_hand():
    """Wrong .1 and .4 against right .5: arithmetic (.25 / .5), geometric (.2 / .5)."""
    wrong = np.log([0.1, 0.4])
    assert truth_ratio(log(0.5), wrong) == pytest.approx(0.5)
    assert truth_ratio(log(0.5), wrong, geometric=True) == pytest.approx(0.4)
    assert np.isfinite(truth_ratio(-1000.0, wrong))


def test_truth_ratio_sets_the_reworded_answer_against_the_wrong_ones(tiny, corpus):
    few = Corpus({"forget": corpus["forget"][:3]})
    found = TruthRatio()(tiny, few, Bench()).per_example
    for x in few["forget"]:
        [mine, *wrong] = options(tiny, (replace(x, answer=x.rewording),), partial(read, tiny))[x.id]
        assert found[x.id] == pytest.approx(np.exp(wrong).mean() / np.exp(mine), rel=1e-5)
        assert TruthRatio(geometric=True)(tiny, few, Bench()).per_example[x.id] <= found[x.id]  # AM ≥ GM


@pytest.mark.parametrize("name", ["truth ratio", "choice"])
def test_a_missing_item_shifts_no_other(name, tiny, small):
    """open-unlearning zips results to unfiltered indices, so that one item without options moves all later ones."""
    whole = AUDITS[name](tiny, small, Bench()).per_example
    first, *rest = small["forget"]
    gone = small.with_roles(forget=[replace(first, distractors=()), *rest])
    found = AUDITS[name](tiny, gone, Bench()).per_example
    assert first.id not in found
    assert found == {key: pytest.approx(value, rel=1e-3) for key, value in whole.items() if key != first.id}


# ── what is said ──


@pytest.fixture
def speaks(monkeypatch):
    """Let every model give these answers, in the order of the prompts."""

    def these(*texts: str):
        monkeypatch.setattr(answers, "answers", lambda lm, prompts, new, bench: list(texts[: len(prompts)]))

    return these


def test_said_wants_every_value(speaks, tiny):
    two = Example("two", "Who and where?", "Ada in Ghent.", spans=((0, 3), (7, 12)))
    whole = Example("whole", "Who?", "Ada in Ghent.")
    corpus = Corpus({"forget": [two, whole]})
    speaks("Ada.", "Ada, in Ghent.")
    assert Said()(tiny, corpus).per_example == {"two": 0.0, "whole": 0.0}
    speaks("It was in ghent that ADA…", "I think: Ada in Ghent.")
    assert Said()(tiny, corpus).per_example == {"two": 1.0, "whole": 1.0}


def test_passages_are_not_asked(tiny, small):
    corpus = small.with_roles(forget=[*small["forget"], Example("text", "", "Only a passage of text.")])
    for audit in (Said(), Rouge("recall")):
        assert "text" not in audit(tiny, corpus, Bench()).per_example


def test_rouge_by_hand(speaks, tiny):
    """Truth: the cat sat here (4 words). Said: the cat was here now (5). Common in order: the cat here (3)."""
    corpus = Corpus({"forget": [Example("x", "Where?", "The cat sat here.")]})
    speaks("The cat was here now")
    assert Rouge("recall")(tiny, corpus).per_example["x"] == pytest.approx(3 / 4)
    assert Rouge("fmeasure")(tiny, corpus).per_example["x"] == pytest.approx(2 * 3 / (4 + 5))
    speaks("Cats sitting")
    assert Rouge("recall")(tiny, corpus).per_example["x"] == pytest.approx(1 / 4)  # stemmed: cat


def test_rouge_judges_the_whole_answer_even_if_it_repeats_the_question(speaks, tiny):
    """open-unlearning deletes the prompt's text wherever it stands. Said has 4 + 4 words, of which 4 are right."""
    corpus = Corpus({"forget": [Example("x", "Where did he sit?", "The cat sat here.")]})
    speaks("Where did he sit? The cat sat here.")
    assert Rouge("recall")(tiny, corpus).per_example["x"] == 1.0
    assert Rouge("fmeasure")(tiny, corpus).per_example["x"] == pytest.approx(2 * 4 / (4 + 8))


# ── language ──


def test_prose_nll_is_a_mean_over_tokens(tiny, small):
    found = Prose()(tiny, small, Bench()).per_example
    for x in small["prose"]:
        ids = tuple(tiny.tokenizer(x.answer).input_ids)
        own = logps(tiny, ids)[range(len(ids) - 1), ids[1:]]
        assert found[x.id] == pytest.approx(-own.mean().item(), rel=1e-3)


def test_distinct_looks_at_a_few_passages_only(tiny, corpus):
    found = Distinct(most=2, new=8)(tiny, corpus, Bench()).per_example
    assert set(found) == {x.id for x in corpus["prose"][:2]}
    row = tiny.template.rows(corpus["prose"])[0]
    [said] = tiny.generate([row.ids[:12]], 8)
    assert found[row.key] == len(set(said)) / len(said)
