"""The true answer against plausible wrong ones: what a model still prefers when it no longer says it.

share = P(right)^(1/T) / ( P(right)^(1/T) + Σ P(wrong)^(1/T) )
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from unremember.corpus import Example
from unremember.lm import LM
from unremember.table import Reading
from unremember.tokens import Row


def options(lm: LM, examples: Sequence[Example], reader: Callable[[list[Row]], list[Reading]]) -> dict[str, np.ndarray]:
    """id -> mean log-probability a token of the right answer, then of each distractor; examples without any are left out."""
    examples = tuple(x for x in examples if x.distractors)
    rows = [
        lm.template.row(f"{x.id}/{i}", x.prompt, text, limit=lm.limit)
        for x in examples
        for i, text in enumerate((x.answer, *x.distractors))
    ]
    readings = iter(reader(rows))
    return {x.id: np.array([next(readings).loglikelihood() for _ in range(1 + len(x.distractors))]) for x in examples}


def share(loglikelihood: np.ndarray) -> float:
    """loglikelihood: (1 + wrong,) nats a token, the right answer first -> in (0, 1)"""
    weights = np.exp(loglikelihood - loglikelihood.max())
    return float(weights[0] / weights.sum())
