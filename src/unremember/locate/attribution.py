"""Direct logit attribution: what each attention and each MLP adds to a token's logit by itself, over no further layer.

    logit_y = b_y + Σ_c  W_U[y] · (g ⊙ c · s),    c over the embedding and all outputs,   s = 1 / rms(Σ_c c)  frozen

g is the gain of the final norm.  With the scale s taken from the whole stream and held, the norm is linear and the sum is exact.
Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Wang et al. 2022 (arXiv 2211.00593).
Differs: `against` the mean of all tokens' logits, if wanted: what raises every logit alike changes nothing that is said, and in a
raw logit it is most of the number.  The gain is measured, not read off a weight (Gemma's is one plus it); parts that do not add
up to the stream, as where a norm follows an attention, are refused.
A part that works through later ones is not seen here: patching sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unremember.errors import BadModel
from unremember.lm import LM
from unremember.locate.anatomy import Component, components, embedding, watched
from unremember.locate.lens import LogitLens, levels
from unremember.tokens import Row, pack

Against = Literal["nothing", "mean"]


@dataclass(frozen=True)
class Attribution:
    """One row's T sensitive tokens.  parts: what each component adds, in the order of the blocks, (T,) each; embedding (T,).

    bias: what the head adds by itself; logit: what all of it sums up to, as the model gives it.
    """

    parts: dict[Component, Tensor]
    embedding: Tensor
    bias: Tensor
    logit: Tensor

    def total(self) -> Tensor:
        """The sum of all contributions, which is the logit up to rounding. -> (T,)"""
        return torch.stack([*self.parts.values(), self.embedding, self.bias]).sum(0)


def contributions(parts: Tensor, gain: Tensor, scale: Tensor, direction: Tensor) -> Tensor:
    """parts: (C, N, H), what is added to the stream; gain: (H,); scale: (N,); direction: (N, H), rows of the head -> (C, N)"""
    return torch.einsum("cnh,h,n,nh->cn", parts, gain, scale, direction)


def gain_and_scale(norm: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """An RMS norm as gain (H,) and frozen scale (N,), float64: norm(h) = gain · h · scale.  BadModel where it is none."""
    own: Any = norm
    eps = float(getattr(own, "variance_epsilon", getattr(own, "eps", None)) or 0.0)
    ones = torch.ones(1, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    gain = norm(ones)[0].double() * (1 + eps) ** 0.5
    scale = (hidden.double().square().mean(1) + eps).rsqrt()
    wanted = norm(hidden).double()
    slack = 1e-4 if hidden.dtype == torch.float32 else 3e-2
    if (wanted - gain * hidden.double() * scale[:, None]).abs().max() > slack * (1 + wanted.abs().max()):
        raise BadModel(
            f"the final norm {type(norm).__name__} is no root-mean-square norm, and only such a one is a gain times a scale; use "
            "a model of a known kind (Llama, Mistral, Qwen, SmolLM)"
        )
    return gain, scale


@torch.no_grad()
def attribute(lm: LM, row: Row, against: Against = "nothing") -> Attribution:
    """The logits of a row's sensitive tokens taken apart, teacher-forced, in float32.  BadModel where parts do not add up."""
    lm = replace(lm, precision="fp32")
    lens, found = LogitLens.of(lm.model), components(lm.model)
    tokens = pack([[row]]).to(lm.device)
    stem, last = embedding(lm.model), levels(lm.model)[-1]
    with watched(lm.model, [stem, last, *(x.output for x in found)]) as seen:
        logits = lm.logits(tokens)[tokens.span].double()  # (N, V)
    places, target = tokens.source[tokens.span], tokens.target[tokens.span]
    parts = torch.stack([seen[site].flatten(0, 1)[places].double() for site in (stem, *(x.output for x in found))])
    hidden = seen[last].flatten(0, 1)[places]  # (N, H)
    off, size = float((parts.sum(0) - hidden.double()).abs().max()), float(hidden.abs().max())
    if not off <= (1e-3 if hidden.dtype == torch.float32 else 3e-2) * (1 + size):
        raise BadModel(
            f"{lm.name or 'the model'}: embedding, attentions and MLPs add up to a stream that is {off:.2g} off (largest entry "
            f"{size:.2g}), so its blocks scale or norm what they add; attribution knows no such model"
        )
    gain, scale = gain_and_scale(lens.norm, hidden)
    head: Any = lens.head
    weight, bias = head.weight, getattr(head, "bias", None)
    direction = weight[target].double()  # (N, H)
    extra = torch.zeros(len(target), dtype=torch.float64, device=lm.device) if bias is None else bias[target].double()
    logit = logits.gather(1, target[:, None])[:, 0]
    if against == "mean":
        direction = direction - weight.double().mean(0)
        extra = extra - (0.0 if bias is None else bias.double().mean())
        logit = logit - logits.mean(1)
    values = contributions(parts, gain, scale, direction)
    return Attribution(dict(zip(found, values[1:], strict=True)), values[0], extra, logit)
