"""Reliability, generality, locality and residual conflict: by hand, in both forms, and what must not pass for an edit."""

from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch

from unremember.audit.editing import Conflict, Editing, conflict, normal, pinned
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus
from unremember.table import read

ALL = [Editing(measure, said) for measure in ("reliability", "generality", "locality") for said in (False, True)]
each = pytest.mark.parametrize("audit", [*ALL, Conflict()], ids=lambda audit: getattr(audit, "measure", "conflict"))


def mean(score) -> float:
    return float(np.mean(list(score.per_example.values())))


@pytest.fixture(scope="module")
def update(small) -> Corpus:
    """What the memoriser says of the forget questions is the new answer; the old one is one that it never heard."""
    old = [replace(x, answer=x.distractors[0], spans=(), distractors=()) for x in small["forget"]]
    new = [replace(x, id=f"{x.id}/new", paraphrases=(x.prompt, "Where is the book?")) for x in small["forget"]]
    other = [replace(x, id=f"{x.id}/other") for x in small.of("retain", "world")]
    return Corpus({"forget": old, "new": new, "neighbour": other})


# ── by hand ──


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (log(0.2), log(0.6), 0.25),
        (log(0.6), log(0.2), 0.75),
        (-50.0, -50.0, 0.5),
        (-1e4, 0.0, 0.0),
        (0.0, -1e4, 1.0),  # e^1e4 would overflow
    ],
)
def test_residual_conflict_by_hand(old, new, expected):
    assert conflict(old, new) == pytest.approx(expected)


def test_what_counts_as_the_same_answer():
    assert normal(" The  Hague.") == normal("the hague") != normal("the hague, of course")
    assert normal("4.5") == "4.5"


def test_residual_conflict_the_slow_way(taught, corpus, slow_nll):
    new = [
        replace(x, id=f"{x.id}/new", answer=x.distractors[0], spans=(), distractors=()) for x in corpus["forget"][:4]
    ]
    found = Conflict()(taught, corpus.with_roles(new=new), Bench()).per_example
    for x, y in zip(corpus["forget"], new, strict=False):
        with torch.no_grad():
            old, other = (
                np.exp(-float(slow_nll(taught, taught.template.row(z.id, z.prompt, z.answer)).double().sum()))
                for z in (x, y)
            )
        assert found[y.id] == pytest.approx(old / (old + other), abs=1e-4)
    assert np.mean(list(found.values())) > 0.9, "the taught model believes the old answers"


def test_the_arg_max_form_is_that_of_the_value_tokens(tiny, small, memoriser):
    """The template of an answer is easy to hit: only its value counts, as in the toolkits, where it is the whole answer."""
    x = small["forget"][0]
    half = replace(x, id="half", answer=x.answer.replace("uncle", "river"), distractors=())
    [reading] = read(memoriser, memoriser.template.rows([half]))
    assert 0 < reading.hit.mean() < 1
    found = Editing()(memoriser, Corpus({"new": [half]}), Bench()).per_example["half"]
    assert found == reading.hit[reading.span].mean() == 0
    whole = replace(half, spans=())
    assert Editing()(memoriser, Corpus({"new": [whole]}), Bench()).per_example["half"] == reading.hit.mean()


def test_generality_is_the_mean_over_paraphrases_and_not_the_question(memoriser, update):
    """One paraphrase is the question itself, the other asks for something else: half is right, and in greedy answers, too."""
    rows = [memoriser.template.row(x.id, x.paraphrases[1], x.answer, x.spans) for x in update["new"]]
    other = {row.key: x.hit[x.span].mean() for row, x in zip(rows, read(memoriser, rows), strict=True)}
    assert max(other.values()) <= 0.5
    for said in (False, True):
        found = Editing("generality", said)(memoriser, update, Bench()).per_example
        assert found == {key: (1 + (0 if said else hits)) / 2 for key, hits in other.items()}
        assert set(Editing("reliability", said)(memoriser, update, Bench()).per_example.values()) == {1.0}


def test_an_example_without_paraphrases_has_no_generality(memoriser, update):
    first, *rest = update["new"]
    some = update.with_roles(new=[replace(first, paraphrases=()), *rest])
    assert set(Editing("generality")(memoriser, some, Bench()).per_example) == {x.id for x in rest}


def test_a_right_beginning_is_no_exact_answer(memoriser, update):
    """All its tokens are the arg-max, and the model goes on talking: what an exact match is there to tell."""
    cut = [replace(x, answer=" ".join(x.answer.split()[:4]), spans=(), distractors=()) for x in update["new"]]
    some = update.with_roles(new=cut)
    assert mean(Editing("reliability")(memoriser, some, Bench())) == 1
    assert mean(Editing("reliability", said=True)(memoriser, some, Bench())) == 0


# ── known ends ──


def test_a_model_that_took_the_update(memoriser, update):
    steady = update.with_roles(new=[replace(x, paraphrases=x.paraphrases[:1]) for x in update["new"]])
    assert [mean(audit(memoriser, steady, Bench())) for audit in ALL] == [1] * 6
    assert mean(Conflict()(memoriser, update, Bench())) == pytest.approx(0, abs=1e-3)


def test_a_model_that_knows_nothing(uniform, update):
    assert [mean(audit(uniform, update, Bench())) for audit in ALL] == [0] * 6
    found = Conflict()(uniform, update, Bench()).per_example
    words = len(uniform.tokenizer)
    for x, y in zip(update["forget"], update["new"], strict=True):
        a, b = (len(uniform.template.row(z.id, z.prompt, z.answer).span) for z in (x, y))
        assert found[y.id] == pytest.approx(conflict(-a * log(words), -b * log(words)), abs=1e-6)


@each
def test_measuring_changes_nothing_and_a_score_says_what_it_is(tiny, update, audit):
    before = {name: w.clone() for name, w in tiny.model.state_dict().items()}
    score = audit(tiny, update, Bench())
    assert all(torch.equal(w, before[name]) for name, w in tiny.model.state_dict().items())
    assert score.definition and score.direction and score.paper == audit.paper and audit.summary
    assert set(score.per_example) == {x.id for x in update.of(*audit.roles)}
    named = {"reliability", "generality", "locality"}
    assert score.name in {*named, *(f"{name}, said" for name in named), "residual conflict"}


@each
def test_batch_budget_and_order_change_nothing(taught, corpus, audit):
    new = [replace(x, id=f"{x.id}/new", answer=x.distractors[0], spans=()) for x in corpus["forget"][:6]]
    new = [replace(x, distractors=()) for x in new]
    other = [replace(x, id=f"{x.id}/other") for x in corpus["world"][:6]]
    one = corpus.with_roles(new=new, neighbour=other)
    turned = Corpus({role: rows[::-1] for role, rows in reversed(list(one.items()))})
    expected = audit(taught, one, Bench()).per_example
    found = audit(taught, turned, Bench(budget=300, batch=3)).per_example
    assert found == {key: pytest.approx(value, abs=2e-4, rel=2e-3) for key, value in expected.items()}


# ── locality ──


def test_pinned_answers_are_those_of_the_model_before_the_edit(taught, corpus):
    """On what the files say the original is often wrong; on what it says itself it scores 1, and an edited one less."""
    asked = corpus.with_roles(neighbour=[replace(x, id=f"{x.id}/other") for x in corpus["world"][:12]])
    fixed = pinned(taught, asked)
    for said in (False, True):
        audit = Editing("locality", said)
        assert mean(audit(taught, asked, Bench())) < 0.9
        assert mean(audit(taught, fixed, Bench())) == 1
        other = taught.copy()
        with torch.no_grad():
            for weight in other.model.parameters():
                weight.mul_(0.7)
        assert mean(audit(other, fixed, Bench())) < 0.9
    assert all(not x.spans and not x.distractors for x in fixed["neighbour"])
    assert fixed["forget"] == corpus["forget"] and asked["neighbour"][0].spans, "the argument is as it was"


def test_what_was_never_answered_consistently_shows_nothing(memoriser, small):
    """A paraphrase to which the model says something else: the fake that section (g) names."""
    steady, torn = small["world"][0], small["retain"][0]
    asked = [
        replace(steady, id="steady", paraphrases=(steady.prompt,)),
        replace(torn, id="torn", paraphrases=(steady.prompt,)),
    ]
    fixed = pinned(memoriser, Corpus({"neighbour": asked}))
    assert [x.id for x in fixed["neighbour"]] == ["steady"]
    with pytest.raises(BadCorpus, match="answers none of the 1 neighbour questions consistently"):
        pinned(memoriser, Corpus({"neighbour": asked[1:]}))


def test_silence_is_no_answer_to_be_kept(memoriser, small, monkeypatch):
    monkeypatch.setattr(type(memoriser), "generate", lambda self, prompts, *_: [()] * len(prompts))
    with pytest.raises(BadCorpus, match="answers none of the 1 neighbour questions"):
        pinned(memoriser, Corpus({"neighbour": [replace(small["world"][0], id="mute")]}), Bench())


# ── refusals ──


def test_a_new_answer_without_its_old_one(memoriser, update):
    lost = Example("lost", "Who asks this?", "Nobody does.")
    with pytest.raises(BadCorpus, match=r"no forget example asks what 'lost' asks \(1 such\)"):
        Conflict()(memoriser, update.with_roles(new=[*update["new"], lost]), Bench())


def test_locality_needs_neighbours(memoriser, update):
    with pytest.raises(BadCorpus, match="needs examples in the role 'neighbour'"):
        pinned(memoriser, update.with_roles(neighbour=()))
