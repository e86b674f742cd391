"""TOFU's truth ratio: how likely wrong answers are against the right one in other words.

    TR = mean over wrong answers of P(wrong)^(1/T)  /  P(paraphrased right)^(1/T)

Maini et al. 2024.  The mean is arithmetic as printed in the paper, `geometric` gives that of both public evaluators; results
are keyed by example, so that a missing item shifts no other (a bug of open-unlearning).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.lm import LM
from unremember.score import Score
from unremember.table import table


def truth_ratio(right: float, wrong: np.ndarray, geometric: bool = False) -> float:
    """right: mean log-probability a token of the reworded right answer; wrong: (k,) of the wrong ones -> ≥ 0"""
    top = np.exp(wrong.mean()) if geometric else np.exp(wrong).mean()
    return float(top / max(np.exp(right), 1e-30))


@dataclass(frozen=True)
class TruthRatio:
    """Needs distractors; where an example has no rewording the answer itself stands in."""

    geometric: bool = False
    roles: tuple[str, ...] = ("forget", "retain", "holdout", "world")
    needs = ("forget",)
    paper = "Maini et al. 2024"
    summary = "likelihood of wrong answers against the reworded right one"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        examples = [x for x in corpus.of(*self.roles) if x.distractors]
        texts = [(x, i, t) for x in examples for i, t in enumerate((x.rewording or x.answer, *x.distractors))]
        rows = [lm.template.row(f"{x.id}/{i}", x.prompt, text, limit=lm.limit) for x, i, text in texts]
        readings = iter(table(lm, rows, bench))
        values = {}
        for x in examples:
            right, *wrong = (next(readings).loglikelihood() for _ in range(1 + len(x.distractors)))
            values[x.id] = truth_ratio(right, np.array(wrong), self.geometric)
        return Score(
            "truth ratio",
            "mean of P(wrong)^(1/T) over P(right in other words)^(1/T)",
            "around 1 = cannot tell right from wrong, near 0 = knows, far above 1 = avoids the truth",
            values,
            self.paper,
        )
