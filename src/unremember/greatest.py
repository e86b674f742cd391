"""The greatest logit of each place for the price of a bfloat16 product: what greedy decoding asks the head for.

Let ŵ, ĥ be the rounded weights and hidden state, s the sum ŵ · ĥ as the processor adds it up in float32, and z that rounded to
bfloat16, which moves it by at most u |z|, u = 2⁻⁸.  By Cauchy and Schwarz, for each token

    |w · h − s|  ≤  max_v ‖w_v − ŵ_v‖ ‖h‖  +  max_v ‖ŵ_v‖ (‖h − ĥ‖ + H 2⁻²² ‖ĥ‖)  =  δ      (2⁻²²: adding up, rounded in any way)

The token with the greatest w · h has s ≥ max z − u |max z| − 2 δ =: L, and so its z is at least L rounded.  The few that have
this are computed in float32, and the greatest of them is the one.  Where many have it, or a number is not finite, the whole
product is computed as ever.  Right up to what float32 can tell, as that product is.  Ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

UNIT, ADDED = 2.0**-8, 2.0**-22
SPARE = 1 + 2.0**-10  # δ itself is computed in float32
ROWS = 1024  # at a time, so that the work stays in the processor's cache
MANY = 512  # one candidate in so many logits costs as much as the product


class Greatest:
    """Of a head without bias, in the place of the head: hidden (N, H) -> the greatest logit and its token, (N,) each.

    Of equals the first.  Holds a bfloat16 copy of the weights: make it anew when they change.
    """

    def __init__(self, weight: Tensor):
        self.weight, self.low = weight, weight.to(torch.bfloat16)
        pairs = list(zip(weight.split(ROWS), self.low.split(ROWS), strict=True))
        self.lost = torch.stack([(exact - low).norm(dim=1).max() for exact, low in pairs]).max()
        self.kept = torch.stack([low.float().norm(dim=1).max() for _, low in pairs]).max()

    def off(self, hidden: Tensor) -> Tensor:
        """δ of the module's docstring. (N, H) -> (N,)"""
        low = hidden.to(torch.bfloat16).float()
        added = hidden.shape[-1] * ADDED * low.norm(dim=1)
        return self.lost * hidden.norm(dim=1) + self.kept * ((hidden - low).norm(dim=1) + added)

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden.to(self.weight.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            z = hidden.to(torch.bfloat16) @ self.low.t()
            top = z.max(-1).values.float()
            least = top - UNIT * top.abs() - 2 * SPARE * self.off(hidden)
            place, token = (z >= least.to(torch.bfloat16)[:, None]).nonzero(as_tuple=True)
            if not bool(torch.isfinite(least).all()) or MANY * len(place) > z.numel():
                best = (hidden @ self.weight.t()).max(-1)
                return best.values, best.indices
            pairs = zip(place.split(ROWS), token.split(ROWS), strict=True)
            logits = torch.cat([torch.linalg.vecdot(hidden[p], self.weight[t]) for p, t in pairs])
        value = hidden.new_full((len(hidden),), -torch.inf).scatter_reduce(0, place, logits, "amax")
        won = logits == value[place]
        return value, torch.full_like(value, z.shape[1], dtype=torch.long).scatter_reduce(
            0, place[won], token[won], "amin"
        )


def greatest(model: Any) -> Greatest | None:
    """Of a model's head; None where that is no plain float32 matrix on the CPU (a GPU may add up in bfloat16)."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or hasattr(head.weight, "full_tensor"):
        return None
    if head._forward_hooks or head._forward_pre_hooks:  # somebody edits what it gives
        return None
    weight = head.weight.detach()
    return Greatest(weight) if weight.dtype == torch.float32 and weight.device.type == "cpu" else None
