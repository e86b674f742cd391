"""`python -m benchmarks.tune FILE [--methods npo,wga] [--trials 6]`: a modest search for each method's settings, with optuna.

FILE is a comparison with one seed, the *validation dossier*: people whom no reported number ever sees.  Each trial forgets down
to the never-taught level and is worth what is left of what should have stayed: the smaller of retained facts and world knowledge,
less the rise of the prose loss; a trial that does not reach the level is worth minus what it left of the forget set.
The study is a file, so that a search that was cut short goes on; tuned.json says what every trial tried and found.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path

from unremember.bench import Bench
from unremember.compare import checked, compare
from unremember.folder import write_json
from unremember.forget import METHODS, PRESETS
from unremember.report.pareto import score

WIDE = 4.0  # the search reaches from a quarter to four times of where a preset stands
RANGES = {  # beside the learning rate: the numbers that the papers tune
    "retain": (1.0, 40.0),
    "kl": (0.5, 10.0),
    "beta": (0.02, 2.0),
    "alpha": (0.3, 10.0),
    "strength": (4.0, 30.0),
    "radius": (0.02, 0.3),
    "scale": (2.0, 20.0),
}
FEW = ("retain", "beta")  # as many of them as so few trials can tell apart, and what a method has of the others


def settings(trial, name: str) -> dict:
    """What one trial tries for a method."""
    has = METHODS[name].__dataclass_fields__
    preset = PRESETS[name]
    tried: dict = {}
    if "plan" in has and "lr" in preset["plan"]:
        lr = preset["plan"]["lr"]
        tried["plan"] = {"lr": trial.suggest_float("lr", lr / WIDE, min(lr * WIDE, 0.9), log=True)}
    keys = [k for k in FEW if k in has] or [k for k in RANGES if k in has][:1]
    for key in keys:
        tried[key] = trial.suggest_float(key, *RANGES[key], log=True)
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
    out.mkdir(parents=True, exist_ok=True)
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
    parser.add_argument("--trials", type=int, default=6)
    args = parser.parse_args()
    raw = tomllib.loads(args.file.read_text(encoding="utf-8"))
    whole = checked(raw)
    if len(whole.settings.seeds) != 1:
        parser.error("a search has one seed, its validation dossier; give [compare] one in seeds")
    found = {}
    for name in args.methods.split(",") if args.methods else whole.settings.methods:
        found[name] = search(raw, name, args.trials)
        print(json.dumps({name: {k: found[name][k] for k in ("best", "worth")}}))
        write_json(Path(raw["compare"]["out"]) / "tuned.json", found)


if __name__ == "__main__":
    main()
