"""Arg-max accuracy: of the answer given its prompt (EM), or of the answer as raw text from its second token on (MA).

    EM = mean_t 1[argmax p(.|x, y_<t) = y_t]          MA = mean_{t≥2} 1[argmax p(.|y_<t) = y_t]

EM: open-unlearning.  MA: Tirumala et al. 2022, Jang et al. 2023.  Differs: no token is dropped at the end "to ignore EOS"
(a known bug of published code), since end marks are never part of the answer here.
"""

from __future__ import annotations

from dataclasses import dataclass

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.lm import LM
from unremember.score import Score
from unremember.table import table


@dataclass(frozen=True)
class Accuracy:
    """raw: without prompt and template (MA), or with them (EM)."""

    raw: bool = False
    roles: tuple[str, ...] = ("forget", "retain", "holdout")
    needs = ("forget",)
    paper = "Jang et al. 2023"
    summary = "share of tokens that greedy decoding gets right, teacher-forced"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        examples = corpus.of(*self.roles)
        if self.raw:
            rows = [lm.template.row(x.id, "", x.answer, limit=lm.limit) for x in examples]
        else:
            rows = lm.template.rows(examples, lm.limit)
        readings = table(lm, rows, bench)
        return Score(
            "memorisation accuracy" if self.raw else "exact match",
            "share of tokens that are the arg-max, "
            + ("the answer as raw text, from its second token on" if self.raw else "the answer after its question"),
            "higher = better known",
            {x.id: float(r.hit.mean()) for x, r in zip(examples, readings, strict=True)},
            self.paper,
        )
