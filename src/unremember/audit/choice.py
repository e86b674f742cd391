"""Right against wrong: does the model prefer the true answer to the distractors?

    share = P(right)^(1/T) / ( P(right)^(1/T) + Σ P(wrong)^(1/T) )         accuracy = 1[right is the likeliest option]

The share is OpenUnlearning's `prob_mean` truth ratio and TOFU's normalised option probability; it sees knowledge that a model
no longer says.  Accuracy over the world role is our measure of general knowledge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.lm import LM
from unremember.preference import options, share
from unremember.score import Score
from unremember.table import table


@dataclass(frozen=True)
class Choice:
    """accuracy: 0 or 1 an example (a tie counts as wrong) instead of the share."""

    accuracy: bool = False
    roles: tuple[str, ...] = ("forget", "retain", "holdout", "world")
    needs = ("forget",)
    paper = "Maini et al. 2024; Dorna et al. 2025"
    summary = "the true answer against its distractors, by likelihood"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        found = options(lm, corpus.of(*self.roles), lambda rows: table(lm, rows, bench))
        if self.accuracy:
            values = {key: float(x[0] > x[1:].max()) for key, x in found.items()}
        else:
            values = {key: share(x) for key, x in found.items()}
        return Score(
            "world accuracy" if self.accuracy else "choice",
            "share of questions whose true answer has the highest likelihood a token of all options"
            if self.accuracy
            else "P(right)^(1/T) over the sum of it and of every wrong option's",
            "higher = better known",
            values,
            self.paper,
            float(np.mean([1 / len(x) for x in found.values()])) if found else None,
        )
