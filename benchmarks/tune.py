"""`python -m benchmarks.tune FILE [--methods npo,wga] [--trials 4]`: a modest search for each method's settings.

FILE is a comparison with one seed, the *validation dossier*: people whom no reported number ever sees.  Each trial forgets down
to the never-taught level and is worth what is left of what should have stayed: the smaller of retained facts and world knowledge,
less the rise of the prose loss; a trial that does not reach the level is worth minus what it left of the forget set.
The first trials are a small grid, further ones optuna's.  The study is a file, so that a search that was cut short goes on;
tuned.json says what every trial tried and found.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path

from unremember.bench import Bench
from unremember.compare import checked, compare
from unremember.folder import claim, read_json, write_json
from unremember.forget import METHODS, PRESETS
from unremember.report.pareto import score

RATES = (1.0, 3.0)  # of the preset's learning rate
PURE = ("ascent", "seul", "advga", "flearning")  # hold nothing by definition, or by strength alone: the rate is all
SECOND = {  # the one number beside it that decides how well the rest is held, where a method has it
    "retain": (4.0, 20.0),
    "kl": (1.0, 5.0),
    "alpha": (1.0, 5.0),
    "strength": (10.0, 30.0),
}


def grid(name: str) -> list[dict[str, float]]:
    """What is tried first, in this order: two rates times two values of the first of SECOND that the method has."""
    has = METHODS[name].__dataclass_fields__
    key = next((k for k in SECOND if k in has and name not in PURE), None)
    rates = [PRESETS[name]["plan"]["lr"] * r for r in RATES] if "plan" in has else [None]
    return [
        ({} if lr is None else {"lr": lr}) | ({} if key is None else {key: value})
        for value in (SECOND[key] if key else (None,))
        for lr in rates
    ]


def settings(trial, name: str) -> dict:
    """What one trial tries for a method: a point of the grid, and after those whatever the sampler thinks of."""
    tried: dict = {}
    for key in grid(name)[0]:
        values = [point[key] for point in grid(name)]
        value = trial.suggest_float(key, min(values) / 2, min(max(values) * 2, 0.9 if key == "lr" else 100.0), log=True)
        tried |= {"plan": {"lr": value}} if key == "lr" else {key: value}
    return tried


def worth(row: dict) -> float:
    """The higher the better; below 0 for a trial that failed or did not reach the level."""
    if row["failed"]:
        return -2.0
    if not row["reached"]:
        return -max(row["r"]["none"] or 1.0, 0.0)
    return score(row) - max(row["prose"] or 0.0, 0.0)


def search(raw: dict, name: str, trials: int) -> dict:
    """The best of `trials` settings of one method, the preset among them, and all that was tried."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out = Path(raw["compare"]["out"])
    claim(out)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(out / f"{name}.log")))
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=0),
    )

    def objective(trial) -> float:
        tried = settings(trial, name)
        own = raw.get("method", {}).get(name, {})
        plan = {**own.get("plan", {}), **tried.get("plan", {})}
        method = {name: {**own, **tried} | ({"plan": plan} if plan else {})}
        asked = {**raw, "compare": {**raw["compare"], "methods": [name]}, "method": method}
        [row] = compare(checked(asked), Bench(), print)["rows"]
        trial.set_user_attr(
            "row", {k: row.get(k) for k in ("reached", "kept", "world", "prose", "steps", "seconds", "failed")}
        )
        return worth(row)

    for point in grid(name):
        study.enqueue_trial(point, skip_if_exists=True)
    left = trials - len([t for t in study.trials if t.state.is_finished()])
    study.optimize(objective, n_trials=max(left, 0))
    tried = [
        {"settings": t.params, "worth": t.value, **t.user_attrs.get("row", {})}
        for t in study.trials
        if t.value is not None
    ]
    return {"best": study.best_params, "worth": study.best_value, "trials": tried}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.tune", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--methods", default="", help="comma-separated; all of the file's by default")
    parser.add_argument("--trials", type=int, default=4)
    args = parser.parse_args()
    raw = tomllib.loads(args.file.read_text(encoding="utf-8"))
    whole = checked(raw)
    if len(whole.settings.seeds) != 1:
        parser.error("a search has one seed, its validation dossier; give [compare] one in seeds")
    tuned = Path(raw["compare"]["out"]) / "tuned.json"
    for name in args.methods.split(",") if args.methods else whole.settings.methods:
        found = search(raw, name, args.trials)
        print(json.dumps({name: {k: found[k] for k in ("best", "worth")}}))
        write_json(tuned, (read_json(tuned) or {}) | {name: found})  # another process may search the other methods


if __name__ == "__main__":
    main()
