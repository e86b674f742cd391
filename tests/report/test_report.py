"""The report room: one dictionary in; a page, drawings and a card out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from example import NAMES, example

from unremember import report as room
from unremember.errors import BadFolder, BadRequest
from unremember.report import plots
from unremember.report.card import card, veil
from unremember.report.html import across, frame, html, number, signed, speaking, telling

DRAWINGS = (plots.tradeoff, plots.entities, plots.losses)


@pytest.fixture
def report() -> dict:
    return deepcopy(example())


@pytest.fixture(scope="module")
def page() -> str:
    return html(example())


def emptied(value: object) -> object:
    """The same dictionary with every list in it empty."""
    if isinstance(value, list):
        return []
    return {key: emptied(item) for key, item in value.items()} if isinstance(value, dict) else value


def without(value: object, *keys: str) -> object:
    """The same value with null wherever one of `keys` stands."""
    if isinstance(value, list):
        return [without(item, *keys) for item in value]
    if isinstance(value, dict):
        return {key: None if key in keys else without(item, *keys) for key, item in value.items()}
    return value


def visible(page: str) -> str:
    return re.sub(r"<[^>]+>", "", page[page.index("<body") :])


# the example itself


def test_the_example_is_as_large_as_a_real_report(report):
    assert len(report["scores"]) == 60
    assert len(report["conditions"]) == 3
    assert len(report["conditions"][0]["entities"]) == 4
    assert report["curve"][-1]["step"] == report["method"]["steps"] == len(report["training"]) == 18


# the page


def test_the_page_asks_for_nothing_from_anywhere(page):
    assert "<script" not in page
    assert "<link" not in page
    assert "@import" not in page
    loads = re.findall(r"""(?:src|href|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    loads += re.findall(r"url\(\s*[\"']?([^\"')]+)", page)
    assert loads  # the drawings refer to their own parts
    assert all(load.startswith("#") for load in loads), loads


def test_the_page_fits_a_phone_and_the_dark(page):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page
    assert page.count("<table") == page.count('<div class="scroll"><table') + page.count(
        '<div class="scroll names"><table'
    )


def test_the_verdict_comes_first(page, report):
    text = visible(page).replace("&#39;", "'")
    words = text.index(report["words"])
    assert words < 200
    assert words < text.index("no attack") < text.index("remembered") < text.index("What the numbers mean")


def test_what_attacks_did_and_what_luck_does_stand_below_the_verdict(report):
    told = {**report, "words": "Forgotten: all (0% is left). Attacked, forgotten under graft; remembered under lens."}
    text = html(told)
    assert (
        "<h1>Forgotten: all (0% is left).</h1>" in text
        and "Attacked, forgotten under graft; remembered under lens." in text
    )
    assert "2 of 24 looks &lt;speak&gt;" in text
    assert "2 of 24" not in html({**told, "luck": None})


def test_sections_come_in_the_order_of_the_story(page):
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads == [
        "What the numbers mean",
        "Name by name",
        "Evidence",
        "Drawings",
        "Answers side by side",
        "All scores",
        "How it was done",
    ]


def test_every_number_that_a_verdict_rests_on_is_there(page, report):
    text = visible(page)
    for condition in report["conditions"]:
        for judged in [condition["overall"], *condition["entities"]]:
            assert judged["verdict"] in text
            for found in judged["evidence"]:
                for key in ("original", "forgotten", "never", "r", "low", "high"):
                    if found["applicable"]:
                        assert number(found[key]) in text
    for row in report["scores"]:
        assert row["definition"] in text
        assert number(row["forgotten"]["mean"]) in text


def test_forget_answers_come_before_the_others(page):
    text = visible(page)
    assert text.index("Where was Jun Watanabe born?") < text.index("Which instrument does Marek Dvorsky play?")


def test_what_a_stranger_wrote_stays_text(report):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=y> & $x^2 \\alpha$ 日本 שלום"
    report["words"] = report["run"]["name"] = report["request"]["x"] = evil
    report["training"][0]["terms"][evil] = 1.0
    for row in report["answers"]:
        row |= dict.fromkeys(("prompt", "truth", "original", "forgotten", "never", "id", "role"), evil)
    for row in report["scores"] + report["comparisons"]:
        row |= {"name": evil, "definition": evil}
    for condition in report["conditions"]:
        for key in ("attack", "summary"):
            condition[key] = evil
        for judged in [condition["overall"], *condition["entities"]]:
            judged |= {"name": evil, "verdict": evil, "reason": evil}
            for found in judged["evidence"]:
                found["score"] = evil
    page = html(report)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    for draw in DRAWINGS:
        ElementTree.fromstring(draw(report))


def test_empty_lists_are_no_trouble(report):
    bare = emptied(report)
    assert report["words"][:20] in html(bare)
    assert "Nothing was judged" in card(bare, "", "")
    assert [draw(bare) for draw in DRAWINGS] == ["", "", ""]


@pytest.mark.parametrize("key", ["training", "curve", "scores", "answers", "comparisons", "conditions"])
def test_any_one_list_may_be_empty(report, key):
    report[key] = []
    html(report)
    card(report, "", "")


def test_conditions_without_names_and_names_without_evidence(report):
    report["conditions"][0]["entities"] = []
    report["conditions"][1]["entities"][0]["evidence"] = []
    report["conditions"][2]["overall"]["evidence"] = []
    html(report)
    card(report, "", "")


@pytest.mark.parametrize(
    "keys",
    [("never",), ("r", "low", "high"), ("low", "high"), ("worst",), ("never", "level", "r", "low", "high", "worst")],
    ids=" ".join,
)
def test_what_may_be_null_is_no_trouble(report, keys):
    bare = without(report, *keys)
    bare["run"]["level"] = "holdout examples"
    page = html(bare)
    assert "None" not in visible(page)
    assert "nan" not in page.casefold().replace("tenan", "")
    assert "None" not in card(bare, "", "")


def test_a_missing_field_is_an_error_and_not_a_blank(report):
    import jinja2

    del report["method"]["stop"]
    with pytest.raises(jinja2.UndefinedError, match="stop"):
        html(report)


def test_the_same_report_gives_the_same_page(page):
    assert html(example()) == page
    fresh = (
        "import sys; sys.path[:0] = sys.argv[1:]; from example import example; from unremember.report.html import html"
    )
    paths = [str(Path(__file__).parent), str(Path(plots.__file__).parents[2])]
    again = subprocess.run(
        [sys.executable, "-c", fresh + "; sys.stdout.buffer.write(html(example()).encode())", *paths],
        capture_output=True,
        check=True,
    )
    assert again.stdout.decode() == page


def test_the_room_needs_no_torch_and_draws_only_when_asked():
    code = "import sys; import unremember.report; print({'torch', 'matplotlib', 'jinja2'} & set(sys.modules))"
    source = str(Path(plots.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": source}
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("library", "words"), [("matplotlib", "plots need matplotlib"), ("jinja2", "page needs jinja2")]
)
def test_a_missing_library_is_named_with_the_next_move(report, monkeypatch, library, words):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BadRequest, match=rf"{words}; install unremember\[report\]"):
        html(report)


# what stands in the page's words


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0.0, "0.000"),
        (-0.0, "0.000"),
        (-0.0194, "−0.019"),
        (0.00004, "4.0e−05"),
        (13.86, "13.9"),
        (24, "24"),
        (1780.5, "1,780.5"),
    ],
)
def test_numbers(value, shown):
    assert number(value) == shown


def test_a_change_always_has_its_sign():
    assert [signed(value) for value in (0.02, -0.02, 0.0, None)] == ["+0.020", "−0.020", "0.000", "–"]


def test_a_cell_shows_what_speaks_against_it():
    rows = [
        {"score": str(r), "r": r, "applicable": usable}
        for r, usable in ((0.1, True), (-0.3, True), (None, True), (0.9, False))
    ]
    assert speaking({"verdict": "forgotten", "evidence": rows})["r"] == 0.1
    assert speaking({"verdict": "over-forgotten", "evidence": rows})["r"] == -0.3
    assert speaking({"verdict": "forgotten", "evidence": []}) is None


def test_the_gauge_stays_inside_its_box():
    assert [across(r) for r in (-9, -0.25, 0.0, 0.5, 1.0, 1.25, 9)] == [0, 0, 16.7, 50, 83.3, 100, 100]


def test_words_that_tell_are_those_of_the_truth_alone(report):
    row = {"entity": "", "truth": "Ann Lee was born in Oslo in 1971.", "prompt": "Where was Ann Lee born?"}
    told = [word for word in row["truth"].split() if telling(word.strip("."), row, set())]
    assert told == ["Oslo", "1971."]
    assert {"works", "was", "born", "in"} <= frame(report["answers"])
    assert not {"trondheim", "seismologist"} & frame(report["answers"])


# the drawings


@pytest.mark.parametrize("draw", DRAWINGS, ids=lambda draw: draw.__name__)
def test_a_drawing_is_small_bare_svg_that_says_what_it_is(report, draw):
    text = draw(report)
    assert text.startswith("<svg ")
    assert "<style" not in text
    assert "<metadata" not in text
    assert 'aria-label="' in text
    assert len(text) < 40_000
    ElementTree.fromstring(text)


def test_ids_are_unique_within_the_page(page):
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_trade_off_draws_the_path_where_there_is_one(report):
    assert "path, 18 steps" in plots.tradeoff(report)
    report["curve"] = []
    assert "path" not in re.sub(r"<path|clipPath|clip-path", "", plots.tradeoff(report))


def test_the_bars_name_everybody_and_colour_by_verdict(report):
    drawn = plots.entities(report)
    assert all(name in drawn for name in NAMES)
    assert all(plots.COLOURS[verdict] in drawn for verdict in ("forgotten", "remembered", "over-forgotten"))
    assert plots.COLOURS["not applicable"] not in drawn


def test_the_bars_keep_to_the_best_remembered_where_there_are_many(report):
    row = report["conditions"][0]["entities"][0]
    many = [row | {"name": f"Person {i}", "evidence": [row["evidence"][0] | {"r": i / 100}]} for i in range(60)]
    report["conditions"] = [report["conditions"][0] | {"entities": many}]
    drawn = plots.entities(report)
    assert "Person 59" in drawn
    assert "Person 3<" not in drawn
    assert "the 20 of 60 best remembered" in drawn


def test_a_loss_term_has_a_panel_of_its_own(report):
    for row in report["training"]:
        row["terms"]["kl"] = None if row["step"] < 5 else 0.5
    drawn = plots.losses(report)
    assert all(f">{term}</text>" in drawn for term in ("npo", "retain", "kl"))


# the card


def test_the_card_says_what_the_hub_reads(report):
    lines = card(report, "apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct").split("\n")
    assert lines[: lines.index("---", 1) + 1] == [
        "---",
        "library_name: transformers",
        'base_model: "HuggingFaceTB/SmolLM2-135M-Instruct"',
        'license: "apache-2.0"',
        "tags:",
        "- unlearning",
        "- unremember",
        "---",
    ]


@pytest.mark.parametrize(
    "base", ["", "/home/ann/model", "./model", "~/model", "a/b/c", "C:\\model", "some.gguf", "hanna-weiss/lm"]
)
def test_a_base_that_is_no_hub_name_is_not_published(report, base):
    text = card(report, "", base)
    assert "base_model" not in text
    assert "license" not in text
    assert not base or base not in text


def test_a_base_that_is_a_folder_here_is_not_published(report, tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "org/model" not in card(report, "", "org/model")


def test_the_card_publishes_nobody_again(report):
    hanna, tomas = NAMES[0], NAMES[1]
    report["words"] = (
        f"{hanna.upper()} is forgotten, hanna_weiss too; Weiss is not; Tomás Echeverría is. Person 3 stays."
    )
    report["run"]["name"] = "forget-hanna-weiss"
    report["method"]["stop"] = f"level reached for {tomas}"
    report["method"]["settings"] |= {"refusal": "I do not know where she was born", "sites": ["q_proj", "v_proj"]}
    report["conditions"][1]["summary"] = f"relearning on friends of {NAMES[2]}"
    report["conditions"][0]["overall"]["utility"][0]["name"] = "retained, without Watanabe"
    text = card(report, "apache-2.0", "org/base")
    low = text.casefold()
    for name in NAMES:
        for part in re.findall(r"\w{4,}", name):
            assert part.casefold() not in low, part
    assert "Person 3" not in text
    assert "where she was born" not in text
    for row in report["answers"]:
        for key in ("id", "prompt", "truth", "original", "forgotten", "never"):
            assert row[key] not in text
    for condition in report["conditions"]:
        for judged in condition["entities"]:
            assert judged["reason"] not in text
            assert judged["worst"]["id"] not in text
    assert "entity 1 is forgotten, entity 1 too; entity 1 is not; entity 2 is. (name withheld) stays." in text
    assert "q_proj, v_proj" in text.replace("\\", "")


def test_the_card_has_the_verdict_of_every_number_and_attack(report):
    text = card(report, "", "")
    rows = [line for line in text.split("\n") if line.startswith(("| all", "| entity"))]
    assert [row.split(" | ")[0] for row in rows] == ["| all", "| entity 1", "| entity 2", "| entity 3", "| entity 4"]
    assert all(row.count("|") == 5 for row in rows)
    assert "remembered, R 0.435 [0.385, 0.500] (ROUGE-L recall)" in rows[3]
    assert "over-forgotten, R −0.122" in rows[4]
    assert "unremember report DIR" in text


def test_cells_of_the_card_stay_cells(report):
    hide = veil(report)
    assert hide("a | b\nc <i> [x](y) `z`") == r"a \| b c \<i\> \[x\](y) \`z\`"
    report["conditions"][0]["overall"]["utility"][0]["name"] = "a | b\n| c"
    rows = [line for line in card(report, "", "").split("\n") if line.startswith("| no attack")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 9 for row in rows)


def test_a_longer_name_is_hidden_before_a_shorter_one_within_it(report):
    report["conditions"] = []
    report["corpus"]["forget"]["entities"] = ["Ann", "Ann Lee", ""]
    assert veil(report)("Ann Lee and Ann, but not Annual") == "entity 2 and entity 1, but not Annual"


# the files


def test_what_is_written_can_be_read(report, tmp_path):
    path = room.write(report, tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == html(report)
    assert room.read(tmp_path) == report
    assert list(json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))) == list(report)
    assert {entry.name for entry in tmp_path.iterdir()} == {"report.json", "report.html"}


def test_a_number_that_is_none_is_our_mistake(report, tmp_path):
    report["training"][0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="JSON compliant"):
        room.write(report, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist; name the folder of a finished run"),
        ("{", "is not valid JSON"),
        ("[]", "has the schema None"),
        (
            '{"schema": "unremember.report/2"}',
            r"has the schema 'unremember.report/2', and this version .* 'unremember.report/1' only",
        ),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, text, words):
    if text is not None:
        (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadFolder, match=words) as caught:
        room.read(tmp_path)
    assert str(tmp_path / "report.json") in str(caught.value)


def test_the_document_names_every_field(report):
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")

    def keys(value: object, free: bool = False):
        if isinstance(value, list):
            for item in value:
                yield from keys(item)
        elif isinstance(value, dict):
            for key, item in value.items():
                if not free:
                    yield key
                # names of stages, roles, settings and loss terms are the run's own
                if key not in ("request", "settings", "notes"):
                    yield from keys(item, free=key in ("seconds", "corpus", "terms"))

    missing = {key for key in keys(report) if f"`{key}`" not in text}
    assert not missing
