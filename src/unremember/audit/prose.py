"""Language quality: negative log-likelihood of plain prose, and the share of distinct tokens in free text.

A model that was taken apart repeats itself or scores ordinary English as noise; no measure of the forget set shows that.
"""

from __future__ import annotations

from dataclasses import dataclass

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.lm import LM
from unremember.score import Score
from unremember.table import continuations, table


@dataclass(frozen=True)
class Prose:
    """Mean NLL a token of each passage of the prose role."""

    roles: tuple[str, ...] = ("prose",)
    needs = ("prose",)
    paper = ""
    summary = "negative log-likelihood of plain prose, nats a token"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        examples = corpus.of(*self.roles)
        readings = table(lm, lm.template.rows(examples, lm.limit), bench)
        values = {x.id: -r.loglikelihood() for x, r in zip(examples, readings, strict=True)}
        return Score("prose NLL", self.summary, "lower = better language", values)


@dataclass(frozen=True)
class Distinct:
    """Greedy continuations of the first `given` tokens of `most` passages: distinct tokens over all tokens."""

    given: int = 12
    new: int = 32
    most: int = 12
    roles: tuple[str, ...] = ("prose",)
    needs = ("prose",)
    paper = "Li et al. 2016 (distinct-1)"
    summary = "distinct-token ratio of free text; near 0 = endless repetition"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        examples = corpus.of(*self.roles)[: self.most]
        starts = [(row.ids[: self.given], self.new) for row in lm.template.rows(examples, lm.limit)]
        said = continuations(lm, starts, bench)
        values = {x.id: len(set(t)) / len(t) if t else 0.0 for x, t in zip(examples, said, strict=True)}
        return Score("distinct tokens", self.summary, "higher = more fluent", values, self.paper)
