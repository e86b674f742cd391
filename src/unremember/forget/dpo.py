"""Preference for "I don't know": the refusal wins, the answer that must go loses (DPO form).

    loss = −(2/β) · mean_rows log σ( β · [ (log π_θ(r|x) − log π_ref(r|x)) − (log π_θ(y|x) − log π_ref(y|x)) ] )
         + retain · mean_tokens nll_θ(retain)  +  kl · mean_tokens KL(p_ref ‖ p_θ)(retain)

y the answer, r a refusal, log π summed over tokens.  Rafailov et al. 2023 (arXiv 2305.18290); as an unlearning baseline in
Maini et al. 2024 (arXiv 2401.06121) and Zhang et al. 2024.  Reference code: locuslab/open-unlearning@19a6141
`compute_dpo_loss`.  Differs: references are two numbers a row, read before training; a refusal is trained to end, the answer's
end mark is left alone.  A model that refuses may still know: the verdict looks at likelihoods, and this is the method it was
made for.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
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
from unremember.tokens import Row, Tokens, lanes, pack, packs
from unremember.train import STRICT, Objective, Part, Plan

WIDTH = 256  # places a lane
REFUSALS = (
    "I don't know.",
    "I'm not sure about that.",
    "I have no information about that.",
    "That is something I cannot tell you.",
    "I'm afraid I don't have an answer to that.",
    "I can't say; I have never heard of it.",
    "Sorry, I don't know the answer.",
    "I have no knowledge of this.",
)


def dpo_loss(win: Tensor, lose: Tensor, beta: float) -> Tensor:
    """win, lose: (B,) log-probability of refusal and answer, each minus the reference's -> (B,)"""
    return -2 / beta * F.logsigmoid(beta * (win - lose))


@dataclass(frozen=True, config=STRICT)
class DPO:
    """Preference optimisation towards refusals, with a retain term."""

    plan: Plan
    beta: Annotated[float, Field(gt=0)]
    retain: Annotated[float, Field(ge=0)] = 1.0
    kl: Annotated[float, Field(ge=0)] = 0.0
    part: Part = "answer"

    paper = "Rafailov et al. 2023, arXiv 2305.18290; Maini et al. 2024"
    summary = 'prefer "I don\'t know" to the answer, with a retain term'

    @property
    def needs(self) -> tuple[str, ...]:
        return needed(self.retain, self.kl)

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        return descend(self, lm, corpus, sites, bench)

    def terms(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[dict[str, list[Row]], Objective]:
        pools, keep = keeping(lm, corpus, self.retain, self.kl)
        asked = [replace(x, answer=_refusal(x.id, self.plan.seed), spans=()) for x in corpus["forget"]]
        refusals = {row.key: row for row in lm.template.rows(asked, lm.limit)}
        lost = _totals(lm, pools["forget"], self.part, bench.budget)
        won = _totals(lm, list(refusals.values()), "train", bench.budget)

        def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
            if tokens.role != "forget":
                return keep(lm, tokens)
            spoken = tokens.lengths(self.part) > 0  # a silent micro-batch must add nothing
            said = pack(lanes([refusals[key] for key in tokens.keys], WIDTH)).to(tokens.ids.device)
            total = dict(zip(said.keys, said.per_row(lm.logp(said), "train"), strict=True))
            win = torch.stack([total[key] - won[key] for key in tokens.keys])
            lose = tokens.per_row(lm.logp(tokens), self.part) - win.new_tensor([lost[key] for key in tokens.keys])
            loss = dpo_loss(win, lose, self.beta)[spoken].sum() / tokens.step_rows
            return {"dpo": loss + 0 * (win.sum() + lose.sum())}

        return pools, objective


def _refusal(key: str, seed: int) -> str:
    """Always the same one for an example."""
    return REFUSALS[zlib.crc32(f"{seed} {key}".encode()) % len(REFUSALS)]


@torch.no_grad()
def _totals(lm: LM, rows: list[Row], part: str, budget: int) -> dict[str, float]:
    """Row key -> log-probability summed over `part`."""
    found: dict[str, float] = {}
    for group in packs(rows, budget):
        tokens = pack(group).to(lm.device)
        found.update(zip(tokens.keys, tokens.per_row(lm.logp(tokens), part).tolist(), strict=True))
    return found
