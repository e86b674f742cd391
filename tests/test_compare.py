"""Comparisons: one request a method and seed, made once, at matched forgetting."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from unremember import compare as room
from unremember import matched
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.embedded.world import world
from unremember.errors import BadRequest, Diverged
from unremember.folder import claim, read_json, write_json
from unremember.forget import METHODS

RAW = {
    "compare": {"out": "out", "methods": ["npo", "wga"], "seeds": [0], "worlds": 20},
    "model": {"name": "tiny", "precision": "fp32"},
    "teach": {"replay": 1.0, "plan": {"steps": 60, "lr": 1e-2, "batch": 10, "beside": 4, "schedule": "linear"}},
    "corpus": {"dossier": {"forget": 2, "retain": 3, "holdout": 4, "relearn": 1}},
    "forget": {"part": "span", "retain": 3.0, "plan": {"steps": 40, "lr": 2e-3, "stop": "probability", "every": 2}},
    "method": {"wga": {"alpha": 0.5}},
}


def raw(**tables) -> dict:
    return json.loads(json.dumps(RAW)) | tables


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """A small comparison, done once."""
    out = tmp_path_factory.mktemp("compare") / "out"
    whole = room.checked(raw(compare=RAW["compare"] | {"out": str(out)}))
    titles: list[str] = []
    result = room.compare(whole, Bench(), titles.append, inside=True)
    return whole, result, titles


def test_each_method_starts_from_the_same_model_and_ends_at_the_level(done):
    whole, result, _ = done
    npo, wga = result["rows"]
    assert (npo["method"], wga["method"]) == ("npo", "wga") and npo["settings"] != wga["settings"]
    assert wga["settings"]["alpha"] == 0.5 and wga["settings"]["part"] == npo["settings"]["part"] == "span"
    for row in result["rows"]:
        assert not row["failed"] and row["curve"][0] == pytest.approx(npo["curve"][0]) and row["curve"][0]["r"] == 1.0
        assert row["reached"] and row["curve"][-1]["r"] < 0.3 and row["steps"] == row["curve"][-1]["step"] < 40
        assert all(0 < p["world"] <= 1 and p["prose"] > 0 for p in row["curve"]), "every look saw general ability"
        assert row["seconds"] > 0 and row["peak bytes"] > 1e8
    originals = {(whole.out / "seed-0" / m / "audit" / "original.json").read_bytes() for m in ("npo", "wga")}
    assert len(originals) == 1
    page = room.write(result, whole.out)
    assert page.exists() and (whole.out / "compare.csv").read_text().count("\n") == 3


def test_every_method_folder_is_an_ordinary_run(done):
    from unremember.report import build

    whole, result, _ = done
    report = build(whole.out / "seed-0" / "npo")
    assert report["conditions"][0]["overall"]["verdict"] == result["rows"][0]["verdicts"]["none"]


def test_a_second_comparison_makes_nothing_again_and_a_change_only_what_it_touches(done, monkeypatch):
    whole, result, _ = done
    titles: list[str] = []
    assert room.compare(whole, Bench(), titles.append, inside=True) == result and titles == []
    other = room.checked({**whole.raw, "method": {"wga": {"alpha": 1.0}}})
    monkeypatch.setattr(room, "work", lambda job, device: titles.append(job.method))
    with pytest.raises((KeyError, TypeError, ValueError, OSError)):  # nothing was made, so there is no cost to read
        room.compare(other, Bench(), lambda _: None, inside=True)
        raise ValueError
    assert titles == ["wga"]


def test_rows_stand_for_folders_that_are_gone_and_calls_add_up(done, monkeypatch, tmp_path):
    """From compare.json alone, in another place: nothing is taught or made again; another method alone is asked for."""
    _, result, _ = done
    out = tmp_path / "elsewhere"
    out.mkdir()
    claim(out)
    write_json(out / "compare.json", result)
    again = room.checked(raw(compare=RAW["compare"] | {"out": str(out)}))
    made: list[tuple[str, ...]] = []
    monkeypatch.setattr(room, "prepared", lambda whole, methods, *_: made.append(tuple(methods)) or [])
    assert room.compare(again, Bench(), inside=True)["rows"] == result["rows"] and not made
    with pytest.raises(KeyError):  # nothing was made, so there is no row
        room.compare(room.checked(raw(compare=again.raw["compare"] | {"methods": ["wga", "simnpo"]})), inside=True)
    assert made == [("simnpo",)]
    changed = room.checked({**again.raw, "method": {"wga": {"alpha": 1.0}}})
    kept = {row["method"] for row in result["rows"] if changed.fits(row)}
    assert kept == {"npo"} and not again.fits({**result["rows"][0], "seed": 1})


def test_rows_of_other_settings_and_of_other_processes_stay(done, monkeypatch, tmp_path):
    """A changed setting makes its own row; the older one is kept beside it and is there again when the setting is."""
    _, result, _ = done
    out = tmp_path / "elsewhere"
    out.mkdir()
    claim(out)
    write_json(out / "compare.json", result)
    table = RAW["compare"] | {"out": str(out), "methods": ["wga"]}
    other = room.checked(raw(compare=table, method={"wga": {"alpha": 1.0}}))
    job = SimpleNamespace(method="wga", seed=0, request=SimpleNamespace(corpus=Corpus({"forget": ()})))
    monkeypatch.setattr(room, "prepared", lambda *_: [job])
    monkeypatch.setattr(room, "done", lambda *_: {})
    monkeypatch.setattr(room, "row", lambda *_: {**result["rows"][1], "kept": 0.5})
    assert [r["kept"] for r in room.compare(other, inside=True)["rows"]] == [0.5]
    fit, past = room.shelf(other, out / "compare.json")
    assert set(fit) == {("npo", 0), ("wga", 0)} and fit["wga", 0]["kept"] == 0.5 and len(past) == 1
    again, _ = room.shelf(room.checked(raw(compare=table)), out / "compare.json")
    assert again["wga", 0] == result["rows"][1] and again["npo", 0] == result["rows"][0]


def test_a_row_can_be_put_to_more_attacks(done, monkeypatch, tmp_path):
    """An added attack is all that is left to do, of those that were asked; a changed one makes another row."""
    whole, result, _ = done
    more = room.checked({**whole.raw, "attack": {"graft": {}}})
    assert all(more.fits(row) and not more.complete(row) for row in result["rows"])
    asked: list[tuple[str, ...]] = []
    out = tmp_path / "elsewhere"
    out.mkdir()
    claim(out)
    write_json(out / "compare.json", result)
    some = room.checked({**more.raw, "compare": RAW["compare"] | {"out": str(out), "methods": ["wga"]}})
    job = SimpleNamespace(method="wga", seed=0, request=SimpleNamespace(corpus=Corpus({"forget": ()})))
    monkeypatch.setattr(room, "prepared", lambda whole, methods, *_: asked.append(tuple(methods)) or [job])
    monkeypatch.setattr(room, "done", lambda *_: {})
    monkeypatch.setattr(room, "row", lambda *_: {**result["rows"][1], "r": {"none": 0.1, "graft": 0.2}})
    [made] = room.compare(some, inside=True)["rows"]
    assert asked == [("wga",)] and some.complete(made)
    assert room.compare(some, inside=True)["rows"] == [made] and asked == [("wga",)]
    fit, past = room.shelf(some, out / "compare.json")
    assert fit["wga", 0] == made and fit["npo", 0] == result["rows"][0] and past == []
    for other in (whole, room.checked({**whole.raw, "attack": {"graft": {"blocks": 2}}})):
        assert other.fits(made) is (other is whole) and other.fits(result["rows"][1])


def test_no_row_is_lost_whatever_is_asked(done, tmp_path):
    """Of rows that fit, the one that covers what is asked stands; what it does not cover stays beside it."""
    whole, result, _ = done
    first = result["rows"][0]

    def asks(*attacks: str) -> room.Comparison:
        return room.checked({**whole.raw, "attack": {a: {} for a in attacks}})

    def tried(*attacks: str) -> dict:
        return {**first, **asks(*attacks).key("npo", 0)}

    path = tmp_path / "compare.json"
    write_json(path, {"rows": [tried("graft", "lens")], "past": []})
    fit, past = room.shelf(asks("graft", "quantise"), path, tried("graft", "quantise"))
    assert fit["npo", 0]["attacks"].keys() == {"graft", "quantise"} and [x["attacks"].keys() for x in past] == [
        {"graft", "lens"}
    ]
    fit, past = room.shelf(asks("graft"), path, tried("graft"))
    assert fit["npo", 0]["attacks"].keys() == {"graft", "lens"} and past == []
    failed = {"method": "npo", "seed": 0, "failed": "no memory", "attacks": {}}
    fit, past = room.shelf(asks("graft"), path, failed)
    assert not fit["npo", 0]["failed"] and past == []
    assert room.shelf(asks("graft"), tmp_path / "none.json", failed)[0]["npo", 0] == failed


def test_a_method_that_fails_is_a_row_that_says_so(done, monkeypatch, tmp_path):
    whole, _, _ = done

    def broken(request, *_):
        raise Diverged(3, {"npo": float("nan")})

    monkeypatch.setattr(room, "execute", broken)
    again = replace(whole, settings=replace(whole.settings, out=str(tmp_path / "out"), methods=("npo",)))
    [row] = room.compare(again, Bench(), inside=True)["rows"]
    assert "diverged at step 3" in row["failed"]
    assert read_json(again.out / "seed-0" / "npo" / "cost.json")["failed"] == row["failed"]
    room.write({"name": "x", "rows": [row], "roles": {}}, again.out)


def test_looks_without_general_ability_cost_less_and_say_so(tmp_path, done):
    """Other drawings, the same forgetting: what is only watched decides nothing."""
    _, result, _ = done
    out = {"out": str(tmp_path / "out"), "methods": ["npo"], "watch": False}
    [row] = room.compare(room.checked(raw(compare=RAW["compare"] | out)), Bench(), inside=True)["rows"]
    watched = result["rows"][0]
    assert [p["world"] for p in row["curve"][1:]] == [None] * (len(row["curve"]) - 1)
    assert [p["r"] for p in row["curve"]] == pytest.approx([p["r"] for p in watched["curve"]])
    assert row["kept"] == pytest.approx(watched["kept"]) and row["world"] == watched["world"]


def test_points_by_hand():
    looks = [
        {"step": 0, "mean": 0.9, "kept": 0.9},
        {"step": 2, "mean": 0.5, "kept": 0.6, "world": 0.7, "prose": 4.0},
        {"step": 4, "mean": 0.1},
    ]
    found = matched.path(looks, known=0.9, level=0.1, kept=0.8, world=0.75, prose=3.9)
    assert found == [
        {"step": 0, "r": 1.0, "kept": 1.0, "world": 0.75, "prose": 3.9},
        {"step": 2, "r": pytest.approx(0.5), "kept": pytest.approx(0.75), "world": 0.7, "prose": 4.0},
        {"step": 4, "r": pytest.approx(0.0), "kept": None, "world": None, "prose": None},
    ]


def test_in_between_by_hand():
    curve = [
        {"step": 0, "r": 1.0, "kept": 1.0, "world": 0.9, "prose": None},
        {"step": 2, "r": 0.6, "kept": 0.9, "world": 0.9, "prose": None},
        {"step": 4, "r": 0.2, "kept": 0.5, "world": 0.7, "prose": None},
        {"step": 6, "r": 0.3, "kept": 0.6, "world": 0.7, "prose": None},
    ]
    found = matched.at(curve, 0.5)
    assert found == {"kept": pytest.approx(0.8), "world": pytest.approx(0.85), "prose": None}
    assert matched.at(curve, 0.1) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compare": {"methods": ["npo"]}}, "compare"),
        ({"compare": RAW["compare"] | {"methods": ["nqo"]}}, "unknown method 'nqo'; did you mean"),
        ({"compare": RAW["compare"] | {"seeds": [-1]}}, "compare.seeds.0 is -1"),
        ({"model": {}}, "model.name is missing"),
        ({"corpus": {"dossier": {"forget": 0}}}, "corpus.dossier.forget is 0"),
        ({"corpus": {"dossier": {}, "forget": "x.jsonl"}}, "corpus.dossier makes its own people"),
        ({"method": {"npo": {"betta": 1.0}}}, "npo: unknown key forget.betta"),
        ({"teach": {"plan": {"steps": 0, "lr": 1e-3}}}, "teach.plan.steps is 0"),
        ({"tune": {}}, "unknown table [tune]"),
        ({"compare": 3}, "compare is 3; it must be a table, [compare]"),
        ({"model": "tiny"}, "model is 'tiny'; it must be a table, [model]"),
        ({"forget": {"plan": {"stop": "never"}}}, "npo, wga: stop is 'never'; methods are compared where"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_taught(change, said, tmp_path):
    with pytest.raises(BadRequest) as raised:
        room.checked(raw(**change), tmp_path)
    assert any(said in problem for problem in raised.value.problems), raised.value.problems


@pytest.mark.parametrize("name", ["dossier", "validation", "tofu"])
def test_the_comparisons_of_the_repository_are_good(name):
    folder = Path(__file__).parents[1] / "benchmarks" / "compare"
    if name == "tofu" and not (folder / "../../../shared/data/tofu").is_dir():
        pytest.skip("TOFU's files are not part of this repository")
    whole = room.parse(folder / f"{name}.toml", ["compare.seeds=[0]"])
    assert set(whole.settings.methods) == set(METHODS) - ({"seul"} if name == "tofu" else set())


def test_settings_that_are_wrong_do_not_hide_methods_that_are_unknown():
    with pytest.raises(BadRequest) as caught:
        room.checked(raw(compare=RAW["compare"] | {"seeds": [-1], "methods": ["nqo", 3]}))
    found = "; ".join(caught.value.problems)
    assert "compare.seeds.0 is -1" in found and "unknown method 'nqo'" in found and "compare.methods.1" in found


def test_a_file_that_is_no_toml_is_refused(tmp_path):
    with pytest.raises(BadRequest, match="cannot be read as TOML"):
        room.parse(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[compare")
    with pytest.raises(BadRequest, match="cannot be read as TOML"):
        room.parse(Path(tmp_path / "bad.toml"))


def test_general_ability_is_that_of_the_weights_as_they_are_now(tiny, moved, corpus):
    """A look comes in the middle of training, where what an audit remembers of a model would be stale."""
    watch = room.Watcher(Corpus({"world": world()[:10], "prose": corpus["prose"]}))
    lm = tiny.copy()
    before = watch(lm)
    lm.model.load_state_dict(moved.model.state_dict())
    assert watch(lm) == watch(moved) != before
