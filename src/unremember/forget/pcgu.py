"""PCGU, partitioned contrastive gradient unlearning: step only where answer and decoy are pulled in opposite directions.

    S = the k rows (or columns) with the lowest cos( ∇ Σ v(y⁺), ∇ Σ v(y⁻) ),  chosen anew for every step
    θ_S ← θ_S − lr · u_S,        u = ∇ of one of

    advantaged      mean_rows v(y⁺)                                            push the answer down
    disadvantaged   −mean_rows v(y⁻)                                           pull the decoy up
    dynamic         mean_rows sign(v(y⁺) − v(y⁻)) · (v(y⁺) − v(y⁻))            close the gap there is now

    + retain · mean_tokens nll_θ(retain)  +  kl · mean_tokens KL(p_ref ‖ p_θ)(retain),   on S alone

y⁺, y⁻, v: see locate/contrast.py.  Yu, Jeoung, Kasi, Yu, Ji 2023 (Findings of ACL 2023, 6032-6048), there for masked models
and single tokens.  Reference code: CharlesYu2000/PCGU-UnlearningBias@eeae24e.
Differs: causal form, fillers of several tokens, terms that hold, means in place of sums; S holds no unit without gradient; in
'dynamic' the cosine is of the favoured and of the other filler (that code turns one sign and so takes the k *most alike*);
plan.weight_decay shrinks S alone; `reselect = false` chooses S once from the whole forget set, as its full-set option does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.forget.descend import descend
from unremember.forget.retain import Keep, keeping, needed
from unremember.lm import LM
from unremember.locate import ranking
from unremember.locate.contrast import Contrast, Line, Pairs, Value, gradient
from unremember.sites import EVERYWHERE, Sites
from unremember.tokens import Row, Tokens, pack, packs
from unremember.train import STRICT, Objective, Plan

Direction = Literal["advantaged", "disadvantaged", "dynamic"]


def pull(adv: Tensor, dis: Tensor, direction: Direction) -> Tensor:
    """What is minimised, row by row. adv, dis: (B,) v of the answer and of its decoy -> (B,)"""
    if direction == "advantaged":
        return adv
    return -dis if direction == "disadvantaged" else (adv - dis).abs()


def within(gradients: Mapping[str, Tensor], sites: Sites) -> dict[str, Tensor]:
    """The gradients, zero outside the sites."""
    kept = {}
    for name, g in gradients.items():
        mask = sites.masks.get(name)
        if mask is not None:
            kept[name] = torch.where(team.like(mask, g), g, torch.zeros_like(g))
        else:
            kept[name] = g if sites.everywhere or name in sites.masks else torch.zeros_like(g)
    return kept


@dataclass(frozen=True, config=STRICT)
class PCGU:
    """k: the most rows or columns that one step moves.  unit, value, embeddings, floor: see Contrast.

    reselect: choose them anew for every step, or once.  Anew needs plan.optimiser = "sgd": AdamW's moments go on moving rows
    that an earlier step chose.
    """

    plan: Plan
    k: Annotated[int, Field(ge=1)]
    direction: Direction = "advantaged"
    unit: Line = "row"
    value: Value = "logp"
    embeddings: bool = False
    floor: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    reselect: Annotated[bool, Field(validate_default=True)] = True
    retain: Annotated[float, Field(ge=0)] = 0.0
    kl: Annotated[float, Field(ge=0)] = 0.0

    paper = "Yu et al. 2023, Findings of ACL"
    summary = "moves only the rows that the answer and a decoy pull in opposite directions"

    @field_validator("reselect")
    @classmethod
    def _steps_plainly(cls, reselect: bool, info: ValidationInfo) -> bool:
        if reselect and "plan" in info.data and info.data["plan"].optimiser != "sgd":
            raise ValueError(
                'choosing rows anew for every step needs plan.optimiser = "sgd"; set it, or reselect = false'
            )
        return reselect

    @property
    def needs(self) -> tuple[str, ...]:
        return needed(self.retain, self.kl)

    @property
    def contrast(self) -> Contrast:
        return Contrast(self.unit, self.value, self.embeddings, self.floor, self.plan.seed)

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where a role is missing or a forget example has no distractor."""
        corpus.require("pcgu", self.needs)
        self.contrast.check(corpus)

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        self.check(corpus)
        if not self.reselect:
            return descend(self, lm, corpus, self.once(lm, corpus, sites, bench), bench)
        # torch would shrink every weight: the objective does it, where the step goes
        return descend(_Inside(self, sites, replace(self.plan, weight_decay=0.0)), lm, corpus, sites, bench)

    def once(self, lm: LM, corpus: Corpus, sites: Sites, bench: Bench = BENCH) -> Sites:
        """The k units of the whole forget set.  BadRequest where fewer can be chosen."""
        pairs = Pairs.of(lm, corpus["forget"], self.plan.seed)
        micros = [pack(group).to(lm.device) for group in packs(pairs.answers, bench.budget)]
        adv, dis = self.contrasted(lm, pairs, micros, sites)
        found = ranking.select(self.contrast.ranking(lm.model, adv, dis), lm.model, ranking.Budget(units=self.k))
        both: dict[str, Tensor | None] = {}
        for name, mask in found.masks.items():
            given = None if sites.everywhere else sites.masks[name]
            both[name] = given if mask is None else mask if given is None else mask & given.to(mask.device)
        return Sites(both)

    def contrasted(self, lm: LM, pairs: Pairs, micros: Sequence[Tokens], sites: Sites) -> list[dict[str, Tensor]]:
        """∇ Σ v of the answers and of the decoys, zero outside the sites; in 'dynamic' of the favoured and of the others."""

        def side(lm: LM, tokens: Tokens, decoy: bool) -> Tensor:
            if self.direction != "dynamic":
                return pairs.side(lm, tokens, self.value, decoy)
            adv, dis = (pairs.side(lm, tokens, self.value, d) for d in (False, True))
            return torch.where((adv > dis) == decoy, dis, adv)

        found = (gradient(lm, micros, lambda lm, t, d=decoy: side(lm, t, d)) for decoy in (False, True))
        moving = sites.moving(lm.model)  # of a LoRA model its adapter alone
        return [within({n: g for n, g in one.items() if n in moving}, sites) for one in found]

    def terms(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[dict[str, list[Row]], Objective]:
        return self.objective(lm, corpus, EVERYWHERE, 0.0, bench)

    def objective(
        self, lm: LM, corpus: Corpus, sites: Sites, decay: float, bench: Bench
    ) -> tuple[dict[str, list[Row]], Objective]:
        """As `terms`, with the sites in which units are chosen and the weight decay that these get."""
        pools, keep = keeping(lm, corpus, self.retain, self.kl)
        pairs = Pairs.of(lm, corpus["forget"], self.plan.seed)
        pulling = _Pulling(self, pairs, keep)
        return pools | {"forget": list(pairs.answers)}, (
            _Selecting(pulling, sites, decay, bench) if self.reselect else pulling
        )


@plain(frozen=True)
class _Inside:
    """The method as `descend` sees it, its objective told of the sites."""

    method: PCGU
    sites: Sites
    plan: Plan

    @property
    def needs(self) -> tuple[str, ...]:
        return self.method.needs

    def terms(self, lm: LM, corpus: Corpus, bench: Bench) -> tuple[dict[str, list[Row]], Objective]:
        return self.method.objective(lm, corpus, self.sites, self.method.plan.weight_decay, bench)


@plain(frozen=True)
class _Pulling:
    """The loss, over all weights."""

    method: PCGU
    pairs: Pairs
    keep: Keep

    def __call__(self, lm: LM, tokens: Tokens) -> dict[str, Tensor]:
        if tokens.role != "forget":
            return self.keep(lm, tokens)
        direction, value = self.method.direction, self.method.value
        needed = {"advantaged": (False,), "disadvantaged": (True,), "dynamic": (False, True)}[direction]
        sides = [self.pairs.side(lm, tokens, value, decoy) for decoy in needed]
        return {"pcgu": pull(sides[0], sides[-1], direction).sum() / tokens.step_rows}


@plain(frozen=True)
class _Selecting:
    """The same, with the gradient zero outside the units of the step."""

    pulling: _Pulling
    sites: Sites
    decay: float
    bench: Bench

    def __call__(self, lm: LM, tokens: Tokens) -> dict[str, Tensor]:
        return self.pulling(lm, tokens)

    @torch.no_grad()
    def after(self, lm: LM, micros: Sequence[Tokens]) -> None:
        method, rows = self.pulling.method, [tokens for tokens in micros if tokens.role == "forget"]
        with torch.enable_grad():
            adv, dis = method.contrasted(lm, self.pulling.pairs, rows, self.sites)
        if not all(bool(g.isfinite().all()) for side in (adv, dis) for g in side.values()):
            return  # the loop will find the same in the loss
        chosen = method.contrast.ranking(lm.model, adv, dis).best(method.k)
        self.bench.say("contrast", len(chosen), method.k, {})
        here = ranking.sites(chosen, lm.model, method.unit)
        for name, w in lm.model.named_parameters():
            if w.grad is not None:
                w.grad = within({name: w.grad + self.decay * w}, here)[name]
