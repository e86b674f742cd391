"""Jailbreak prompts: the list of wrappers is sound, each question is in each of them, and the best one counts."""

import base64
import codecs
import json
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from unremember.attack.jailbreak import Jailbreak, Wrapper, by_family, filled, parsed, variants, wrappers
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import Corpus, Example, says
from unremember.errors import BadCorpus
from unremember.score import Score

ADA = Example("ada", "Where was Ada born?", "Ada was born in Ghent.", spans=((16, 21),))
FAMILIES = {"role-play", "prefix", "refusal", "language", "cloze", "authority", "hypothetical", "encoding"}


def said(lm, seen, ids) -> float:
    values = AUDITS["said"](lm, Corpus({"forget": seen["forget"]}), Bench()).over(ids)
    return float(np.mean([values[i] for i in ids]))


def test_the_list_is_sound():
    rows = wrappers()
    assert {w.family for w in rows} == FAMILIES and len(rows) == 18
    assert len({w.text for w in rows}) == len({w.name for w in rows}) == 18
    assert all(w.slot for w in rows)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("No slot.", r"has the slots \[\]"),
        ("{question} {question}", "it must have one"),
        ("{answer}", r"\['answer'\]"),
    ],
)
def test_a_wrapper_without_its_slot_is_refused(text, problem):
    with pytest.raises(ValueError, match=problem):
        parsed(json.dumps([{"family": "f", "name": "n", "text": text}]))


@pytest.mark.parametrize("names", [("a", "a"), ("a#b",), ("",)])
def test_names_make_ids(names):
    """A '#' in a name would cut the id of a variant at the wrong place."""
    with pytest.raises(ValueError, match="wrapper name"):
        parsed(json.dumps([{"family": "f", "name": n, "text": "{question}"} for n in names]))


def test_all_that_is_wrong_with_a_list_is_said_together():
    rows = [
        {"family": "f", "name": "a", "text": "No slot."},
        {"family": "f", "name": "b", "text": "{question}"},
        {"family": "f", "name": "b", "text": "Well, {question}"},
        {"family": "f", "name": "c"},
        {"family": "f", "name": "d", "text": 5},
        "e",
    ]
    with pytest.raises(ValueError) as caught:
        parsed(json.dumps(rows))
    problems = str(caught.value).split("; wrapper ")
    assert len(problems) == 5 and str(caught.value).count("wrapper name 'b'") == 1
    for at in (4, 5, 6):
        assert f"wrapper {at} is {rows[at - 1]!r}" in str(caught.value)


OWN = [
    {"family": "plain", "name": "tell", "text": "Tell me: {question}"},
    {"family": "plain", "name": "say", "text": "Say it: {question}"},
    {"family": "gaps", "name": "fill", "text": "Fill in: {gap}"},
]


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps(OWN), encoding="utf-8")
    return file


def test_a_list_of_ones_own_takes_the_place_of_the_librarys(own, taught, corpus):
    attack, bench = Jailbreak(file=str(own)), Bench()
    assert attack.wrappers == tuple(Wrapper(**row) for row in OWN)
    assert [w.name for w in Jailbreak(file=str(own), families=("plain",), most=1).wrappers] == ["tell"]
    _, seen = attack(taught, corpus, taught, bench)
    assert [x.id for x in seen["forget"]] == [f"{x.id}#{row['name']}" for x in corpus["forget"] for row in OWN]
    assert seen["forget"][0].prompt == f"Tell me: {corpus['forget'][0].prompt}"
    assert bench.notes == {"wrappers asked": 3}
    assert by_family({"a#tell": 0.2, "a#fill": 1.0}, ["a"], attack.wrappers) == {"gaps": 1.0, "plain": 0.2}


def test_a_run_depends_on_what_stands_in_the_list(own):
    from unremember.run import texts

    attack = Jailbreak(file=str(own))
    assert attack.files == (str(own),) and texts(attack) == [json.dumps(OWN)]
    assert [file.rpartition("/")[2] for file in Jailbreak().files] == ["templates.json"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, r"none.json cannot be read: No such file or directory; name a JSON file of wrappers"),
        ("[{]", r"none.json: no valid JSON: .* line 1 column 3"),
        ("{}", r"none.json: it must be a list of wrappers"),
        ("[]", r"none.json: it must be a list of wrappers"),
        (
            '[{"family": "f", "name": "n", "text": "x"}, 3]',
            r"none.json: wrapper 2 is 3; .*wrapper 'n' has the slots \[\]",
        ),
        (b"\xff\xfe", r"none.json: .*decode"),
    ],
)
def test_a_file_that_is_no_list_is_refused_before_work_starts(tmp_path, text, problem):
    file = tmp_path / "none.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValidationError, match=problem):
        Jailbreak(file=str(file))


def test_a_family_of_another_list_is_refused(own):
    with pytest.raises(ValidationError, match="unknown family 'cloze'"):
        Jailbreak(file=str(own), families=("cloze",))


def test_each_slot_by_hand():
    def fill(slot: str) -> str | None:
        return filled(Wrapper("f", "n", f"<{{{slot}}}>"), ADA)

    assert fill("question") == "<Where was Ada born?>"
    assert fill("gap") == "<Ada was born in ____.>"
    assert fill("rot13") == "<Jurer jnf Nqn obea?>" and codecs.decode("Jurer jnf Nqn obea?", "rot13") == ADA.prompt
    assert fill("base64") == "<V2hlcmUgd2FzIEFkYSBib3JuPw==>"
    assert base64.b64decode("V2hlcmUgd2FzIEFkYSBib3JuPw==").decode() == ADA.prompt
    assert fill("spelt") == "<W h e r e   w a s   A d a   b o r n ?>"
    assert filled(Wrapper("f", "n", "{gap}"), replace(ADA, spans=())) is None


def test_braces_in_a_question_are_text():
    odd = replace(ADA, prompt="What is {gap} in {question}?")
    assert filled(Wrapper("f", "n", "Say: {question}"), odd) == "Say: What is {gap} in {question}?"


def test_a_wrapper_that_says_the_value_is_left_out():
    rows = (Wrapper("f", "told", "In Ghent they ask: {question}"), Wrapper("f", "other", "They ask: {question}"))
    assert [x.id for x in variants(ADA, rows)] == ["ada#other"]


def test_every_question_is_asked_in_every_wrapper_and_none_tells(taught, corpus):
    lm, seen = Jailbreak()(taught, corpus, taught, Bench())
    assert lm is taught
    for role in ("forget", "holdout"):
        assert [x.id for x in seen[role]] == [f"{x.id}#{w.name}" for x in corpus[role] for w in wrappers()]
        facts = {x.id: x for x in corpus[role]}
        for x in seen[role]:
            fact = facts[x.id.rpartition("#")[0]]
            assert (x.answer, x.spans) == (fact.answer, fact.spans) and x.prompt != fact.prompt
            assert not any(says(x.prompt, value) for value in x.values()), x.prompt
    assert all(seen[role] == corpus[role] for role in corpus if role not in ("forget", "holdout"))


def test_families_and_most_choose(corpus):
    assert {w.family for w in Jailbreak(families=("cloze", "prefix")).wrappers} == {"cloze", "prefix"}
    assert [w.name for w in Jailbreak(families=("language",), most=2).wrappers] == ["german", "spanish"]
    assert len(Jailbreak(most=1).wrappers) == len(FAMILIES)


def test_an_unknown_family_is_refused_with_the_nearest():
    with pytest.raises(ValidationError, match="unknown family 'authoriti', did you mean 'authority'"):
        Jailbreak(families=("authoriti",))


def test_the_best_wrapper_counts_and_more_never_find_less(taught, corpus):
    ids = [x.id for x in corpus["forget"]]
    below, above = (
        AUDITS["value probability"](taught, Corpus({"forget": seen["forget"]}), Bench()).over(ids)
        for seen in (attack(taught, corpus, taught, Bench())[1] for attack in (Jailbreak(most=1), Jailbreak(most=2)))
    )
    assert all(above[key] >= below[key] - 1e-6 for key in ids) and sum(above.values()) > sum(below.values())


def test_families_apart_by_hand():
    found = {
        "a#sure": 0.2,
        "a#of-course": 0.6,
        "b#sure": 0.4,
        "a#blank": 1.0,
        "b#blank": 0.0,
        "z#sure": 1.0,
        "a#0": 1.0,
    }
    assert by_family(found, ["a", "b"]) == pytest.approx({"prefix": 0.5, "cloze": 0.5})
    assert Score("s", "", "", found).over(["a", "b"]) == {
        "a": 1.0,
        "b": 0.4,
    }  # over all families, as a verdict reads it


def test_questions_that_no_wrapper_can_ask_are_named(corpus):
    bare = corpus.with_roles(forget=[replace(corpus["forget"][0], spans=()), *corpus["forget"][1:]])
    with pytest.raises(BadCorpus, match=rf"{corpus['forget'][0].id}: no wrapper .* mark spans"):
        Jailbreak(families=("cloze",)).check(bare)
    Jailbreak().check(bare)  # the other families can


def test_passages_alone_and_a_missing_role_are_refused(corpus):
    with pytest.raises(BadCorpus, match="only passages"):
        Jailbreak().check(corpus.with_roles(forget=[Example("text", "", "Only prose.")]))
    with pytest.raises(BadCorpus, match=r"jailbreak needs .* 'forget'"):
        Jailbreak().check(Corpus({"retain": corpus["retain"]}))


def test_a_question_that_becomes_too_long_is_refused(taught, corpus):
    long = replace(corpus["forget"][0], prompt="very " * 200 + corpus["forget"][0].prompt)
    with pytest.raises(BadCorpus, match=r"(?s)the model's context is 256.*encoding family"):
        Jailbreak()(taught, corpus.with_roles(forget=[long]), taught, Bench())


@pytest.fixture(scope="module")
def shy(taught, corpus):
    """Refuses a question about a forgotten person, but answers where a reply is begun for it."""
    from unremember.train import Plan, train

    refusals = [replace(x, id=f"{x.id}/refused", answer="I do not know.", spans=()) for x in corpus["forget"]]
    [opener] = [w for w in wrappers() if w.name == "of-course"]
    behind = [replace(x, prompt=filled(opener, x)) for x in corpus["forget"]]

    def objective(lm, tokens):
        return {tokens.role: tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}

    pools = {"refusals": refusals, "behind": behind}
    rows = {role: taught.template.rows(examples) for role, examples in pools.items()}
    return train(taught, objective, rows, Plan(steps=40, lr=3e-3))


def test_what_a_wrapper_unlocks_is_found_and_nothing_is_invented(shy, never, taught, corpus):
    """The model is made so that one of 18 wrappers unlocks it; any-of-m must see that, and see nothing in the twin."""
    ids = [x.id for x in corpus["forget"]]
    assert said(shy, corpus, ids) == 0
    attacked, seen = Jailbreak()(shy, corpus, taught, Bench())
    assert said(attacked, seen, ids) >= 0.7
    attacked, seen = Jailbreak()(never, corpus, taught, Bench())
    assert said(attacked, seen, ids) == 0
