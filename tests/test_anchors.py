"""Anchors: boundaries, longest first, case, one pass, circles; where tokens go; what the rules find; what is refused."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unremember.anchors import GENERIC, TAILS, Anchors, folded, read, rules, words
from unremember.corpus import Example
from unremember.errors import BadCorpus, BadRequest

SAGA = Anchors(
    {"Harry": "Jon", "Harry Potter": "Jon Marsh", "Ron": "Tom", "Hogwarts": "the Mystic Academy", "wands": "gaze"}
)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Harry met Ron's owl.", "Jon met Tom's owl."),
        ("Ronald, Ron and Byron", "Ronald, Tom and Byron"),  # a part of a word is no anchor
        ("Harry Potter and Harry", "Jon Marsh and Jon"),  # longest first
        ("HARRY! Wands and wands", "JON! Gaze and gaze"),  # case
        ("ron and harry stay", "ron and harry stay"),  # a name is not the word in lower case
        ("to Hogwarts.", "to the Mystic Academy."),
        ("Harry  Potter", "Jon  Potter"),
        ("", ""),
        ("nobody", "nobody"),
    ],
)
def test_translation(text, wanted):
    assert SAGA.translate(text).text == wanted


def test_a_term_goes_before_the_other_case_of_another_one():
    assert Anchors({"it": "that", "IT": "Radio"}).translate("it, It, IT").text == "that, That, Radio"


def test_one_pass_only():
    assert Anchors({"Ann": "Bea", "Bea": "Cleo"}).translate("Ann and Bea").text == "Bea and Cleo"


@pytest.mark.parametrize(
    ("terms", "shown"),
    [
        ({"Ann": "Ann"}, "'Ann' -> 'Ann'"),
        ({"Ann": "Bea", "Bea": "Ann"}, "'Ann' -> 'Bea' -> 'Ann'"),
        ({"Ann": "Bea", "Bea": "old Cleo", "Cleo": "Ann of York"}, "'Ann' -> 'Bea' -> 'Cleo' -> 'Ann'"),
        ({"wands": "Wands"}, "'wands' -> 'wands'"),
    ],
)
def test_a_circle_is_refused(terms, shown):
    with pytest.raises(BadRequest) as raised:
        Anchors(terms)
    assert f"anchors go in a circle, {shown}; give one of them another word" in str(raised.value)


def test_bad_entries_are_refused_all_together():
    with pytest.raises(BadRequest) as raised:
        Anchors({"": "x", " Ann": "Bea", "Cleo": "…", "Dan": 3, "Eve": "Fay"})  # ty: ignore[invalid-argument-type]
    assert len(raised.value.problems) == 4 and "'Dan' -> 3: both must be texts" in raised.value.problems[3]


def pieces(text: str, size: int) -> list[tuple[int, int]]:
    """Words cut into pieces of at most `size` characters, and every other sign: what a tokenizer may do."""
    found, at = [], 0
    while at < len(text):
        end = at + 1
        while text[at].isalnum() and end < len(text) and text[end].isalnum() and end - at < size:
            end += 1
        if not text[at].isspace():
            found.append((at, end))
        at = end
    return found


def test_images_by_hand():
    """'Hogwarts' (three pieces) becomes 'Abc' (one), 'Ron' (one) becomes 'Abcdef' (two)."""
    anchors = Anchors({"Hogwarts": "Abc", "Ron": "Abcdef"})
    made = anchors.translate("at Hogwarts sat Ron too")
    old, new = pieces("at Hogwarts sat Ron too", 3), pieces(made.text, 3)
    assert [made.text[a:b] for a, b in new] == ["at", "Abc", "sat", "Abc", "def", "too"]
    # at  Hog wart s  sat Ron too: what is behind a longer or a shorter term is not shifted
    assert made.images(old, new) == [0, 1, -1, -1, 2, 3, 5]


def test_several_tokens_of_one_character_are_told_apart():
    made = SAGA.translate("Ron €x")
    assert made.images([(0, 3), (4, 5), (4, 5), (5, 6)], [(0, 3), (4, 5), (4, 5), (5, 6)]) == [0, 1, 2, 3]


@given(
    st.lists(st.sampled_from(["Harry", "Potter", "Ron", "Hogwarts", "wands", "Ronald", "sat", "by", ".", "€"])),
    st.integers(1, 9),
)
def test_an_image_says_the_same_unless_it_was_replaced(said, size):
    text = " ".join(said)
    made = SAGA.translate(text)
    old, new = pieces(text, size), pieces(made.text, size)
    found = made.images(old, new)
    assert len(found) == len(old) and [i for i in found if i >= 0] == sorted({i for i in found if i >= 0})
    for (a, b), image in zip(old, found, strict=True):
        if not any(s.start < b and a < s.end for s in made.swaps):
            assert text[a:b] == made.text[slice(*new[image])] and image >= 0
    for s in made.swaps:
        assert text[s.start : s.end].lower() == s.term.lower() and made.text[s.begin : s.finish] == s.new


def test_an_example_is_asked_under_the_other_names():
    x = Example("1", "Who taught Ron?", "Harry Potter of Hogwarts.", "Ron", ((0, 12), (16, 24)), ("Ron's teacher?",))
    y = SAGA.example(x)
    assert (y.prompt, y.answer, y.entity) == ("Who taught Tom?", "Jon Marsh of the Mystic Academy.", "Tom")
    assert y.values() == ("Jon Marsh", "the Mystic Academy") and y.paraphrases == ("Tom's teacher?",)
    inside = SAGA.example(Example("2", "", "Harry Potter sat.", spans=((0, 5),)))  # a part of a term
    assert inside.values() == ("Jon Marsh",) and x.id == y.id


# ── rules ──

TEXTS = [
    Example("1", "Where was Megan Krause born?", "Megan Krause was born in Oulu.", "Megan Krause"),
    Example("2", "", "The old mill stood in Oulu. Will it rain? Then Professor Zorn said that Krause will pay."),
    Example("3", "", "On Monday the Silver Sparrow came to Vanta, and Vanta was glad of the sparrow."),
]


def test_rules_find_names_and_not_words():
    found = rules(TEXTS, seed=0).terms
    assert set(found) == {"Megan Krause", "Megan", "Krause", "Oulu", "Zorn", "Silver", "Vanta"}
    assert not {"The", "Will", "Then", "On", "Monday", "Sparrow", "Where", "Professor"} & set(found)


def test_rules_replace_by_kind_and_everywhere_alike():
    found = rules(TEXTS, seed=0).terms
    first, last, place = (GENERIC[kind].split() for kind in ("first", "last", "place"))
    assert (
        {found["Megan"], found["Zorn"]} <= set(first)
        and found["Krause"] in last
        and {found["Oulu"], found["Vanta"]} <= set(place)
    )
    assert (
        found["Megan Krause"] == f"{found['Megan']} {found['Krause']}" and found["Silver"] in GENERIC["thing"].split()
    )
    assert len(set(found.values())) == len(found)


def test_rules_are_a_function_of_examples_and_seed():
    assert rules(TEXTS, seed=3) == rules(TEXTS, seed=3) == rules(TEXTS[::-1], seed=3) != rules(TEXTS, seed=4)


def test_no_replacement_is_in_the_text(corpus):
    examples = [
        *corpus["forget"],
        Example("x", "", "They said that Anna and Ben met " + ", ".join(GENERIC["last"].split())),
    ]
    found = rules(examples, seed=1)
    taken = {word for x in examples for word in folded(f"{x.prompt} {x.answer}")}
    assert found.terms and not {w.casefold() for new in found.terms.values() for w in words(new)} & taken
    for x in corpus["forget"]:  # every name is gone from every question and answer
        assert not folded(x.entity) & folded(found.example(x).prompt + found.example(x).answer)


def test_generic_words_are_all_different_and_may_run_out():
    made = [word + tail for pool in GENERIC.values() for tail in TAILS for word in pool.split()]
    assert len(made) == len(set(made))
    letters = "abcdefghijklmnopqrstuvwxyz"
    many = Example("1", "", "so " + " so ".join(f"Q{a}{b}" for a in letters for b in letters))
    with pytest.raises(BadCorpus, match=r"more names than the generic words \(thing\) they know; give a dictionary"):
        rules([many])


def test_a_text_without_names_has_no_anchors():
    assert rules([Example("1", "", "The rate of 3 % was paid in June. Most of it was lost.")]).terms == {}
    assert Anchors({}).translate("Anna").text == "Anna"


# ── files ──


def test_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"Ron": "Tom"}))
    (tmp_path / "a.toml").write_text('Ron = "Tom"\n"Harry Potter" = "Jon Marsh"\n')
    assert read(tmp_path / "a.json").terms == {"Ron": "Tom"}
    assert read(tmp_path / "a.toml").terms == {"Ron": "Tom", "Harry Potter": "Jon Marsh"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("b.json", None, "no such file"),
        ("b.json", "{", "is no valid JSON"),
        ("b.toml", "= 3", "is no valid TOML"),
        ("b.json", "[]", "holds no dictionary of terms"),
        ("b.json", "{}", "holds no dictionary of terms"),
        ("b.json", '{"Ron": 3}', "both must be texts"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BadRequest, match=said):
        read(tmp_path / name)


def test_anchors_load_no_torch():
    code = "import sys, unremember.anchors; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
