"""Seconds, memory, and what the machine could do at most."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import torch


def timed(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, taken in turn so that a busy moment hits all alike; the first round is thrown away."""
    seconds = {name: [] for name in steps}
    for at in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if at:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def peak(stage: str, side: str) -> float:
    """Peak resident memory, MB, of a fresh process that does one side of a stage twice."""
    command = [sys.executable, "-m", "benchmarks", "--peak", stage, side]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def products(dtype: torch.dtype, rows: int = 1024, width: int = 576, height: int = 1536) -> float:
    """The best rate of a matrix product of the default model's own shape, FLOP/s."""
    a, b = torch.randn(rows, width).to(dtype), torch.randn(width, height).to(dtype)
    best = 0.0
    for _ in range(40):
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        best = max(best, 5 * 2 * rows * width * height / (time.perf_counter() - began))
    return best


def bandwidth(size: int = 2**28) -> float:
    """The best rate of copying memory that no cache holds, bytes read and written a second."""
    source, target = torch.ones(size // 4), torch.empty(size // 4)
    best = 0.0
    for _ in range(12):
        began = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * size / (time.perf_counter() - began))
    return best
