"""`make bench`: every stage of the work against a plain script that does the same, in one run, on the real default model.

Both sides take turns; printed and written to OUT are medians, spread, ratios, shares of what the machine can do at most, and
the peak memory of each side in a process of its own: bench.json, bench.md, bench.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import bandwidth, peak, products, timed
from benchmarks.stages import BUDGET, PLAN, ROWS, STAGES, corpus, made
from unremember.folder import claim, write_json, write_text
from unremember.lm import LM
from unremember.loading import load
from unremember.machine import keep_memory, peak_memory
from unremember.report.plots import COLOURS, INK, SOFT, axes, svg
from unremember.train import batch


def flops(lm: LM) -> float:
    """Matrix products of a step that trains all weights, forward and backward: places of our tries, and the scored ones' head."""
    given = corpus()
    pools = {role: lm.template.rows(given[role][:ROWS], lm.limit) for role in ("forget", "retain")}
    micros = batch(pools, PLAN, 0, BUDGET)
    body = sum(w.numel() for n, w in lm.model.named_parameters() if "embed" not in n)
    head = lm.model.get_input_embeddings().weight.numel()
    return 6 * (body * sum(t.ids.numel() for t in micros) + head * sum(len(t.row) for t in micros))


def measured(lm: LM, names: list[str], rounds: int, memory: bool, say=print) -> Iterator[dict]:
    """The whole result so far, after each stage."""
    rate = products(torch.bfloat16 if lm.precision == "bf16" else torch.float32)
    trains, stages = ("ascent", "npo", "npo + KL"), {}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "precision": lm.precision,
        "rounds": rounds,
        "matrix products, GFLOP/s": rate / 1e9,
        "memory, GB/s": bandwidth() / 1e9,
        "stages": stages,
    }
    for name in names:
        say(f"▸ {name}")
        seconds = timed({side: made(lm, name, side) for side in ("plain", "ours")}, rounds)
        middle = {side: float(np.median(values)) for side, values in seconds.items()}
        texts = STAGES[name].texts(lm)
        found = {
            "about": STAGES[name].about,
            "seconds": seconds,
            "times faster": middle["plain"] / middle["ours"],
            "spread": [float(f(np.array(seconds["plain"]) / np.array(seconds["ours"]))) for f in (np.min, np.max)],
            "target": STAGES[name].target,
            "tokens of text a second": {side: texts / value for side, value in middle.items()},
        }
        if name in trains:
            found["share of the peak"] = flops(lm) / middle["ours"] / rate
        if memory:
            found["peak memory, MB"] = {side: peak(name, side) for side in ("plain", "ours")}
        stages[name] = found
        yield result


def table(result: dict) -> str:
    """The stages as Markdown."""
    lines = [
        "| stage | times faster | target | ours, s | plain, s | tokens a second | of the peak | peak GB, ours | plain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, x in result["stages"].items():
        ours, plain = (float(np.median(x["seconds"][side])) for side in ("ours", "plain"))
        share, memory = x.get("share of the peak"), x.get("peak memory, MB")
        cells = [
            f"{name} ({x['about']})" if x["about"] != name else name,
            f"{x['times faster']:.1f} ({x['spread'][0]:.1f} to {x['spread'][1]:.1f})",
            f"{x['target']:g}" if x["target"] else "",
            f"{ours:.2f}",
            f"{plain:.2f}",
            f"{x['tokens of text a second']['ours']:.0f}",
            f"{share:.0%}" if share else "",
            *([f"{memory[side] / 1024:.1f}" for side in ("ours", "plain")] if memory else ["", ""]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(result: dict) -> str:
    """How many times faster each stage is, with the spread of the rounds and the target as a line."""
    stages = result["stages"]
    height = 46 + 20 * len(stages)

    def draw(figure) -> None:
        ax = axes(figure, height, left=96, bottom=34, top=8, right=30)
        for at, x in enumerate(stages.values()):
            ax.barh(at, x["times faster"], 0.62, color=COLOURS["forgotten"])
            ax.plot(x["spread"], [at, at], color=INK, linewidth=1)
            ax.text(max(x["spread"]) * 1.06, at, f"{x['times faster']:.1f}", va="center", color=INK)
            if x["target"]:
                ax.plot([x["target"]] * 2, [at - 0.42, at + 0.42], color=COLOURS["remembered"], linewidth=1.4)
        ax.set_xscale("log")
        ax.set_xlim(0.8, 1.6 * max(max(x["spread"][1], x["target"] or 0) for x in stages.values()))
        ax.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        ax.minorticks_off()
        ax.axvline(1, color=SOFT, linewidth=0.6)
        ax.set_yticks(range(len(stages)), stages)
        ax.invert_yaxis()
        ax.set_xlabel("times faster than a plain script (| = target)")

    return svg("bench", "How many times faster each stage is than a plain script that does the same", height, draw)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", default="", help=f"comma-separated, of {', '.join(STAGES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument(
        "--no-memory", action="store_true", help="leave peak memory out: it takes two processes a stage"
    )
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_memory()
    if args.peak:
        stage, side = args.peak
        work = STAGES[stage].sides[side](load("smollm2-135m"))  # no copy: it would count
        work(), work()
        print(peak_memory() / 2**20)
        return
    names = args.stages.split(",") if args.stages else list(STAGES)
    if strange := [name for name in names if name not in STAGES]:
        parser.error(f"unknown stages {', '.join(strange)}; there are {', '.join(STAGES)}")
    claim(args.out)
    result: dict = {}
    for result in measured(
        load("smollm2-135m"), names, args.rounds, not args.no_memory
    ):  # minutes a stage: none is lost
        write_json(args.out / "bench.json", result)
        write_text(args.out / "bench.md", table(result))
        write_text(args.out / "bench.svg", picture(result))
    print(table(result))
    print(json.dumps({k: v for k, v in result.items() if k != "stages"}, indent=1))


if __name__ == "__main__":
    main()
