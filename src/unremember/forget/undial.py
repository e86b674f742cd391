"""UNDIAL: learn from one's own former self, its belief in the true token lowered.

    loss = mean_tokens CE( softmax(z_ref − strength · onehot(y)), p_θ )
         + retain · mean_tokens nll_θ(retain)  +  kl · mean_tokens KL(p_ref ‖ p_θ)(retain)

Dong et al. 2025 (arXiv 2402.10052).  Reference code: locuslab/open-unlearning@19a6141 `compute_undial_loss`.
Differs: the target distribution is computed once and cached (float16), so no second model is in memory; the mean runs over
answer tokens, where that code averages over every place, prompt and padding included, and takes the label −100 of those places
for the vocabulary's hundredth entry from its end, which it lowers there.
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
from unremember.forget.reference import distributions, recall
from unremember.forget.retain import keeping, needed
from unremember.lm import LM
from unremember.sites import EVERYWHERE, Sites
from unremember.tokens import Row, Tokens
from unremember.train import STRICT, Objective, Part, Plan


def undial_loss(logits: Tensor, reference: Tensor, target: Tensor, strength: float) -> Tensor:
    """logits, reference: (N, V), the latter logits or log-probabilities; target: (N,) the tokens to forget -> (N,)"""
    lowered = reference.scatter_add(1, target[:, None], reference.new_full((len(target), 1), -strength))
    return -(lowered.softmax(-1) * F.log_softmax(logits, -1)).sum(-1)


@dataclass(frozen=True, config=STRICT)
class Undial:
    """Self-distillation towards adjusted logits; it has a fixed point, so it cannot run away."""

    plan: Plan
    strength: Annotated[float, Field(ge=0)]
    retain: Annotated[float, Field(ge=0)] = 1.0
    kl: Annotated[float, Field(ge=0)] = 0.0
    part: Part = "answer"

    paper = "Dong et al. 2025, arXiv 2402.10052"
    summary = "self-distillation towards the model's own logits with the true token lowered"

    @property
    def needs(self) -> tuple[str, ...]:
        return needed(self.retain, self.kl)

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        return descend(self, lm, corpus, sites, bench)

    def terms(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[dict[str, list[Row]], Objective]:
        pools, keep = keeping(lm, corpus, self.retain, self.kl)
        reference = distributions(lm, pools["forget"])

        def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
            if tokens.role != "forget":
                return keep(lm, tokens)
            loss = undial_loss(lm.logits(tokens).float(), recall(reference, tokens), tokens.target, self.strength)
            return {"undial": tokens.per_row(loss, self.part).sum() / tokens.step_tokens[self.part]}

        return pools, objective
