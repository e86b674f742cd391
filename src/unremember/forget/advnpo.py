"""AdvNPO: negative preference optimisation while an adversary in the hidden states brings the answers back.

    loss = −(2/β) · mean_rows log σ( β · (nll_θ(y|x; δ) − nll_ref(y|x)) )  +  the terms of NPO that hold the rest, without δ

δ: for each row the displacement behind one early block that makes y likeliest, see perturbed.py.
Yuan et al. 2024 (arXiv 2408.10682); HongbangYuan/RobustUnlearning@70a85e8 `adv_npo/trainer.py`.
Differs: the paper prints NPO with a ratio of losses inside the logarithm; this is the standard form, as in that code.  The
reference is that of npo.py: one number a row, read without δ.  What differs in the adversary stands in perturbed.py.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.displace import block_name, share_of
from unremember.forget.descend import descend
from unremember.forget.npo import NPO
from unremember.forget.perturbed import Perturbed
from unremember.forget.retain import needed
from unremember.lm import LM
from unremember.sites import EVERYWHERE, Sites
from unremember.tokens import Row
from unremember.train import STRICT, Objective, Part, Plan


@dataclass(frozen=True, config=STRICT)
class AdvNPO:
    """NPO under attack.

    radius: length of the displacement as a share of what it is added to.  inner: steps of the adversary.  at: which share of the
    blocks lies below it, 0.13 = the paper's layer 4 of 32.
    """

    plan: Plan
    beta: Annotated[float, Field(gt=0)]
    radius: Annotated[float, Field(ge=0)]
    inner: Annotated[int, Field(ge=0)]
    retain: Annotated[float, Field(ge=0)] = 1.0
    kl: Annotated[float, Field(ge=0)] = 0.0
    at: Annotated[float, Field(gt=0, le=1)] = 0.13
    part: Part = "answer"

    paper = "Yuan et al. 2024, arXiv 2408.10682"
    summary = "NPO while a latent adversary brings the answers back"

    @property
    def needs(self) -> tuple[str, ...]:
        return needed(self.retain, self.kl)

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        return descend(self, lm, corpus, sites, bench)

    def terms(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[dict[str, list[Row]], Objective]:
        block = block_name(lm, share_of(lm, self.at))
        pools, plain = NPO(self.plan, self.beta, self.retain, self.kl, self.part).terms(lm, corpus, bench)
        rows = {row.key: row for row in pools["forget"]}
        return pools, Perturbed(plain, rows, block, self.radius, self.inner, self.part, self.plan.seed)
