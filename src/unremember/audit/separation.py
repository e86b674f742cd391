"""How well one number an example tells members from strangers: AUC, true positives at few false ones, advantage, PrivLeak.

    AUC = P(member > stranger) + ½ P(member = stranger)        advantage = max_t TPR(t) − FPR(t)
    TPR at a FPR of α = the largest TPR(t) with FPR(t) ≤ α
    PrivLeak = 100 · (a_unl − a_ret) / a_ret,  a = 1 − AUC      0 = like retrained, < 0 = still leaks, > 0 = over-forgotten

DeLong, DeLong, Clarke-Pearson 1988 (interval of the AUC); Newcombe 2006, method 5 (where the groups do not overlap);
Obuchowski 1997 has the case of clusters, here by bootstrap and permutation; Carlini et al. 2022 (TPR at a low FPR); Shi et al.
2025 (MUSE, PrivLeak).  Reference code: locuslab/open-unlearning, from descriptions of it, not read.
Differs: PrivLeak has no value without the retrained model (that code puts a = 0.5 in its place and says nothing) or where
a_ret is tiny; a TPR has none where there are not 3 / FPR examples on either side; an AUC below one half is not turned round.
Members and strangers must come from one source: no statistic here can see that they do not (`textonly` can).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from math import comb, log, sqrt

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import norm, rankdata

from unremember.errors import BadRequest
from unremember.score import FORGOTTEN, NOT_APPLICABLE, OVER, REMEMBERED, Score

DRAWS = 2000  # of a bootstrap or a permutation
EXACT = 2500  # pairs up to which the null distribution is counted out
LEVEL = 0.05
LEAST = 0.1  # of 1 − AUC of a retrained model: PrivLeak divides by it
BOUND = 50.0  # PrivLeak: half of the way from the retrained model to full leakage


@dataclass(frozen=True)
class Measured:
    """A number about two groups, with its 95 % interval, its chance level, and where 95 % of the numbers fall by chance.

    value: None where it cannot be told, and `reason` says why.  units: how many independent ones there are on each side.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    chance: float
    null: tuple[float, float] | None
    members: int
    strangers: int
    units: tuple[int, int]
    reason: str = ""

    @property
    def beyond(self) -> bool:
        """Whether chance explains the value no more: it lies outside the null interval."""
        return self.value is not None and self.null is not None and not self.null[0] <= self.value <= self.null[1]


def separation(
    score: Score,
    members: Iterable[str],
    strangers: Iterable[str],
    fpr: float = 0.01,
    tried: int = 1,
    units: Mapping[str, str] | None = None,
) -> dict[str, Measured]:
    """{'AUC', 'TPR', 'advantage'} of one score.

    fpr: false positives that the TPR allows.  tried: how many attacks were looked at; the null interval is that of the best of
    them (Bonferroni), as the best of ten looks good on pure noise.
    units: id -> what examples share when they are not independent (the person they are about); whole units are then resampled
    and permuted.  Leave it out where single examples were drawn for each side.
    """
    wrong = [f"fpr = {fpr:g} lies outside (0, 1)"] if not 0 < fpr < 1 else []
    wrong += [f"tried = {tried}: at least the attack itself was tried, give 1 or more"] if tried < 1 else []
    if wrong:
        raise BadRequest(wrong)
    ids = list(members), list(strangers)
    a, b = _groups(score, *ids, units)
    sides = _units(ids[0], units), _units(ids[1], units)
    counts = len(set(sides[0])), len(set(sides[1]))
    ones = np.ones((1, len(a))), np.ones((1, len(b)))
    value, hit, gap = (float(x[0]) for x in _statistics(a, b, *ones, fpr))
    lots = (_statistics(a, b, *w, fpr) for w in _weights(*sides, len(a) + len(b)))
    draws = [np.concatenate(x) for x in zip(*lots, strict=True)]
    spread = [(float(np.quantile(x, LEVEL / 2)), float(np.quantile(x, 1 - LEVEL / 2))) for x in draws]
    if units is None:
        low, high = interval(a, b)
        null = null_interval(len(a), len(b), tried)
        most = sqrt(-log(LEVEL / tried) / 2 * (1 / len(a) + 1 / len(b)))  # one-sided Kolmogorov-Smirnov
        usual = sqrt(np.pi / 8) * sqrt(1 / len(a) + 1 / len(b))  # its mean
    else:
        low, high = spread[0]
        shuffled, tail = _permuted(a, b, sides, fpr), LEVEL / tried / 2
        lower, upper = (
            float(np.quantile(shuffled[0], q, method=end)) for q, end in ((tail, "lower"), (1 - tail, "higher"))
        )
        null = lower, upper
        most, usual = float(np.quantile(shuffled[2], 1 - 2 * tail, method="higher")), float(shuffled[2].mean())

    def measured(name: str, value: float, ends: tuple[float, float], chance: float, null: tuple[float, float] | None):
        return Measured(name, value, *ends, chance, null, len(a), len(b), counts)

    rate = measured(f"TPR at {100 * fpr:g} % FPR", hit, spread[1], fpr, None)
    if min(counts) < (need := round(3 / fpr)):
        why = f"{min(counts)} independent examples on one side, and a FPR of {fpr:g} needs {need}"
        rate = replace(rate, value=None, low=None, high=None, reason=why)
    return {
        "AUC": measured("AUC", value, (low, high), 0.5, null),
        "TPR": rate,
        "advantage": measured("advantage", gap, spread[2], min(usual, 1.0), (0.0, min(most, 1.0))),
    }


def auc(a: np.ndarray, b: np.ndarray) -> float:
    """a: (m,) members, b: (n,) strangers -> share of the pairs in which the member's number is higher, ties by half."""
    ranks = rankdata(np.concatenate([a, b]))[: len(a)]
    return float((ranks.sum() - len(a) * (len(a) + 1) / 2) / (len(a) * len(b)))


def variance(a: np.ndarray, b: np.ndarray) -> float:
    """DeLong's variance of the AUC, from the share of the other side that each example beats."""
    ranks = rankdata(np.concatenate([a, b]))
    wins = (ranks[: len(a)] - rankdata(a)) / len(b)  # (m,)
    losses = 1 - (ranks[len(a) :] - rankdata(b)) / len(a)  # (n,)
    return float(wins.var(ddof=1) / len(a) + losses.var(ddof=1) / len(b))


def interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """95 % interval of the AUC: DeLong on the logit scale; groups that do not overlap get Newcombe's, which is no point."""
    value, spread = auc(a, b), variance(a, b)
    z = norm.isf(LEVEL / 2)
    if value in (0, 1):
        inner = _apart(len(a), len(b), z)
        return (inner, 1.0) if value == 1 else (0.0, 1 - inner)
    if spread == 0:  # all numbers are equal
        return null_interval(len(a), len(b))
    step = z * sqrt(spread) / (value * (1 - value))
    centre = log(value / (1 - value))
    return float(expit(centre - step)), float(expit(centre + step))


def _apart(m: int, n: int, z: float) -> float:
    """The AUC from which none smaller explains that all members are above all strangers: the root of (1 − θ)² = z² V(θ)."""
    more = (m + n) / 2 - 1

    def gap(theta: float) -> float:  # both sides divided by 1 − θ
        return 1 - theta - z**2 * theta * (1 + more * ((1 - theta) / (2 - theta) + theta / (1 + theta))) / (m * n)

    return float(brentq(gap, 0, 1))


def null_interval(m: int, n: int, tried: int = 1) -> tuple[float, float]:
    """Where 95 % of the AUCs fall if members and strangers come from one distribution; exact for few, else normal."""
    share = LEVEL / tried / 2
    if m * n <= EXACT:
        least = int(np.searchsorted(np.cumsum(_wins(m, n)), share, side="right"))
        return least / (m * n), 1 - least / (m * n)
    half = norm.isf(share) * sqrt((m + n + 1) / (12 * m * n))
    return max(0.5 - half, 0.0), min(0.5 + half, 1.0)


@cache
def _wins(m: int, n: int) -> np.ndarray:
    """P(u of the m·n pairs are won by the member), u = 0 … m·n, where every order is as likely (Mann, Whitney 1947)."""
    above = [np.ones(1)] * (n + 1)
    for i in range(1, m + 1):
        row = [np.ones(1)]
        for j in range(1, n + 1):
            p = np.zeros(i * j + 1)
            p[j:] += i / (i + j) * above[j]  # the highest of all is a member, who beats j strangers
            p[: i * (j - 1) + 1] += j / (i + j) * row[j - 1]
            row.append(p)
        above = row
    return above[n]


def privleak(
    unlearned: Score,
    retrained: Score | None,
    members: Iterable[str],
    strangers: Iterable[str],
    units: Mapping[str, str] | None = None,
) -> Measured:
    """PrivLeak of two models' scores of the same examples, with a paired bootstrap interval.

    Raises BadRequest without the retrained model's score, where the two are different scores, and where a_ret is below 0.1: the
    retrained model, too, tells the groups apart, so they differ in more than membership, and the quotient explodes.
    """
    if retrained is None:
        raise BadRequest(
            "PrivLeak compares with a model that was retrained without the forget set, and there is none; train one and give "
            "its score of the same examples (there is no default to put in its place)"
        )
    if unlearned.name != retrained.name:
        raise BadRequest(f"PrivLeak compares one score of two models, not {unlearned.name!r} with {retrained.name!r}")
    ids = list(members), list(strangers)
    a, b = _groups(unlearned, *ids, units)
    c, d = _groups(retrained, *ids, units)
    sides = _units(ids[0], units), _units(ids[1], units)
    left, floor = 1 - auc(a, b), 1 - auc(c, d)
    if floor < LEAST:
        raise BadRequest(
            f"PrivLeak divides by 1 − AUC of the retrained model, which is {floor:.3f} (at least {LEAST} is needed): one that "
            "never saw the forget set tells it from the holdout, so the two differ in more than membership; draw both from one "
            "source, at random"
        )
    draws = []
    for w in _weights(*sides, len(a) + len(b)):
        one, two = 1 - _statistics(a, b, *w, 0.5)[0], 1 - _statistics(c, d, *w, 0.5)[0]
        draws.append(100 * (one - two) / np.maximum(two, LEAST))
    low, high = np.quantile(np.concatenate(draws), [LEVEL / 2, 1 - LEVEL / 2])
    counts = len(set(sides[0])), len(set(sides[1]))
    fair = null_interval(*counts)
    why = (
        f"the retrained model has an AUC of {1 - floor:.2f} and by chance {fair[0]:.2f} to {fair[1]:.2f}: no fair split"
    )
    value = 100 * (left - floor) / floor
    told = "" if fair[0] <= 1 - floor <= fair[1] else why
    return Measured("PrivLeak", value, float(low), float(high), 0.0, None, len(a), len(b), counts, told)


def judged(leak: Measured, useful: bool) -> str:
    """What a PrivLeak says of a model.  useful: whether it passed the utility gate; a wrecked model has any PrivLeak, even 0."""
    if leak.value is None or leak.low is None or leak.high is None:
        return NOT_APPLICABLE
    if leak.high < 0:
        return REMEMBERED
    if not useful or leak.low > 0:
        return OVER
    return FORGOTTEN if leak.low >= -BOUND else NOT_APPLICABLE  # too few examples to tell


# ── groups, weights and curves ──


def _groups(
    score: Score, members: list[str], strangers: list[str], units: Mapping[str, str] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of both groups in the order of their ids; BadRequest with everything that forbids a comparison."""
    found = score.over([*members, *strangers])
    problems = []
    if score.direction.startswith("lower"):
        problems.append(f"{score.name!r} is {score.direction}: higher must mean more of a member; turn its sign")
    for side, ids in (("members", members), ("strangers", strangers)):
        if len(ids) < 2:
            problems.append(f"there are {len(ids)} {side}, and at least 2 are needed; add some")
        if len(set(ids)) < len(ids):
            problems.append(f"the {side} name {_some(x for x in set(ids) if ids.count(x) > 1)} twice; once is enough")
    if both := set(members) & set(strangers):
        problems.append(f"{_some(both)} are members and strangers at once; remove them from one side")
    if absent := [x for x in (*members, *strangers) if x not in found]:
        problems.append(f"{score.name!r} has no number for {_some(absent)}; measure them, or leave them out")
    if broken := [x for x, value in found.items() if not np.isfinite(value)]:
        problems.append(f"{score.name!r} is not finite for {_some(broken)}; the model or the measure is broken")
    if units is not None:
        if alone := [x for x in (*members, *strangers) if x not in units]:
            problems.append(f"no unit is given for {_some(alone)}; name one for each example")
        else:
            mixed = {units[x] for x in members} & {units[x] for x in strangers}
            if mixed:
                problems.append(
                    f"the units {_some(mixed)} stand on both sides: drawn example by example, give no units"
                )
            for side, ids in (("members", members), ("strangers", strangers)):
                if len(ids) > 1 and len({units[x] for x in ids}) < 2:
                    problems.append(f"all {side} belong to one unit, and one has no spread; add others")
    if problems:
        raise BadRequest(problems)
    return np.array([found[x] for x in members]), np.array([found[x] for x in strangers])


def _some(ids: Iterable[str]) -> str:
    ids = sorted(ids)
    return ", ".join(ids[:5]) + (f" … ({len(ids)} in all)" if len(ids) > 5 else "")


def _units(ids: list[str], units: Mapping[str, str] | None) -> np.ndarray:
    """(N,) number of each example's unit on its side."""
    named = [units[x] for x in ids] if units is not None else ids
    return np.unique(named, return_inverse=True)[1]


def _lots(total: int, draws: int, size: int) -> Iterator[int]:
    """`draws` cut into portions so that one of them times `size` numbers stays small."""
    step = max(1, total // size)
    yield from (min(step, draws - first) for first in range(0, draws, step))


def _weights(one: np.ndarray, other: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """How often each example is drawn when whole units are drawn with replacement, side by side.  (draws, N) each"""
    rng = np.random.default_rng(0)
    for lot in _lots(4_000_000, DRAWS, size):
        drawn = []
        for side in (one, other):
            n = side.max() + 1
            drawn.append(rng.multinomial(n, np.full(n, 1 / n), lot)[:, side].astype(float))
        yield drawn[0], drawn[1]


def _permuted(a: np.ndarray, b: np.ndarray, sides: tuple[np.ndarray, np.ndarray], fpr: float) -> list[np.ndarray]:
    """The statistics where whole units change sides: every way to choose the members' units, or DRAWS of them."""
    count, others = sides[0].max() + 1, sides[1].max() + 1
    whole = np.concatenate([sides[0], sides[1] + count])
    values = np.concatenate([a, b])
    rng = np.random.default_rng(0)
    if comb(count + others, count) <= DRAWS:
        chosen = [list(c) for c in combinations(range(count + others), count)]
    else:
        chosen = [list(rng.permutation(count + others)[:count]) for _ in range(DRAWS)]
    member = np.zeros((len(chosen), count + others))
    for row, units in zip(member, chosen, strict=True):
        row[units] = 1
    member = member[:, whole]  # (draws, N)
    parts = [
        _statistics(values, values, rows, 1 - rows, fpr)
        for rows in np.array_split(member, max(1, member.size // 4_000_000))
    ]
    return [np.concatenate(x) for x in zip(*parts, strict=True)]


def _statistics(
    a: np.ndarray, b: np.ndarray, wa: np.ndarray, wb: np.ndarray, fpr: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUC, TPR at `fpr` and advantage of weighted groups.  wa: (D, m), wb: (D, n) -> (D,) each"""
    values = np.concatenate([a, b])
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))  # a threshold takes all equal numbers at once
    up = np.concatenate([wa, np.zeros_like(wb)], 1)[:, order].cumsum(1)[:, ends]
    right = np.concatenate([np.zeros_like(wa), wb], 1)[:, order].cumsum(1)[:, ends]
    none = np.zeros((len(wa), 1))
    tpr = np.concatenate([none, up / wa.sum(1, keepdims=True)], 1)  # (D, thresholds + 1), from the highest downwards
    false = np.concatenate([none, right / wb.sum(1, keepdims=True)], 1)
    area = (np.diff(false, axis=1) * (tpr[:, 1:] + tpr[:, :-1]) / 2).sum(1)
    return area, np.where(false <= fpr + 1e-12, tpr, 0).max(1), (tpr - false).max(1)
