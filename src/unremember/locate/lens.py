"""Logit lens: what a model would say if it stopped behind each block, read with its own final norm and head.

    logits_l = W_U · norm(h_l),    h_0 the embeddings, h_l the residual stream behind block l

At the last level this is what the model says.  That is checked at every reading, so a cap, a scale or a second norm between the
last block and the logits is refused and not overlooked.
nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al. 2023 (arXiv 2303.08112).
Differs: hooks behind the blocks, since the last of transformers' `hidden_states` is normed already and a lens on it norms twice;
ties count against the token, so that a model which says nothing ranks nothing first.
What a lens does not show may be there all the same, in a form that only a probe or a patch finds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.errors import BadModel
from unremember.lm import LM
from unremember.locate.anatomy import Site, embedding, watched
from unremember.tokens import Row, Tokens, pack, packs

PLACES, ROWS = 256, 8  # that pass the head together; that are ranked together
Lens = Callable[[int, Tensor], Tensor]  # level, (N, H) -> (N, V) float32


def rank(logits: Tensor, target: Tensor) -> Tensor:
    """1 = the likeliest of all; a tie counts against the target. logits: (N, V); target: (N,) -> (N,)"""
    return (logits >= logits.gather(1, target[:, None])).sum(1)


@dataclass(frozen=True)
class Trail:
    """One row through the levels, (levels, T) over its sensitive tokens: the token's rank, and its log-probability."""

    rank: np.ndarray
    logp: np.ndarray

    def typical(self) -> np.ndarray:
        """Geometric mean of the ranks of a level's tokens. -> (levels,)"""
        return np.exp(np.log(self.rank).mean(1))


@dataclass(frozen=True)
class LogitLens:
    """levels: embeddings and blocks."""

    norm: nn.Module
    head: nn.Module
    levels: int

    @staticmethod
    def of(model: Any) -> LogitLens:
        """The model's own norm and head.  BadModel where no norm stands beside the blocks, or weights are split."""
        name = levels(model)[1][0]
        trunk = model.get_submodule(".".join(name.split(".")[:-2]))
        norm, head = getattr(trunk, "norm", None), model.get_output_embeddings()
        if not isinstance(norm, nn.Module) or head is None:
            raise BadModel(
                f"{type(trunk).__name__} has no `norm` beside its blocks, or no head behind it, and a lens reads through both "
                "(known: Llama, Mistral, Qwen, SmolLM); use a model of such a kind"
            )
        if any(hasattr(weight, "full_tensor") for weight in head.parameters()):
            raise BadModel(
                "the head is split over processes, and a lens needs all of it; read the model in one process"
            )
        return LogitLens(norm, head, len(team.blocks(model)) + 1)

    def __call__(self, level: int, hidden: Tensor) -> Tensor:
        weight: Any = self.head.weight
        return self.head(self.norm(hidden).to(weight.dtype)).float()


def levels(model: Any) -> list[Site]:
    """Where the residual stream is read: behind the embeddings and behind every block."""
    blocks = team.blocks(model)
    if not blocks:
        raise BadModel("the model has no blocks to look behind; use a transformer")
    names = {id(module): name for name, module in model.named_modules()}
    return [embedding(model), *((names[id(block)], "out") for block in blocks)]


@torch.no_grad()
def stream(lm: LM, tokens: Tokens) -> Tensor:
    """The residual stream at every level, at the places that predict the scored tokens. -> (levels, N, H)

    Raises BadModel where it is not finite, or the lens at the last level is not what the model says.
    """
    lens, sites = LogitLens.of(lm.model), levels(lm.model)
    with watched(lm.model, sites) as seen:
        said = lm.logits(replace(tokens, source=tokens.source[:ROWS])).float()  # enough to check the lens by
    hidden = torch.stack([seen[site].flatten(0, 1)[tokens.source].to(seen[sites[-1]].dtype) for site in sites])
    if broken := [level for level, h in enumerate(hidden) if not h.isfinite().all()]:
        raise BadModel(
            f"{lm.name or 'the model'}: the residual stream at level {broken[0]} of {len(sites) - 1} holds numbers that are not "
            "finite; its weights are broken, load them again"
        )
    off = float((lens(len(sites) - 1, hidden[-1, :ROWS]) - said).abs().max())
    slack = 1e-3 if hidden.dtype == torch.float32 else 3e-2
    if off > slack * (1 + float(said.abs().max())):
        raise BadModel(
            f"{lm.name or 'the model'}: norm and head give logits that are {off:.2g} off what the model says, so something else "
            "stands between its last block and its logits (a cap, a scale); lenses know no such model"
        )
    return hidden


def placed(read: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Rank and log-probability of the target. hidden: (N, H); target: (N,) -> (N,), (N,)

    Many places pass the head together, which is as long in coming as it is big; a few are then looked at, which fit the cache.
    """
    ranks, logps = [target.new_empty(0)], [hidden.new_empty(0, dtype=torch.float32)]
    for few, wanted in zip(hidden.split(PLACES), target.split(PLACES), strict=True):
        for z, t in zip(read(few).split(ROWS), wanted.split(ROWS), strict=True):
            ranks.append(rank(z, t))
            logps.append(-nn.functional.cross_entropy(z, t, reduction="none"))
    return torch.cat(ranks), torch.cat(logps)


@torch.no_grad()
def trails(lm: LM, rows: Sequence[Row], lens: Lens | None = None, bench: Bench = BENCH) -> list[Trail]:
    """Each row's sensitive tokens at every level, teacher-forced, in the order of `rows`.  lens: the logit lens if None."""
    read = lens or LogitLens.of(lm.model)
    numbered = [Row(str(i), row.ids, row.start, row.stop, row.span) for i, row in enumerate(rows)]
    groups = packs(numbered, bench.budget)
    found: dict[int, Trail] = {}
    with lm.lowered():
        for done, group in enumerate(mine := groups[team.rank() :: team.size()]):
            tokens = pack(group).to(lm.device)
            hidden = stream(lm, tokens)[:, tokens.span]  # (levels, N, H)
            target, row = tokens.target[tokens.span], tokens.row[tokens.span].cpu().numpy()
            seen = [placed(partial(read, level), h, target) for level, h in enumerate(hidden)]
            ranks, logps = (torch.stack(column).cpu().numpy() for column in zip(*seen, strict=True))
            for at, key in enumerate(tokens.keys):
                found[int(key)] = Trail(ranks[:, row == at], logps[:, row == at])
            bench.say("read", done + 1, len(mine), {})
    found = team.merge(found)
    return [found[i] for i in range(len(rows))]
