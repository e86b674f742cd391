"""`python -m benchmarks.ability MODEL --data FOLDER`: general ability by lm-eval, a line a task, as a Markdown table.

FOLDER holds the tasks as NAME.jsonl; a task that is not there is lm-eval's own and needs a network.  A limit takes rows evenly
from a task; the interval is the 95 % bootstrap interval over them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from unremember.audit.harness import Harness, accuracy
from unremember.bench import Bench
from unremember.loading import load
from unremember.machine import keep_memory

TASKS = ("arc_easy", "arc_challenge", "piqa", "winogrande", "lambada_openai", "mmlu")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.ability", description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--limit", type=int, default=0, help="rows a task, 0 = all")
    parser.add_argument("--shots", type=int, help="worked examples in front")
    parser.add_argument("--metric", default="", help="by default acc_norm where a task has it, else acc")
    args = parser.parse_args()
    keep_memory()
    audit = Harness(tuple(args.tasks), args.data, args.limit, args.shots, args.metric)
    audit.check()
    lm, bench = load(args.model), Bench()
    began = time.monotonic()
    print("| task | n | right | 95 % | chance |\n|---|---:|---:|---|---:|")
    for name, score in audit.scores(lm, bench).items():
        x = accuracy(score)
        print(f"| {name} | {x['n']} | {x['mean']:.3f} | {x['low']:.3f} to {x['high']:.3f} | {x['chance']:.3f} |")
    print(f"\n{args.model}, {lm.precision}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
