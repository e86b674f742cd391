"""First-order attribution from one backward pass: which units of the weights the forget text leans on.

    gradient:  ‖∂F/∂W_u‖₂              weight:  Σ_{w in u} w · ∂F/∂w              F = Σ_rows Σ_tokens log P(y_t | x, y_<t)

u is a row, a column or the whole of a matrix, or a neuron = what a neuron sends out.  The second is the first term of the
Taylor series of F(W) − F(W with u zeroed); for a neuron it equals its activation times gradient, summed over all places.
Mozer, Smolensky 1988 (skeletonization); the importance of Michel et al. 2019 (arXiv 1905.10650) without its absolute value.
Differs: signed, because a unit that holds the text back must not be chosen in order to forget it.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadRequest
from unremember.lm import LM
from unremember.locate.integrated import still
from unremember.locate.neurons import neurons
from unremember.locate.ranking import Ranking
from unremember.sites import Sites
from unremember.tokens import pack, packs
from unremember.train import STRICT, Part


def units(values: Tensor, unit: str) -> Tensor:
    """Sum over each unit. values: (R, C) -> (R,) for 'row', (C,) for 'column', (1,) for 'tensor'."""
    return values.sum()[None] if unit == "tensor" else values.sum(1 if unit == "row" else 0)


def score(weight: Tensor, slope: Tensor, kind: str, unit: str) -> Tensor:
    """weight, slope = ∂F/∂weight: (R, C) -> one number a unit; see the head of this file."""
    return units(slope.square(), unit).sqrt() if kind == "gradient" else units(weight * slope, unit)


@dataclass(frozen=True, config=STRICT)
class Gradients:
    """Ranks units by gradient, or by weight times gradient.

    unit: 'neuron' ranks the down-projections alone; the others rank the matrices of the blocks.
    among: shell patterns of the parameters that are ranked; empty = all of those.
    """

    kind: Literal["gradient", "weight"]
    unit: Literal["neuron", "row", "column", "tensor"] = "neuron"
    part: Part = "span"
    among: tuple[str, ...] = ()

    needs = ("forget",)
    paper = "Michel et al. 2019, arXiv 1905.10650"
    summary = "gradient, or weight times gradient, of the forget text's log-probability, unit by unit"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Ranking:
        corpus.require("gradients", self.needs)
        lm = still(lm)
        weights = dict(lm.model.named_parameters())
        unit = neurons(lm.model)[1] if self.unit == "neuron" else self.unit
        names = self.names(lm)
        for name in names:
            weights[name].requires_grad_(True)
        groups = packs(lm.template.rows(corpus["forget"], lm.limit), bench.budget)
        for done, group in enumerate(groups):
            tokens = pack(group).to(lm.device)
            tokens.per_row(lm.logp(tokens), self.part).sum().backward()
            bench.say("attribute", done + 1, len(groups), {})
        scores = {}
        for name in names:
            weight, slope = weights[name].detach(), weights[name].grad
            slope = torch.zeros_like(weight) if slope is None else slope
            scores[name] = score(weight, slope, self.kind, unit).cpu()
        return Ranking(scores, unit)

    def names(self, lm: LM) -> list[str]:
        """The parameters that are ranked; BadRequest where a pattern leads to none of them."""
        if self.unit == "neuron":
            names = list(neurons(lm.model)[0])
        else:
            inside = {id(w) for block in team.blocks(lm.model) for w in block.parameters() if w.dim() == 2}
            names = [n for n, w in lm.model.named_parameters() if id(w) in inside and w.is_floating_point()]
        if not self.among:
            return names
        chosen = Sites.named(lm.model, self.among).masks
        if not set(names) & set(chosen):
            raise BadRequest(
                f"among = {list(self.among)} leads to no parameter that has a {self.unit} to rank; such are "
                f"{', '.join(names[:3])}"
            )
        return [n for n in names if n in chosen]
