"""Displacing hidden states: where it may happen, how far, and one step of the search for what to add.

What the latent adversary of training (`forget/perturbed.py`) and the attacks from inside (`attack/latent.py` above all) share.
Yuan et al. 2024 (arXiv 2408.10682); what differs from it is told in these two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unremember import team
from unremember.errors import BadModel
from unremember.lm import LM
from unremember.tokens import Tokens

SMALL = 1e-6  # keeps a gradient that vanishes from becoming 0 / 0


def lengths(values: Tensor) -> Tensor:
    """The norm of each example's whole block. values: (B, T, H) -> (B, 1, 1)"""
    return values.flatten(1).norm(dim=1)[:, None, None]


def stride(delta: Tensor, gradient: Tensor, size: Tensor) -> Tensor:
    """One step of normalised descent. delta, gradient: (B, T, H); size: (B, 1, 1) -> (B, T, H)"""
    return delta - size * gradient / (lengths(gradient) + SMALL)


def shortened(delta: Tensor, limit: Tensor) -> Tensor:
    """At most `limit` long, in its own direction. delta: (B, T, H); limit: (B, 1, 1) -> (B, T, H)"""
    return delta * (limit / lengths(delta).clamp(min=torch.finfo(delta.dtype).tiny)).clamp(max=1)


def movable(tokens: Tokens) -> Tensor:
    """Which places may be displaced: real ones but the first (a lane's filling has position 0, too). -> (B, T, 1) bool"""
    return (tokens.positions > 0)[:, :, None]


@torch.no_grad()
def leaving(lm: LM, tokens: Tokens, block: str) -> Tensor:
    """What leaves `block` without any displacement. -> (B, T, H) float32"""
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        found.append(hidden)
        return hidden

    with lm.at(block, keep):
        lm.logits(tokens)
    return found[0].float()


def share_of(lm: LM, share: float) -> int:
    """Index of the block with `share` of all blocks at or below it; BadModel where the model has no blocks."""
    count = len(team.blocks(lm.model))
    if not count:
        raise BadModel(
            f"{lm.name or 'the model'} has no list of blocks, so nothing can be displaced between them; "
            'use a transformer, or what needs no latent adversary, such as the method "npo" or the attack "rephrase"'
        )
    return max(0, round(share * count) - 1)


def block_name(lm: LM, index: int) -> str:
    """The dotted name of a block."""
    wanted = team.blocks(lm.model)[index]
    return next(name for name, module in lm.model.named_modules() if module is wanted)
