"""SimNPO: NPO without a reference; each answer is judged by its own mean token likelihood.

    loss = −(2/β) · mean_rows log σ( β · (u − γ) ),    u = nll_θ(y|x) / |y|, the mean over the answer tokens
         + retain · mean_tokens nll_θ(retain)  +  kl · mean_tokens KL(p_ref ‖ p_θ)(retain)

Fan et al. 2024 (arXiv 2410.07163).  Reference code: OPTML-Group/Unlearn-Simple@f1a355d, TOFU part (its MUSE and WMDP parts
compute something else).  Differs: γ stands inside β as in that code, not as printed in the paper (equal at γ = 0, the
default); |y| counts the tokens that are scored, where the code counts labels before the shift.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.forget.descend import descend
from unremember.forget.retain import keeping, needed
from unremember.lm import LM
from unremember.sites import EVERYWHERE, Sites
from unremember.tokens import Row, Tokens
from unremember.train import STRICT, Objective, Part, Plan


def simnpo_loss(nll: Tensor, length: Tensor, beta: float, gamma: float = 0.0) -> Tensor:
    """nll: (B,) summed over the answer; length: (B,) its token count, at least 1 -> (B,)"""
    return -2 / beta * F.logsigmoid(beta * (nll / length - gamma))


@dataclass(frozen=True, config=STRICT)
class SimNPO:
    """SimNPO with a retain term; without one utility is not protected."""

    plan: Plan
    beta: Annotated[float, Field(gt=0)]
    gamma: float = 0.0
    forget: Annotated[float, Field(gt=0)] = 1.0
    retain: Annotated[float, Field(ge=0)] = 1.0
    kl: Annotated[float, Field(ge=0)] = 0.0
    part: Part = "answer"

    paper = "Fan et al. 2024, arXiv 2410.07163"
    summary = "NPO without a reference model, normalised by answer length, with a retain term"

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
            nll, length = tokens.per_row(-lm.logp(tokens), self.part), tokens.lengths(self.part)  # (B,), (B,)
            spoken = length > 0  # a silent micro-batch must add nothing
            loss = simnpo_loss(nll[spoken], length[spoken], self.beta, self.gamma).sum() / tokens.step_rows
            return {"simnpo": self.forget * loss + 0 * nll.sum()}

        return pools, objective
