"""The simplest edit: what was located becomes zero.  What stood there is kept, and can be put back bit for bit.

    W ← W ⊙ (1 − M)              undo:  W[M] ← what was removed

Wu et al. 2023, DEPN (arXiv 2310.20138), the editor: a zero column of a down-projection is a neuron whose activation is zero for
every input.  Reference code: flamewei123/DEPN@f779dd9 `3_edit_privacy_neurons.py`.
Differs: weights, not hooks, so that the edit is in what is saved, for every prompt; that code writes the embedding of [UNK] in
place of zero for names and texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unremember.errors import BadModel, BadRequest, nearest
from unremember.lm import LM
from unremember.sites import Sites


@dataclass(frozen=True)
class Removed:
    """Parameter name -> where it was zeroed (bool, of its shape), and the values that stood there, in order; on the CPU."""

    masks: Mapping[str, Tensor]
    values: Mapping[str, Tensor]


@torch.no_grad()
def zero(lm: LM, sites: Sites) -> tuple[LM, Removed]:
    """A copy whose `sites` are zero, and what was removed from it.

    BadRequest where the sites are everywhere or of another model, BadModel where a weight is not what the model computes with.
    """
    if sites.everywhere:
        raise BadRequest("zeroing everywhere leaves no model; name the sites, or select them from a ranking")
    lm = lm.copy()
    masks, values = {}, {}
    for name, weight in _named(lm, sites.masks):
        mask = sites.masks[name]
        masks[name] = torch.ones(weight.shape, dtype=torch.bool) if mask is None else mask.cpu().clone()
        _fits(name, masks[name], weight)
        there = masks[name].to(weight.device)
        values[name] = weight[there].cpu()
        weight[there] = 0
    return lm, Removed(masks, values)


@torch.no_grad()
def undo(lm: LM, removed: Removed) -> LM:
    """A copy with everything back in its place, bit for bit.

    BadModel where something else stands there now: of several edits the last must be undone first.
    """
    lm = lm.copy()
    for name, weight in _named(lm, removed.masks):
        _fits(name, removed.masks[name], weight)
        there = removed.masks[name].to(weight.device)
        if weight[there].any():
            raise BadModel(
                f"{name} is not zero where the edit left it so; undo what was done to the model since, the last edit first"
            )
        weight[there] = removed.values[name].to(weight.device)
    return lm


def _named(lm: LM, masks: Mapping[str, Tensor | None]) -> list[tuple[str, Tensor]]:
    """The parameters of these names."""
    if hasattr(lm.model, "peft_config"):
        raise BadModel(
            "this model carries a LoRA adapter: its effective matrices are in no parameter, and a zero in the base would not "
            "be saved with the adapter; merge it first (merge_and_unload), or leave out forget.lora"
        )
    weights = dict(lm.model.named_parameters())
    if unknown := [name for name in masks if name not in weights]:
        raise BadRequest(f"sites: the model has no parameter {name!r}; {nearest(name, weights)}" for name in unknown)
    if coded := [name for name in masks if not weights[name].is_floating_point()]:
        raise BadModel(
            f"{', '.join(coded[:3])} is quantised ({weights[coded[0]].dtype}); load the model with whole weights"
        )
    return [(name, weights[name]) for name in masks]


def _fits(name: str, mask: Tensor, weight: Tensor) -> None:
    if mask.shape != weight.shape:
        raise BadRequest(
            f"sites: the mask of {name!r} is {tuple(mask.shape)} and the parameter {tuple(weight.shape)}; "
            "use sites of this model"
        )
