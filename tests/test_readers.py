"""Readers: the formats, TOFU as it really is, and every problem with its place."""

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus
from unremember.readers import Source, read, write_jsonl

TOFU = Path(__file__).parents[2] / "shared" / "data" / "tofu"
needs_tofu = pytest.mark.skipif(not TOFU.is_dir(), reason=f"no TOFU data in {TOFU}")


@pytest.fixture
def put(tmp_path):
    """put(name, text or bytes or rows) -> the file."""

    def write(name: str, content: str | bytes | list) -> Path:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write


def problems(file: Path, **how) -> tuple[str, ...]:
    """What is wrong, with the folder cut off."""
    with pytest.raises(BadCorpus) as raised:
        read(Source(file, **how))
    return tuple(problem.replace(f"{file.parent}{os.sep}", "") for problem in raised.value.problems)


# ── JSON ──

FULL = {
    "id": "a",
    "prompt": "Who?",
    "answer": "Ada Byron.",
    "entity": "Ada",
    "spans": [[0, 3], [4, 9]],
    "paraphrases": ["Which one?"],
    "rewording": "It was Ada Byron.",
    "distractors": ["Bob.", "Eve."],
}
EXAMPLE = Example(
    "a", "Who?", "Ada Byron.", "Ada", ((0, 3), (4, 9)), ("Which one?",), "It was Ada Byron.", ("Bob.", "Eve.")
)


def test_every_field_of_our_schema(put):
    assert read(Source(put("x.jsonl", [FULL]))) == (EXAMPLE,)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.JSONL"])
def test_content_and_not_the_name_says_list_or_lines(put, name):
    rows = [FULL, {**FULL, "id": "b"}]
    assert len(read(Source(put(name, rows)))) == 2
    assert len(read(Source(put(name, "\n" + json.dumps(rows, indent=2))))) == 2


def test_ids_count_rows_and_the_entity_fills_in(put):
    file = put("facts.jsonl", '{"prompt":"a?","answer":"a"}\n\n{"prompt":"b?","answer":"b","entity":"Bob"}\n')
    first, second = read(Source(file, entity="Ada"))
    assert (first.id, first.entity) == ("facts/1", "Ada")
    assert (second.id, second.entity) == ("facts/2", "Bob")


def test_limit_takes_the_first_rows_and_looks_no_further(put):
    file = put("x.jsonl", '{"prompt":"a?","answer":"a"}\n{"prompt":"b?","answer":"b"}\nnot json\n')
    assert [x.answer for x in read(Source(file, limit=2))] == ["a", "b"]
    assert problems(file, limit=3) and problems(file)
    assert "limit is -1" in problems(file, limit=-1)[0]


def test_lines_end_at_line_feeds_only(put):
    text = "a\u2028b\u2029c\x85d\x0be"
    file = put("x.jsonl", json.dumps({"prompt": "?", "answer": text}, ensure_ascii=False) + "\r\n")
    assert read(Source(file))[0].answer == text


def test_null_is_absent(put):
    file = put("x.jsonl", [{"id": None, "prompt": "?", "answer": "a", "entity": None, "spans": None}])
    assert read(Source(file)) == (Example("x/1", "?", "a"),)


def test_a_byte_order_mark_is_tolerated(put):
    assert read(Source(put("x.jsonl", b'\xef\xbb\xbf{"prompt":"?","answer":"\xc3\xa9"}')))[0].answer == "é"


def test_tofu_keys(put):
    row = {
        "question": "Who?",
        "answer": "Ada.",
        "paraphrased_question": "Which one?",
        "paraphrased_answer": "It was Ada.",
        "perturbed_answer": ["Bob.", "Eve."],
        "option1": "Ada",
        "option2": "Bob",
    }
    expected = Example("x/1", "Who?", "Ada.", "", (), ("Which one?",), "It was Ada.", ("Bob.", "Eve."))
    assert read(Source(put("x.json", [row]))) == (expected,)
    [listed] = read(Source(put("x.json", [{**row, "paraphrased_question": ["1?", "2?"], "perturbed_answer": "Bob."}])))
    assert (listed.paraphrases, listed.distractors) == (("1?", "2?"), ("Bob.",))


def test_the_source_may_name_the_keys(put):
    file = put("x.jsonl", [{"q": "Who?", "a": "Ada."}])
    assert read(Source(file, question="q", answer="a")) == (Example("x/1", "Who?", "Ada."),)
    turned = put("y.jsonl", [{"question": "Ada.", "answer": "Who?"}])
    assert read(Source(turned, question="answer", answer="question")) == (Example("y/1", "Who?", "Ada."),)
    prose = put("z.jsonl", [{"text": "Some prose."}])
    assert read(Source(prose, question="", answer="text")) == (Example("z/1", "", "Some prose."),)


# ── what is wrong with a row ──


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": 3, "answer": "a"}, "x.jsonl:1: 'prompt' must be text, not 3"),
        ({"prompt": ["?"], "answer": "a"}, "x.jsonl:1: 'prompt' must be text, not [\"?\"]"),
        ({"id": 7, "prompt": "?", "answer": "a"}, "x.jsonl:1: 'id' must be text, not 7"),
        ({"prompt": "\ud800", "answer": "a"}, "x.jsonl:1: 'prompt' must be text, not \"\\ud800\""),
        ({"prompt": "?", "answer": "a" * 3, "spans": [[0, 1.5]]}, "'spans' must be a list of [start, end] pairs"),
        ({"prompt": "?", "answer": "a" * 3, "spans": [[0, True]]}, "'spans' must be a list of [start, end] pairs"),
        ({"prompt": "?", "answer": "a" * 3, "spans": [0, 1]}, "'spans' must be a list of [start, end] pairs"),
        ({"prompt": "?", "answer": "a" * 3, "spans": [[0, 1, 2]]}, "'spans' must be a list of [start, end] pairs"),
        ({"prompt": "?", "answer": "a" * 3, "spans": [[0, 4]]}, "span [0, 4] lies outside its answer of 3 characters"),
        ({"prompt": "?", "answer": "a", "distractors": [1]}, "'distractors' must be text or a list of texts"),
        ({"prompt": "?", "answer": "a", "distractors": ["a"]}, "the distractor 'a' is the right answer"),
        ({"question": "?", "answer": "a", "perturbed_answer": [""]}, "'perturbed_answer' must be text or a list"),
        ({"prompt": "?", "answer": "a", "paraphrases": {"a": 1}}, "'paraphrases' must be text or a list of texts"),
        ({"prompt": "?", "answer": "a", "entiy": "Ada"}, "unknown key 'entiy'; did you mean 'entity'?"),
        ({"question": "?", "answer": "a", "perturbed_anwser": []}, "did you mean 'perturbed_answer'?"),
        ({"prompt": "?", "question": "?", "answer": "a"}, "'prompt' and 'question' both give the prompt; keep one"),
        ({"prompt": "?"}, "x.jsonl:1: no 'answer'; add it"),
        ({"answer": "a"}, "x.jsonl:1: no 'prompt' and no 'question'; add one"),
        ({"prompt": None, "answer": "a"}, "x.jsonl:1: no 'prompt' and no 'question'; add one"),
        ({"prompt": "?", "answer": " "}, "x.jsonl:1: example 'x/1' has an empty answer"),
        ({"id": "", "prompt": "?", "answer": "a"}, "x.jsonl:1: an example has an empty id"),
        ("text", "x.jsonl:1: a row must be an object"),
        (None, "x.jsonl:1: a row must be an object"),
    ],
)
def test_a_bad_row_is_named_with_its_line(put, row, said):
    [problem] = problems(put("x.jsonl", [row]))
    assert said in problem


def test_all_problems_of_a_file_come_together_in_order(put):
    file = put(
        "x.jsonl",
        '{"id":"a","prompt":"?","answer":"a"}\n{"id":"b"\n\n{"id":"a","prompt":"?","answr":"c"}\n'
        '{"id":"a","prompt":"?","answer":"d"}\n[1]\n',
    )
    found = problems(file)
    assert [int(problem.split(":")[1]) for problem in found] == [2, 4, 4, 5, 6]
    assert "not JSON" in found[0] and "'answer'" in found[1]
    assert "the id 'a' is already taken by x.jsonl:1" in found[3]


def test_problems_in_a_list_count_rows_and_broken_lists_say_the_line(put):
    assert problems(put("x.json", '[{"prompt":"?","answer":"a"},\n{"prompt":"?"}]'))[0].startswith("x.json, row 2: ")
    [broken] = problems(put("x.json", '[{"prompt":"?","answer":"a"},\n{"prompt":"?",}]'))
    assert broken.startswith("x.json:2: not JSON")


def test_twenty_problems_are_shown_and_the_rest_counted(put):
    found = problems(put("x.jsonl", "{\n" * 50))
    assert len(found) == 21 and found[-1] == "... and 30 more"
    assert len(problems(put("x.jsonl", "{\n" * 20))) == 20


def test_absurd_nesting_is_a_problem_and_no_crash(put):
    assert "not JSON" in problems(put("x.jsonl", "[" * 200_000))[0]
    assert "not JSON" in problems(put("x.jsonl", '{"a":' * 200_000))[0]


# ── what is wrong with a file ──


def test_a_missing_file_names_its_nearest_neighbour(put, tmp_path):
    assert "holds no corpus file" in problems(tmp_path / "forget.jsonl")[0]
    put("forget10.jsonl", "{}")
    [problem] = problems(tmp_path / "forget1.jsonl")
    assert problem == "forget1.jsonl does not exist; did you mean 'forget10.jsonl'?"
    assert "nor does the folder" in problems(tmp_path / "nowhere" / "forget.jsonl")[0]


def test_formats_that_are_not_read_are_refused_with_those_that_are(put, tmp_path):
    [problem] = problems(put("x.xlsx", b"PK"))
    assert "'.xlsx'" in problem and ".parquet" in problem
    assert "'no suffix'" in problems(put("corpus", "a"))[0]
    (tmp_path / "folder.json").mkdir()
    assert "is not a file" in problems(tmp_path / "folder.json")[0]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt"])
@pytest.mark.parametrize("content", ["", " \n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_a_problem(put, name, content):
    assert "x" in problems(put(name, content))[0] and "is empty" in problems(put(name, content))[0]


def test_a_file_without_rows_is_a_problem(put):
    assert "no rows" in problems(put("x.json", "[]"))[0]
    assert "no rows" in problems(put("x.csv", "question,answer\n"))[0]


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.txt"])
def test_other_encodings_are_named_with_the_line(put, name):
    [problem] = problems(put(name, "a\ncafé".encode("latin1")))
    assert problem.startswith(f"{name}:2: byte 0xe9 is not UTF-8")
    assert "0xff" in problems(put(name, "question,answer\n".encode("utf-16")))[0]


# ── text and tables ──


def test_text_is_passages_between_blank_lines(put):
    file = put("prose.txt", "\n\nOne line.\r\nAnother.\r\n \t\r\n\n  Second,\n\u2028indented.")
    first, second = read(Source(file, entity="Ada"))
    assert first == Example("prose/1", "", "One line.\nAnother.", "Ada")
    assert second.answer == "  Second,\n\u2028indented."


@pytest.mark.parametrize(("name", "tab"), [("x.csv", ","), ("x.tsv", "\t")])
def test_tables_by_named_columns(put, name, tab):
    lines = [
        ["n", "q", "a", "id", "entity"],
        ["1", "Who?", '"Ada,\n""Countess"""', "one", ""],
        ["2", "B?", "b", "", "Bob"],
    ]
    file = put(name, "\r\n".join(tab.join(line) for line in lines))
    assert read(Source(file, question="q", answer="a", entity="Ada")) == (
        Example("one", "Who?", 'Ada,\n"Countess"', "Ada"),
        Example("x/2", "B?", "b", "Bob"),
    )
    assert read(Source(file, question="", answer="q", limit=1)) == (Example("one", "", "Who?"),)


def test_bad_tables(put):
    found = problems(put("x.csv", "Question,text\na,b\n"))
    assert "no column 'question'; did you mean 'Question'?" in found[0] and "no column 'answer'" in found[1]
    assert "2 columns 'answer'" in problems(put("x.csv", "question,answer,answer\na,b,c\n"))[0]
    found = problems(put("x.csv", 'question,answer\n"a\nb",c\nd\n\ne,\nf,"g'))
    assert found[0].startswith("x.csv:4: 1 cells under a header of 2")
    assert found[1].startswith("x.csv:6: example 'x/2' has an empty answer")
    assert found[2].startswith("x.csv:7: not CSV")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"q": ["A?", "B?"], "a": ["a", "b"], "id": [7, None], "other": [0.5, 1]}), file)
    assert read(Source(file, question="q", answer="a")) == (Example("7", "A?", "a"), Example("x/2", "B?", "b"))
    assert len(read(Source(file, question="q", answer="a", limit=1))) == 1
    assert len(problems(file)) == 2
    assert problems(file, question="q", answer="other")[0].startswith("x.parquet, row 1: 'other' must be text, not 0.5")
    file.write_bytes(b"PAR1 and then nothing")
    assert "cannot be read as Parquet" in problems(file)[0]


def test_parquet_without_pyarrow_says_what_to_install(put, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'unremember[tables]'" in problems(put("x.parquet", b"PAR1"))[0]


# ── writing ──

text = st.text(st.characters(exclude_categories=["Cs"]))
words = text.filter(str.strip)


@st.composite
def examples(draw) -> Example:
    answer = draw(words)
    places = st.integers(0, len(answer))
    spans = st.tuples(places, places).filter(lambda span: span[0] < span[1])
    return Example(
        id=draw(text.filter(bool)),
        prompt=draw(text),
        answer=answer,
        entity=draw(text),
        spans=tuple(draw(st.lists(spans, max_size=3))),
        paraphrases=tuple(draw(st.lists(words, max_size=3))),
        rewording=draw(text),
        distractors=tuple(draw(st.lists(words.filter(lambda wrong: wrong.strip() != answer.strip()), max_size=3))),
    )


@given(rows=st.lists(examples(), min_size=1, max_size=5, unique_by=lambda x: x.id))
def test_what_is_written_is_read_back(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("written") / "x.jsonl"
    write_jsonl(rows, file)
    assert read(Source(file)) == tuple(rows)
    assert file.read_bytes().count(b"\n") == len(rows)


def test_empty_optional_fields_are_not_written(tmp_path):
    write_jsonl(iter([Example("é", "", "ü")]), tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").read_text(encoding="utf-8") == '{"id": "é", "prompt": "", "answer": "ü"}\n'


# ── TOFU as it is published ──


@needs_tofu
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("full", 4000),
        ("forget01", 40),
        ("forget10", 400),
        ("forget10_perturbed", 400),
        ("retain90", 3600),
        ("retain_perturbed", 400),
        ("holdout10", 400),
        ("real_authors", 100),
        ("real_authors_perturbed", 100),
        ("world_facts", 117),
        ("world_facts_perturbed", 117),
    ],
)
def test_tofu_has_its_published_sizes(name, rows):
    found = read(Source(TOFU / f"{name}.jsonl"))
    assert len(found) == rows
    assert found[0].id == f"{name}/1" and found[-1].id == f"{name}/{rows}"
    assert all(x.prompt and x.answer for x in found)


@needs_tofu
def test_tofu_perturbed_rows_have_everything_and_read_back(tmp_path):
    found = read(Source(TOFU / "forget10_perturbed.jsonl"))
    assert all(len(x.distractors) == 5 and len(x.paraphrases) == 1 and x.rewording for x in found)
    plain = read(Source(TOFU / "forget10.jsonl"))
    assert [(x.prompt, x.answer) for x in found] == [(x.prompt, x.answer) for x in plain]
    write_jsonl(found, tmp_path / "again.jsonl")
    assert read(Source(tmp_path / "again.jsonl")) == found


@needs_tofu
def test_tofu_named_json_is_read_too(tmp_path):
    (tmp_path / "forget01.json").write_bytes((TOFU / "forget01.jsonl").read_bytes())
    assert read(Source(tmp_path / "forget01.json")) == read(Source(TOFU / "forget01.jsonl"))


@needs_tofu
def test_tofu_makes_a_corpus():
    corpus = Corpus(
        {
            "forget": read(Source(TOFU / "forget10_perturbed.jsonl")),
            "retain": read(Source(TOFU / "retain90.jsonl")),
            "holdout": read(Source(TOFU / "holdout10.jsonl")),
            "world": read(Source(TOFU / "world_facts_perturbed.jsonl")),
        }
    )
    assert len(corpus.of("forget", "retain")) == 4000
