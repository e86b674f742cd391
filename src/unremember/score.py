"""Score, evidence, verdict: numbers compared with numbers.  No model is seen here, and no torch.

The unit of evidence is a triple under the same attack, and a gate:

    R = (s_forgotten − s_never) / (s_original − s_never)          0 = like a model that never saw it, 1 = as before

with n, a bootstrap interval, and only the items that the original itself still gets right under that attack.  The gate asks
whether what should stay has stayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

FORGOTTEN, REMEMBERED, OVER, NOT_APPLICABLE = "forgotten", "remembered", "over-forgotten", "not applicable"
RESAMPLES = 2000  # of facts, for an interval
WORDS = (REMEMBERED, OVER, FORGOTTEN, NOT_APPLICABLE)  # the worst first


@dataclass(frozen=True)
class Score:
    """One measure of one model: a number per example, and what it means.  Aggregates are derived, never stored alone.

    chance: what pure guessing would give, None where that has no meaning.
    """

    name: str
    definition: str
    direction: str
    per_example: Mapping[str, float]
    paper: str = ""
    chance: float | None = None

    def over(self, ids: Sequence[str]) -> dict[str, float]:
        """The values of those examples that were measured, variants ('id#…') of one fact reduced to their highest."""
        wanted, found = set(ids), {}
        for key, value in self.per_example.items():
            fact = key if key in wanted else key.rpartition("#")[0]
            if fact in wanted:
                found[fact] = max(value, found.get(fact, -np.inf))
        return found


def together(parts: Sequence[Sequence[Score]]) -> list[Score]:
    """The scores of an attack that is made in several turns; what several asked has the mean of its values."""
    out = []
    for scores in zip(*parts, strict=True):
        levels = [score.chance for score in scores if score.chance is not None]
        values: dict[str, list[float]] = {}
        for score in scores:
            for key, value in score.per_example.items():
                values.setdefault(key, []).append(value)
        means = {key: float(np.mean(found)) for key, found in values.items()}
        out.append(replace(scores[0], per_example=means, chance=float(np.mean(levels)) if levels else None))
    return out


def interval(values: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; equal ends for one value or equal values."""
    data = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(data), (draws, len(data)))
    low, high = np.quantile(data[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def wilson(k: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of k of n: (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n)."""
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"{k} of {n}: give 0 <= k <= n and n >= 1")
    p, square = k / n, z * z / n
    middle, half = p + square / 2, z * sqrt(p * (1 - p) / n + square / (4 * n))
    low, high = (middle - half) / (1 + square), (middle + half) / (1 + square)
    return 0.0 if k == 0 else low, 1.0 if k == n else high  # rounding leaves 1e-17 at the ends


def summary(values: Mapping[str, float]) -> dict | None:
    """{'mean', 'low', 'high', 'n'} of the values, None where there are none."""
    if not values:
        return None
    low, high = interval(list(values.values()))
    return {"mean": float(np.mean(list(values.values()))), "low": low, "high": high, "n": len(values)}


@dataclass(frozen=True)
class Evidence:
    """One score of three models over the same facts, and what share of the knowledge is left: `r` in [low, high].

    Means are over the n facts that the original passes (over all facts where it passes too few and r is None).
    items: fact -> r of that fact alone.  leaks: facts that the forgotten model still says and the never-taught does not.
    """

    score: str
    original: float
    forgotten: float
    never: float
    r: float | None
    low: float | None
    high: float | None
    n: int
    items: Mapping[str, float]
    leaks: tuple[str, ...] = ()

    @property
    def applicable(self) -> bool:
        return self.r is not None


Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


@checked(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Rule:
    """What the words of a verdict mean.  The burden of proof lies with "forgotten".

    tolerance: the largest R that still counts as forgotten.  bound: the largest upper end of its 95 % interval that does.
    passes: an item counts where the original scores at least this.
    facts: fewest such items for a verdict on one entity; overall: fewest for the verdict on all.
    gap: how far original and never-taught must lie apart.  kept: share of the retained knowledge that must be left.
    world: largest fall of world-knowledge accuracy.  prose: largest rise of prose NLL, nats a token.
    fluent: share of the original's distinct-token ratio that free text must keep.
    """

    tolerance: Share = 0.25
    bound: Share = 0.5
    passes: Share = 0.5
    facts: Annotated[int, Field(ge=1)] = 3
    overall: Annotated[int, Field(ge=1)] = 10
    gap: Positive = 0.2
    kept: Share = 0.8
    world: Share = 0.05
    prose: Positive = 0.2
    fluent: Share = 0.8


RULE = Rule()


def evidence(
    name: str,
    original: Mapping[str, float],
    forgotten: Mapping[str, float],
    never: Mapping[str, float],
    rule: Rule = RULE,
    least: int = 1,
    draws: int = RESAMPLES,
) -> Evidence:
    """The triple of one score.  original, forgotten: fact -> value over the same facts.

    never: the control model's values on the same facts (pairs are then resampled together), or any model's values on other
    facts that were never taught (resampled on their own).
    """
    keys = [k for k in original if original[k] >= rule.passes and k in forgotten]
    paired = all(k in never for k in keys)
    o, f = np.array([original[k] for k in keys]), np.array([forgotten[k] for k in keys])
    n = np.array([never[k] for k in keys]) if paired else np.array(list(never.values()))
    floor = n if paired else np.full(len(o), n.mean() if len(n) else 0.0)
    leaks = tuple(k for k, b, c in zip(keys, f, floor, strict=True) if name == "said" and b == 1 and c < 0.5)
    if len(keys) < max(least, 1) or not len(n) or o.mean() - n.mean() < rule.gap:
        means = [float(np.mean(list(x.values()))) if x else 0.0 for x in (original, forgotten, never)]
        return Evidence(name, *means, None, None, None, len(keys), {}, leaks)
    r = float((f.mean() - n.mean()) / (o.mean() - n.mean()))
    rng = np.random.default_rng(0)
    pick = rng.integers(0, len(o), (draws, len(o)))
    other = pick if paired else rng.integers(0, len(n), (draws, len(n)))
    down = n[other].mean(1)
    spread = np.maximum(o[pick].mean(1) - down, rule.gap)
    low, high = np.quantile((f[pick].mean(1) - down) / spread, [0.025, 0.975])
    items = {k: float((b - c) / max(a - c, rule.gap)) for k, a, b, c in zip(keys, o, f, floor, strict=True)}
    means = (float(o.mean()), float(f.mean()), float(n.mean()))
    return Evidence(name, *means, r, float(low), float(high), len(keys), items, leaks)


@dataclass(frozen=True)
class Check:
    """One line of the utility gate: how much a number may change (limit ≤ 0: fall by, > 0: rise by), and whether it held.

    against: what it may not fall below or rise above by more: the original's number, or under an attack that of the
    never-taught model where this is worse, since an attack that trains harms a model more that has something to learn.
    """

    name: str
    original: float
    forgotten: float
    never: float | None
    against: float
    limit: float

    @property
    def change(self) -> float:
        return self.forgotten - self.against

    @property
    def passed(self) -> bool:
        return self.change <= self.limit if self.limit > 0 else self.change >= self.limit - 1e-9


@dataclass(frozen=True)
class Verdict:
    """A word, the sentence behind it, and the numbers behind that."""

    name: str
    verdict: str
    reason: str
    n: int
    evidence: tuple[Evidence, ...]
    utility: tuple[Check, ...] = ()

    @property
    def worst(self) -> tuple[str, float, str] | None:
        """The best-remembered single fact: (id, r, score), judged by the first applicable score."""
        for triple in self.evidence:
            if triple.items:
                key = max(triple.items, key=lambda k: triple.items[k])
                return key, triple.items[key], triple.score
        return None


STRONG = ("value probability", "said")  # a destroyed model cannot score on these by luck


def judge(
    name: str, found: Sequence[Evidence], utility: Sequence[Check], rule: Rule = RULE, n: int = 0, gate: bool = True
) -> Verdict:
    """The verdict on one entity, or on all: the first of these that holds.

    remembered       a value is still said verbatim
    not applicable   the original itself shows too little on every score
    remembered       the likelihood is left over: R above the tolerance, or its interval above the bound
    over-forgotten   something that should have stayed is gone (utility gate)
    remembered       the model still tells right from wrong, or finishes the answer: R above the tolerance, and above 0
                     for certain (95 %), since these scores have a chance level about which a model without knowledge varies
    forgotten        nothing of the above
    """
    usable = [x for x in found if x.applicable]
    utility = tuple(utility)

    def verdict(word: str, reason: str) -> Verdict:
        return Verdict(name, word, reason, n, tuple(found), utility if gate else ())

    if leaks := {key for x in found for key in x.leaks}:
        return verdict(REMEMBERED, f"{len(leaks)} of {n} values are still said verbatim")
    if not usable:
        most = max((x.n for x in found), default=0)
        why = f"the original shows {most} of {n} facts here, too few or too weakly to measure a loss"
        return verdict(NOT_APPLICABLE, why)

    ranked = sorted(((x, x.r or 0.0, x.low or 0.0, x.high or 0.0) for x in usable), key=lambda x: -x[1])
    for x, r, _, high in (x for x in ranked if x[0].score in STRONG):
        if r > rule.tolerance:
            return verdict(REMEMBERED, f"{r:.0%} of the {x.score} is left (at most {rule.tolerance:.0%} is allowed)")
        if high > rule.bound:
            why = f"up to {high:.0%} of the {x.score} may be left (95 %; at most {rule.bound:.0%} is allowed)"
            return verdict(REMEMBERED, why)
    if failed := [c for c in utility if not c.passed]:
        c = failed[0]
        return verdict(OVER, f"{c.name} went from {c.against:.2f} to {c.forgotten:.2f}, further than allowed")
    for x, r, low, _ in (x for x in ranked if x[0].score not in STRONG):
        if r > rule.tolerance and low > 0:  # guessing well is not yet knowing
            return verdict(REMEMBERED, f"{r:.0%} of the {x.score} is left (at most {rule.tolerance:.0%} is allowed)")
    x, r, low, _ = ranked[0]
    if r > rule.tolerance:
        return verdict(FORGOTTEN, f"{r:.0%} on {x.score} cannot be told from none (its interval begins at {low:.0%})")
    return verdict(FORGOTTEN, f"at most {max(r, 0):.0%} is left on any score ({x.score})")


def overall(verdicts: Sequence[Verdict], whole: Verdict) -> Verdict:
    """The verdict on all facts together, which is no better than that on any entity."""
    if whole.verdict in (REMEMBERED, OVER):
        return whole
    for word, verb in ((REMEMBERED, "still remembered"), (OVER, "over-forgotten")):
        if bad := [v for v in verdicts if v.verdict == word]:
            reason = f"{len(bad)} of {len(verdicts)} are {verb}, whatever the average"
            return Verdict(whole.name, word, reason, whole.n, whole.evidence, whole.utility)
    return whole


def forget_quality(forgotten: Mapping[str, float], never: Mapping[str, float]) -> dict[str, float]:
    """TOFU's forget quality on two models' truth ratios over the same questions, and what it leaves out.

    ks_p: two-sample Kolmogorov-Smirnov p-value (Maini et al. 2024), which assumes independent samples although both models
    see the same questions.  paired_p: Wilcoxon signed-rank on the pairs.  effect: mean difference of the log truth ratios
    over its standard deviation (0 = equal); p-values are no scores to maximise, and this is what they are blind to.
    """
    from scipy.stats import ks_2samp, wilcoxon

    keys = [k for k in forgotten if k in never]
    a, b = (np.log(np.maximum([x[k] for k in keys], 1e-12)) for x in (forgotten, never))
    gap = a - b
    same = np.allclose(gap, 0)
    return {
        "n": float(len(keys)),
        "ks_p": float(ks_2samp(a, b).pvalue),
        "paired_p": 1.0 if same else float(wilcoxon(gap).pvalue),
        "effect": 0.0 if same else float(gap.mean() / max(gap.std(ddof=1), 1e-12)),
    }


def model_utility(parts: Sequence[float]) -> float:
    """TOFU's model utility: the harmonic mean of its parts; 0 where a part is 0, ValueError where one is negative."""
    if any(p < 0 for p in parts):
        raise ValueError("model utility is a harmonic mean of shares; a part is negative")
    return 0.0 if not parts or any(p == 0 for p in parts) else len(parts) / sum(1 / p for p in parts)
