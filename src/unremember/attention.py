"""Attention in bfloat16 on the CPU as three plain matrix operations, where the fused kernel is at its slowest.

Torch's fused kernel with an explicit mask (and tries need one) runs at a tenth of the matrix peak on short lanes.  Here
heads that share a key are rows of one product, the mask is added in place, and the softmax is one call.  The scores of a
lane are held whole, so that long rows and big batches go back to the fused kernel.  Equal to it up to rounding; in bfloat16 the
scores are rounded, as in transformers' own eager attention, where the fused kernel keeps them (tested, with how much).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

NAME = "unremember"
KINDS = ("llama", "mistral", "qwen2", "qwen3")  # nothing in their attention but scores, mask and softmax
LONG, MOST = 512 * 512, 2**25  # scores of a head, and of all heads and rows, beyond which the fused kernel is used


def grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax(scale · query keyᵀ + mask) value.  H is a multiple of K; head h reads key h // (H / K).

    query (B, H, T, D), key and value (B, K, S, D), mask (B, 1, T, S) -> (B, T, H, D).
    """
    b, h, t, d = query.shape
    k, s = key.shape[1:3]
    rows = (query * scale).reshape(b * k, h // k * t, d)
    scores = torch.bmm(rows, key.reshape(b * k, s, d).transpose(1, 2))
    if mask is not None:
        # a constant: its gradient is nobody's, and autograd would copy the scores three times on the way back
        scores.detach().view(b, h, t, s).add_(floored(mask, scores.dtype))
    mixed = torch.bmm(scores.softmax(-1), value.reshape(b * k, s, value.shape[-1]))
    return mixed.view(b, h, t, -1).transpose(1, 2).contiguous()


def floored(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask in another precision, whose lowest number it must not fall below: what sees nothing would be 0 / 0."""
    return mask.clamp(min=max(torch.finfo(dtype).min, torch.finfo(mask.dtype).min)).to(dtype)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """What transformers calls in every block. settings: its own; dropout is off in every model here."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the rotation has made them float32
    scores = query.shape[2] * key.shape[2]
    exact = value.dtype not in (torch.bfloat16, torch.float16)  # the fused kernel is as fast there
    if exact or scores > LONG or scores * query.shape[0] * query.shape[1] > MOST:
        mask = None if attention_mask is None else floored(attention_mask, query.dtype)
        return sdpa_attention_forward(module, query, key, value, mask, **settings)
    with torch.autocast(query.device.type, enabled=False):  # it would make the softmax a float32 one, twice the memory
        return grouped(query, key, value, attention_mask, settings["scaling"]), None


def quick(model: Any) -> Any:
    """The same model, whose blocks use this attention where it is known to be theirs; other models stay as they are."""
    if model.config.model_type in KINDS and model.device.type == "cpu":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, eager_mask)
        model.set_attn_implementation(NAME)
    return model
