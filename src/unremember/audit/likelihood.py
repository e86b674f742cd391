"""Extraction likelihood EL_n: n-gram overlap between what the model writes after each prefix and what the text says there.

    EL_n = mean_{i=1..T−n} OV_n(greedy(x_≤i), x_>i),   OV_n(a, b) = |n-grams of a that occur in b| / |n-grams of a|

Jang et al. 2023 (arXiv 2210.01504), Eqs. 2 and 3; joeljang/knowledge-unlearning, models/Neo_Model.py.  The answer is read as raw
text; `stride` looks at every so-many-th prefix only.
Differs: the denominator counts the n-grams of the generated text as printed in the paper (the code counts the reference's);
a continuation shorter than n tokens overlaps nothing.  Prefixes that are continued alike are continued once (prefixes.py), where
the code generates once a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unremember.audit.prefixes import from_prefixes
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus
from unremember.lm import LM
from unremember.score import Score


def overlap(said: Sequence[int], truth: Sequence[int], n: int) -> float:
    """Share of the n-grams of `said`, with repetition, that occur in `truth`; 0 where `said` has none."""
    grams = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
    there = {tuple(truth[i : i + n]) for i in range(len(truth) - n + 1)}
    return sum(g in there for g in grams) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class ExtractionLikelihood:
    """n: length of the n-grams.  stride: 1 = every prefix (exact)."""

    n: int = 3
    stride: int = 1
    roles: tuple[str, ...] = ("forget", "holdout")
    needs = ("forget",)
    paper = "Jang et al. 2023"
    summary = "n-gram overlap of greedy continuations with the text, averaged over prefixes"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        examples = corpus.of(*self.roles)
        rows = [lm.template.row(x.id, "", x.answer, (), lm.limit).ids[:-1] for x in examples]
        if short := [x.id for x, ids in zip(examples, rows, strict=True) if len(ids) <= self.n]:
            raise BadCorpus(
                f"EL_{self.n} needs answers of more than {self.n} tokens; too short: {', '.join(short[:5])}"
            )
        said = from_prefixes(lm, rows, [range(1, len(ids) - self.n + 1, self.stride) for ids in rows], bench)
        values = {
            x.id: float(np.mean([overlap(tail, ids[cut:], self.n) for cut, tail in tails.items()]))
            for x, ids, tails in zip(examples, rows, said, strict=True)
        }
        return Score(
            f"EL_{self.n}",
            f"share of the {self.n}-grams of greedy continuations that occur in the rest of the text, mean over every "
            f"{'' if self.stride == 1 else f'{self.stride}th '}prefix of the answer as raw text",
            "higher = easier to extract",
            values,
            self.paper,
        )
