"""Stop when the forget set is known no better than examples that were never taught.

The level is measured on the holdout role, with the model as it came in: for each example a number that is higher the better
it is known.  Training stops when the mean over the forget set is at most the level's mean *and* the best-known forget
example is at most the best-known holdout example.  With the metric 'preference', moreover, no entity's true answers may be
preferred to their distractors more than those of the best-preferred holdout entity: a value can become unlikely and still be
the likeliest of four.  A method that holds retained examples goes on until these are known
nearly as well as before, too: at first it pushes down all that looks alike, and wins the rest back while its own gradient
fades.  Generalises Jang et al. 2023 (stop on the mean of MA and EL only), which let single sequences stay verbatim.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus
from unremember.lm import LM
from unremember.preference import options, share
from unremember.table import Reading, read
from unremember.tokens import Row

ENOUGH = 20  # fewer holdout examples make a mean that is mostly noise
KEPT = 0.9  # share of what was known of the watched retained examples


def known(reading: Reading, metric: str) -> float:
    """How well a row's sensitive tokens are known: 'accuracy' = share that greedy decoding hits, else P^(1/T)."""
    if metric == "accuracy":
        return float(reading.hit[reading.span].mean() if reading.span.any() else reading.hit.mean())
    return reading.likelihood("span")


def preferred(lm: LM, examples: Sequence[Example], bench: Bench) -> float:
    """The largest mean share of the true answer among its distractors over the entities."""
    groups: dict[str, list[float]] = {}
    found = options(lm, examples, lambda rows: read(lm, rows, bench))
    for x in examples:
        groups.setdefault(x.entity, []).append(share(found[x.id]))
    return max(float(np.mean(values)) for values in groups.values())


def check(corpus: Corpus, metric: str) -> None:
    """BadCorpus where `corpus` has no level to stop at; a warning where the level is one of other tokens."""
    corpus.require(f"stopping on {metric!r}", ("forget", "holdout"))
    if len(corpus["holdout"]) < ENOUGH:
        raise BadCorpus(
            f"stopping on {metric!r} needs at least {ENOUGH} holdout examples and there are {len(corpus['holdout'])}; "
            'add some, or set forget.plan.stop = "never"'
        )
    if corpus.marked("forget") != corpus.marked("holdout"):
        with_spans, without = ("forget", "holdout") if corpus.marked("forget") else ("holdout", "forget")
        warnings.warn(
            f"the {with_spans} examples have spans and no {without} example has any, so that a level of the one says little of "
            "the other; give spans to both roles (unremember annotate), or to neither",
            stacklevel=2,
        )
    for role in ("forget", "holdout"):
        if metric == "preference" and (bare := [x.id for x in corpus[role] if not x.distractors]):
            raise BadCorpus(
                f"stopping on 'preference' needs distractors, and {len(bare)} {role} examples have none ({', '.join(bare[:3])}); "
                'add some, or set forget.plan.stop = "probability"'
            )


@dataclass
class Stopper:
    """Callable on (lm, step); `looks` is the record of what it saw, `reached` the step at which it said stop.

    ceiling: the largest preference for true answers that any holdout entity shows, None where that is not watched.
    A look holds mean and worst of the metric, `kept`, its mean over `watch`, a few retained rows, the preference where all
    else was well, and for the trade-off curve the mean answer probability of forget rows and `watch`.
    """

    metric: str
    every: int
    rows: Sequence[Row]
    watch: Sequence[Row]
    mean: float
    worst: float
    floor: float = 0.0
    asked: Sequence[Example] = ()
    ceiling: float | None = None
    bench: Bench = BENCH
    reached: int | None = None
    looks: list[dict[str, float]] = field(default_factory=list)

    @staticmethod
    def calibrated(
        lm: LM, corpus: Corpus, metric: str, every: int, holds: bool, bench: Bench = BENCH
    ) -> Stopper | None:
        """Measure the level on corpus['holdout'] with `lm`; None for metric 'never'.

        holds: whether the method has a term on the retain role, so that stopping may wait for it.
        Where bench.levels has the level already, that one stands: it is of the model before any portion was forgotten, where
        `lm` may have lost the holdout, too.  Raises BadCorpus as `check` does.
        """
        if metric == "never":
            return None
        check(corpus, metric)
        rows = lm.template.rows(corpus["forget"], lm.limit)
        levels = {} if bench.levels is None else bench.levels
        watched = int(levels[metric]["watched"]) if metric in levels else len(rows)  # a floor is of certain rows
        watch = lm.template.rows(corpus.of("retain")[:watched], lm.limit)
        asked = corpus["forget"] if metric == "preference" else ()
        if metric not in levels:
            held = [known(x, metric) for x in read(lm, lm.template.rows(corpus["holdout"], lm.limit), bench)]
            kept = [known(x, metric) for x in read(lm, watch, bench)] if holds and watch else [0.0]
            levels[metric] = {"mean": float(np.mean(held)), "worst": float(np.max(held)), "kept": float(np.mean(kept))}
            levels[metric] |= {"watched": watched}
            levels[metric] |= {"ceiling": preferred(lm, corpus["holdout"], bench)} if asked else {}
        at = levels[metric]
        floor, ceiling = KEPT * at["kept"], at.get("ceiling")
        return Stopper(metric, every, rows, watch, at["mean"], at["worst"], floor, asked, ceiling, bench)

    def __call__(self, lm: LM, step: int) -> bool:
        seen = read(lm, [*self.rows, *self.watch], self.bench)
        forget, retain = seen[: len(self.rows)], seen[len(self.rows) :]
        now = [known(x, self.metric) for x in forget]
        look = {"step": step, "mean": float(np.mean(now)), "worst": float(np.max(now))}
        look["forget"] = float(np.mean([x.likelihood() for x in forget]))
        if retain:
            look["retain"] = float(np.mean([x.likelihood() for x in retain]))
            look["kept"] = float(np.mean([known(x, self.metric) for x in retain]))
        gone = look["mean"] <= self.mean and look["worst"] <= self.worst
        gone = gone and look.get("kept", 0.0) >= self.floor
        if gone and self.ceiling is not None:  # the costlier question, asked only where all else is well
            look["preferred"] = preferred(lm, self.asked, self.bench)
            gone = look["preferred"] <= self.ceiling
        if self.bench.watch:
            look |= self.bench.watch(lm)
        self.looks.append(look)
        if gone:
            self.reached = step
        return gone
