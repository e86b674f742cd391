"""Canary exposure: how far up the true value stands when a model ranks everything that could stand in its place.

    exposure(s) = log2 |R| − log2 rank(s)               rank by the log-probability of the text, ties placed before s
    sampled:      log2 (N + 1) − log2 (1 + #{r : p(r) ≥ p(s)})            over N random fillings; capped at log2 (N + 1)
    extrapolated: −log2 F(−log2 p(s)),                   F a skew-normal fitted to −log2 p of N random fillings
    DEPN:         log2 10^L − log2 (1 + Σ_i r_i 10^(L−1−i)),    r_i = rank from 0 of digit i, all the others in place
    MRR:          mean over the value's tokens of 1 / rank(token)

Carlini et al. 2019 (arXiv 1802.08232); Wu et al. 2023 (arXiv 2310.20138), flamewei123/DEPN@f779dd9.
A canary is an example with one span: the hole.  R is a pattern, in which # is a digit, or a list.  A value that was drawn at
random and never seen has a mean exposure of log2 e = 1.44 bits, not 0 (`null_level`).
The log-probability is that of the text from the first place on where fillings differ: what stands before is the same for all,
and the end mark is not counted.  All fillings go through the model as one trie: a place that they share is computed once.
Differs: an extrapolated exposure may pass log2 |R| and is called extrapolated.  DEPN's digits are ranked one at a time with
all the others visible, which for a causal model means by the whole text; it is a proxy, not the rank of the number.  Ties
never count for the model.  The longer of two fillings is at a disadvantage: give a list of values alike in length.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadRequest
from unremember.folder import fingerprint
from unremember.lm import LM
from unremember.score import Score, interval
from unremember.tokens import Row, pack, packs
from unremember.train import STRICT

PLACES = 256  # whose distributions are in memory at once
FIT = 1000  # fewest fillings that a distribution is fitted to
NULL = math.log2(math.e)
HOLE = "#"


# ── arithmetic ──


def exposure(rank: int, size: int) -> float:
    """Bits; 0 for the last of `size`, log2 size for the first."""
    return math.log2(size) - math.log2(rank)


def place(own: float, others: np.ndarray) -> int:
    """Rank from 1 among the others, (N,), with ties placed before it."""
    return 1 + int((others >= own).sum())


def lexicographic(ranks: Sequence[int], base: int = 10) -> int:
    """DEPN's rank of a number from the ranks, from 0, of its digits."""
    return 1 + sum(rank * base ** (len(ranks) - 1 - i) for i, rank in enumerate(ranks))


def extrapolated(own: float, others: np.ndarray) -> tuple[float, float]:
    """own, others (N,): −log2 p in bits -> exposure, and the p-value of Kolmogorov and Smirnov for the fit."""
    from scipy.stats import kstest, skewnorm

    if np.ptp(others) < 1e-9:  # nothing is likelier than anything: a tie
        return (0.0 if own >= others.min() else math.log2(len(others) + 1)), 1.0
    with np.errstate(all="ignore"):
        shape, middle, width = skewnorm.fit(others)
        fits = kstest(others, skewnorm(shape, middle, width).cdf).pvalue
    return -log2_cdf(own, shape, middle, width), float(fits)


def log2_cdf(value: float, shape: float, middle: float, width: float) -> float:
    """log2 of the skew-normal's distribution function, also where that is no longer a double."""
    from scipy.special import log_ndtr, logsumexp

    z = (value - middle) / width
    # log of the density 2 φ(u) Φ(shape·u), summed from z downwards as far as it matters
    u = z - np.linspace(0, 40 / (1 + abs(min(z, 0.0))) + max(z, 0.0), 20001)
    density = math.log(2) - u**2 / 2 - math.log(2 * math.pi) / 2 + log_ndtr(shape * u)
    step = u[0] - u[1]
    density[[0, -1]] -= math.log(2)  # trapezia
    return min(0.0, float(logsumexp(density) + math.log(step)) / math.log(2))


@plain(frozen=True)
class Mean:
    """Mean exposure of n canaries with its 95 % interval, and where the mean of n that were never seen lies (95 %)."""

    value: float
    n: int
    low: float
    high: float
    null: float
    null_low: float
    null_high: float


def null_level(n: int) -> tuple[float, float, float]:
    """Mean exposure of n canaries nobody saw, and its 95 % interval.  |R| large: −log2 of a uniform share is exponential."""
    from scipy.stats import gamma

    if n < 1:
        raise ValueError(f"n = {n}: a mean needs at least one canary")
    low, high = gamma.ppf([0.025, 0.975], n, scale=NULL / n)
    return NULL, float(low), float(high)


def mean_exposure(values: Mapping[str, float], ids: Sequence[str]) -> Mean:
    """Over the canaries `ids` of a score."""
    found = [values[i] for i in ids]
    null, low, high = null_level(len(found))
    return Mean(float(np.mean(found)), len(found), *interval(found), null, low, high)


# ── canaries ──


@plain(frozen=True)
class Canary:
    """A text with a hole: `answer[:a] + filling + answer[b:]`.  pattern: HOLE stands for a digit; else fillings is the space."""

    example: Example
    a: int
    b: int
    pattern: str
    fillings: tuple[str, ...]

    @property
    def value(self) -> str:
        return self.example.answer[self.a : self.b]

    @property
    def size(self) -> int:
        return len(self.fillings) or 10 ** self.pattern.count(HOLE)

    def filling(self, i: int) -> str:
        """Number i of the space, 0 ≤ i < size."""
        if self.fillings:
            return self.fillings[i]
        digits = iter(f"{i:0{self.pattern.count(HOLE)}d}")
        return "".join(next(digits) if c == HOLE else c for c in self.pattern)

    @property
    def number(self) -> int:
        """Which of the space the true value is."""
        if self.fillings:
            return self.fillings.index(self.value)
        return int("".join(c for c, hole in zip(self.value, self.pattern, strict=True) if hole == HOLE))

    def problems(self) -> list[str]:
        who, fits = f"canary {self.example.id!r}", re.escape(self.pattern).replace(re.escape(HOLE), "[0-9]")
        if self.fillings:
            if self.value not in self.fillings:
                return [f"{who}: its value {self.value!r} is not among the {len(self.fillings)} fillings; add it"]
        elif HOLE not in self.pattern:
            return [
                f"{who}: its value {self.value!r} has no digit to vary; give fillings, or mark the digits as its span"
            ]
        elif not re.fullmatch(fits, self.value):
            return [f"{who}: its value {self.value!r} does not fit the pattern {self.pattern!r} ({HOLE} is a digit)"]
        return []

    def draw(self, count: int, seed: int) -> list[int]:
        """`count` different numbers of the space, none of them the true one; all of them if there are fewer."""
        if count >= self.size - 1:
            return [i for i in range(self.size) if i != self.number]
        rng, found = random.Random(f"{seed}/{self.example.id}"), dict[int, None]()
        while len(found) < count:
            if (i := rng.randrange(self.size)) != self.number:
                found[i] = None
        return list(found)

    def row(self, lm: LM, filling: str) -> Row:
        x = self.example
        answer = x.answer[: self.a] + filling + x.answer[self.b :]
        row = lm.template.row(x.id, x.prompt, answer, ((self.a, self.a + len(filling)),), lm.limit)
        return replace(row, ids=row.ids[: row.stop])


@torch.no_grad()
def logps(lm: LM, rows: Sequence[Row], bench: Bench = BENCH) -> np.ndarray:
    """Log-probability of each row's tokens from the first place on where two of the rows differ; (N,), float64, in nats.

    rows: with the same context, without end marks.  One distribution for every place that has a successor in their trie.
    """
    ids = [row.ids for row in rows]
    first, last = min(ids), max(ids)
    same = next((i for i, (x, y) in enumerate(zip(first, last, strict=False)) if x != y), min(len(first), len(last)))
    begin = min(max(same, rows[0].start), min(map(len, ids)))
    child: dict[tuple[int, int], int] = {}
    prefix, below, ends = [ids[0][:begin]], [[]], []
    for row in ids:
        node = 0
        for token in row[begin:]:
            if (node, token) not in child:
                child[node, token] = len(prefix)
                below[node].append(token)
                below.append([])
                prefix.append((*prefix[node], token))
            node = child[node, token]
        ends.append(node)
    inner = [
        Row(str(node), (*prefix[node], tokens[0]), len(prefix[node]), len(prefix[node]) + 1, (True,))
        for node, tokens in enumerate(below)
        if tokens
    ]
    total = np.zeros(len(prefix))
    groups = packs(inner, bench.budget) if inner else []
    with lm.lowered():
        for done, group in enumerate(groups):
            tokens = pack(group).to(lm.device)
            nodes = [int(key) for key in tokens.keys]
            for keys, z in zip(_split(nodes, PLACES), lm.logits(tokens).split(PLACES), strict=True):
                norm = z.float().logsumexp(-1).cpu()
                if not torch.isfinite(norm).all():
                    raise ValueError(
                        f"{lm.name or 'the model'} gives probabilities that are not finite; its weights are broken"
                    )
                at = [(i, token, child[node, token]) for i, node in enumerate(keys) for token in below[node]]
                i, token, to = (torch.tensor(column) for column in zip(*at, strict=True))
                own = z[i.to(z.device), token.to(z.device)].float().cpu()
                total[to.numpy()] = (own - norm[i]).numpy()
            bench.say("read", done + 1, len(groups), {})
    parent = {to: node for (node, _), to in child.items()}
    for node in range(1, len(total)):  # parents come first
        total[node] += total[parent[node]]
    return total[ends]


def _split(values: Sequence[int], size: int) -> list[Sequence[int]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


@plain(frozen=True)
class Exposed:
    """Exposure of one canary in bits; its rank (0 where extrapolated) among `size`; whether more could not have been seen.

    fit: p-value of Kolmogorov and Smirnov for the fitted distribution, None where none was.
    """

    bits: float
    rank: int
    size: int
    capped: bool = False
    fit: float | None = None


@dataclass(frozen=True, config=STRICT)
class Exposure:
    """how: 'enumerated' ranks the whole space, 'sampled' and 'extrapolated' compare with `sample` random fillings.

    'digits' is DEPN's proxy.
    pattern: the space, # is a digit, all else stands for itself; empty: the value with each of its digits free.
    fillings: the space as a list, instead.  most: the largest space that is enumerated.
    """

    how: Literal["enumerated", "sampled", "extrapolated", "digits"] = "enumerated"
    pattern: str = ""
    fillings: tuple[str, ...] = ()
    sample: Annotated[int, Field(ge=1)] = 2000
    most: Annotated[int, Field(ge=2)] = 10_000
    seed: int = 0
    roles: tuple[str, ...] = ("forget", "holdout")
    needs = ("forget",)
    paper = "Carlini et al. 2019"
    summary = "bits by which the true value stands above a random one, among all that could stand in its place"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        found = self.exposures(lm, corpus, bench)
        capped = [key for key, x in found.items() if x.capped]
        how = {
            "enumerated": "among all fillings of its place",
            "sampled": f"among {self.sample} random fillings and itself, capped at {math.log2(self.sample + 1):.1f} bits "
            f"({len(capped)} of {len(found)} are at the cap)",
            "extrapolated": f"from a skew-normal fitted to {self.sample} random fillings: extrapolated, no cap",
            "digits": "digit by digit, all others in place (DEPN's proxy)",
        }[self.how]
        return Score(
            "exposure" if self.how == "enumerated" else f"exposure, {self.how}",
            f"log2 of the number of values less log2 of the true one's rank by log-probability, {how}",
            "higher = better remembered; unseen values have 1.44 on average",
            {key: x.bits for key, x in found.items()},
            "Wu et al. 2023" if self.how == "digits" else self.paper,
            NULL,
        )

    def canaries(self, corpus: Corpus) -> list[Canary]:
        """The canaries of a corpus.  Raises BadRequest or BadCorpus with all problems together, before a model is asked."""
        problems = []
        if self.pattern and self.fillings:
            problems.append("exposure: pattern and fillings are both given; leave one of them out")
        if len(set(self.fillings)) < len(self.fillings):
            problems.append("exposure: a filling occurs twice; remove it")
        if len(self.fillings) == 1:
            problems.append("exposure: one filling is no space; give at least two")
        if self.how == "digits" and self.fillings:
            problems.append('exposure: how = "digits" varies digits; leave fillings out')
        if self.how == "extrapolated" and self.sample < FIT:
            problems.append(
                f"exposure: sample = {self.sample} is too few to fit a distribution to; give at least {FIT}"
            )
        if problems:
            raise BadRequest(problems)
        found = []
        for x in corpus.of(*self.roles):
            if len(x.spans) > 1:
                problems.append(f"canary {x.id!r} has {len(x.spans)} spans; a canary has one hole: split it")
                continue
            a, b = x.spans[0] if x.spans else (0, len(x.answer))
            pattern = "" if self.fillings else self.pattern or re.sub("[0-9]", HOLE, x.answer[a:b])
            canary = Canary(x, a, b, pattern, self.fillings)
            problems += canary.problems()
            if self.how == "enumerated" and canary.size > self.most:
                problems.append(
                    f"canary {x.id!r} has {canary.size} fillings and at most {self.most} are enumerated; "
                    'set how = "sampled" or "extrapolated", or raise most'
                )
            if self.how == "extrapolated" and canary.size <= FIT:
                problems.append(
                    f'canary {x.id!r} has {canary.size} fillings, too few to fit a distribution to; set how = "enumerated"'
                )
            found.append(canary)
        if problems:
            raise BadCorpus(problems)
        return found

    def exposures(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> dict[str, Exposed]:
        """What is behind the score, by canary.  Each (model, settings, canary) is computed once in the life of bench.memory."""
        known = bench.memory.setdefault(f"{lm.fingerprint}/exposure", {})
        found = {}
        for canary in self.canaries(corpus):
            key = fingerprint(repr(replace(self, roles=())), repr(canary))
            if key not in known:
                known[key] = (
                    self._digits(lm, canary, bench) if self.how == "digits" else self._ranked(lm, canary, bench)
                )
            found[canary.example.id] = known[key]
        return found

    def _ranked(self, lm: LM, canary: Canary, bench: Bench) -> Exposed:
        count = canary.size if self.how == "enumerated" else self.sample
        others = [canary.filling(i) for i in canary.draw(count, self.seed)]
        own, *rest = logps(lm, [canary.row(lm, filling) for filling in (canary.value, *others)], bench)
        rest = np.array(rest)
        if self.how == "extrapolated":
            bits, fit = extrapolated(-own / math.log(2), -rest / math.log(2))
            return Exposed(bits, 0, canary.size, fit=fit)
        rank = place(own, rest)
        return Exposed(exposure(rank, len(rest) + 1), rank, len(rest) + 1, rank == 1 and len(rest) + 1 < canary.size)

    def _digits(self, lm: LM, canary: Canary, bench: Bench) -> Exposed:
        holes = [i for i, c in enumerate(canary.pattern) if c == HOLE]
        value, ranks = canary.value, []
        for hole in holes:
            others = [value[:hole] + d + value[hole + 1 :] for d in "0123456789" if d != value[hole]]
            own, *rest = logps(lm, [canary.row(lm, filling) for filling in (value, *others)], bench)
            ranks.append(place(own, np.array(rest)) - 1)
        rank = lexicographic(ranks)
        return Exposed(exposure(rank, canary.size), rank, canary.size)


@dataclass(frozen=True, config=STRICT)
class ReciprocalRank:
    """DEPN's score for names: the mean over the sensitive tokens of 1 / rank in the vocabulary; at most 1, ties before it."""

    roles: tuple[str, ...] = ("forget", "holdout")
    needs = ("forget",)
    paper = "Wu et al. 2023"
    summary = "mean reciprocal rank of the sensitive tokens in the vocabulary, teacher-forced"

    @torch.no_grad()
    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        rows = lm.template.rows(corpus.of(*self.roles), lm.limit)
        known = bench.memory.setdefault(f"{lm.fingerprint}/ranks", {})
        new = [row for row in rows if (row.ids, row.start, row.stop, row.span) not in known]
        with lm.lowered():
            for group in packs(new, bench.budget) if new else []:
                tokens = pack(group).to(lm.device)
                ranks = torch.cat(
                    [
                        (z >= z.gather(1, wanted[:, None])).sum(-1)
                        for z, wanted in zip(lm.logits(tokens).split(PLACES), tokens.target.split(PLACES), strict=True)
                    ]
                )
                means = tokens.per_row(1 / ranks.float(), "span") / tokens.lengths("span")
                by_key = dict(zip(tokens.keys, means.tolist(), strict=True))
                known.update({(r.ids, r.start, r.stop, r.span): by_key[r.key] for lane in group for r in lane})
        return Score(
            "value MRR",
            "mean over the sensitive tokens of one over their rank in the vocabulary, what stands before them given",
            "higher = better known",
            {row.key: known[row.ids, row.start, row.stop, row.span] for row in rows},
            self.paper,
        )
