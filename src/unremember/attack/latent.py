"""Latent perturbation: one displacement of the residual stream, fitted to half of the facts; the other half is asked.

    v = argmin_v mean_tokens −log p_{θ>l}(y | h_l + v),  ‖v‖ ≤ ε,      ε = radius · mean_places ‖h_l‖,  h_l behind block l
    v₀ = 0;  `steps` times  v ← Π( v − REACH · ε/steps · g / ‖g‖ ),    the v of least loss counts

The adversary that AdvGA and AdvNPO train against (Yuan et al. 2024, arXiv 2408.10682; HongbangYuan/RobustUnlearning@70a85e8),
made fit to be asked what it was not shown.  How the auditor reads it: as in steer.py, a hook behind the block of a copy.
Differs: one vector for every place of every text, not a block of T × H for each example, which is fitted to the answer that it
is scored by and writes it into models that were never taught it; v₀ = 0, longer steps, no clamp; the first place, whose norm
dwarfs all others, gets v as well, and has no part in ε.  `steer` adds a difference that nobody optimised, and needs the
original; this needs answers, and no original.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember.attack.fair import KNOWN, silent
from unremember.attack.finetune import Fold, parted
from unremember.attack.steer import added, steered
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.displace import block_name, leaving, movable, share_of, shortened, stride
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.lm import LM
from unremember.tokens import Row, pack, packs
from unremember.train import STRICT

REACH = 2.5  # the way of all steps, in radii: enough to come to the border and go along it


@dataclass(frozen=True, config=STRICT)
class Latent:
    """radius: most length of v, in mean lengths of the stream at a place.  at: share of the blocks at or below it.

    fold: which half of each person's facts is shown, 0 or 1; None = both in turn, as in finetune.py.
    """

    radius: Annotated[float, Field(gt=0)]
    steps: Annotated[int, Field(ge=1)]
    at: Annotated[float, Field(gt=0, le=1)] = 0.13
    fold: Fold = None

    needs = ("forget",)
    paper = "Yuan et al. 2024, arXiv 2408.10682"
    summary = "one displacement of the residual stream, fitted to half of the facts"
    alone = True

    @property
    def turns(self) -> tuple[Latent, ...]:
        """The attacks that this one consists of; what is asked after each lies side by side."""
        return (replace(self, fold=0), replace(self, fold=1)) if self.fold is None else (self,)

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where a half is empty, or everything that could be shown tells what is asked."""
        corpus.require("latent", self.needs)
        for turn in self.turns:
            turn._check(corpus)

    def _check(self, corpus: Corpus) -> None:
        if not parted(corpus, self.fold)[1]:
            raise BadCorpus(
                f"latent has nothing left to ask: all {len(corpus['forget'])} forgotten facts are in the half that is shown; add "
                "facts"
            )
        if not self.shown(corpus):
            raise BadCorpus(
                "latent has nothing to be fitted to: every fact that it could be shown says a value of one that is asked; "
                "add facts, or take the other fold"
            )

    def shown(self, corpus: Corpus) -> tuple[Example, ...]:
        """The facts that it is fitted to: those of one half that tell nothing of what is asked."""
        shown, asked = parted(corpus, self.fold)
        return silent(shown, (*asked, *corpus.of("holdout")))

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        self.check(corpus)
        asked, block = parted(corpus, self.fold)[1], share_of(lm, self.at)
        rows = lm.template.rows(self.shown(corpus), lm.limit)
        attacked = steered(lm, {block: self._fitted(lm, block_name(lm, block), rows, bench)})
        return attacked, corpus.with_roles(forget=asked)

    def _fitted(self, lm: LM, block: str, rows: Sequence[Row], bench: Bench) -> Tensor:
        """The best v of all steps. -> (H,)"""
        batches = [pack(lanes).to(lm.device) for lanes in packs(rows, bench.budget)]
        scored = sum(int(tokens.answer.sum()) for tokens in batches)
        with lm.lowered():
            limit = self.radius * typical(lm, block, rows)
            v = torch.zeros(1, 1, lm.model.get_input_embeddings().weight.shape[1], device=lm.device)
            best, least, first = v, float("inf"), float("inf")
            for step in range(self.steps + 1):
                v.requires_grad_()
                loss, gradient = 0.0, torch.zeros_like(v)
                for tokens in batches:
                    with torch.enable_grad(), lm.at(block, partial(added, vector=v[0, 0])):
                        part = -lm.logp(tokens)[tokens.answer].sum() / scored
                    gradient += torch.autograd.grad(part, v)[0]
                    loss += float(part.detach())
                v = v.detach()
                if not torch.tensor(loss).isfinite() or not gradient.isfinite().all():
                    raise BadModel(
                        f'{lm.name or "the model"} gives losses that are not finite; take precision = "fp32", or a smaller radius'
                    )
                first = loss if step == 0 else first
                if loss < least:
                    best, least = v, loss
                bench.say("latent", step, self.steps, {"loss": loss})
                v = shortened(stride(v, gradient, REACH * limit / self.steps), limit)
        if least >= first > KNOWN:  # a model that knows them by heart may stay as it is
            raise BadRequest(
                f"{self.steps} step(s) within radius = {self.radius} leave the loss at {first:.3g} or above, so nothing was "
                "attacked; take more steps, or another radius"
            )
        return best[0, 0]


@torch.no_grad()
def typical(lm: LM, block: str, rows: Sequence[Row]) -> Tensor:
    """Mean norm of what leaves `block` at the places that may be displaced, each row's own. -> (1, 1, 1)"""
    alone = [pack([[row]]).to(lm.device) for row in rows]  # in a trie, what rows share would count once
    norms = [leaving(lm, tokens, block).norm(dim=-1)[movable(tokens)[:, :, 0]] for tokens in alone]
    return torch.cat(norms).mean()[None, None, None]
