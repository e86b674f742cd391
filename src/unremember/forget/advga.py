"""AdvGA: gradient ascent while an adversary in the hidden states brings the answers back.

    loss = − mean_tokens nll_θ(forget; δ)  +  the terms of ascent that hold the rest, without δ

δ: for each row the displacement behind one early block that makes its answer likeliest, see perturbed.py.
Yuan et al. 2024 (arXiv 2408.10682); HongbangYuan/RobustUnlearning@70a85e8.
Differs: nothing but what stands in ascent.py and perturbed.py.  It has no more of a brake than ascent has: the authors advise
AdvNPO.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.displace import block_name, share_of
from unremember.forget.ascent import Ascent
from unremember.forget.descend import descend
from unremember.forget.perturbed import Perturbed
from unremember.forget.retain import needed
from unremember.lm import LM
from unremember.sites import EVERYWHERE, Sites
from unremember.tokens import Row
from unremember.train import STRICT, Objective, Part, Plan


@dataclass(frozen=True, config=STRICT)
class AdvGA:
    """Ascent, gradient difference (retain > 0) or ascent with KL (kl > 0) under attack; radius, inner, at as in AdvNPO."""

    plan: Plan
    radius: Annotated[float, Field(ge=0)]
    inner: Annotated[int, Field(ge=0)]
    retain: Annotated[float, Field(ge=0)] = 0.0
    kl: Annotated[float, Field(ge=0)] = 0.0
    at: Annotated[float, Field(gt=0, le=1)] = 0.13
    part: Part = "answer"

    paper = "Yuan et al. 2024, arXiv 2408.10682"
    summary = "gradient ascent while a latent adversary brings the answers back"

    @property
    def needs(self) -> tuple[str, ...]:
        return needed(self.retain, self.kl)

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        return descend(self, lm, corpus, sites, bench)

    def terms(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[dict[str, list[Row]], Objective]:
        block = block_name(lm, share_of(lm, self.at))
        pools, plain = Ascent(self.plan, self.retain, self.kl, self.part).terms(lm, corpus, bench)
        rows = {row.key: row for row in pools["forget"]}
        return pools, Perturbed(plain, rows, block, self.radius, self.inner, self.part, self.plan.seed)
