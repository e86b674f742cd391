"""Sampling: ask n times at a temperature, because an answer that is never the likeliest may still be said now and then.

    token = argmax_v ( z_v / T + g_v ),   g_v = −log(−log u_v),        which is a draw from softmax(z / T)
    s(fact) = max over n draws;           of k among n with c hits:  1 − C(n − c, k) / C(n, k)

Gumbel-max: Gumbel 1954; best of n for unlearning: Scholten et al. 2024 (arXiv 2410.03523); the estimator: Chen et al. 2021.
One call gives the first draw: an LM that decodes with the noise on its logits; nothing else of it has changed.  `read`, which is
what a run uses, lets an audit see all n draws and keeps each fact's best: what is generated counts best of n, and likelihoods,
which no draw touches, stay as they are.  Noise hangs on (seed, draw, place, what is read there), not on the batch.
Differs: no top-k and no top-p, which would hide rare answers.  Where two questions come to the same word at the same place in
one draw, they share that step's noise: each is a fair sample, but facts of one draw are not independent of one another.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from math import comb
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.lm import LM
from unremember.score import Score
from unremember.train import STRICT

TINY = 1e-20  # keeps log(0) out of the noise


def gumbel(size: int, *key: object) -> Tensor:
    """Noise that is a function of its key. -> (V,) float32"""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    uniform = torch.rand(size, generator=generator, dtype=torch.float64)
    waits = (-torch.log(uniform.clamp(min=TINY))).clamp(min=TINY)
    return -torch.log(waits).float()


def noised(logits: Tensor, temperature: float, noise: Tensor) -> Tensor:
    """What arg-max must see for its choice to be a draw at this temperature. both: (B, V) -> (B, V) float32"""
    return logits.float() / temperature + noise


def within(hits: int, n: int, k: int) -> float:
    """Probability that at least one of k samples hits, from n of which `hits` did: unbiased for k ≤ n."""
    if not (0 <= hits <= n and 1 <= k <= n):
        raise ValueError(f"{hits} hits of {n}, k = {k}: allowed are 0 <= hits <= n and 1 <= k <= n")
    return 1 - comb(n - hits, k) / comb(n, k)


def best(scores: Sequence[Score]) -> Score:
    """One score from those of n draws: each example's highest.  They must measure the same examples."""
    first = scores[0]
    if strange := [s.name for s in scores if (s.name, set(s.per_example)) != (first.name, set(first.per_example))]:
        raise ValueError(f"draws of {first.name!r} cannot be compared with {strange[0]!r} over other examples")
    values = {key: max(s.per_example[key] for s in scores) for key in first.per_example}
    return replace(first, per_example=values)


@plain(frozen=True)
class Draw:
    """The Pick of sampling: the choice of a token hangs on the text and this draw, and on no neighbour in the batch."""

    temperature: float
    seed: int
    draw: int

    def __call__(self, logits: Tensor, read: list[list[int]], length: list[int]) -> Tensor:
        noise = [
            gumbel(logits.shape[-1], self.seed, self.draw, n - 1, row) for row, n in zip(read, length, strict=True)
        ]
        return noised(logits, self.temperature, torch.stack(noise).to(logits.device)).argmax(-1)


def drawing(lm: LM, temperature: float, seed: int, draw: int) -> LM:
    """The same weights, sampled from.  Its fingerprint differs, so no greedy answer is remembered for it."""
    return replace(lm, pick=Draw(temperature, seed, draw))


def unlike(lm: LM, draws: Sequence[LM], bench: Bench) -> float | None:
    """Share of these draws' answers that are not the greedy one, of those that the bench remembers; None where it has none."""
    greedy, *said = (bench.memory.get(f"{one.fingerprint}/say", {}) for one in (lm, *draws))
    pairs = [answer != greedy[asked] for answers in said for asked, answer in answers.items() if asked in greedy]
    return sum(pairs) / len(pairs) if pairs else None


@dataclass(frozen=True, config=STRICT)
class Sample:
    """temperature: T, above 0.  n: how often each question is asked by `read`."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    n: Annotated[int, Field(ge=1)] = 8
    seed: Annotated[int, Field(ge=0)] = 0

    needs = ("forget",)
    paper = "Scholten et al. 2024, arXiv 2410.03523"
    summary = "answers sampled at a temperature instead of the likeliest, best of n"
    alone = True
    reads = ("said",)  # what a run reads through `read`: likelihoods do not change with the draw

    @property
    def each(self) -> int:
        """How often a question is put."""
        return self.n

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where there is nothing to ask."""
        corpus.require("sample", self.needs)

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        self.check(corpus)
        return drawing(lm, self.temperature, self.seed, 0), corpus

    def read(self, audit: Callable[[LM, Corpus, Bench], Score], lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        """What the audit finds in the best of n draws of the LM, example by example."""
        self.check(corpus)
        draws = [drawing(lm, self.temperature, self.seed, draw) for draw in range(self.n)]
        found = best([audit(one, corpus, bench) for one in draws])
        if (share := unlike(lm, draws, bench)) is not None:
            bench.notes["answers unlike the greedy one"] = (
                share or "none: a temperature so low asks nothing new, raise it"
            )
        return found
