"""The study as a whole: one command, resumable, judged and drawn."""

import dataclasses
import json

import pytest

from unremember.dynamics import claims, study, write
from unremember.dynamics.curves import Time
from unremember.errors import BadRequest

SMALL = study.Study(
    widths=(16, 32), encoders=(16,), seeds=1, sequences=16, length=12, held=8, special=4, lr=1e-2, masked_lr=1e-2,
    epochs=3, masked_epochs=2, middle=16, sizes=(8,), rates=(3e-3, 3e-2), rated=(16,), insert=2, after=6, early=1, late=0,
    repeats=(1, 2), random=(16,), digits=4, planted=2, speech=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """SMALL, run once: the folder and the result."""
    folder = tmp_path_factory.mktemp("study") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(study.PRESETS, "small", SMALL)
        return folder, study.run("small", folder)


def test_one_command_makes_every_cell_and_its_numbers(done):
    folder, result = done
    assert len(result["rows"]) == len(list(study.cells(SMALL))) == len(list((folder / "cells").iterdir()))
    assert {row["experiment"] for row in result["rows"]} == set(study.EXPERIMENTS) - {"speech"}
    assert json.loads((folder / "dynamics.json").read_text())["rows"][0]["seconds"] >= 0


def test_an_interrupted_study_goes_on_where_it_stopped(done, monkeypatch):
    folder, result = done
    monkeypatch.setitem(study.PRESETS, "small", SMALL)
    gone = sorted((folder / "cells").iterdir())[0]
    gone.unlink()
    made = []
    again = study.run("small", folder, say=lambda what, n, total: made.append(what))
    assert len(made) == 1 and gone.exists()

    def bare(found):
        return json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in found["rows"]], sort_keys=True)

    assert bare(again) == bare(result)  # the same numbers, bit for bit


def test_other_settings_share_nothing_with_what_is_there(done, monkeypatch):
    folder, _ = done
    kept = {file.name for file in (folder / "cells").iterdir()}
    other = dataclasses.replace(SMALL, lr=2e-2)
    names = {f"{study.fingerprint(study.SCHEMA, dataclasses.asdict(other), c)}.json" for c in study.cells(other)}
    assert not names & kept


def test_every_claim_is_judged_and_the_page_draws_every_figure(done):
    folder, result = done
    found = claims.judge(result)
    assert len(found) == len(claims.CLAIMS) and len({c.name for c in found}) == len(found)
    assert {c.name for c in found if c.n == 0} == {"speech"} and next(
        c for c in found if c.name == "speech"
    ).holds is None
    page = write(result, folder).read_text(encoding="utf-8")
    assert page.count("<svg") >= 12 and "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("n = 1 seed") == page.count("<figure>") and result["machine"] in page
    assert write(result, folder).read_text(encoding="utf-8") == page


def test_a_threshold_that_was_never_reached_counts_against_who_did_not_reach_it():
    reached, never = Time(9, 10), Time(20, None)
    assert claims.faster([reached], [never]) and not claims.faster([never], [reached])
    assert not claims.faster([never], [never])
    assert claims.faster([reached], [Time(12, 13)], 0.8) and not claims.faster([reached], [Time(11, 12)], 0.8)
    assert not claims.faster([reached, never], [never, never])


def test_a_size_claim_needs_every_seed():
    def row(width, seed, epochs):
        return {
            "experiment": "size",
            "kind": "causal",
            "width": width,
            "seed": seed,
            "m": [0.1] * (epochs - 1) + [0.95],
        }

    result = {"study": {"widths": (32, 64)}, "rows": [row(32, 0, 10), row(64, 0, 5), row(32, 1, 10), row(64, 1, 7)]}
    assert claims.size(result).holds and "width 32: 10/10" in claims.size(result).numbers
    result["rows"][-1] = row(64, 1, 8)
    assert claims.size(result).holds is False and claims.size(result).n == 2


def test_bad_settings_are_refused_before_anything_runs(tmp_path, monkeypatch):
    with pytest.raises(BadRequest, match="did you mean 'quick'"):
        study.run("quik", tmp_path / "a")
    monkeypatch.setitem(study.PRESETS, "bad", dataclasses.replace(SMALL, widths=(20,), digits=11))
    with pytest.raises(BadRequest, match=r"width 20(.|\n)*digits = 11"):
        study.run("bad", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="seeds"):
        study.Study(seeds=0)


def test_two_processes_give_the_same_numbers_as_one(tmp_path, done):
    few = dataclasses.replace(SMALL, encoders=(), sizes=(), rates=(), early=0, planted=0, repeats=(), random=())
    wanted = list(study.cells(few))[:2]
    two = dict(study._worked(few, wanted, [0, 1], 2))
    for i, cell in enumerate(wanted):
        one = study.measure(few, cell)
        assert {k: v for k, v in two[i].items() if k != "seconds"} == {k: v for k, v in one.items() if k != "seconds"}


def test_sentences_are_parted_once_and_for_all():
    train, held = study.sentences(0)
    assert not set(train) & set(held) and len(held) == (len(train) + len(held)) // 5
    assert study.sentences(0) == (train, held) != study.sentences(1)
