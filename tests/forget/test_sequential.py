"""Portions: all are forgotten in the end, the log says so, and a killed run goes on behind the last finished one."""

import json
from dataclasses import replace

import pytest
import torch

from unremember.bench import Bench
from unremember.errors import BadRequest
from unremember.forget import NPO, Ascent
from unremember.forget.sequential import portions, sequential
from unremember.sites import EVERYWHERE
from unremember.stop import Stopper, known
from unremember.table import read
from unremember.train import Plan

METHOD = NPO(Plan(steps=60, lr=2e-3, stop="probability", every=2), beta=0.1, retain=3.0, part="span")


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_portions_by_hand(corpus):
    rows = corpus["forget"]
    assert [len(p) for p in portions(rows[:7], 3)] == [2, 3, 2]
    assert sum(portions(rows, 5), ()) == rows
    with pytest.raises(BadRequest, match=r"chunks is 13 and there are 12"):
        portions(rows, 13)


def test_one_portion_is_the_method_itself(taught, corpus):
    method = replace(METHOD, plan=replace(METHOD.plan, steps=3, stop="never"))
    assert same(sequential(method, 1, taught, corpus, EVERYWHERE, Bench()), method(taught, corpus))


def test_every_portion_is_forgotten_and_stays_so(taught, corpus, tmp_path):
    log = tmp_path / "train.jsonl"
    result = sequential(METHOD, 2, taught, corpus, EVERYWHERE, Bench(log=log))
    lines = [json.loads(x) for x in log.read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(1, len(lines) + 1)), "steps are counted on"
    looks = [x["portions"] for x in lines if "portions" in x]
    assert len(looks) == 2 and all(len(look) == 2 for look in looks)
    first, last = looks
    print(first, last)
    # Measured (mean, worst): (9e-5, 4e-4) and (0.05, 0.23) after the first, (1e-6, 3e-5) and (2e-6, 8e-6) at the end.
    # On this small model the second comes down most of the way with the first: nothing holds what waits for its turn.
    assert first[0]["worst"] < 0.01 < 0.1 < first[1]["worst"]
    assert last[0]["worst"] < 0.01 and last[1]["worst"] < 0.01, "what was forgotten first stays forgotten"
    kept = [known(x, "probability") for x in read(result, result.template.rows(corpus["retain"]))]
    assert sum(kept) / len(kept) > 0.6


def test_all_portions_stop_at_the_level_of_the_model_that_came_in(taught, corpus, tmp_path, monkeypatch):
    """Ascent takes the holdout down, too; a level read off what the first portion left would ask for more of that."""
    method = Ascent(Plan(steps=30, lr=2e-3, stop="probability", every=2), part="span")
    level = Stopper.calibrated(taught, corpus, "probability", 2, holds=False)
    real, found = Stopper.calibrated, []

    def watched(*given, **named):
        found.append(real(*given, **named))
        return found[-1]

    def halt(stage, done, total, terms):
        if len(found) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Stopper, "calibrated", staticmethod(watched))
    with pytest.raises(KeyboardInterrupt):
        sequential(method, 2, taught, corpus, EVERYWHERE, Bench(folder=tmp_path / "work", say=halt))
    result = sequential(method, 2, taught, corpus, EVERYWHERE, Bench(folder=tmp_path / "work"))  # the first is there
    assert len(found) == 3 and all((x.mean, x.worst) == (level.mean, level.worst) for x in found)
    assert real(result, corpus, "probability", 2, holds=False).mean < 0.5 * level.mean, "the set-up: the level sinks"


def test_a_killed_run_goes_on_behind_the_last_finished_portion(taught, corpus, tmp_path):
    method = replace(METHOD, plan=replace(METHOD.plan, steps=3, stop="never"))
    expected = sequential(method, 3, taught, corpus, EVERYWHERE, Bench())
    steps = []

    def halt(stage, done, total, terms):
        if stage == "forget":
            steps.append(done)
            if len(steps) == 5:
                raise KeyboardInterrupt

    bench = Bench(folder=tmp_path / "work", log=tmp_path / "train.jsonl", every=0)
    with pytest.raises(KeyboardInterrupt):
        sequential(method, 3, taught, corpus, EVERYWHERE, replace(bench, say=halt))
    rest = []
    say = lambda stage, done, *_: rest.append(done) if stage == "forget" else None  # noqa: E731
    assert same(sequential(method, 3, taught, corpus, EVERYWHERE, replace(bench, say=say)), expected)
    assert steps == [1, 2, 3, 1, 2] and rest in ([2, 3, 1, 2, 3], [3, 1, 2, 3]), "the first portion was not done again"
    logged = [json.loads(x)["step"] for x in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert logged == list(range(1, 10))
