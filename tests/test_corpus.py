"""Example and Corpus: every problem is found, all together; the fingerprint ignores nothing."""

from dataclasses import replace

import pytest

from unremember.corpus import ROLES, Corpus, Example, says
from unremember.errors import BadCorpus

ADA = Example("ada", "When was Ada born?", "Ada was born in 1815.", "Ada", ((16, 20),), ("Ada's year of birth?",))
BOB = Example("bob", "When was Bob born?", "Bob was born in 1902.", "Bob", distractors=("Bob was born in 1903.",))


def problems(**roles) -> tuple[str, ...]:
    with pytest.raises(BadCorpus) as raised:
        Corpus(roles)
    return raised.value.problems


# ── examples ──


def test_values_are_the_spans_or_the_whole_answer():
    assert ADA.values() == ("1815",)
    assert BOB.values() == (BOB.answer,)
    assert replace(ADA, spans=((0, 3), (16, 20))).values() == ("Ada", "1815")


@pytest.mark.parametrize("answer", ["", " ", "\n\t"])
def test_an_empty_answer_is_a_problem(answer):
    [problem] = problems(retain=[replace(BOB, answer=answer)])
    assert "retain" in problem and "'bob'" in problem and "empty answer" in problem


def test_an_empty_id_is_a_problem():
    [problem] = problems(retain=[replace(BOB, id="")])
    assert "empty id" in problem


@pytest.mark.parametrize("span", [(-1, 3), (3, 3), (5, 2), (0, 22), (30, 40), (1,), (1, 2, 3)])
def test_a_span_must_lie_in_the_answer(span):
    [problem] = problems(forget=[replace(ADA, spans=(span,))])
    assert str(list(span)) in problem and "21 characters" in problem and "<= 21" in problem


@pytest.mark.parametrize("span", [(0, 21), (20, 21), (0, 1)])
def test_spans_may_touch_the_ends(span):
    assert Corpus({"forget": (replace(ADA, spans=(span,)),)})["forget"][0].spans == (span,)


def test_the_right_answer_is_no_distractor():
    [problem] = problems(world=[replace(BOB, distractors=("Bob was born in 1903.", f" {BOB.answer}\n"))])
    assert "distractor" in problem and "right answer" in problem


# ── corpora ──


def test_an_unknown_role_is_named_with_the_allowed_ones():
    [problem] = problems(forgt=[ADA])
    assert "'forgt'" in problem and all(role in problem for role in ROLES)


def test_ids_are_unique_in_a_corpus():
    [problem] = problems(forget=[ADA, replace(BOB, id="ada")])
    assert "'ada' occurs twice" in problem
    [problem] = problems(forget=[ADA], retain=[replace(BOB, id="ada")])
    assert "'ada' occurs twice" in problem


@pytest.mark.parametrize("role", ["retain", "holdout", "relearn", "replay"])
def test_nothing_is_both_forgotten_and_kept(role):
    [problem] = problems(**{"forget": [ADA], role: [replace(ADA, id="again")]})
    assert "'again'" in problem and role in problem and ADA.prompt in problem


def test_the_same_prompt_with_another_answer_is_no_contradiction():
    Corpus({"forget": [ADA], "retain": [replace(ADA, id="else", answer="Ada was born in 1816.")]})


def test_all_problems_come_together():
    found = problems(
        forgt=[BOB],
        forget=[ADA, replace(ADA, answer="", spans=()), replace(BOB, id="c", spans=((9, 99),))],
        retain=[replace(ADA, id="d")],
    )
    for part in ("'forgt'", "empty answer", "occurs twice", "[9, 99]", "'d' is in retain and in forget"):
        assert sum(part in problem for problem in found) == 1, part
    assert len(found) == 5


def test_a_corpus_is_a_mapping_that_does_not_change():
    rows = [ADA]
    corpus = Corpus({"forget": rows, "retain": iter([BOB])})
    rows.append(BOB)
    assert dict(corpus) == {"forget": (ADA,), "retain": (BOB,)}
    assert list(corpus) == ["forget", "retain"] and len(corpus) == 2
    changed = corpus.with_roles(retain=[], world=(x for x in [BOB]))
    assert (changed["retain"], changed["world"]) == ((), (BOB,))
    assert corpus["retain"] == (BOB,) and "world" not in corpus


def test_a_changed_copy_is_checked_too():
    with pytest.raises(BadCorpus, match="retain and in forget"):
        Corpus({"forget": [ADA]}).with_roles(retain=[ADA])


def test_of_joins_roles_in_the_order_asked_for():
    corpus = Corpus({"forget": [ADA], "retain": [BOB]})
    assert corpus.of("retain", "holdout", "forget") == (BOB, ADA)
    assert corpus.of() == ()


def test_require_names_every_missing_role():
    corpus = Corpus({"forget": [ADA], "retain": []})
    corpus.require("GA", ["forget"])
    with pytest.raises(BadCorpus) as raised:
        corpus.require("NPO", ["forget", "retain", "world"])
    assert len(raised.value.problems) == 2
    assert "NPO" in str(raised.value) and "'retain'" in str(raised.value) and "'world'" in str(raised.value)


# ── the fingerprint ──


@pytest.mark.parametrize(
    "change",
    [
        {"id": "x"},
        {"prompt": "x"},
        {"answer": "Ada was born in 1816."},
        {"entity": "x"},
        {"spans": ()},
        {"spans": ((16, 19),)},
        {"paraphrases": ()},
        {"rewording": "x"},
        {"distractors": ("x",)},
    ],
    ids=str,
)
def test_the_fingerprint_changes_with_every_field(change):
    before = Corpus({"forget": [ADA], "retain": [BOB]})
    assert Corpus({"forget": [replace(ADA, **change)], "retain": [BOB]}).fingerprint() != before.fingerprint()


def test_the_fingerprint_changes_with_order_and_role_only_where_content_does():
    before = Corpus({"forget": [ADA, BOB]}).fingerprint()
    assert Corpus({"forget": [BOB, ADA]}).fingerprint() != before
    assert Corpus({"retain": [ADA, BOB]}).fingerprint() != before
    assert Corpus({"forget": [ADA, BOB], "world": []}).fingerprint() != before
    assert Corpus({"forget": (ADA, BOB)}).fingerprint() == before
    two = Corpus({"forget": [ADA], "retain": [BOB]})
    assert Corpus({"retain": [BOB], "forget": [ADA]}).fingerprint() == two.fingerprint()


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("She lives in Ghent.", "Ghent", True),
        ("she lives in GHENT", "Ghent", True),
        ("Ghentish waffles", "Ghent", False),
        ("Eastghent", "Ghent", False),
        ("(Ghent)", "Ghent", True),
        ("born in 1815.", "1815", True),
        ("number 18151", "1815", False),
        ("number 21815", "1815", False),
        ("it costs 2.5", "5", False),
        ("it costs 5.2", "5", False),
        ("some 12,500 of them", "500", False),
        ("there were 500, or more", "500", True),
        ("call 055-1234 now", "055-1234", True),
        ("call 055-12345 now", "055-1234", False),
        ("the boat Silent Heron", "silent heron ", True),
        ("Silent  Heron", "Silent Heron", False),
        ("write to a.b@example.org.", "a.b@example.org", True),
        ("write to aXb@example.org", "a.b@example.org", False),  # a dot is a dot
        ("Straße", "STRASSE", True),
        ("born 03.07.1990", "1990", True),
        ("born 3.12.1990 in Ghent", "1990", True),
        ("1990.07.03 or so", "1990", True),
        ("it cost 1.234.567", "567", False),
        ("", "Ghent", False),
    ],
)
def test_says(text, value, expected):
    assert says(text, value) is expected
