"""AdvRMU: scramble the representation of the forget text while an adversary further down brings the answers back.

    loss = mean_tokens ‖h_θ(x; δ) − c·u‖² / H  (forget)  +  the term of RMU that pins the rest, without δ

δ: for each row the displacement behind an earlier block than RMU's own that makes its answer likeliest, see perturbed.py.
Yuan et al. 2024 (arXiv 2408.10682); HongbangYuan/RobustUnlearning@70a85e8 `adv_rmu/trainer.py`.
Differs: the RMU inside is the published one (rmu.py), with one direction throughout; that code draws a new one for every batch
and token and divides it by the norm of them all.  One backward pass a displacement, where that code adds up four.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.displace import block_name, share_of
from unremember.errors import BadRequest
from unremember.forget.descend import descend
from unremember.forget.perturbed import Perturbed
from unremember.forget.rmu import RMU
from unremember.lm import LM
from unremember.sites import EVERYWHERE, Sites
from unremember.tokens import Row
from unremember.train import STRICT, Objective, Plan


@dataclass(frozen=True, config=STRICT)
class AdvRMU:
    """RMU under attack; scale, alpha, depth as in RMU, radius, inner, at as in AdvNPO.  `at` must lie below `depth`."""

    plan: Plan
    scale: Annotated[float, Field(gt=0)]
    alpha: Annotated[float, Field(ge=0)]
    radius: Annotated[float, Field(ge=0)]
    inner: Annotated[int, Field(ge=0)]
    depth: Annotated[float, Field(gt=0, le=1)] = 0.3
    at: Annotated[float, Field(gt=0, le=1)] = 0.13

    paper = "Yuan et al. 2024, arXiv 2408.10682"
    summary = "RMU while a latent adversary brings the answers back"

    @property
    def plain(self) -> RMU:
        return RMU(self.plan, self.scale, self.alpha, self.depth)

    @property
    def needs(self) -> tuple[str, ...]:
        return self.plain.needs

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        return descend(self, lm, corpus, self.plain.sites(lm) if sites.everywhere else sites, bench)

    def terms(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[dict[str, list[Row]], Objective]:
        index, target = share_of(lm, self.at), self.plain.block(lm)
        if index >= target:
            raise BadRequest(
                f"advrmu displaces what leaves block {index} (at = {self.at}) and scrambles what leaves block {target} "
                f"(depth = {self.depth}); the first must lie below the second: lower at, or raise depth"
            )
        pools, plain = self.plain.terms(lm, corpus, bench)
        rows = {row.key: row for row in pools["forget"]}
        return pools, Perturbed(plain, rows, block_name(lm, index), self.radius, self.inner, "answer", self.plan.seed)
