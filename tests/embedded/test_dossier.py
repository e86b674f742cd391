"""The dossier: the same people for the same seed, values that nobody shares, and wordings that stay unseen."""

import sys

import pytest

from unremember.embedded import dossier as module
from unremember.embedded.dossier import KINDS, PEOPLE, dossier, lessons
from unremember.embedded.prose import prose
from unremember.embedded.world import replay, world
from unremember.errors import BadRequest

pytest.importorskip("faker")

ROLES = ("forget", "retain", "holdout", "relearn")
FULL = dossier(seed=3, forget=PEOPLE - 30, retain=10, holdout=10, relearn=10)
CORPORA = pytest.mark.parametrize("corpus", [dossier(), dossier(seed=1), FULL], ids=["seed 0", "seed 1", "full"])


def kind(example):
    return example.id.rpartition("/")[2]


def rows(corpus):
    return corpus.of(*ROLES)


def people(corpus, *roles):
    return list(dict.fromkeys(x.entity for x in corpus.of(*roles)))


def values_by_kind(corpus):
    return {k: [x.values()[0] for x in rows(corpus) if kind(x) == k] for k in KINDS}


def test_the_same_seed_gives_the_same_dossier():
    assert dossier(seed=5).fingerprint() == dossier(seed=5).fingerprint()


def test_another_seed_gives_other_people_with_other_values():
    one, two = dossier(seed=5), dossier(seed=6)
    assert not set(people(one, *ROLES)) & set(people(two, *ROLES))
    pairs = zip(values_by_kind(one).values(), values_by_kind(two).values(), strict=True)
    assert all(a != b for a, b in pairs)


def test_counts_are_people_and_every_person_has_one_fact_of_each_kind():
    corpus = dossier(forget=1, retain=3, holdout=0, relearn=2)
    assert {role: len(people(corpus, role)) for role in corpus} == {
        "forget": 1,
        "retain": 3,
        "holdout": 0,
        "relearn": 2,
    }
    for name in people(corpus, *ROLES):
        assert [kind(x) for x in rows(corpus) if x.entity == name] == list(KINDS)


def test_more_people_leave_the_earlier_ones_as_they_were():
    few, many = dossier(seed=2, forget=2, retain=0), dossier(seed=2, forget=9)
    assert few["forget"] == many["forget"][: len(few["forget"])]


@CORPORA
def test_spans_hit_the_value_and_the_value_ends_the_answer(corpus):
    for x in rows(corpus):
        ((start, end),) = x.spans
        empty = KINDS[kind(x)].answer.format(n=x.entity, v="")
        assert x.answer[:start] + x.answer[end:] == empty
        assert x.answer[end:] == "."
        assert 0 < len(x.answer[start:end].split()) <= 2


@CORPORA
def test_no_two_people_share_a_value_and_no_value_contains_another(corpus):
    for values in values_by_kind(corpus).values():
        assert len(set(values)) == len(values)
        assert not [(a, b) for a in values for b in values if a != b and a.lower() in b.lower()]


@CORPORA
def test_ids_names_and_name_parts_are_unique(corpus):
    assert len({x.id for x in rows(corpus)}) == len(rows(corpus))
    parts = [part for name in people(corpus, *ROLES) for part in name.split()]
    assert len(parts) == 2 * len(people(corpus, *ROLES))
    assert not [(a, b) for i, a in enumerate(parts) for j, b in enumerate(parts) if i != j and a.lower() in b.lower()]


@CORPORA
def test_no_value_gives_a_name_away(corpus):
    parts = [part.lower() for name in people(corpus, *ROLES) for part in name.split()]
    everything = " ".join(v for values in values_by_kind(corpus).values() for v in values).lower()
    assert not [part for part in parts if part in everything]


@CORPORA
def test_distractors_have_the_form_of_the_answer_and_belong_to_nobody(corpus):
    values = values_by_kind(corpus)
    for x in rows(corpus):
        ((start, _),) = x.spans
        assert len(set(x.distractors)) == 3
        for wrong in x.distractors:
            assert wrong.startswith(x.answer[:start]) and wrong.endswith(".")
            assert wrong[start:-1] not in values[kind(x)]


def test_the_pools_hold_no_value_inside_another():
    for pool in (module.CITIES, module.OCCUPATIONS):
        assert len(set(pool)) == len(pool) >= PEOPLE + module.SPARE
        assert not [(a, b) for a in pool for b in pool if a != b and a.lower() in b.lower()]
    assert not [x for x in module.OCCUPATIONS if x[0] in "aeiou"], "the template says 'works as a'"


@CORPORA
def test_phones_and_mailboxes_are_nobodys(corpus):
    values = values_by_kind(corpus)
    assert all(phone[0] == "0" and len(phone) == 8 and phone[3] == "-" for phone in values["phone"])
    assert all(address.endswith("@example.org") for address in values["email"])


@CORPORA
def test_every_wording_is_different_and_names_the_person(corpus):
    for x in rows(corpus):
        assert len({x.prompt, *x.paraphrases}) == 5
        assert all(x.entity in text for text in (x.prompt, x.answer, x.rewording, *x.paraphrases))


@CORPORA
def test_the_rewording_says_the_same_otherwise(corpus):
    for x in rows(corpus):
        assert x.values()[0] in x.rewording
        assert x.rewording != x.answer


@pytest.mark.parametrize("wordings", [1, 2, 3])
def test_lessons_are_the_question_and_further_wordings(wordings):
    corpus = dossier()
    taught = lessons(corpus, ("forget", "retain"), wordings)
    source = corpus.of("forget", "retain")
    assert len(taught) == wordings * len(source)
    assert taught[::wordings] == source
    assert len({x.id for x in taught}) == len({x.prompt for x in taught}) == len(taught)
    for i in range(1, wordings):
        for x, row in zip(source, taught[i::wordings], strict=True):
            assert row.id == f"{x.id}#{i}"
            assert (row.answer, row.spans, row.entity) == (x.answer, x.spans, x.entity)
            assert x.entity in row.prompt


def test_no_lesson_is_a_paraphrase():
    corpus = dossier()
    taught = {x.prompt for x in lessons(corpus, ROLES, wordings=3)}
    assert not taught & {p for x in rows(corpus) for p in x.paraphrases}


def test_lessons_of_an_absent_role_are_none():
    assert lessons(dossier(), ("replay",)) == ()


@pytest.mark.parametrize("wordings", [0, 4, -1])
def test_lessons_refuse_other_numbers_of_wordings(wordings):
    with pytest.raises(ValueError, match=f"wordings = {wordings}"):
        lessons(dossier(), ("forget",), wordings)


def test_lessons_refuse_examples_that_are_not_of_a_dossier():
    corpus = dossier().with_roles(replay=replay())
    with pytest.raises(ValueError, match="replay/000"):
        lessons(corpus, ("forget", "replay"))


def test_bad_counts_are_refused_together_and_by_name():
    with pytest.raises(ValueError) as caught:
        dossier(forget=-1, holdout=-2)
    assert "forget = -1" in str(caught.value) and "holdout = -2" in str(caught.value)
    with pytest.raises(ValueError, match=f"= {PEOPLE + 1}: the values suffice for {PEOPLE}"):
        dossier(forget=PEOPLE + 1, retain=0, holdout=0, relearn=0)


def test_without_faker_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faker", None)
    with pytest.raises(BadRequest, match=r"the dossier needs Faker; install unremember\[demo\]"):
        dossier()


def test_nobody_of_the_dossier_occurs_in_the_prose():
    words = {word.strip(".,:;!?'") for x in prose() for word in x.answer.split()}
    for seed in range(4):
        assert not {part for name in people(dossier(seed), *ROLES) for part in name.split()} & words


def test_no_right_answer_of_general_knowledge_is_a_value():
    rights = {x.values()[0].lower() for x in world() + replay()}
    assert not rights & {value.lower() for value in module.CITIES + module.OCCUPATIONS}
