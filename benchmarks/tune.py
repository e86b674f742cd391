"""`python -m benchmarks.tune FILE [--methods npo,wga] [--trials 4]`: a modest search for each method's settings.

FILE is a comparison with one seed, the *validation dossier*: people whom no reported number ever sees.  Each trial forgets down
to the never-taught level and is worth what is left of what should have stayed: the smaller of retained facts and world knowledge,
less the rise of the prose loss; a trial that does not reach the level is worth minus that rise and what it left of the forget
set.  The first trial has three times the preset's rate, the next ones follow from what it did, further ones are optuna's.
The study is a file, so that a search that was cut short goes on; tuned.json says what every trial tried and found, and one that
lies beside FILE is where a new search begins.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path

from unremember.bench import Bench
from unremember.compare import checked, compare
from unremember.folder import claim, read_json, write_json
from unremember.forget import METHODS, PRESETS
from unremember.report.pareto import score

BEGIN, STEP = 3.0, 3.0  # the first rate, in preset's learning rates, and how far the second is from it
WRECKED = 0.5  # share of what retained people's answers had, below which a rate was too high
LIGHTER = 4.0  # the third trial's retain weight, as a divisor
PURE = ("ascent", "seul", "advga", "flearning")  # hold nothing by definition, or by strength alone: the rate is all
SECOND = {  # the first of these that a method has is searched, too, from this or from its preset, if that is more
    "retain": 4.0,
    "kl": 1.0,
    "alpha": 1.0,
}
OWN = {  # and what a method cannot come down to the level without, at any rate, as first trials without it have shown
    "simnpo": {"beta": 1.0},  # 2.5: its slope is 2σ(−β u), nothing once a token is down to a few percent
    "undial": {"strength": 20.0},  # 10: a token that was sure (0.9999) has a third left in what is distilled
}
REACH = 4.0  # trials after the second lie within this factor, both ways


def first(name: str) -> dict[str, float]:
    """The settings of the first trial."""
    has = METHODS[name].__dataclass_fields__
    key = next((k for k in SECOND if k in has and name not in PURE), None)
    found = {"lr": BEGIN * PRESETS[name]["plan"]["lr"]} if "plan" in has else {}
    return found | ({key: max(SECOND[key], PRESETS[name].get(key, 0.0))} if key else {}) | OWN.get(name, {})


def after(done: list[tuple[dict[str, float], float, dict]]) -> dict[str, float] | None:
    """The next trial by hand, after those `done` (settings, worth, row); None where the sampler goes on.

    Second: a lower rate where the level was reached or the model was wrecked, else a higher one.
    Third, where neither reached it: a lighter retain term at the better of the two rates.
    Later: a lower rate for the first that reached it.
    """
    reached = [bool(row.get("reached")) for *_, row in done]
    if len(done) == 1 or (len(done) > 2 and reached[-1] and not any(reached[:-1])):
        point, _, row = done[-1]
        up = not row.get("reached") and (row.get("kept") or 0.0) > WRECKED
        return {k: v if k != "lr" else v * STEP if up else v / STEP for k, v in point.items()}
    if len(done) == 2 and not any(row.get("reached") for *_, row in done):
        point = max(done, key=lambda x: x[1])[0]
        lighter = {k: v / LIGHTER if k in SECOND else v for k, v in point.items()}
        return lighter if lighter != point else None
    return None


def settings(trial, name: str, point: dict[str, float]) -> dict:
    """What one trial tries for a method: `point`, which has been asked for, or what the sampler thinks of."""
    tried: dict = {}
    for key, middle in first(name).items():
        given = point.get(key, middle)
        high = min(middle * REACH, 0.9) if key == "lr" else middle * REACH
        value = trial.suggest_float(key, min(given, middle / REACH), max(given, high), log=True)
        tried |= {"plan": {"lr": value}} if key == "lr" else {key: value}
    return tried


def worth(row: dict) -> float:
    """The higher the better; below 0 for a trial that failed or did not reach the level."""
    if row["failed"]:
        return -2.0
    if not row["reached"]:
        left = row["r"]["none"]
        return -1.0 if left is None else -max(left, 0.0) - max(row["prose"] or 0.0, 0.0)
    return score(row) - max(row["prose"] or 0.0, 0.0)


def search(raw: dict, name: str, trials: int, earlier: Sequence[dict] = ()) -> dict:
    """The best of `trials` settings of one method, and all that was tried.  earlier: trials of a tuned.json, counted, too."""
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

    if not study.trials:
        for past in earlier:
            point, row = past["settings"], {k: v for k, v in past.items() if k not in ("settings", "worth")}
            study.add_trial(
                optuna.trial.create_trial(
                    params=point,
                    distributions={k: optuna.distributions.FloatDistribution(v, v, log=True) for k, v in point.items()},
                    value=past["worth"],
                    user_attrs={"row": row},
                )
            )

    def objective(trial) -> float:
        tried = settings(trial, name, trial.user_attrs.get("asked", {}))
        own = raw.get("method", {}).get(name, {})
        plan = {**own.get("plan", {}), **tried.get("plan", {})}
        method = {name: {**own, **tried} | ({"plan": plan} if plan else {})}
        asked = {**raw, "compare": {**raw["compare"], "methods": [name]}, "method": method}
        [row] = compare(checked(asked), Bench(), print)["rows"]
        keys = ("r", "reached", "kept", "world", "prose", "steps", "seconds", "failed")
        trial.set_user_attr("row", {k: row.get(k) for k in keys})
        return worth(row)

    while len(done := [t for t in study.trials if t.value is not None]) < trials:  # a trial that was cut short is none
        point = after([(t.params, t.value, t.user_attrs.get("row", {})) for t in done]) if done else first(name)
        if point and not any(t.state.name == "WAITING" for t in study.trials):
            study.enqueue_trial(point, user_attrs={"asked": point})
        study.optimize(objective, n_trials=1)
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
    known = read_json(args.file.parent / tuned.name) or {}
    for name in args.methods.split(",") if args.methods else whole.settings.methods:
        found = search(raw, name, args.trials, known.get(name, {}).get("trials", ()))
        print(json.dumps({name: {k: found[k] for k in ("best", "worth")}}))
        write_json(tuned, (read_json(tuned) or {}) | {name: found})  # another process may search the other methods


if __name__ == "__main__":
    main()
