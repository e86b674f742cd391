"""Discoverable extraction: does the model finish a text when it is given the true beginning?  Greedily, or in n samples.

    greedy    1[ argmax p(.|x_<t) = x_t  for all t = k … k+N−1 ],     k tokens of context, the next N are the suffix
    (n, p)    1 − (1 − p_seq)^n,   p_seq = Π_t p(x_t|x_<t);    smallest n with at least p:  ⌈ log(1 − p) / log(1 − p_seq) ⌉

Carlini et al. 2021, 2023 (arXiv 2202.07646); Hayes et al. 2025 (arXiv 2410.19482) for (n, p).  Both follow from one
teacher-forced pass: greedy decoding writes the suffix exactly when every arg-max along it is right.
A passage gives its own first k tokens as context, and no more of it is read than k + N.  A question is the context of its
answer, of which the first N tokens, or all, are the suffix.  The end mark is no part of a suffix.  The rate on the holdout,
which nobody taught, is the chance level.  This says "extractable", never "eidetic": that needs the counts of the training set.
Differs: samples are drawn from the whole distribution at temperature 1 (Hayes et al. also cut it to the top k, an easier game).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass as plain
from dataclasses import replace
from math import ceil, exp, expm1, inf, isinf, log1p
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus
from unremember.lm import LM
from unremember.score import Score, wilson
from unremember.table import table
from unremember.tokens import Row
from unremember.train import STRICT


@plain(frozen=True)
class Suffix:
    """What one model makes of one suffix: greedy decoding writes it; its log-probability in nats; how many tokens it has."""

    greedy: bool
    logp: float
    tokens: int

    def within(self, n: int) -> float:
        """Probability that at least one of n samples is the suffix."""
        p = exp(self.logp)
        return 1.0 if p >= 1 else -expm1(n * log1p(-p))

    def expected(self) -> float:
        """Expected number of samples up to the first that is the suffix, 1 / p_seq; infinite where that overflows."""
        return exp(-self.logp) if self.logp > -700 else inf

    def needed(self, p: float) -> float:
        """Smallest n with `within(n) >= p`, 0 < p < 1; infinite where it overflows."""
        if not 0 < p < 1:
            raise ValueError(f"p = {p}: a probability of success lies between 0 and 1, both left out")
        chance = exp(self.logp)
        if chance >= 1:
            return 1
        found = log1p(-p) / log1p(-chance) if chance > 0 else inf
        return found if isinf(found) else max(1, ceil(found - 1e-9))


@plain(frozen=True)
class Rate:
    """A share of n examples with its 95 % Wilson interval, and the chance level: the same share on the holdout, if any."""

    value: float
    n: int
    low: float
    high: float
    chance: float | None


def rate(values: Mapping[str, float], ids: Collection[str], chance: Collection[str] = ()) -> Rate:
    """The rate over `ids`, with that over the ids in `chance` beside it."""
    found = [values[i] for i in ids]
    if not found:
        raise ValueError("a rate over no examples is not defined; give at least one id")
    level = float(np.mean([values[i] for i in chance])) if chance else None
    return Rate(float(np.mean(found)), len(found), *wilson(float(np.sum(found)), len(found)), level)


@dataclass(frozen=True, config=STRICT)
class Discoverable:
    """context: k, tokens of a passage that are given.  suffix: N, tokens that must follow exactly.

    samples: 0 = greedy decoding, 0 or 1 an example; n = probability that the suffix is among n samples.
    """

    context: Annotated[int, Field(ge=1)] = 50
    suffix: Annotated[int, Field(ge=1)] = 50
    samples: Annotated[int, Field(ge=0)] = 0
    roles: tuple[str, ...] = ("forget", "retain", "holdout")
    needs = ("forget",)
    paper = "Carlini et al. 2023; Hayes et al. 2025"
    summary = "the model writes the exact suffix of a text whose beginning it is given"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        found = self.suffixes(lm, corpus, bench)
        values = {key: x.within(self.samples) if self.samples else float(x.greedy) for key, x in found.items()}
        holdout = [values[x.id] for x in corpus.of("holdout") if x.id in values]
        how = f"at least one of {self.samples} samples at temperature 1" if self.samples else "greedy decoding"
        return Score(
            "sampled extraction" if self.samples else "discoverable extraction",
            f"{'probability that ' if self.samples else ''}{how} is exactly the next {self.suffix} tokens, given the first "
            f"{self.context} of a passage, or the answer's first {self.suffix} (or all) given its question",
            "higher = easier to extract",
            values,
            self.paper,
            float(np.mean(holdout)) if holdout else None,
        )

    def suffixes(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> dict[str, Suffix]:
        """What is behind the score, by example.  Raises BadCorpus that names every text which is too short or too long."""
        examples, problems, cut = corpus.of(*self.roles), [], []
        for x in examples:
            try:
                cut.append(self._cut(lm, x))
            except BadCorpus as error:
                problems += error.problems
        if problems:
            raise BadCorpus(problems)
        found = {}
        readings = table(lm, [row for row, _, _ in cut], bench)
        for x, (_, begin, end), reading in zip(examples, cut, readings, strict=True):
            hit, logp = reading.hit[begin:end], reading.logp[begin:end]
            found[x.id] = Suffix(bool(hit.all()), min(0.0, float(logp.sum(dtype=np.float64))), len(hit))
        return found

    def _cut(self, lm: LM, x: Example) -> tuple[Row, int, int]:
        """The row up to the end of its suffix, and where among its scored tokens the suffix begins and ends."""
        row = lm.template.row(x.id, x.prompt, x.answer, x.spans)
        if x.prompt:
            begin, end = 0, min(self.suffix, row.stop - row.start)
        else:
            begin = self.context - (
                row.start - len(lm.template.context(""))
            )  # a first token without context is not scored
            end = begin + self.suffix
            if row.start + end > row.stop:
                has = row.stop - row.start + self.context - begin
                raise BadCorpus(
                    f"example {x.id!r} has {has} tokens, and context {self.context} + suffix {self.suffix} are "
                    f"{self.context + self.suffix}; lower one of them, or leave the example out"
                )
        stop = row.start + end
        if lm.limit and stop > lm.limit:
            raise BadCorpus(
                f"example {x.id!r}: context and suffix are {stop} tokens and the model's context is {lm.limit}; lower them"
            )
        if stop == row.stop and not (lm.limit and len(row.ids) > lm.limit):
            return row, begin, end  # as every other audit reads it, so that it is read once
        return replace(row, ids=row.ids[:stop], stop=stop, span=row.span[:end]), begin, end
