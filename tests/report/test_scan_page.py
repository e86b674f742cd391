"""The page of a scan: what was found, how sure, against which chance level; honest where nothing can be seen; nothing runs."""

import re
from copy import deepcopy
from xml.etree import ElementTree

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from unremember.report.scan import FIRST, cautions, levels, marked, page, several, words, write


def passage(n: int, said: float | None = 1.0, forget: bool = True) -> dict:
    text = "Anna <b>Weiss</b> rang 012-3456."
    return {
        "id": f"d{n}@0-{len(text)}", "document": f"d{n}", "file": "a.jsonl", "bytes": [0, 90], "characters": [0, len(text)],
        "text": text, "spans": [[0, 4], [23, 31]], "sensitive": 2, "tokens": 12, "longest": 11, "score": 11.8, "p": 0.004,
        "q": 0.02, "run": 11.0, "match": 0.9, "strength": 0.8, "probability": -0.2, "min-k++": -0.1, "zlib": -0.02,
        "said": said, "windows": 2, "forget": forget,
    }  # fmt: skip


@pytest.fixture
def result() -> dict:
    return {
        "schema": "unremember.scan/1", "model": "a <model>", "control": None,
        "settings": {"alpha": 0.05, "score": "run", "least": 10, "prefix": 50, "says": 0.5},
        "documents": {"documents": 3, "characters": 900, "bad": 0, "problems": (), "ignored": 0, "digest": "d", "short": 0},
        "chance": {
            "kind": "holdout", "is": "windows of documents that the model never saw", "windows": 232,
            "smallest p": 1 / 233, "together at least": 9, "tokens a window": 30.0, "quantiles": [i / 10 for i in range(51)],
        },
        "windows": {
            "n": 96, "found": 24, "without a run": 0, "tokens a window": 32.0, "quantiles": [i / 5 for i in range(51)],
        },
        "passages": [passage(0), passage(1, 0.5), passage(1, None)], "left out": [], "forget": 3,
        "cost": {"tokens": 3000, "seconds": 2.0},
    }  # fmt: skip


def test_the_sentence_says_how_much_and_how_sure(result):
    text = words(result)
    assert text.startswith(
        "3 passages to forget, in 2 documents. 24 windows of 96 beat the windows of never-seen documents"
    )
    assert "at most about 1 window of these is expected to be chance" in text
    assert text.endswith("asked for 2 passages and said 1 of them word for word.")
    assert several(1, "window") == "1 window" and several(1200, "window") == "1,200 windows"


def test_shuffled_words_give_no_error_rate(result):
    result["chance"]["kind"] = "shuffled"
    assert "this is no error rate" in words(result) and "expected to be chance" not in words(result)
    assert "not asked for 1 passage, beyond the budget, and is not in the forget set for that" in cautions(result)[0]


def test_nothing_found_says_what_could_not_be_seen(result):
    result["windows"]["found"], result["passages"], result["forget"] = 0, [], 0
    assert words(result).startswith("Nothing was found: no window of 96 beats chance (232 windows)")
    assert "9 windows would have had to beat all of it together" in words(result)
    assert "<h1>0 passages to forget</h1>" in page(result) and "None." in page(result)


def test_what_a_reader_should_know_first(result):
    assert [c[:27] for c in cautions(result)] == ["The model was not asked for"]
    result["chance"]["tokens a window"] = 12.0
    result["windows"]["without a run"] = 3
    result["documents"] |= {"short": 2, "bad": 1, "problems": ("a.jsonl:2: empty",), "ignored": 4}
    result["left out"] = ["example 'x' is too long"]
    text = " ".join(cautions(result))
    for part in (
        "12 tokens and scanned ones 32", "3 windows beat chance without a run of 10", "2 documents shorter",
        "1 problem with documents, which were left out: a.jsonl:2: empty", "4 files with other", "'x' is too long",
    ):  # fmt: skip
        assert part in text, part
    assert all(part in page(result).replace("&#39;", "'") for part in ("a.jsonl:2: empty", "'x' is too long"))


def test_spans_are_marked_and_the_text_is_whole(result):
    pieces = marked(result["passages"][0])
    assert "".join(piece for piece, _ in pieces) == result["passages"][0]["text"]
    assert [piece for piece, span in pieces if span] == ["Anna", "012-3456"]


def test_the_drawing_is_svg(result):
    ElementTree.fromstring(levels(result))
    assert "longest run" in levels(result)


def test_the_page_needs_nothing_runs_nothing_and_escapes_all(result, tmp_path):
    text = write(result, tmp_path).read_text(encoding="utf-8")
    assert "a &lt;model&gt;" in text and "&lt;b&gt;" in text and "<b>Weiss" not in text
    assert "<mark>012-3456</mark>" in text and "1,500 a second" in text
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", text)
    assert "above control" not in text
    with_control = deepcopy(result) | {"control": "never"}
    for x in with_control["passages"]:
        x["reference"] = 1.25
    assert "above control" in page(with_control) and "1.250" in page(with_control)


def test_a_long_list_is_cut_and_says_so(result):
    result["passages"] = [passage(i) for i in range(FIRST + 5)]
    text = page(result)
    assert text.count("<mark>012-3456</mark>") == FIRST and f"the first {FIRST} of {FIRST + 5}" in text
