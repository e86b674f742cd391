"""RMU: scramble what the model makes of the forget text half-way up, and pin what it makes of the rest.

    loss = mean_tokens ‖h_θ − c·u‖² / H  (forget)  +  alpha · mean_tokens ‖h_θ − h_ref‖² / H  (retain, replay)

h = residual stream behind block l at the places that predict the answer's tokens; u = a fixed random direction with entries
uniform in [0, 1), of length 1; c = scale · median ‖h_ref‖ over the forget answers.  Only the down-projections of blocks l − 2
to l move, unless sites are named.  Li et al. 2024, WMDP (arXiv 2403.03218); locuslab/open-unlearning@d3d7cf9 `rmu.py`.
Differs: c is a multiple of the layer's own norm, because the published 6.5 and 20 lie below that of small Llama-like models and
then shrink activations instead; h_ref is computed once and cached; the first position, whose norm dwarfs all others
in such models, is left out, and so are prompts and padding; one direction for all topics.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadModel
from unremember.forget.descend import descend
from unremember.lm import LM
from unremember.sites import EVERYWHERE, Sites
from unremember.tokens import Row, Tokens, pack, packs
from unremember.train import STRICT, Objective, Plan


def distance(hidden: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error a place. hidden: (N, H); wanted: (N, H) or (H,) -> (N,)"""
    return (hidden.float() - wanted).square().mean(-1)


@dataclass(frozen=True, config=STRICT)
class RMU:
    """Representation misdirection.  depth: which share of the blocks lies below h, counting its own."""

    plan: Plan
    scale: Annotated[float, Field(gt=0)]
    alpha: Annotated[float, Field(ge=0)]
    depth: Annotated[float, Field(gt=0, le=1)] = 0.3

    paper = "Li et al. 2024, arXiv 2403.03218"
    summary = "scrambles the representation of the forget text at one layer, pins that of the rest"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("forget", "retain") if self.alpha else ("forget",)

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        return descend(self, lm, corpus, self.sites(lm) if sites.everywhere else sites, bench)

    def block(self, lm: LM) -> int:
        """Index of the block behind which h is taken."""
        return max(0, round(self.depth * len(team.blocks(lm.model))) - 1)

    def sites(self, lm: LM) -> Sites:
        """The down-projections of the last three blocks below h; BadModel where none goes by that name."""
        blocks = team.blocks(lm.model)[max(0, self.block(lm) - 2) : self.block(lm) + 1]
        inside = {id(w) for block in blocks for n, w in block.named_parameters() if "down_proj" in n}
        names = [n for n, w in lm.model.named_parameters() if id(w) in inside]
        if hasattr(lm.model, "peft_config"):
            names = [n for n in names if "lora_" in n]
        if not names:
            raise BadModel(
                f"rmu moves the down-projections and finds no parameter 'down_proj' in the blocks of {lm.name!r}; "
                "name those of this architecture under forget.sites"
            )
        return Sites({n: None for n in names})

    def terms(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[dict[str, list[Row]], Objective]:
        block = self.block(lm)
        roles = ("forget", *(("retain", "replay") if self.alpha else ()))
        pools = {role: lm.template.rows(corpus.of(role), lm.limit) for role in roles if corpus.of(role)}
        former = _hidden(lm, [row for rows in pools.values() for row in rows], block, bench)
        norms = torch.cat([former[row.key].norm(dim=-1) for row in pools["forget"]])
        draw = torch.rand(
            former[pools["forget"][0].key].shape[1], generator=torch.Generator().manual_seed(self.plan.seed)
        )
        target = self.scale * norms.median() * draw / draw.norm()  # (H,)

        def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
            hidden = lm.hidden(tokens, block)  # (N, H)
            forget = tokens.role == "forget"
            wanted = target if forget else torch.cat([former[key] for key in tokens.keys])
            gap = distance(hidden, wanted.to(hidden.device))
            gap = torch.where(_first(tokens), torch.zeros_like(gap), gap)
            loss = tokens.per_row(gap, "answer").sum() / tokens.step_tokens["answer"]
            return {"rmu" if forget else f"{tokens.role} rmu": loss if forget else self.alpha * loss}

        return pools, objective


def _first(tokens: Tokens) -> Tensor:
    """(N,) whether a scored token is predicted at the sequence's first position."""
    return tokens.positions.flatten()[tokens.source] == 0


@torch.no_grad()
def _hidden(lm: LM, rows: list[Row], block: int, bench: Bench) -> dict[str, Tensor]:
    """Row key -> (T, H) residual stream at its scored tokens, on the CPU."""
    found = {}
    for group in packs(rows, bench.budget):
        tokens = pack(group).to(lm.device)
        lengths = tokens.row.bincount(minlength=tokens.rows).tolist()
        found.update(zip(tokens.keys, lm.hidden(tokens, block).float().cpu().split(lengths), strict=True))
    return found
