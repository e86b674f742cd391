"""Extraction strength: how little of the answer must be given until greedy decoding finishes it.

    ES = 1 − k*/T,   k* = the smallest k with the arg-max right at every t ≥ k (0-based),  k* = T if even the last is wrong

Carlini et al. 2021; Wang et al. 2024.  Differs from open-unlearning: a wholly wrong answer scores 0 and not 1/T.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.lm import LM
from unremember.score import Score
from unremember.table import table


def extraction_strength(hit: np.ndarray) -> float:
    """hit: (T,) bool, T ≥ 1 -> in [0, 1]"""
    wrong = np.flatnonzero(~hit)
    return 1.0 - (wrong[-1] + 1) / len(hit) if len(wrong) else 1.0


@dataclass(frozen=True)
class ExtractionStrength:
    """From the score table alone: no generation is needed."""

    roles: tuple[str, ...] = ("forget", "retain", "holdout")
    needs = ("forget",)
    paper = "Carlini et al. 2021; Wang et al. 2024"
    summary = "share of the answer that greedy decoding finishes by itself"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        examples = corpus.of(*self.roles)
        readings = table(lm, lm.template.rows(examples, lm.limit), bench)
        return Score(
            "extraction strength",
            "1 − k*/T, k* = length of the answer prefix after which greedy decoding completes the rest exactly",
            "higher = easier to extract",
            {x.id: extraction_strength(r.hit) for x, r in zip(examples, readings, strict=True)},
            self.paper,
        )
