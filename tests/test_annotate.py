"""Annotation: what each rule finds and leaves alone, replies that are read strictly, and examples that end without a span."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unremember.annotate import (
    ANNOTATORS,
    accept,
    annotated,
    confirmed,
    gazetteer,
    listed,
    located,
    named,
    normal,
    presidio,
    together,
    unless,
)
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadRequest


def found(name: str, text: str) -> list[str]:
    return [text[a:b] for a, b in normal(text, named(name)(text))]


# ── rules ──


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("email", "Write to walnut.comet@example.org.", ["walnut.comet@example.org"]),
        ("email", "a.b+c@mail.example.co.uk, x_1@example.org!", ["a.b+c@mail.example.co.uk", "x_1@example.org"]),
        ("email", "at example.org @home, 3@ 4, name@host", []),
        ("url", "See https://example.org/a?b=1, (www.example.org).", ["https://example.org/a?b=1", "www.example.org"]),
        ("url", "The file://x and example.org are none", []),
        ("phone", "Call 012-3456 now.", ["012-3456"]),
        ("phone", "+49 30 1234567, (055) 123-4567, 020.7946.0018", ["+49 30 1234567", "(055) 123-4567", "020.7946.0018"]),
        ("phone", "In 1914-1918, on page 123-45, item a012-3456", []),
        ("phone", "1234567890123456", []),  # 16 digits: more than a phone number can have
        ("digits", "IDs 12345 and 4111 1111 1111 1111, not 1234 nor 12,345.", ["12345", "4111 1111 1111 1111"]),
        ("digits", "A12345678Z", ["12345678"]),
        ("date", "On 2024-01-15, 3.5.1999 and 12/31/99.", ["2024-01-15", "3.5.1999", "12/31/99"]),
        ("date", "born 3rd of May 1980, died May 4, 2001", ["3rd of May 1980", "May 4, 2001"]),
        ("date", "In May 1999, not in May, nor 1999", ["May 1999"]),
        ("date", "He may 4get; version 1.2.3 is no date", []),
        ("money", "It cost $1,500.00, then 3 million euros or CHF 20.", ["$1,500.00", "3 million euros", "CHF 20"]),
        ("money", "20 € and £5", ["20 €", "£5"]),
        ("money", "20 eurostars, a pound, 5 dollarsigns", []),
        ("names", "When Anna Weiss met Dr. Paul de Groot in Ghent, she smiled.", ["Anna Weiss", "Dr. Paul de Groot", "Ghent"]),
        ("names", "J. R. O'Neill-Sørby wrote it.", ["J. R. O'Neill-Sørby"]),
        ("names", "Anna Weiss's boat is called Silver Otter.", ["Anna Weiss", "Silver Otter"]),
        ("names", "Yesterday it rained. Somebody laughed.", []),  # a lone word that opens a sentence
        ("names", "Anna left. Nobody saw Anna.", ["Anna", "Anna"]),  # but here it stands inside one as well
        ("names", "On Monday I saw it in May.", []),
        ("names", "Élodie and Ørjan Ås came.", ["Ørjan Ås"]),
        ("names", "We like the Anna de la mer.", ["Anna"]),  # a particle that leads nowhere is none of the name
        ("names", "", []),
    ],
)  # fmt: skip
def test_what_a_rule_finds(name, text, expected):
    assert found(name, text) == expected


@given(st.text(alphabet="aA1 .,-@/(+$€Ø\n'", max_size=80))
def test_every_rule_stays_inside_any_text(text):
    for name in ANNOTATORS:
        spans = normal(text, named(name)(text))
        assert all(0 <= a < b <= len(text) and text[a:b].strip() == text[a:b] for a, b in spans)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))


@pytest.mark.parametrize(
    "text", ["a" * 20_000, "1" * 20_000, "A " * 10_000, "1-" * 10_000, "a.b" * 7_000, ". " * 10_000]
)
def test_no_rule_is_slow_on_a_hostile_text(text):
    """Backtracking would take minutes; the timeout of the suite is the bound."""
    for name in ANNOTATORS:
        named(name)(text)


def test_the_values_of_the_dossier_that_have_a_form_are_found(corpus):
    """Exactly the gold spans; an occupation is a common noun, which no rule can see."""
    people = corpus.of("forget", "retain", "holdout")
    kinds = {"birthplace", "employer", "phone", "email", "boat"}
    gold = [x for x in people if x.id.rpartition("/")[2] in kinds]
    result = annotated([replace(x, spans=()) for x in gold], together(*ANNOTATORS.values()))
    assert not result.problems
    assert [x.values() for x in result.examples] == [x.values() for x in gold]
    jobs = [replace(x, spans=()) for x in people if x.id.endswith("/occupation")]
    assert len(annotated(jobs, together(*ANNOTATORS.values())).problems) == len(jobs)


def test_a_gazetteer_takes_whole_words_the_longest_first():
    text = "Ann and Annual, New York or York; ann."
    spans = gazetteer(["York", "Ann", "New York", " "])(text)
    assert [text[a:b] for a, b in spans] == ["Ann", "New York", "York"]
    with pytest.raises(BadRequest, match="the gazetteer is empty"):
        gazetteer([" "])


def test_an_unknown_annotator_is_named():
    with pytest.raises(BadRequest, match=r"unknown annotator 'e-mail'; did you mean 'email'\?"):
        named("e-mail")


# ── intervals ──


def test_intervals_are_sorted_trimmed_and_merged():
    text = "ab cd  ef"
    assert normal(text, [(6, 9), (0, 2), (1, 5), (5, 7)]) == [(0, 5), (7, 9)]
    assert normal(text, [(0, 2), (2, 5)]) == [(0, 2), (3, 5)]  # touching ones stay two
    assert normal(text, [(0, 6), (1, 3)]) == [(0, 5)] and normal(text, [(2, 3)]) == []


@pytest.mark.parametrize("span", [(-1, 2), (0, 10), (3, 3), (4, 2)])
def test_an_interval_outside_the_text_is_refused(span):
    with pytest.raises(BadCorpus, match=rf"the spans \[{span[0]}, {span[1]}\] lie outside the text of 9 characters"):
        normal("ab cd  ef", [(0, 2), span])


# ── an LLM's replies ──


def test_all_occurrences_are_marked():
    assert located("aaa b aa", ["aa"]) == [(0, 2), (1, 3), (6, 8)]
    text = "Anna saw Anna's cat (0.5)."
    spans = listed(lambda asked: json.dumps(["Anna", "(0.5)", "Anna"]) if asked == text else "[]")(text)
    assert [text[a:b] for a, b in spans] == ["Anna", "Anna", "(0.5)"]
    assert listed(lambda _: "[]")(text) == []


def test_a_string_that_is_not_in_the_text_is_refused_and_listed():
    with pytest.raises(BadCorpus, match="not in the text, letter for letter: 'anna', 'Bob'; ask again"):
        listed(lambda _: '["Anna", "anna", "Bob"]')("Anna saw a cat.")


@pytest.mark.parametrize(
    "reply", ["Anna", '{"a": 1}', '["Anna", 3]', '["Anna", " "]', 'Sure: ["Anna"]', "```[]```", "", "null"]
)
def test_a_reply_that_is_no_list_of_texts_is_refused(reply):
    with pytest.raises(BadCorpus, match="is no JSON list of texts"):
        listed(lambda _: reply)("Anna saw a cat.")


def test_the_second_stage_is_asked_with_text_and_candidate():
    asked = []

    def ask(text, candidate):
        asked.append((text, candidate))
        return {"Anna": "Yes.", "cat": " no"}.get(candidate, "perhaps")

    verify = confirmed(ask)
    assert verify("Anna, cat", (0, 4)) and not verify("Anna, cat", (6, 9))
    assert asked == [("Anna, cat", "Anna"), ("Anna, cat", "cat")]
    with pytest.raises(BadCorpus, match="the reply 'perhaps' on ',' is neither yes nor no"):
        verify("Anna, cat", (4, 5))


def test_both_stages_by_an_llm():
    x = Example("x", "", "Anna met Paul in May.")
    result = annotated(
        [x], listed(lambda _: '["Anna", "Paul", "May"]'), confirmed(lambda _, c: "no" if c == "May" else "yes")
    )
    assert result.examples[0].values() == ("Anna", "Paul") and not result.problems


# ── presidio ──


@pytest.mark.filterwarnings("ignore")  # spaCy's own deprecations
def test_presidio_finds_names_and_addresses_and_asks_no_network(monkeypatch):
    pytest.importorskip("presidio_analyzer", reason="install unremember[pii]")
    text = "Anna Schmidt lives in London; write to anna@example.org, or to nobody at all."
    monkeypatch.setattr("socket.socket.connect", None)  # a call of it would fail
    found = {text[a:b] for a, b in presidio()(text)}
    assert {"Anna Schmidt", "London", "anna@example.org"} <= found
    assert not any("nobody" in x for x in found)
    assert {text[a:b] for a, b in presidio(least=0.9)(text)} == {"anna@example.org"}


def test_a_spacy_model_that_is_not_there_is_not_downloaded():
    pytest.importorskip("presidio_analyzer", reason="install unremember[pii]")
    with pytest.raises(BadRequest, match="one of no_such_model"):
        presidio(model="no_such_model")


def test_without_presidio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(BadRequest, match="needs presidio-analyzer and a spaCy model; pip install presidio-analyzer"):
        named("presidio")


# ── examples ──


def test_spans_are_added_and_the_argument_is_left_alone():
    x = Example("x", "Who?", "Anna Weiss, a potter, 012-3456.", spans=((14, 20),))
    result = annotated([x], together(ANNOTATORS["names"], ANNOTATORS["phone"]))
    assert result.examples[0].values() == ("Anna Weiss", "potter", "012-3456") and x.spans == ((14, 20),)
    assert replace(result.examples[0], spans=x.spans) == x
    assert result.coverage == pytest.approx((9 + 6 + 8) / 27)


def test_what_the_prompt_says_is_no_secret():
    x = Example("x", "Where was anna weiss born?", "Anna Weiss was born in Ghent.")
    assert annotated([x], ANNOTATORS["names"]).examples[0].values() == ("Ghent",)
    other = replace(x, prompt="Where was Annabel Weissman born?")  # part of a word is not said
    assert annotated([other], ANNOTATORS["names"]).examples[0].values() == ("Anna Weiss", "Ghent")


def test_an_example_without_a_span_is_a_problem():
    """To the rest of the library its whole answer would be sensitive, and nobody would have said so."""
    bare, marked = Example("bare", "", "Nothing here."), Example("marked", "", "Nothing here.", spans=((0, 7),))
    result = annotated([bare, marked], ANNOTATORS["email"])
    assert result.examples == (bare, marked)
    assert result.problems == (
        "example 'bare': nothing sensitive was found in 'Nothing here.', so that all of it counts; mark it by hand, leave it "
        "out, or use more annotators",
    )
    assert (
        annotated([bare], lambda text: [(0, 7)], lambda *_: False).problems == result.problems
    )  # proposed, not verified
    assert annotated([], ANNOTATORS["email"]).coverage == 0


def test_an_annotator_that_fails_on_one_example_stops_no_other():
    bad, good = Example("bad", "", "Short."), Example("good", "", "Long enough it is.")
    result = annotated([bad, good], lambda text: [(5, 9)])
    assert result.examples[0] == bad and result.examples[1].spans == ((5, 9),)
    [problem] = result.problems
    assert problem.startswith("example 'bad': the spans [5, 9] lie outside the text of 6 characters")


def test_harmless_names_are_kept_out():
    x = Example("x", "", "She met Anna in Ghent.")
    assert annotated([x], ANNOTATORS["names"], unless(["ghent "])).examples[0].values() == ("Anna",)
    assert annotated([x], ANNOTATORS["names"], accept).examples[0].values() == ("Anna", "Ghent")


def test_what_comes_out_is_a_corpus(corpus):
    result = annotated(corpus["forget"], together(*ANNOTATORS.values()))
    assert Corpus({"forget": result.examples}).of("forget") == result.examples
    assert result.examples == corpus["forget"]  # what is marked by hand already stays as it is


def test_it_loads_no_torch():
    code = "import sys, unremember.annotate; print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
