"""Gradient ascent: run the training objective backwards on the forget answers, and optionally forwards on others.

    loss = − mean_tokens nll_θ(forget)  +  retain · mean_tokens nll_θ(retain)  +  kl · mean_tokens KL(p_ref ‖ p_θ)(retain)

With both weights zero this is knowledge unlearning (Jang et al. 2023, arXiv 2210.01504; joeljang/knowledge-unlearning@732876),
with `retain` gradient difference, with `kl` the KL-minimisation baseline of TOFU (Maini et al. 2024, arXiv 2401.06121).
Differs: stops on the mean and on the worst example (see stop.py); the reference distribution is computed once, in float16,
instead of by a second model; pad tokens do not exist, so a real end-of-text token is never masked.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.forget.descend import descend
from unremember.forget.retain import keeping, needed
from unremember.lm import LM
from unremember.sites import EVERYWHERE, Sites
from unremember.tokens import Row, Tokens
from unremember.train import STRICT, Objective, Part, Plan


def ascent_loss(nll: Tensor, tokens: float) -> Tensor:
    """Minus the token mean. nll: (B,) summed a row over its answer tokens; tokens: answer tokens of the whole step."""
    return -nll.sum() / tokens


@dataclass(frozen=True, config=STRICT)
class Ascent:
    """Gradient ascent, gradient difference (retain > 0) or ascent with KL (kl > 0)."""

    plan: Plan
    retain: Annotated[float, Field(ge=0)] = 0.0
    kl: Annotated[float, Field(ge=0)] = 0.0
    part: Part = "answer"

    paper = "Jang et al. 2023, arXiv 2210.01504"
    summary = "gradient ascent; with a retain term gradient difference, with KL the KL baseline"

    @property
    def needs(self) -> tuple[str, ...]:
        return needed(self.retain, self.kl)

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        return descend(self, lm, corpus, sites, bench)

    def terms(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[dict[str, list[Row]], Objective]:
        pools, keep = keeping(lm, corpus, self.retain, self.kl)

        def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
            if tokens.role != "forget":
                return keep(lm, tokens)
            nll = tokens.per_row(-lm.logp(tokens), self.part)  # (B,)
            return {"ascent": ascent_loss(nll, tokens.step_tokens[self.part])}

        return pools, objective
