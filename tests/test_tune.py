"""The search for settings: what is tried next, and what a trial is worth."""

import pytest
from benchmarks import tune
from benchmarks.tune import PURE, after, first, worth

from unremember.forget import METHODS, PRESETS


def row(**given) -> dict:
    usual = {
        "failed": "",
        "reached": True,
        "r": {"none": 0.0},
        "kept": 0.9,
        "world": 0.8,
        "world before": 0.8,
        "prose": 0.1,
    }
    return usual | given


def test_the_first_trial_has_three_times_the_presets_rate_and_a_retain_term_no_lighter():
    assert first("npo")["lr"] == pytest.approx(3 * PRESETS["npo"]["plan"]["lr"]) and first("npo")["retain"] >= 4
    assert first("rmu")["alpha"] == PRESETS["rmu"]["alpha"] == 10.0
    assert all(set(first(name)) == {"lr"} for name in PURE) and first("depn") == {}
    assert set(first("simnpo")) == {"lr", "retain", "beta"}
    for name in METHODS:
        assert all(key == "lr" or key in METHODS[name].__dataclass_fields__ for key in first(name)), name


@pytest.mark.parametrize(
    ("done", "rate"),
    [
        (row(), 1e-5),
        (row(reached=False), 9e-5),
        (row(reached=False, kept=0.2), 1e-5),
        ({"failed": "died"}, 1e-5),
    ],
)
def test_a_rate_that_reached_or_wrecked_is_followed_by_a_lower_one(done, rate):
    assert after([({"lr": 3e-5, "retain": 4.0}, 0.0, done)]) == {"lr": pytest.approx(rate), "retain": 4.0}


def test_where_neither_reached_the_retain_term_of_the_better_is_lightened():
    point = {"lr": 3e-5, "retain": 4.0, "beta": 1.0}
    tried = [(point, -0.3, row(reached=False)), (point | {"lr": 9e-5}, -0.1, row(reached=False))]
    assert after(tried) == {"lr": 9e-5, "retain": 1.0, "beta": 1.0}
    assert after([(point, -0.3, row(reached=False)), (point, 0.8, row())]) is None
    assert after([({"lr": 3e-5}, -0.3, row(reached=False)), ({"lr": 9e-5}, -0.1, row(reached=False))]) is None


def test_the_first_that_reaches_is_followed_by_a_lower_rate_later_too():
    point = {"lr": 9e-5, "strength": 20.0}
    two = [({"lr": 3e-5}, -0.3, row(reached=False)), ({"lr": 9e-5}, -0.1, row(reached=False))]
    assert after([*two, (point, 0.4, row())]) == {"lr": pytest.approx(3e-5), "strength": 20.0}
    assert after([*two, (point, 0.4, row()), (point | {"lr": 3e-5}, 0.6, row())]) is None


def test_a_search_begins_where_tuned_json_stopped(tmp_path, monkeypatch):
    tried = []

    def pretended(whole, bench, title) -> dict:
        tried.append(whole.raw["method"]["undial"])
        return {"rows": [row(steps=3, seconds=1.0)]}

    monkeypatch.setattr(tune, "compare", pretended)
    raw = {"compare": {"out": str(tmp_path), "seeds": [1000]}, "model": {"name": "tiny"}, "corpus": {"dossier": {}}}
    raw |= {"forget": {"plan": {"stop": "probability"}}}
    point = {"lr": 3e-4, "retain": 4.0, "strength": 20.0}
    past = {"settings": point, "worth": 0.4, **row()}
    found = tune.search(raw, "undial", 2, [past])
    assert [t["settings"]["lr"] for t in found["trials"]] == pytest.approx([3e-4, 1e-4]) and len(tried) == 1
    assert tried[0]["strength"] == 20.0 and found["best"]["lr"] == pytest.approx(1e-4)
    assert tune.search(raw, "undial", 3, [past])["trials"][0] == past and len(tried) == 2  # the third is the sampler's


def test_worth_by_hand():
    assert worth(row()) == pytest.approx(0.9 - 0.1)
    assert worth(row(world=0.4)) == pytest.approx(0.5 - 0.1)
    assert worth(row(reached=False, r={"none": 0.3})) == pytest.approx(-0.4)
    assert worth(row(reached=False, r={"none": -0.2}, prose=-1.0)) == 0.0
    assert worth(row(reached=False, r={"none": None})) == -1.0 and worth(row(failed="so")) == -2.0
