"""The greatest logit of each place, exactly, for the price of a bfloat16 product: what greedy decoding asks the head for.

Let u = 2⁻⁸ be the rounding of bfloat16, ŵ and ĥ the rounded weights and hidden state, and z the bfloat16 result of ŵ · ĥ.  Then

    |w · h − z|  ≤  max_v ‖w_v − ŵ_v‖ ‖h‖  +  max_v ‖ŵ_v‖ (‖h − ĥ‖ + H 2⁻²⁴ ‖ĥ‖)  +  u |z|  =  δ

by Cauchy and Schwarz (H 2⁻²⁴: what adding up in float32 may lose), so that the greatest logit has z ≥ max z − 2 δ.  The few that
have are computed again in float32.  Where many have, or a number is not finite, the whole product is computed as ever.  Ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

UNIT = 2.0**-8
ROWS = 1024
FEW = 64  # candidates a place, on average, beyond which the whole product is cheaper


class Greatest:
    """Of a head without bias, in the place of the head: hidden (N, H) -> the greatest logit and its token, (N,) each.

    Holds a bfloat16 copy of the weights: make it anew when they change.
    """

    def __init__(self, weight: Tensor):
        self.weight, self.low = weight, weight.to(torch.bfloat16)
        pairs = list(zip(weight.split(ROWS), self.low.split(ROWS), strict=True))  # in the processor's cache
        self.lost = max(float((exact - low).norm(dim=1).max()) for exact, low in pairs)
        self.kept = max(float(low.float().norm(dim=1).max()) for _, low in pairs)

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden.to(self.weight.dtype)
        rounded = hidden.to(torch.bfloat16)
        with torch.autocast(hidden.device.type, enabled=False):
            z = rounded @ self.low.t()
            top = z.max(-1).values.float()
            added = hidden.shape[-1] * 2.0**-24 * rounded.float().norm(dim=1)
            off = self.lost * hidden.norm(dim=1) + self.kept * ((hidden - rounded).norm(dim=1) + added)
            least = top - 2 * off - 3 * UNIT * top.abs()  # one of the three for rounding `least` itself
            place, token = (z >= least.to(torch.bfloat16)[:, None]).nonzero(as_tuple=True)
            if not bool(torch.isfinite(least).all()) or len(place) > FEW * len(hidden):
                best = (hidden @ self.weight.t()).max(-1)
                return best.values, best.indices
            logits = torch.linalg.vecdot(hidden[place], self.weight[token])
        many = torch.bincount(place, minlength=len(hidden))
        first = many.cumsum(0) - many  # where a place's candidates begin
        side = hidden.new_full((len(hidden), int(many.max())), -torch.inf)
        side[place, torch.arange(len(place)) - first[place]] = logits
        best = side.max(-1)
        return best.values, token[first + best.indices]


def greatest(model: Any) -> Greatest | None:
    """Of a model's head; None where that is no plain float32 matrix on the CPU (a GPU may add up in bfloat16)."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or hasattr(head.weight, "full_tensor"):
        return None
    weight = head.weight.detach()
    return Greatest(weight) if weight.dtype == torch.float32 and weight.device.type == "cpu" else None
