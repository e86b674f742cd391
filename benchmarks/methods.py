"""`python -m benchmarks.methods`: what one training step of each method costs, as a ratio to a step of NPO in the same run.

Default model, dossier, 16 forget and 16 retain rows, presets; forward and backward passes, no optimiser.  Steps are taken in
turn, so that a busy moment hits all alike.  `rmu (middle)` is RMU at the middle block.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import numpy as np
from pydantic import TypeAdapter

from benchmarks.measure import timed
from benchmarks.stages import BUDGET, ROWS
from unremember.corpus import Corpus
from unremember.embedded.dossier import dossier
from unremember.forget import METHODS, PRESETS
from unremember.lm import LM
from unremember.loading import load
from unremember.machine import keep_memory
from unremember.sites import EVERYWHERE
from unremember.train import backward, batch

CASES = {
    "npo": ("npo", {}),
    "ascent on spans": ("ascent", {"part": "span"}),
    "seul (spans given)": ("seul", {}),
    "rmu (middle)": ("rmu", {"depth": 0.5}),
    **{name: (name, {}) for name in ("advnpo", "dpo", "kga", "llmu", "rmu", "simnpo", "undial", "wga", "whp")},
    "mechanistic (all MLPs)": ("mechanistic", {"locator": "mlps"}),
}


def prepared(lm: LM, corpus: Corpus, name: str, more: dict) -> Callable[[], None]:
    """A step of a method, with all that it resolves before training behind it."""
    method = TypeAdapter(METHODS[name]).validate_python({**PRESETS[name], **more})
    live = lm.copy()
    pools, objective = method.terms(live, corpus)
    where = {"rmu": lambda: method.sites(live), "mechanistic": lambda: method.sites(live, corpus)}
    where.get(name, lambda: EVERYWHERE)().open(live.model)  # weights that stay need no gradient

    def step() -> None:
        micros = batch(pools, method.plan, 0, BUDGET)
        if hasattr(objective, "before"):
            objective.before(live, micros, 1)
        backward(live, objective, micros, BUDGET)
        live.model.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.methods", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default="", help="comma-separated; all by default")
    args = parser.parse_args()
    keep_memory()
    lm, people = load("smollm2-135m"), dossier(0)
    corpus = people.with_roles(forget=people["forget"][:ROWS], retain=people["retain"][:ROWS])
    chosen = ["npo", *(x for x in (args.cases.split(",") if args.cases else CASES) if x != "npo")]
    seconds = timed({case: prepared(lm, corpus, *CASES[case]) for case in chosen}, args.rounds)
    base = float(np.median(seconds["npo"]))
    shown = {case: {"times npo": float(np.median(v)) / base, "seconds": v} for case, v in seconds.items()}
    print(json.dumps({"precision": lm.precision, "rounds": args.rounds, "steps": shown}, indent=1, default=float))


if __name__ == "__main__":
    main()
