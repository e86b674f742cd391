"""`python -m benchmarks.curve RUN`: how much comes back after how much finetuning, on the three models of a run.

The attack `finetune` as it is preset, once a budget of steps and once a budget of texts, on each kind of text: what the
forgotten model scores on the facts that it was not shown, beside the original and the never-taught one under the same attack.
Printed: the curves, A (0 = as if never taught, 1 = as before) and the first budget with half of the original's score.  A line
is kept beside the result as soon as it is there, and the same command goes on from it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import TypeAdapter

from unremember.attack import PRESETS, Finetune
from unremember.attack.finetune import Curve, trace
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.folder import fingerprint, read_json, write_json
from unremember.machine import keep_memory
from unremember.request import again, handed
from unremember.run import Run

KINDS = {"half": "finetune", "lora": "finetune-lora", "retain": "finetune-retain", "unrelated": "finetune-unrelated"}


def attack(kind: str) -> Finetune:
    """The preset, at a constant rate, so that budgets of steps lie on one path."""
    made = TypeAdapter(Finetune).validate_python(PRESETS[KINDS[kind]])
    return replace(made, plan=replace(made.plan, schedule="constant"))


def table(kind: str, over: str, curve: Curve) -> str:
    """A curve as Markdown: a line a model."""
    words = {"steps": "steps", "n": "texts"}[over]
    lines = [f"| {kind}, {words} | {' | '.join(map(str, curve.budgets))} |", "|---|" + "---:|" * len(curve.budgets)]
    for who in ("original", "forgotten", "never"):
        lines.append(f"| {who} | {' | '.join(f'{x:.2f}' for x in getattr(curve, who))} |")
    excess, half = curve.excess(), curve.reaches(0.5)
    told = "not applicable" if excess is None else f"{excess:.2f}"
    return (
        "\n".join(lines)
        + f"\n\nA = {told}; half of the original's score "
        + ("is reached by none of them" if half is None else f"after {half} {words}")
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.curve", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder with a control model")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--steps", nargs="*", type=int, default=[5, 10, 20, 40])
    parser.add_argument("--texts", nargs="*", type=int, default=[2, 5], help="with as many steps as the preset has")
    parser.add_argument("--audit", default="value probability", choices=sorted(AUDITS))
    parser.add_argument("--out", type=Path, default=Path("runs/curve.json"))
    args = parser.parse_args()
    keep_memory()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench()
    run = Run(again(args.run), bench)
    if not run.request.control or not run.forgotten():
        parser.error(
            f"{args.run} has no control or no forgotten model; name the folder of a finished run with a control"
        )
    models = {who: run.lm(who) for who in run.models}
    corpus = handed(run.measured, control=True)
    found = (read_json(args.out) or {}).get("curves", {})
    for kind in args.kinds:
        for over, budgets in (("steps", args.steps), ("n", args.texts)):
            if not budgets:
                continue
            tried = attack(kind)
            key = fingerprint(repr(tried), over, budgets, args.audit, *(lm.fingerprint for lm in models.values()))
            if found.get(f"{kind}, {over}", {}).get("key") != key:
                since = time.monotonic()
                curve = trace(tried, models, corpus, budgets, AUDITS[args.audit], bench, over)
                found[f"{kind}, {over}"] = {"key": key, "curve": asdict(curve), "seconds": time.monotonic() - since}
                write_json(args.out, {"audit": args.audit, "curves": found})
            curve = Curve(**{k: tuple(v) for k, v in found[f"{kind}, {over}"]["curve"].items()})
            print(table(kind, over, curve) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
