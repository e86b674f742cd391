"""The page of a comparison: a row a method, honest about what failed, and nothing that runs."""

import re
from copy import deepcopy
from xml.etree import ElementTree

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from unremember.report.pareto import csv, ends, lines, markdown, methods, page, paths, ranged, robust, spread, withstood


def row(method: str, seed: int, kept: float, reached: bool = True) -> dict:
    curve = [
        {"step": step, "r": r, "kept": k, "world": 0.9, "prose": 3.9}
        for step, r, k in ((0, 1.0, 1.0), (4, 0.4, 0.8), (8, 0.0 if reached else 0.3, kept))
    ]
    return {
        "method": method, "seed": seed, "failed": "", "verdicts": {"none": "forgotten", "relearn": "remembered"},
        "reasons": {"none": "at most 1% is left", "relearn": "a value <is> said"}, "reached": reached, "stop": "level",
        "steps": 8, "r": {"none": 0.01}, "kept": kept, "said": 1.0, "leaked": 0.0, "world": 0.81, "world before": 0.9,
        "prose": 0.02,
        "at": {"0.5": {"kept": 0.85, "world": 0.9, "prose": 3.9}, "0.25": None, "0.1": None}, "seconds": 60.0,
        "peak bytes": 3e9, "settings": {"beta": 0.1}, "curve": curve,
    }  # fmt: skip


@pytest.fixture
def result() -> dict:
    rows = [row("npo", 0, 0.9), row("npo", 1, 0.7), row("ascent", 0, 0.95, reached=False), row("ascent", 1, 0.5)]
    rows += [{"method": "wild", "seed": s, "failed": "training diverged at step 3"} for s in (0, 1)]
    return {
        "schema": "unremember.compare/1",
        "name": "a <b> test",
        "request": {},
        "roles": {"forget": 12},
        "rows": rows,
    }


def test_methods_that_reach_the_level_come_first_and_failures_last(result):
    assert list(methods(result)) == ["npo", "ascent", "wild"]
    first, second, last = lines(result)
    assert (first["reached"], second["reached"]) == (2, 1) and "reached" not in last
    assert first["kept"] == {"mean": pytest.approx(0.8), "low": 0.7, "high": 0.9, "n": 2}
    assert first["kept at 0.25"] is None and first["kept at 0.5"]["mean"] == pytest.approx(0.85)
    assert last["failed"] == ["training diverged at step 3"]


def test_spread_and_its_text_by_hand():
    assert spread([None, 1, 3]) == {"mean": 2.0, "low": 1.0, "high": 3.0, "n": 2} and spread([None]) is None
    assert ranged(spread([1, 3])) == "2.00 (1.00 to 3.00)" and ranged(spread([2])) == "2.00" and ranged(None) == "–"
    assert ranged(spread([-0.5]), "{:+.2f}") == "−0.50"


def test_the_table_of_numbers_has_a_row_a_job(result):
    head, *rows = csv(result).splitlines()
    assert len(rows) == 6 and head.startswith("method,seed,failed,reached") and "verdict relearn" in head
    assert all(len(line.split(",")) == len(head.split(",")) for line in rows)


def test_drawings_are_svg_with_a_panel_a_method(result):
    for drawn in (paths(result), paths(result, "world"), ends(result)):
        ElementTree.fromstring(drawn)
    assert "npo" in paths(result) and "wild" not in paths(result)


def test_the_page_needs_nothing_and_runs_nothing(result):
    text = page(result)
    assert "a &lt;b&gt; test" in text and "a value &lt;is&gt; said" in text and "training diverged" in text
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", text)


def test_nothing_but_failures_is_a_page_too(result):
    bad = deepcopy(result)
    bad["rows"] = bad["rows"][-2:]
    assert paths(bad) == ends(bad) == "" and "training diverged" in page(bad)


def test_methods_are_ordered_by_what_the_worst_attack_brings_back(result):
    for row, relearn in zip(result["rows"][:4], (0.2, 0.4, 0.1, 0.1), strict=True):
        row["r"] = {"none": 0.01, "relearn": relearn, "prune": None}
    result["rows"][0]["r"]["prune"] = 0.05  # applied with one seed alone
    ascent, npo = withstood(result)
    assert (ascent["method"], ascent["worst"], ascent["most"]) == ("ascent", "relearn", pytest.approx(0.1))
    assert npo["back"] == {"none": pytest.approx(0.01), "relearn": pytest.approx(0.3), "prune": pytest.approx(0.05)}
    words = " ".join(ElementTree.fromstring(robust(result)).itertext())
    assert "0.30" in words and "–" in words and words.index("ascent") < words.index("npo")
    assert "Robust forgetting" in page(result)
    head, first, *_ = csv(result).splitlines()
    named = dict(zip(head.split(","), first.split(","), strict=True))
    assert (named["R none"], named["R relearn"]) == ("0.01", "0.2")


def test_a_model_that_was_taken_apart_does_not_lead(result):
    for row, relearn in zip(result["rows"][:4], (0.2, 0.4, 0.1, 0.1), strict=True):
        row["r"] = {"none": 0.01, "relearn": relearn}
    result["rows"][3]["verdicts"] = {"none": "over-forgotten", "relearn": "over-forgotten"}  # ascent, one of two seeds
    assert [x["method"] for x in withstood(result)] == ["npo", "ascent"]
    assert "ascent †" in " ".join(ElementTree.fromstring(robust(result)).itertext())


def test_who_was_not_put_to_every_attack_comes_last_and_says_so(result):
    for row in result["rows"][:2]:
        row["verdicts"], row["r"] = row["verdicts"] | {"lens": "forgotten"}, {"none": 0.0, "relearn": 0.4, "lens": 0.1}
    for row in result["rows"][2:4]:
        row["r"] = {"none": 0.0, "relearn": 0.1}
    assert [(x["method"], x["few"]) for x in withstood(result)] == [("npo", 0), ("ascent", 1)]
    assert "relearn 0.10 (of 1)" in markdown(result) and "relearn 0.40 |" in markdown(result)


def test_without_attacks_there_is_no_such_drawing(result):
    for row in result["rows"][:4]:
        row["r"] = {"none": 0.01}
    assert robust(result) == "" and "Robust forgetting" not in page(result)


def test_the_table_for_a_readme_counts_verdicts_and_tells_failures(result):
    """Under attack a seed has the worst that was said of it: the second one's is under prune."""
    first, second = result["rows"][:2]
    first["verdicts"] = {"none": "forgotten", "relearn": "forgotten"}
    second["verdicts"] = {"none": "forgotten", "relearn": "forgotten", "prune": "remembered"}
    first["r"], second["r"] = {"none": 0.01, "relearn": 0.1}, {"none": 0.01, "relearn": -0.1, "prune": 0.26}
    head, _, npo, _, wild = markdown(result).splitlines()
    assert head.startswith("| method | level | unattacked | attacked | most back, R | facts kept |")
    assert npo.startswith(
        "| `npo` | 2 of 2 | forgotten | 1 forgotten, 1 remembered | prune 0.26 | 0.80 (0.70 to 0.90) | 0.81 | +0.02 |"
    )
    assert wild.startswith("| `wild` | failed: training diverged at step 3 |")
    assert len({row.count("|") for row in (head, npo, wild)}) == 1
