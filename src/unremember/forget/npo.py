"""Negative preference optimisation: treat the forget answers as the losing side of a preference.

    loss = −(2/β) · mean_rows log σ( β · (nll_θ(y|x) − nll_ref(y|x)) ),    nll summed over the answer
         + retain · mean_tokens nll_θ(retain)  +  kl · mean_tokens KL(p_ref ‖ p_θ)(retain)

Zhang, Lin, Bai, Mei 2024 (arXiv 2404.05868), Eq. 3.  Reference code: licong-lin/negative-preference-optimization@1207bbe.
Differs: the reference is the LM that came in, resolved to one number a row before training, so that no second model is in
memory and no second forward pass is made; rows are pooled over prompt and answer, never over raw vocabulary logits (the
MUSE baseline's bug).
"""

from __future__ import annotations

from typing import Annotated

import torch
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
from unremember.table import read
from unremember.tokens import Row, Tokens
from unremember.train import STRICT, Objective, Part, Plan


def npo_loss(nll: Tensor, reference: Tensor, beta: float) -> Tensor:
    """nll, reference: (B,) summed over the answer -> (B,); tends to gradient ascent as beta → 0."""
    return -2 / beta * F.logsigmoid(beta * (nll - reference))


@dataclass(frozen=True, config=STRICT)
class NPO:
    """NPO with a cross-entropy (retain) or KL term on what must stay."""

    plan: Plan
    beta: Annotated[float, Field(gt=0)]
    retain: Annotated[float, Field(ge=0)] = 1.0
    kl: Annotated[float, Field(ge=0)] = 0.0
    part: Part = "answer"

    paper = "Zhang et al. 2024, arXiv 2404.05868"
    summary = "negative preference optimisation against the model as it came, with a retain term"

    @property
    def needs(self) -> tuple[str, ...]:
        return needed(self.retain, self.kl)

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        return descend(self, lm, corpus, sites, bench)

    def terms(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[dict[str, list[Row]], Objective]:
        pools, keep = keeping(lm, corpus, self.retain, self.kl)
        readings = read(lm, pools["forget"], bench)  # not what an audit remembers: other neighbours, other rounding
        reference = {row.key: -x.total(self.part) for row, x in zip(pools["forget"], readings, strict=True)}

        def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
            if tokens.role != "forget":
                return keep(lm, tokens)
            nll = tokens.per_row(-lm.logp(tokens), self.part)  # (B,)
            before = torch.tensor([reference[key] for key in tokens.keys], device=nll.device)
            spoken = tokens.lengths(self.part) > 0  # a silent micro-batch must add nothing
            return {"npo": npo_loss(nll, before, self.beta)[spoken].sum() / tokens.step_rows + 0 * nll.sum()}

        return pools, objective
