"""The workbench: where computation happens and who is told about it.  Nothing in it but `levels` changes a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def _silent(stage: str, done: int, total: int, terms: dict[str, float]) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Bench:
    """device: torch device name.  budget: places in one packed forward pass.
    batch: prompts decoded together; the more, the nearer a step comes to the machine's peak.
    recompute: training keeps what enters a block, and computes the rest again on the way back, where it gathers
    sharded weights again.
    folder: where a training run keeps its checkpoint, None = nowhere.  every: seconds between two checkpoints, at least.
    log: file for one JSON line a step, None = no file.
    say(stage, done, total, terms): called after each unit of work.
    watch(lm): further numbers for each look of a stopper, for curves; they decide nothing.
    memory: score tables and generated answers by model fingerprint; fill it from disk to avoid work.
    levels: what the first stopper measured, for those of later portions; None = each measures for itself.
    notes: what an attack found out about itself, by name, beside the model that it gives back; the report shows it.
    """

    device: str = "cpu"
    budget: int = 2048
    recompute: bool = False
    batch: int = 192
    folder: Path | None = None
    every: float = 60.0
    log: Path | None = None
    say: Callable[[str, int, int, dict[str, float]], None] = _silent
    watch: Callable[[Any], dict[str, float]] | None = None
    memory: dict[str, dict] = field(default_factory=dict)
    levels: dict[str, dict[str, float]] | None = None
    notes: dict[str, float | str] = field(default_factory=dict)


LEAST = 64  # places of a pass that are still worth trying
BENCH = Bench()
