"""`python -m benchmarks.scaling`: how cost grows with examples, tokens, model size and processes, as measured exponents.

cost ∝ size^k, k by least squares over logarithms of medians.  A training step (ascent) and a reading pass for each; examples and
tokens on the default model, model sizes with random weights (time does not depend on them).  Processes: one with two threads
against two with one each (FSDP2), steps of the same rows.  Sizes of one series take turns, so that a busy moment hits all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import timed
from benchmarks.stages import BUDGET
from unremember import team
from unremember.bench import Bench
from unremember.embedded.dossier import dossier
from unremember.embedded.prose import prose
from unremember.folder import claim, write_json
from unremember.lm import LM
from unremember.loading import load
from unremember.machine import keep_memory
from unremember.table import read
from unremember.tokens import Row, shares
from unremember.train import Plan, backward, batch, train

EXAMPLES = (16, 32, 64, 128)
TOKENS = (64, 128, 256, 512)
TEXTS = 8
SIZES = {"15M": (192, 10, 3, 1), "45M": (384, 20, 6, 2), "135M": (576, 30, 9, 3)}  # width, blocks, heads, kinds of keys
STEPS = 4


def ascent(lm: LM, tokens) -> dict[str, torch.Tensor]:
    return {"ascent": -tokens.per_row(-lm.logp(tokens), "answer").sum() / tokens.step_tokens["answer"]}


def stepping(lm: LM, rows: list[Row]) -> Callable[[], None]:
    optimiser = torch.optim.AdamW(lm.model.parameters(), lr=1e-6, fused=True)

    def take() -> None:
        backward(lm, ascent, batch({"forget": rows}, Plan(steps=1, lr=1e-6), 0, BUDGET), BUDGET)
        optimiser.step()
        optimiser.zero_grad()

    return take


def facts(lm: LM, count: int) -> list[Row]:
    people = dossier(0, forget=1 + count // 6, retain=1, holdout=1, relearn=0)
    return lm.template.rows(people["forget"][:count])


def passages(lm: LM, length: int) -> list[Row]:
    """Texts of exactly so many tokens, from plain prose, no two with a beginning in common."""
    ids = [i for x in prose() for i in lm.template.row(x.id, "", x.answer).ids[:-1]]
    cut = [tuple((ids * 20)[at * 601 :][:length]) for at in range(TEXTS)]
    return [Row(str(at), (*x, 0), 1, length, (True,) * (length - 1)) for at, x in enumerate(cut)]


def sized(lm: LM, width: int, blocks: int, heads: int, keys: int) -> LM:
    """A model of the same kind and another size, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from unremember.attention import quick

    shape = {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_hidden_layers": blocks}
    config = LlamaConfig(
        **shape, num_attention_heads=heads, num_key_value_heads=keys, vocab_size=49152, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    return replace(lm, model=quick(LlamaForCausalLM(config)).eval())


def series(made: dict[float, tuple[LM, list[Row]]], rounds: int) -> dict:
    """Seconds of a step and of reading at each size, and their exponents."""
    found = {}
    for kind in ("step", "read"):
        work = {
            str(size): stepping(lm.copy(), rows) if kind == "step" else lambda lm=lm, rows=rows: read(lm, rows)
            for size, (lm, rows) in made.items()
        }
        seconds = timed(work, rounds)
        middle = [float(np.median(seconds[str(size)])) for size in made]
        k = float(np.polyfit(np.log(list(made)), np.log(middle), 1)[0])
        found[kind] = {"sizes": list(made), "seconds": seconds, "exponent": k}
    return found


def child(out: Path, half: int | None) -> None:
    """What a process of torchrun, or one alone, does: STEPS steps behind one that is not counted. half: 0 or 1 of the rows."""
    team.join()
    lm = load("smollm2-135m")
    marks: list[float] = []
    rows = facts(lm, 64)
    rows = rows if half is None else shares(rows, 2)[half]

    def say(stage: str, done: int, total: int, terms: dict) -> None:
        marks.append(time.perf_counter())

    train(lm, ascent, {"forget": rows}, Plan(steps=STEPS + 1, lr=1e-6), bench=Bench(say=say))
    if team.rank() == 0:
        out.write_text(json.dumps(np.diff(marks).tolist()))
    team.leave()


def processes(out: Path) -> dict:
    """Seconds a step of one process with two threads, of two with one, and of two that never talk, with half of the rows each."""
    alone, both = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    found = {}
    for name, threads, commands in (
        ("one process, two threads", "2", [alone]),
        ("two processes, FSDP2", "1", [both]),
        ("two processes apart", "1", [alone, alone]),
    ):
        running = []
        for at, command in enumerate(commands):
            run = [*command, "-m", "benchmarks.scaling", "--child", str(out / f"steps-{at}.json")]
            run += ["--half", str(at)] if len(commands) > 1 else []
            running.append(
                subprocess.Popen(run, env={**os.environ, "OMP_NUM_THREADS": threads}, stderr=subprocess.PIPE)
            )
        for process in running:
            said = process.communicate()[1]
            if process.returncode:
                raise RuntimeError(f"{name}: {said.decode()[-2000:]}")
        places = [out / f"steps-{at}.json" for at in range(len(commands))]
        found[name] = np.max([json.loads(place.read_text()) for place in places], 0).tolist()
        for place in places:
            place.unlink()
    one, two, apart = (float(np.median(x)) for x in found.values())
    return found | {"two over one": two / one, "apart over one": apart / one}


def sizes(rounds: int) -> dict:
    """Exponents of examples, tokens and weights."""
    lm = load("smollm2-135m")
    models = [sized(lm, *shape) for shape in SIZES.values()]
    weights = [sum(w.numel() for w in x.model.parameters()) for x in models]
    return {
        "precision": lm.precision,
        "examples": series({n: (lm, facts(lm, n)) for n in EXAMPLES}, rounds),
        "tokens": series({n: (lm, passages(lm, n)) for n in TOKENS}, rounds),
        "weights": series({n: (x, facts(lm, 32)) for n, x in zip(weights, models, strict=True)}, rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--only-processes", action="store_true", help="one process against two, and nothing else")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--half", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_memory()
    if args.child:
        return child(args.child, args.half)
    claim(args.out)
    result: dict = {"threads": torch.get_num_threads(), "rounds": args.rounds}
    if not args.only_processes:
        result |= sizes(args.rounds)
    result["processes"] = processes(args.out)
    write_json(args.out / "scaling.json", result)
    for name in [x for x in ("examples", "tokens", "weights") if x in result]:
        for kind, x in result[name].items():
            middle = ", ".join(f"{size:,}: {np.median(x['seconds'][str(size)]):.2f} s" for size in x["sizes"])
            print(f"{kind} by {name}: exponent {x['exponent']:.2f} ({middle})")
    two, apart = (result["processes"][x] for x in ("two over one", "apart over one"))
    print(f"two processes over one: {two:.2f} times the seconds a step; {apart:.2f} where they never talk")


if __name__ == "__main__":
    main()
