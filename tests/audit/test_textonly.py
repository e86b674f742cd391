"""The control without a model: at chance on a fair split, far above on an unfair one, and never fooled by a shared name."""

import numpy as np
import pytest

from unremember.audit.separation import auc
from unremember.audit.textonly import TextOnly, out_of_fold
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.embedded.dossier import dossier
from unremember.errors import BadCorpus, BadRequest

CONTROL = TextOnly()
WORDS = [f"{a}{b}" for a in ("ba", "de", "ki", "lo", "mu", "ra", "sa", "ti", "vo", "ze") for b in ("n", "r", "s", "l")]


def texts(rng, count: int, most: int = 12, extra: str = "") -> list[str]:
    return [" ".join(rng.choice(WORDS, most)) + extra for _ in range(count)]


def split(members, strangers, entities=("", "")) -> Corpus:
    def side(name, rows, entity):
        return [Example(f"{name}{i}", "", x, entity and f"{entity} {i // 6}") for i, x in enumerate(rows)]

    return Corpus({"forget": side("m", members, entities[0]), "holdout": side("s", strangers, entities[1])})


def test_a_fair_split_is_at_chance():
    """One source, 30 draws of 40 against 40: mean AUC .501, beyond its null interval in two."""
    found = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        found.append(CONTROL.leaks(split(texts(rng, 40), texts(rng, 40))))
    values = [x.value for x in found]
    assert np.mean(values) == pytest.approx(0.5, abs=0.05)
    assert np.mean([x.beyond for x in found]) <= 0.15 and 0.03 < np.std(values) < 0.1
    assert {x.reason for x in found if not x.beyond} == {""}


def test_another_source_is_found():
    """The same words with another date behind them; the same words, but more of them; the same with other commas."""
    rng = np.random.default_rng(0)
    for strangers in (texts(rng, 30, extra=" in 2024"), texts(rng, 30, 30), texts(rng, 30, extra=" ,")):
        found = CONTROL.leaks(split(texts(rng, 30), strangers))
        assert found.beyond and found.value > 0.9 and "the split leaks" in found.reason


def test_case_is_a_cue():
    rng = np.random.default_rng(1)
    found = CONTROL.leaks(split(texts(rng, 30), [x.title() for x in texts(rng, 30)]))
    assert found.beyond


def test_the_name_of_a_person_gives_nothing_away():
    """Six facts a person: fitted on five, the classifier would know the sixth by the name.  By persons it is at chance."""
    people = dossier(0, forget=8, retain=0, holdout=8, relearn=0)
    found = CONTROL.leaks(people)
    assert not found.beyond and found.units == (8, 8) and found.members == 48
    examples = people.of("forget", "holdout")
    inside = np.array([1] * 48 + [0] * 48)
    careless = out_of_fold([f"{x.prompt} {x.answer}" for x in examples], inside, [x.id for x in examples], 5, 0)
    assert auc(careless[:48], careless[48:]) > 0.9


def test_an_entity_on_both_sides_does_not_bind_its_texts():
    rng = np.random.default_rng(2)
    both = CONTROL.leaks(split(texts(rng, 20), texts(rng, 20), ("news", "news")))
    assert both.units == (20, 20)


def test_out_of_fold_means_out_of_fold():
    """Every text has a word of its own that is perfectly telling in sight and useless out of it."""
    inside = np.array([1, 0] * 20)
    found = out_of_fold([f"word{i} same" for i in range(40)], inside, [str(i) for i in range(40)], 5, 0)
    assert np.isfinite(found).all() and abs(auc(found[inside == 1], found[inside == 0]) - 0.5) < 0.2


def test_it_is_an_audit_that_sees_no_model():
    rng = np.random.default_rng(3)
    corpus = split(texts(rng, 10), texts(rng, 10))
    score = CONTROL(None, corpus, Bench())
    assert set(score.per_example) == {x.id for x in corpus.of("forget", "holdout")}
    assert score == CONTROL(None, corpus) and score.direction.startswith("higher") and score.paper == CONTROL.paper
    assert CONTROL(None, corpus) != TextOnly(seed=1)(None, corpus)


def test_the_order_of_the_examples_hardly_matters_to_the_verdict():
    rng = np.random.default_rng(4)
    members, strangers = texts(rng, 30), texts(rng, 30, extra=" today")
    assert (
        CONTROL.leaks(split(members[::-1], strangers[::-1])).beyond and CONTROL.leaks(split(members, strangers)).beyond
    )


def test_too_few_are_refused():
    rng = np.random.default_rng(5)
    with pytest.raises(BadCorpus, match=r"4 independent entities in the role 'holdout' make no 5 folds.*folds = 4"):
        CONTROL(None, split(texts(rng, 9), texts(rng, 4)))
    with pytest.raises(BadCorpus, match="2 independent entities in the role 'forget'"):
        CONTROL(None, split(texts(rng, 12), texts(rng, 12), ("p", "q")))
    with pytest.raises(BadCorpus, match="'holdout' and there are none"):
        CONTROL(None, Corpus({"forget": [Example("a", "", "some text")]}))


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.pipeline", None)
    rng = np.random.default_rng(6)
    with pytest.raises(BadRequest, match="pip install scikit-learn"):
        CONTROL(None, split(texts(rng, 9), texts(rng, 9)))
