"""Weighted gradient ascent: each token is pushed down in proportion to how well it is still known.

    loss = mean_tokens  p_θ^α · log p_θ,    the weight p_θ^α taken as a constant
         + retain · mean_tokens nll_θ(retain)  +  kl · mean_tokens KL(p_ref ‖ p_θ)(retain)

Wang et al. 2025 (arXiv 2502.19301).  Reference code: locuslab/open-unlearning@19a6141 `compute_wga_loss`, the same formula.
Ascent's pull grows without end once a token is gone; this one fades, α = 0 being ascent again.
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


def wga_loss(logp: Tensor, alpha: float) -> Tensor:
    """logp: (N,) of the tokens to forget -> (N,); its gradient is p^alpha times that of logp."""
    return (alpha * logp).exp().detach() * logp


@dataclass(frozen=True, config=STRICT)
class WGA:
    """Ascent whose force on a token fades with its probability."""

    plan: Plan
    alpha: Annotated[float, Field(ge=0)]
    retain: Annotated[float, Field(ge=0)] = 1.0
    kl: Annotated[float, Field(ge=0)] = 0.0
    part: Part = "answer"

    paper = "Wang et al. 2025, arXiv 2502.19301"
    summary = "gradient ascent weighted by each token's own probability, so that it fades"

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
            loss = tokens.per_row(wga_loss(lm.logp(tokens), self.alpha), self.part)  # (B,)
            return {"wga": loss.sum() / tokens.step_tokens[self.part]}

        return pools, objective
