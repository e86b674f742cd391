"""`python -m benchmarks.verdict --model tiny --seeds 3`: is the verdict right on models whose truth is known?

For each seed other people are made up and an original and its never-taught control are taught, as in the demo; every case of
embedded/liars.py is then judged like any other model, unattacked and under four attacks or those that are named.
Printed: what was said, case by attack, and the rates of error with n and Wilson's 95 % interval over cases; a second opinion on
every case: told half of the forgotten facts, the share of the other half that comes back (0 = never taught, 1 = the original).
The attack `finetune` takes the same steps, so where it is among the attacks the opinion is no other one.  A case that was heard
is kept beside the result, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from unremember.attack import ATTACKS, SUITES, VARIANTS, Finetune
from unremember.attack import PRESETS as SETTINGS
from unremember.bench import Bench
from unremember.demo import PRESETS, Base, known, pair, taught
from unremember.embedded.dossier import dossier, lessons
from unremember.embedded.liars import RECIPES, School, liars, taught_back
from unremember.embedded.prose import prose
from unremember.embedded.world import replay
from unremember.folder import fingerprint, write_json, write_text
from unremember.loading import auto_precision, load
from unremember.machine import keep_memory
from unremember.meta import Case, Court, Told, markdown, plain
from unremember.score import RULE

DEMOS = {"smollm2-135m": "smollm2", "tiny": "tiny"}


class Heard:
    """What was said of cases by an earlier call with the same settings, one JSON line a case."""

    def __init__(self, place: Path, about: dict):
        self.place, self.about = place, about
        self.rows = {}
        for line in place.read_text(encoding="utf-8").splitlines() if place.exists() else []:
            with suppress(json.JSONDecodeError):  # one that a kill cut short
                row = json.loads(line)
                if row["about"] == about:
                    self.rows[row["seed"], row["told"]["case"]["name"]] = row
        write_text(place, "".join(json.dumps(row) + "\n" for row in self.rows.values()))

    def get(self, seed: int, name: str) -> tuple[Told, float | None] | None:
        """The case as it was heard, with its second opinion."""
        if (row := self.rows.get((seed, name))) is None:
            return None
        return Told(**row["told"] | {"case": Case(**row["told"]["case"])}), row["back"]

    def add(self, seed: int, told: Told, back: float | None, seconds: float) -> None:
        row = {"about": self.about, "seed": seed, "told": asdict(told), "back": back, "seconds": seconds}
        self.rows[seed, told.case.name] = row
        with self.place.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def armed(model: str, names: Sequence[str]) -> dict[str, Any]:
    """The attacks by name: those that train as they are set for this model, the others as they are for any."""
    p = PRESETS[DEMOS[model]]
    own = {"finetune": Finetune("half", RECIPES[model].back, n=0), "relearn": p.relearn, "rephrase": p.rephrase}
    kinds = {name: ATTACKS[VARIANTS.get(name, name)] for name in names}
    return {name: own.get(name) or TypeAdapter(kinds[name]).validate_python(SETTINGS[name]) for name in names}


def trial(
    model: str, seed: int, folder: Path, attacks: Mapping[str, Any], only: str, opinion: bool, heard: Heard
) -> tuple[list[Told], dict[str, float]]:
    """What is said of every case of one seed under the attacks, and the second opinion on each."""
    p, bench = PRESETS[DEMOS[model]], Bench()
    precision = auto_precision() if p.precision == "auto" else p.precision
    base = Base(p.model, precision, bench, lambda text: print(f"  {text}", flush=True))
    people = dossier(seed, *p.people)
    folders = {
        name: taught(base, name, lessons(people, roles, p.wordings), share, p.teach, seed)
        for name, roles, share in pair(people)
    }
    original, never = (load(str(folders[who]), precision=precision) for who in ("original", "never-taught"))
    corpus = people.with_roles(prose=prose(), world=known(base, p.worlds), replay=replay())
    court, recipe = Court(original, never, corpus, attacks), RECIPES[model]
    school = School(base.lm, p.teach, corpus, p.wordings, bench)
    found, back = [], {}
    ends: list[float] = []
    for name, truth, make in liars(school, original, recipe, seed):
        if only and only not in name:
            continue
        if before := heard.get(seed, name):
            found.append(before[0])
            back |= {name: before[1]} if before[1] is not None else {}
            continue
        began, lm = time.monotonic(), make()
        made = time.monotonic()
        found.append(court.hear(Case(name, truth), lm, folder / f"seed-{seed}", bench))
        if opinion:
            ends = ends or [taught_back(lm, corpus, recipe.back, bench) for lm in (never, original)]
            back[name] = (taught_back(lm, corpus, recipe.back, bench) - ends[0]) / max(ends[1] - ends[0], 0.2)
        heard.add(seed, found[-1], back.get(name), time.monotonic() - began)
        words = ", ".join(f"{attack}: {word}" for attack, word in found[-1].words.items())
        print(
            f"  seed {seed}, {name} ({truth}): {words}  [{made - began:.0f} + {time.monotonic() - made:.0f} s]",
            flush=True,
        )
        bench.memory.clear()
    return found, back


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.verdict", description=__doc__)
    parser.add_argument("--model", choices=sorted(RECIPES), default="tiny")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument(
        "--attacks", default="finetune,graft,relearn,rephrase", help="comma-separated, or the name of a suite"
    )
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--no-opinion", action="store_true", help="leave out the second opinion")
    parser.add_argument("--keep", type=Path, help="a folder in which all run folders stay")
    parser.add_argument("--out", type=Path, default=Path("runs/verdict.json"))
    args = parser.parse_args()
    names = SUITES.get(args.attacks) or tuple(args.attacks.split(","))
    if strange := [name for name in names if name not in SETTINGS]:
        parser.error(f"--attacks {', '.join(strange)}: unknown; allowed are {', '.join((*SUITES, *SETTINGS))}")
    keep_memory()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    attacks = armed(args.model, names)
    settings = [RECIPES[args.model], PRESETS[DEMOS[args.model]], attacks, RULE]
    made = fingerprint(*map(repr, settings), auto_precision(), not args.no_opinion)
    heard = Heard(args.out.with_suffix(".heard.jsonl"), {"model": args.model, "fingerprint": made})
    found, opinions = [], []
    seeds = range(args.first, args.first + args.seeds)
    for seed in seeds:
        with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as name:
            told, back = trial(args.model, seed, Path(name), attacks, args.only, not args.no_opinion, heard)
        found += told
        opinions.append(back)
    if not found:
        parser.error(f"--only {args.only!r} names no case")
    told_in = [row["seconds"] for (seed, name), row in heard.rows.items() if seed in seeds and args.only in name]
    print("\n" + markdown(found))
    if not args.no_opinion:
        print("\n| case | comes back when half is told, mean | least | most |\n|---|---:|---:|---:|")
        for name in opinions[0]:
            values = [back[name] for back in opinions]
            print(f"| {name} | {np.mean(values):.2f} | {min(values):.2f} | {max(values):.2f} |")
    wrong = [x for x in found if any(word != x.case.truth for word in x.words.values())]
    print("\nNot the truth:")
    for x in wrong:
        for attack, word in x.words.items():
            if word != x.case.truth:
                gate = f" [gate: {', '.join(x.failed[attack])}]" if x.failed[attack] else ""
                print(f"- {x.case.name} ({x.case.truth}), {attack}: {word}: {x.reasons[attack]}{gate}")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"\n{args.model}, seeds {', '.join(map(str, seeds))}, {machine}, {sum(told_in):.0f} s")
    about = {"model": args.model, "seeds": list(seeds), "machine": machine, "seconds": sum(told_in)}
    write_json(args.out, about | json.loads(json.dumps(plain(found))) | {"comes back": opinions})
    if not args.only:
        heard.place.unlink()
    print(args.out)


if __name__ == "__main__":
    main()
