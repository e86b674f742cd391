"""Task arithmetic: what a finetuning changed, as a vector of weights that can be taken away from a model again.

    δ = θ_tuned − θ          θ' = θ − λ · δ          of a LoRA adapter  δ(W) = (alpha / r) · B A

Ilharco et al. 2023, "Editing Models with Task Arithmetic" (arXiv 2212.04089), §3.
Reference code: jaechan-repo/muse_bench@54719c5 `baselines/baselines/task_vector.py`.
Differs: whole numbers (int8 and bool included; there int64 and uint8 alone) are copied, weights that share their memory are
moved once, all is reckoned in float32 and cast back, a name that one side lacks is an error and no warning, and where λ·δ is 0
the weight keeps its bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from unremember.errors import BadModel

Weights = Mapping[str, Tensor]  # what `state_dict` or `named_parameters` of a model gives


@torch.no_grad()
def difference(start: Weights, tuned: Weights) -> dict[str, Tensor]:
    """tuned − start in float32, one entry for each floating-point tensor of `start` that has memory of its own.

    Raises BadModel where names or shapes do not agree: the two are no finetuning of one another.
    """
    _matching(start, tuned)
    twins = _twins(start)
    return {
        name: tuned[name].float() - weight.float()
        for name, weight in start.items()
        if weight.is_floating_point() and twins[name] == name
    }


@torch.no_grad()
def subtract(start: Weights, delta: Weights, strength: float) -> dict[str, Tensor]:
    """start − strength · delta under every name of `start`, in memory of its own; names that share it there share it here.

    Raises BadModel for a delta of a tensor that is not there, has another shape, or holds no floating-point numbers.
    """
    _matching(delta, {name: start[name] for name in delta if name in start})
    if whole := [name for name in delta if not start[name].is_floating_point()]:
        raise BadModel(
            f"{whole[0]!r} holds {start[whole[0]].dtype} numbers, from which nothing can be subtracted; "
            "load the model with floating-point weights instead of quantised ones"
        )
    twins, result = _twins(start), {}
    for name, weight in start.items():
        if twins[name] != name:
            result[name] = result[twins[name]]
            continue
        step = strength * delta[name].to(weight.device, torch.float32) if name in delta else None
        moved = weight if step is None else torch.where(step == 0, weight, (weight.float() - step).to(weight.dtype))
        result[name] = moved.clone()
    return result


def low_rank(down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """What an adapter adds to its matrix: (alpha / r) · up @ down. down: (r, in), up: (out, r) -> (out, in) float32"""
    return alpha / len(down) * (up.detach().float() @ down.detach().float())


def _twins(weights: Weights) -> dict[str, str]:
    """Each name -> the first name of the same memory."""
    first: dict[tuple, str] = {}
    return {
        name: first.setdefault((w.data_ptr(), w.shape, w.stride(), w.dtype) if w.numel() else (name,), name)
        for name, w in weights.items()
    }


def _matching(one: Weights, other: Weights) -> None:
    """BadModel where names or shapes differ."""
    if strange := sorted(one.keys() ^ other.keys()):
        raise BadModel(
            f"two sets of weights do not belong together: {len(strange)} names are in one alone ({', '.join(strange[:3])}); "
            "subtract only what was finetuned from the same model"
        )
    for name, weight in one.items():
        if weight.shape != other[name].shape:
            raise BadModel(
                f"{name!r} has shape {tuple(weight.shape)} in one set of weights and {tuple(other[name].shape)} in the other; "
                "subtract only what was finetuned from the same model"
            )
