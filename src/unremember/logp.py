"""Log-probability of the target at each place, without float32 copies of the logits on the way there or back."""

from __future__ import annotations

import torch
from torch import Tensor


class LogP(torch.autograd.Function):
    """Log-softmax of logits (N, V) at target (N,), in float32, a few rows at a time.

    Spares the float32 copies of the logits and of their gradient that `cross_entropy` makes: each row is read while it is in
    the processor's cache, and what is kept for the way back is the logits themselves.
    """

    ROWS = 8  # 1.5 MB of a vocabulary of 49,152

    @staticmethod
    def forward(ctx, z: Tensor, target: Tensor) -> Tensor:
        # less the largest first: the likelihood of a sure token is a small difference of large numbers
        top = z.detach().amax(-1, keepdim=True).float() if len(z) else z.new_empty(0, 1, dtype=torch.float32)
        parts = zip(z.split(LogP.ROWS), top.split(LogP.ROWS), strict=True)
        total = torch.cat([(part.float() - most).exp_().sum(-1, keepdim=True).log_() for part, most in parts])
        ctx.save_for_backward(z, target, top, total)
        return (z.gather(1, target[:, None]).float() - top - total)[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *slopes: Tensor) -> tuple[Tensor, None]:
        z, target, top, total = ctx.saved_tensors
        (slope,) = slopes
        out = torch.empty_like(z)
        for at in range(0, len(z), LogP.ROWS):
            rows = slice(at, at + LogP.ROWS)
            part = (z[rows].float() - top[rows]).sub_(total[rows]).exp_().mul_(-slope[rows, None])
            out[rows] = part.scatter_add_(1, target[rows, None], slope[rows, None])
        return out, None
