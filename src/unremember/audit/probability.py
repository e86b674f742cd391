"""Probability of the answer, normalised by its length: P(y|x)^(1/T), over the whole answer or its sensitive spans.

Maini et al. 2024 (TOFU, arXiv 2401.06121).  Differs: content tokens only, no end mark.
"""

from __future__ import annotations

from dataclasses import dataclass

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.lm import LM
from unremember.score import Score
from unremember.table import table


@dataclass(frozen=True)
class Probability:
    """part: 'answer' or 'span'."""

    part: str = "answer"
    roles: tuple[str, ...] = ("forget", "retain", "holdout")
    needs = ("forget",)
    paper = "Maini et al. 2024"
    summary = "probability of the answer a token, teacher-forced"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        examples = corpus.of(*self.roles)
        readings = table(lm, lm.template.rows(examples, lm.limit), bench)
        return Score(
            "probability" if self.part == "answer" else "value probability",
            f"P(y|x)^(1/T): geometric mean of the token probabilities of the "
            f"{'whole answer' if self.part == 'answer' else 'sensitive values in the answer'}",
            "higher = better known",
            {x.id: r.likelihood(self.part) for x, r in zip(examples, readings, strict=True)},
            self.paper,
        )
