"""General knowledge and prose: well formed, in two parts that do not overlap."""

import re

import pytest

from unremember.corpus import Corpus
from unremember.embedded.prose import prose
from unremember.embedded.world import replay, world

PARTS = pytest.mark.parametrize("part", [world, replay])
COUNTRIES = str.split("""
    Argentina Australia Austria Belgium Brazil Canada China Cuba Denmark Egypt Finland France Germany Greece
    Hungary India Iran Iraq Ireland Israel Italy Jamaica Japan Kenya Mexico Netherlands Norway Peru Poland
    Portugal Russia Spain Sweden Switzerland Thailand Turkey Vietnam Korea Kingdom States
""")
ANIMALS = str.split("bear bee cat cow dog duck elephant flamingo frog goat goose kangaroo lion pig sheep spider wolf")


def test_there_is_enough_of_both():
    assert len(world()) >= 110
    assert len(replay()) >= 60


def test_they_make_a_corpus():
    corpus = Corpus({"world": world(), "replay": replay(), "prose": prose()})
    assert [corpus[role][0].id for role in corpus] == ["world/000", "replay/000", "prose/00"]


@PARTS
def test_answers_end_with_the_right_value(part):
    for x in part():
        ((start, end),) = x.spans
        assert x.answer[end:] == "."
        assert x.answer[start - 1] == " "
        assert x.answer[start:end] == x.answer[start:end].strip() != ""


@PARTS
def test_four_different_options_of_one_form(part):
    for x in part():
        options = [x.answer, *x.distractors]
        ((start, _),) = x.spans
        assert len({option.lower() for option in options}) == len(options) == 4
        assert all(option.startswith(x.answer[:start]) and option.endswith(".") for option in options)
        # An article before the gap must not sort out an option by its first letter.
        if re.search(r"\b(a|an) $", x.answer[:start]):
            assert len({option[start] in "aeiou" for option in options}) == 1, options


def test_no_question_or_answer_comes_twice():
    rows = world() + replay()
    assert len({x.prompt.lower() for x in rows}) == len(rows)
    assert len({x.answer.lower() for x in rows}) == len(rows)
    assert all(x.prompt.endswith("?") for x in rows)


def test_no_right_value_is_in_both_parts():
    assert not {x.values()[0].lower() for x in world()} & {x.values()[0].lower() for x in replay()}


@pytest.mark.parametrize("subjects", [COUNTRIES, ANIMALS], ids=["countries", "animals"])
def test_no_subject_is_asked_about_in_both_parts(subjects):
    def asked(rows):
        return {s for x in rows for s in subjects if re.search(rf"\b{s}s?\b", f"{x.prompt} {x.answer}")}

    assert asked(world()) and asked(replay())
    assert not asked(world()) & asked(replay())


@PARTS
def test_topics_are_mixed_from_beginning_to_end(part):
    rows = part()
    thirds = [rows[: len(rows) // 3], rows[len(rows) // 3 : -len(rows) // 3], rows[-len(rows) // 3 :]]
    for opening in ("What is the capital", "How many", 'What is the opposite of "', 'Who wrote "', "What is a young"):
        assert all(any(x.prompt.startswith(opening) for x in third) for third in thirds), opening


@PARTS
def test_ids_and_entity_name_the_part(part):
    assert [x.id for x in part()] == [f"{part.__name__}/{i:03}" for i in range(len(part()))]
    assert {x.entity for x in part()} == {part.__name__}


def test_twenty_four_passages_of_one_length():
    rows = prose()
    assert [x.id for x in rows] == [f"prose/{i:02}" for i in range(24)]
    assert len({x.answer for x in rows}) == 24
    assert all(45 <= len(x.answer.split()) <= 70 for x in rows), [len(x.answer.split()) for x in rows]
    assert all(x.prompt == "" and x.entity == "prose" for x in rows)
    assert all("\n" not in x.answer and "  " not in x.answer and x.answer.endswith(".") for x in rows)
