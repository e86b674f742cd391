"""What a model says of every vocabulary entry at the scored places, kept as numbers: a reference that needs no live model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unremember.lm import LM
from unremember.tokens import Row, Tokens, pack, packs

BUDGET = 512  # places: all of their distributions are in memory at once


@torch.no_grad()
def distributions(lm: LM, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Row key -> (T, V) float16 log-probabilities at its scored tokens, on the CPU."""
    found = {}
    for group in packs(rows, BUDGET):
        tokens = pack(group).to(lm.device)
        logp = F.log_softmax(lm.logits(tokens).float(), -1).half().cpu()
        lengths = tokens.row.bincount(minlength=tokens.rows).tolist()
        found.update(zip(tokens.keys, logp.split(lengths), strict=True))
    return found


def recall(reference: dict[str, Tensor], tokens: Tokens) -> Tensor:
    """The reference's log-probabilities at the scored tokens of a micro-batch. -> (N, V) float32, on its device"""
    return torch.cat([reference[key] for key in tokens.keys]).to(tokens.ids.device).float()
