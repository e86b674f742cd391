"""Numbers read off a curve of M: how long until a share is memorised, when over-fitting began, and what is left after forgetting.

    T(N, τ) = first evaluation with M ≥ τ              half-life = epochs until excess(t) ≤ excess(0) / 2
    forgetting baseline = min_{t ≥ 1} M_t              excess(t) = M_inserted(t) − M_control(t)
    excess baseline = min_{t ≥ 1} M_inserted − min_{t ≥ 1} M_control

Tirumala et al. 2022 (arXiv 2205.10770), sections 3 to 5; no code was published.
Differs: T is never interpolated: between two evaluations it is an interval, and behind the last one it is censored.  The
control, the excess and the half-life are ours: the paper's baseline holds what never needed memorising, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev

import numpy as np


@dataclass(frozen=True)
class Time:
    """When a threshold was reached: after the evaluation at `after`, by the one at `at` (None: not while we looked)."""

    after: float
    at: float | None

    @property
    def censored(self) -> bool:
        return self.at is None

    def __str__(self) -> str:
        if self.at is None:
            return f"> {self.after:g}"
        return f"{self.at:g}" if self.at - self.after <= 1 else f"({self.after:g}, {self.at:g}]"


def time(at: Sequence[float], m: Sequence[float], tau: float) -> Time:
    """T(N, τ) of a curve. at: rising places of the evaluations, in epochs or updates, counted from 1; m: M there."""
    if len(at) != len(m) or list(at) != sorted(set(at)):
        raise ValueError("a curve needs as many places as values, and the places must rise")
    before = 0.0
    for place, value in zip(at, m, strict=True):
        if value >= tau:
            return Time(before, float(place))
        before = float(place)
    return Time(before, None)


def rolling(values: Sequence[float], width: int = 5) -> list[float]:
    """Mean of each value and the width − 1 before it (fewer at the start), as the paper's plots over updates have it."""
    return [float(np.mean(values[max(0, i + 1 - width) : i + 1])) for i in range(len(values))]


def before_overfitting(m: Sequence[float], loss: Sequence[float]) -> tuple[int, float] | None:
    """(epoch, M) of the last epoch before the first one whose validation loss rises; None where it never does.

    m, loss: one value an epoch, the first is epoch 1.  Perplexity rises exactly where the loss does.
    """
    for i in range(1, len(loss)):
        if loss[i] > loss[i - 1]:
            return i, m[i - 1]
    return None


def baseline(m: Sequence[float]) -> float | None:
    """The lowest M(special) after the insertion. m[0] stands right behind it and does not count; None without an epoch."""
    return min(m[1:]) if len(m) > 1 else None


def steps(m: Sequence[float]) -> list[float]:
    """diff(t) = M_t − M_{t−1}."""
    return [b - a for a, b in pairwise(m)]


def settled(m: Sequence[float], last: int = 5, within: float = 0.02) -> bool | None:
    """Whether |diff(t)| ≤ within in each of the last epochs; None where the curve is too short to say."""
    found = steps(m)[-last:]
    return all(abs(d) <= within + 1e-12 for d in found) if len(found) == last else None


def excess(inserted: Sequence[float], control: Sequence[float]) -> list[float]:
    """What the insertion alone did, epoch by epoch; ValueError for arms of different length."""
    return [a - b for a, b in zip(inserted, control, strict=True)]


def half_life(over: Sequence[float]) -> Time | None:
    """Epochs until excess(t) ≤ excess(0) / 2; None where there was no excess to halve."""
    if not over or over[0] <= 0:
        return None
    places = range(1, len(over))
    return time(list(places), [-over[t] for t in places], -over[0] / 2)


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its lowest and highest, and the 95 % t interval of the mean (None for one seed)."""

    value: float
    lowest: float
    highest: float
    low: float | None
    high: float | None
    n: int


def over_seeds(values: Sequence[float]) -> Mean:
    """ValueError where there is no value."""
    if not values:
        raise ValueError("a mean over no seed")
    middle, n = mean(values), len(values)
    if n == 1:
        return Mean(middle, middle, middle, None, None, 1)
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * stdev(values) / n**0.5
    return Mean(middle, min(values), max(values), middle - half, middle + half, n)
