"""Relearning: a few steps of finetuning on other people's facts, and the forgotten ones may come back.

    loss = mean_tokens nll_θ(relearn)

Hu et al. 2024 (arXiv 2406.13356), Deeb & Roger 2024 (arXiv 2410.08827).  The attacker's examples contain none of the values
that are scored afterwards; original and never-taught model are attacked in the same way.  A loss that does not fall is an error.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember.attack.fair import learnt, outsiders
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.lm import LM
from unremember.tokens import Tokens
from unremember.train import STRICT, Plan, train


@dataclass(frozen=True, config=STRICT)
class Relearn:
    """Finetune on the relearn role.  The role is gone from what the auditor sees next."""

    plan: Plan

    needs = ("forget", "relearn")
    paper = "Hu et al. 2024, arXiv 2406.13356"
    summary = "a few steps of finetuning on other people's facts"
    alone = True

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where the attacker's examples are missing, or tell what is asked afterwards."""
        corpus.require("relearn", self.needs)
        outsiders("relearn", corpus)

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        self.check(corpus)

        def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
            return {"relearn": tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}

        rows = lm.template.rows(corpus["relearn"], lm.limit)
        attacked = train(lm, objective, {"relearn": rows}, self.plan, bench=bench, stage="relearn")
        learnt("relearn", lm, attacked, rows, bench)
        return attacked, Corpus({role: rows for role, rows in corpus.items() if role != "relearn"})
