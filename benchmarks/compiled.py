"""`python -m benchmarks.compiled`: does `torch.compile` of the blocks pay on this machine?  A training step with and without.

Ascent on 64 facts, one pass of one shape, so that a single graph a block is enough; blocks are alike, and share it.  Printed:
seconds of both, in turn, the seconds until the first compiled step has ended, and how far the gradients are apart.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

from benchmarks.measure import timed
from benchmarks.scaling import ascent, facts, stepping
from benchmarks.stages import BUDGET
from unremember import team
from unremember.lm import LM
from unremember.loading import load
from unremember.machine import keep_memory
from unremember.tokens import Row
from unremember.train import Plan, backward, batch


def gradients(lm: LM, rows: list[Row]) -> torch.Tensor:
    """All of a step's, in one vector."""
    backward(lm, ascent, batch({"forget": rows}, Plan(steps=1, lr=1e-6), 0, BUDGET), BUDGET)
    found = torch.cat([w.grad.flatten() for w in lm.model.parameters() if w.grad is not None])
    lm.model.zero_grad()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.compiled", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    keep_memory()
    plain = load("smollm2-135m")
    compiled, rows = plain.copy(), facts(plain, 64)
    for block in team.blocks(compiled.model):
        block.compile(dynamic=False)
    began = time.perf_counter()
    theirs = gradients(compiled, rows)
    first = time.perf_counter() - began
    ours = gradients(plain, rows)
    apart = float((theirs - ours).norm() / ours.norm())
    seconds = timed({"as it is": stepping(plain, rows), "compiled": stepping(compiled, rows)}, args.rounds)
    ratio = float(np.median(seconds["as it is"]) / np.median(seconds["compiled"]))
    shown = {"threads": torch.get_num_threads(), "precision": plain.precision, "first compiled step": first}
    print(json.dumps(shown | {"gradients apart": apart, "times faster": ratio, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
