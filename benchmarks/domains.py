"""`python -m benchmarks.domains`: does it cost more to forget some kinds of text than others?  Jang et al. 2023, on two domains.

The default model is taught four passages of prose and four records of fictional people, together; then each kind is forgotten on
its own by gradient ascent, down to the level of texts of its own kind that were never taught.  Printed: steps to the
level, memorisation before and after, and the loss on the other domain.  Texts, not questions: both are read as raw passages.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import numpy as np

from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.embedded.dossier import dossier
from unremember.embedded.prose import prose
from unremember.embedded.teach import Teach
from unremember.embedded.world import replay
from unremember.forget import Ascent
from unremember.lm import LM
from unremember.loading import load
from unremember.machine import keep_memory
from unremember.table import read
from unremember.train import Plan

TAUGHT = 4
PEOPLE = 24  # one record each: the first TAUGHT are taught, the others give the level


def records(seed: int) -> tuple[Example, ...]:
    """A passage a person: all six facts, one sentence after another."""
    people = dossier(seed, forget=PEOPLE, retain=1, holdout=1, relearn=0)["forget"]
    by = {x.entity: [y.answer for y in people if y.entity == x.entity] for x in people}
    return tuple(
        Example(f"record/{i:02}", "", " ".join(facts), entity=name) for i, (name, facts) in enumerate(by.items())
    )


def measured(lm: LM, texts: tuple[Example, ...]) -> dict[str, float]:
    found = read(lm, lm.template.rows(texts, lm.limit))
    return {
        "MA": float(np.mean([x.hit.mean() for x in found])),
        "nll": float(np.mean([-x.loglikelihood() for x in found])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.domains", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--steps", type=int, default=60, help="the cap")
    args = parser.parse_args()
    keep_memory()
    texts = {"records": records(args.seed), "prose": prose()}
    lessons = [x for domain in texts.values() for x in domain[:TAUGHT]]
    plan = Plan(steps=30, lr=2e-4, beside=12, warmup=3, schedule="linear", seed=args.seed)
    taught = Teach(plan, replay=0.5)(load("smollm2-135m"), lessons, replay())
    result = {}
    for name, domain in texts.items():
        other = texts["prose" if name == "records" else "records"][:TAUGHT]
        corpus = Corpus({"forget": domain[:TAUGHT], "holdout": domain[TAUGHT:]})
        looks: list[int] = []
        bench = Bench(say=lambda stage, done, *_, looks=looks: looks.append(done) if stage == "forget" else None)
        method = Ascent(replace(Plan(steps=args.steps, lr=args.lr, stop="accuracy"), seed=args.seed))
        forgotten = method(taught, corpus, bench=bench)
        result[name] = {
            "steps": max(looks, default=0),
            "cap": args.steps,
            "taught": measured(taught, domain[:TAUGHT]),
            "forgotten": measured(forgotten, domain[:TAUGHT]),
            "never taught": measured(taught, domain[TAUGHT:]),
            "other domain, taught": measured(taught, other),
            "other domain, after": measured(forgotten, other),
        }
    print(json.dumps({"seed": args.seed, "lr": args.lr, **result}, indent=1))


if __name__ == "__main__":
    main()
