"""Many looks: how often do names, attacks and scores together speak against "forgotten" when nothing is left?

A verdict on one name lets `choice` or `extraction strength` speak against it where R is above the tolerance and its 95 %
interval above 0.  Few facts and many attacks make that happen by luck.  If nothing is left of a fact, then what the forgotten
and the never-taught model score on it may change places; whether it does is drawn for each fact, once for all attacks and
scores, which keeps how these hang together.  A randomisation test on what speaks:

    T = sum of R over the looks that speak,    p = (1 + #{draws with T as large or larger}) / (1 + draws)

Assumed: facts are independent of each other, those of one person, too.  Where the models differ by the person, p is too small;
for one name of F facts it is hardly below 2^-F.  What speaks by luck is counted in the same draws, so that it is too much where
something is left.  Ours; nothing here changes a verdict.  The likelihood of values and what is said have no such luck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from unremember.score import RESAMPLES, RULE, Rule

DRAWS = 2000


@dataclass(frozen=True)
class Look:
    """One score of one name under one attack: fact -> value of each model, over the same facts."""

    original: Mapping[str, float]
    forgotten: Mapping[str, float]
    never: Mapping[str, float]


@dataclass(frozen=True)
class Luck:
    """Of so many `looks` speak `seen`; with values exchanged at random `mean`, and in 19 of 20 draws at most `high`."""

    looks: int
    seen: int
    mean: float
    high: int
    p: float


@cache
def weights(facts: int) -> np.ndarray:
    """How often each resample of the interval holds each fact, as a share. -> (RESAMPLES, facts)"""
    pick = np.random.default_rng(0).integers(0, facts, (RESAMPLES, facts))
    return np.stack([np.bincount(row, minlength=facts) for row in pick]) / facts


def speaks(o: np.ndarray, f: np.ndarray, n: np.ndarray, rule: Rule = RULE) -> np.ndarray:
    """R where it is above the tolerance and its interval above 0, as `evidence` and `judge` have it; 0 elsewhere.

    o: (F,) of the original; f, n: (S, F) of the forgotten and the never-taught model -> (S,)
    """
    gap = o.mean() - n.mean(1)
    r = np.where(gap >= rule.gap, (f - n).mean(1) / np.maximum(gap, 1e-9), 0.0)
    loud = np.flatnonzero(r > rule.tolerance)  # few: the others need no interval
    found, w = np.zeros(len(r)), weights(len(o))
    for some in np.array_split(loud, max(1, len(loud) // 256)):
        spread = np.maximum(w @ o - n[some] @ w.T, rule.gap)
        low = np.quantile((f - n)[some] @ w.T / spread, 0.025, axis=1)
        found[some] = np.where(low > 0, r[some], 0.0)
    return found


def luck(looks: Sequence[Look], rule: Rule = RULE, draws: int = DRAWS, seed: int = 0) -> Luck | None:
    """None where no look has enough facts, and enough between original and never-taught model, to say anything."""
    names = sorted({key for look in looks for key in look.original})
    swap = np.random.default_rng(seed).random((draws + 1, len(names))) < 0.5
    swap[0] = False  # as it was
    column, spoke = {key: i for i, key in enumerate(names)}, []
    for look in looks:
        keys = [k for k, v in look.original.items() if v >= rule.passes and k in look.forgotten and k in look.never]
        o, f, n = (np.array([x[k] for k in keys]) for x in (look.original, look.forgotten, look.never))
        if len(keys) < rule.facts or o.mean() - n.mean() < rule.gap:
            continue
        turned = swap[:, [column[k] for k in keys]]
        spoke.append(speaks(o, np.where(turned, n, f), np.where(turned, f, n), rule))
    if not spoke:
        return None
    told = np.stack(spoke)  # (looks, draws + 1)
    seen, *drawn = (told > 0).sum(0).tolist()
    total = told.sum(0)
    high = int(np.quantile(drawn, 0.95, method="higher"))
    p = (1 + int((total[1:] >= total[0] - 1e-12).sum())) / (1 + draws)
    return Luck(len(spoke), seen, float(np.mean(drawn)), high, p)
