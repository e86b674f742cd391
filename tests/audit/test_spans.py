"""Span audits: arithmetic by hand, the slow way beside the fast one, and that only the corpus' own spans count."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from unremember.audit import spans
from unremember.audit.accuracy import Accuracy
from unremember.audit.likelihood import overlap
from unremember.audit.spans import SpanAccuracy, SpanExtraction, runs
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.forget.seul import SeUL
from unremember.stop import known
from unremember.table import Reading, read
from unremember.train import Plan

ALL = (SpanAccuracy(), SpanAccuracy(rest=True), SpanExtraction(), SpanExtraction(back=(0, 4, 8)))
each = pytest.mark.parametrize("audit", ALL, ids=("S-MA", "rest-MA", "S-EL", "S-EL back"))


def mean(score, examples) -> float:
    return float(np.mean([score.per_example[x.id] for x in examples]))


# ── by hand ──


@pytest.mark.parametrize(
    ("marked", "expected"),
    [("0110010", [(1, 3), (5, 6)]), ("111", [(0, 3)]), ("000", []), ("1", [(0, 1)]), ("01", [(1, 2)])],
)
def test_runs_by_hand(marked, expected):
    flags = tuple(x == "1" for x in marked)
    assert runs(flags) == expected
    assert runs(flags, 10) == [(a + 10, b + 10) for a, b in expected]


def test_accuracy_by_hand(monkeypatch, tiny):
    """Five tokens, the second and third sensitive: of these one is hit, of the other three two."""
    hit, span = np.array([True, True, False, False, True]), np.array([False, True, True, False, False])
    zeros = np.zeros(5)
    monkeypatch.setattr(spans, "table", lambda *_: [Reading(zeros, hit, zeros, zeros, span)])
    corpus = Corpus({"forget": [Example("x", "Who?", "Her uncle keeps the key.")]})
    assert SpanAccuracy()(tiny, corpus).per_example == {"x": 1 / 2}
    assert SpanAccuracy(rest=True)(tiny, corpus).per_example == {"x": 2 / 3}


@pytest.fixture
def speaks(monkeypatch, tiny):
    """Let every model go on with this text; returns the (prefix, most new tokens) that it was asked."""

    def this(*texts: str) -> list:
        asked = []

        def go_on(lm, prompts, bench):
            asked.extend(prompts)
            said = [tuple(tiny.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
            return [said[i % len(said)] for i in range(len(prompts))]

        monkeypatch.setattr(spans, "continuations", go_on)
        return asked

    return this


def test_extraction_by_hand(speaks, tiny):
    """The span 'the cat sat home' has 4 tokens and so two 3-grams."""
    x = Example("x", "Who?", "He said the cat sat home now.", spans=((8, 24),))
    corpus, row = Corpus({"forget": [x]}), tiny.template.rows([x])[0]
    for text, expected in (
        (" the cat sat home now.", 1.0),
        (" now the cat sat home", 1.0),  # the place does not matter
        (" the cat sat now home", 1 / 2),  # 'the cat sat' is there, 'cat sat home' is not
        (" the cat sat", 1 / 2),  # early ends are no excuse: the span's n-grams are counted, not those of what was said
        (" the cat now sat home", 0.0),
        ("", 0.0),
    ):
        asked = speaks(text)
        assert SpanExtraction()(tiny, corpus).per_example == {"x": expected}, text
        assert asked == [(row.ids[: row.start + 2], 4 + 4)]  # behind 'He said', the span's length and the slack
    speaks(" cat the home sat")
    assert SpanExtraction(n=1)(tiny, corpus).per_example == {"x": 1.0}


def test_a_span_shorter_than_n_counts_whole_and_spans_are_averaged(speaks, tiny):
    x = Example("x", "Who?", "the cat saw a dog now", spans=((4, 7), (12, 17)))  # cat | a dog
    corpus = Corpus({"forget": [x]})
    speaks(" cat and more", " a small dog")
    assert SpanExtraction()(tiny, corpus).per_example == {"x": 1 / 2}
    speaks(" cat", " a dog")
    assert SpanExtraction()(tiny, corpus).per_example == {"x": 1.0}


def test_it_may_begin_further_back_but_not_behind_the_answer(speaks, tiny):
    x = Example("x", "Who?", "He said the cat sat home now.", spans=((8, 24),))
    corpus, row = Corpus({"forget": [x]}), tiny.template.rows([x])[0]
    at = row.start + 2
    asked = speaks(" the cat sat home", "")
    assert SpanExtraction(back=(0, 1))(tiny, corpus).per_example == {"x": 1 / 2}
    assert asked == [(row.ids[: at - 1], 9), (row.ids[:at], 8)]
    asked = speaks("")
    SpanExtraction(back=(8, 4, 0))(tiny, corpus)
    assert asked == [
        (row.ids[: row.start], 10),
        (row.ids[:at], 8),
    ]  # 8 and 4 back are the answer's beginning, asked once


# ── the slow way ──


def test_both_equal_the_obvious_way(taught, corpus):
    few = Corpus({role: corpus[role][:6] for role in ("forget", "holdout")})
    inside, outside = (SpanAccuracy(rest=rest)(taught, few, Bench()).per_example for rest in (False, True))
    extracted = SpanExtraction(n=2)(taught, few, Bench()).per_example
    for row in taught.template.rows(few.of("forget", "holdout")):
        with torch.no_grad():
            best = taught.model(input_ids=torch.tensor([row.ids])).logits[0].argmax(-1).tolist()
        hits = [best[t - 1] == row.ids[t] for t in range(row.start, row.stop)]
        assert inside[row.key] == pytest.approx(np.mean([h for h, s in zip(hits, row.span, strict=True) if s]))
        assert outside[row.key] == pytest.approx(np.mean([h for h, s in zip(hits, row.span, strict=True) if not s]))
        a = row.start + row.span.index(True)
        b = a + sum(row.span)
        [said] = taught.generate([row.ids[:a]], b - a + 4)
        assert extracted[row.key] == pytest.approx(overlap(row.ids[a:b], said, min(2, b - a)))


def test_the_two_parts_add_up_to_exact_match_and_the_stopper_sees_the_same(taught, corpus):
    inside, outside = (SpanAccuracy(rest=rest)(taught, corpus, Bench()).per_example for rest in (False, True))
    whole = Accuracy()(taught, corpus, Bench()).per_example
    rows = taught.template.rows(corpus.of("forget", "holdout"))
    for row, reading in zip(rows, read(taught, rows), strict=True):
        share = np.mean(row.span)
        assert share * inside[row.key] + (1 - share) * outside[row.key] == pytest.approx(whole[row.key])
        assert inside[row.key] == known(reading, "accuracy")


# ── ends ──


def test_a_memoriser_and_one_that_knows_nothing(memoriser, uniform, small):
    for audit in ALL:
        assert set(audit(memoriser, small, Bench()).per_example.values()) == {1.0}
        assert set(audit(uniform, small, Bench()).per_example.values()) == {0.0}


def test_what_was_never_taught_is_far_below(taught, never, corpus):
    """One value a slot would make this level high, and stopping at it easy.  Measured: S-MA 0.15, S-EL 0.07, rest 0.64."""
    forget = corpus["forget"]
    inside, outside, free = ([mean(audit(lm, corpus, Bench()), forget) for lm in (taught, never)] for audit in ALL[:3])
    assert inside[0] > 0.95 and free[0] > 0.95 and outside[0] > 0.95
    assert inside[1] < 0.3 and free[1] < 0.2 and outside[1] > 0.5


def test_a_name_may_be_gone_in_free_text_and_still_follow_from_its_first_token(monkeypatch, taught, corpus):
    """Why both are reported: with the first token given the rest comes by itself; without it nothing does."""
    x = next(x for x in corpus["forget"] if x.id.endswith("/phone"))
    one = Corpus({"forget": [x]})
    [row] = taught.template.rows([x])
    a = row.start + row.span.index(True)

    def all_but_the_first(prompts):
        return [() if ids == row.ids[:a] else row.ids[len(ids) : len(ids) + new] for ids, new in prompts]

    monkeypatch.setattr(spans, "continuations", lambda lm, prompts, bench: all_but_the_first(prompts))
    hit = np.array([t != a for t in range(row.start, row.stop)])
    zeros = np.zeros(len(hit))
    monkeypatch.setattr(spans, "table", lambda *_: [Reading(zeros, hit, zeros, zeros, np.array(row.span))])
    assert SpanExtraction()(taught, one).per_example[x.id] == 0.0
    assert SpanAccuracy()(taught, one).per_example[x.id] >= 0.85


# ── whose spans ──


def test_what_a_method_pushes_on_is_not_what_it_is_measured_by(taught, never, corpus):
    """The selector marks other tokens than the corpus; the audits' spans stay the corpus' own."""
    asked = Corpus({**corpus, "forget": corpus["forget"][:6]})
    method = SeUL(Plan(steps=1, lr=1e-3), spans="online", scorer=never, share=0.2)
    before = asked.fingerprint()
    result = method(taught, asked)
    chosen = method.choose(taught, asked)
    assert asked.fingerprint() == before and [x.spans for x in chosen] != [x.spans for x in asked["forget"]]
    found = SpanAccuracy()(result, asked, Bench()).per_example
    rows = result.template.rows(asked["forget"])
    assert {row.key: known(r, "accuracy") for row, r in zip(rows, read(result, rows), strict=True)} == {
        x.id: found[x.id] for x in asked["forget"]
    }


def test_without_spans_the_answer_is_the_span_and_has_no_rest(tiny, corpus):
    x = replace(corpus["forget"][0], spans=())
    bare = Corpus({"forget": [x]})
    assert SpanAccuracy()(tiny, bare, Bench()).per_example == Accuracy()(tiny, bare, Bench()).per_example
    assert SpanAccuracy(rest=True)(tiny, bare, Bench()).per_example == {}
    [row] = tiny.template.rows([x])
    assert SpanExtraction()(tiny, bare, Bench()).per_example[x.id] == overlap(
        row.ids[row.start : row.stop], tiny.generate([row.ids[: row.start]], row.stop - row.start + 4)[0], 3
    )


def test_a_span_at_the_first_token_of_a_passage(tiny):
    """That token has nothing in front and is not scored; one that covers it alone is refused where rows are made."""
    both = Corpus({"forget": [Example("x", "", "The cat sat home.", spans=((0, 7),))]})
    [row] = tiny.template.rows(both["forget"])
    assert row.start == 1 and row.span == (True, False, False, False)
    for audit in ALL:
        assert set(audit(tiny, both, Bench()).per_example) == {"x"}


# ── what every audit promises (also over the table) ──


@each
def test_batch_budget_and_order_change_nothing(audit, taught, corpus):
    few = Corpus({role: rows[:8] for role, rows in corpus.items()})
    turned = Corpus({role: rows[::-1] for role, rows in reversed(list(few.items()))})
    one = audit(taught, few, Bench()).per_example
    assert set(one) == {x.id for x in few.of(*audit.roles)}
    assert audit(taught, turned, Bench(budget=300, batch=3)).per_example == pytest.approx(one)


@each
def test_a_score_says_what_it_is(audit, tiny, small):
    score = audit(tiny, small, Bench())
    assert score.name in ("span accuracy", "rest accuracy", "span extraction") and score.paper == audit.paper
    assert score.definition and score.direction and audit.summary and audit.needs == ("forget",)
