"""Many looks: how often would names, attacks and scores together speak against a model that is like one never taught?

A verdict on one name under one attack lets `choice` or `extraction strength` speak against it where R passes the tolerance and
its 95 % interval lies above 0.  Few facts and many attacks make that happen by luck.  If forgotten and never-taught model
are alike, then what they score on a fact may change places; whether it does is drawn for each fact, once for all attacks and
scores, which keeps how these hang together.  The looks that would speak are counted in each draw (a randomisation test).

    p = (1 + #{draws with as many or more}) / (1 + draws)

Ours; nothing here changes a verdict.  The likelihood of values and what is said word for word have no such luck and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unremember.score import RULE, Rule

DRAWS, RESAMPLES = 200, 1000


@dataclass(frozen=True)
class Look:
    """One score of one name under one attack: fact -> value of each model, over the same facts."""

    original: Mapping[str, float]
    forgotten: Mapping[str, float]
    never: Mapping[str, float]


@dataclass(frozen=True)
class Luck:
    """Of so many `looks` speak `seen`; by luck it were `mean`, and in 19 of 20 cases at most `high`.  p: as many or more."""

    looks: int
    seen: int
    mean: float
    high: int
    p: float


def speaks(o: np.ndarray, f: np.ndarray, n: np.ndarray, rule: Rule = RULE, resamples: int = RESAMPLES) -> np.ndarray:
    """Whether R is above the tolerance and above 0 for certain (95 %), by resampling facts. o: (F,); f, n: (S, F) -> (S,)"""
    facts = len(o)
    pick = np.random.default_rng(0).integers(0, facts, (resamples, facts))
    weight = np.stack([(pick == i).sum(1) for i in range(facts)], 1) / facts  # (resamples, F)
    low = np.quantile((f - n) @ weight.T, 0.025, axis=1)
    gap = o.mean() - n.mean(1)
    return (gap >= rule.gap) & ((f - n).mean(1) > rule.tolerance * gap) & (low > 0)


def luck(looks: Sequence[Look], rule: Rule = RULE, draws: int = DRAWS, seed: int = 0) -> Luck | None:
    """None where no look has enough facts to say anything."""
    names = sorted({key for look in looks for key in look.original})
    swap = np.random.default_rng(seed).random((draws + 1, len(names))) < 0.5
    swap[0] = False  # as it was
    column, spoke = {key: i for i, key in enumerate(names)}, []
    for look in looks:
        keys = [k for k, v in look.original.items() if v >= rule.passes and k in look.forgotten and k in look.never]
        if len(keys) < rule.facts:
            continue
        o, f, n = (np.array([x[k] for k in keys]) for x in (look.original, look.forgotten, look.never))
        turned = swap[:, [column[k] for k in keys]]
        spoke.append(speaks(o, np.where(turned, n, f), np.where(turned, f, n), rule))
    if not spoke:
        return None
    seen, *drawn = np.sum(spoke, axis=0).tolist()
    high = int(np.quantile(drawn, 0.95, method="higher"))
    return Luck(len(spoke), seen, float(np.mean(drawn)), high, (1 + sum(x >= seen for x in drawn)) / (1 + draws))
