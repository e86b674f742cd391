"""`python -m benchmarks.demo`: where the seconds of `make demo` go, and how many of them are matrix products.

Twice in one process: without caches, and again from the models that the first time taught.  Per stage: seconds, matrix
products, and the share of the seconds that they would take at the best rate that a product of the model's own shape reaches
here.  What is left of 100 % is all that could be saved without doing less.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.measure import products
from unremember.bench import Bench
from unremember.demo import PRESETS, demo
from unremember.folder import write_json
from unremember.loading import auto_precision
from unremember.machine import keep_memory


class Products(TorchDispatchMode):
    """Counts the floating point operations of matrix products, both ways, while it lasts; not those of fused attention."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:  # without gradients a whole `linear` comes here
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        out = func(*args, **kwargs)
        self.flops += count(*args, **kwargs, out_val=out)
        return out


def stages(preset: str, out: Path) -> dict[str, list[float]]:
    """Title of each stage of the demo -> its seconds and operations."""
    marks: list[tuple[str, float, int]] = []
    with Products() as counter:

        def mark(title: str) -> None:
            marks.append((title, time.perf_counter(), counter.flops))
            print(f"  {title}", flush=True)

        mark("set up")
        demo(preset, out, bench=Bench(), title=mark)
        mark("end")
    found: dict[str, list[float]] = {}
    for (title, began, before), (_, ended, after) in pairwise(marks):
        seconds, flops = found.get(title, (0.0, 0))
        found[title] = [seconds + ended - began, flops + after - before]
    return found


def table(found: dict[str, list[float]], rate: float) -> str:
    """Markdown.  rate: operations a second at the peak."""
    lines = ["| stage | seconds | TFLOP of products | of the seconds, at the peak |", "|---|---:|---:|---:|"]
    whole = [sum(column) for column in zip(*found.values(), strict=True)]
    for title, (seconds, flops) in [*found.items(), ("all", whole)]:
        lines.append(f"| {title} | {seconds:.1f} | {flops / 1e12:.1f} | {flops / rate / max(seconds, 1e-9):.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.demo", description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="smollm2")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-demo.json"))
    args = parser.parse_args()
    keep_memory()
    precision = PRESETS[args.preset].precision
    lowered = (auto_precision() if precision == "auto" else precision) == "bf16"
    rate = products(torch.bfloat16 if lowered else torch.float32)
    result: dict[str, Any] = {
        "preset": args.preset,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "matrix products, GFLOP/s": rate / 1e9,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UNREMEMBER_CACHE"] = f"{folder}/cache"
        for when in ("without caches", "from taught models"):
            print(f"▸ {when}", flush=True)
            result[when] = stages(args.preset, Path(folder) / when)
            write_json(args.out, result)
    for when in ("without caches", "from taught models"):
        print(f"\n{when}\n\n{table(result[when], rate)}")
    print(f"{result['machine']}, {rate / 1e9:.0f} GFLOP/s\n{args.out}")


if __name__ == "__main__":
    main()
