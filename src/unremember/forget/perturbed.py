"""Latent adversary: while a loss is taken, hidden states are displaced so that the forgotten text comes back best.

A wrapper around any objective.  For each example of the forget role the inner loop looks for the displacement that makes its
answer likeliest; the objective is then taken under it, and only the weights learn:

    inner   δ = argmin CE( θ_{>l}(h + δ), y ) over ‖δ‖ ≤ ε,    h = θ_{≤l}(x),  ε = radius · ‖h‖
            δ₀ = r · ε · a gaussian direction, r ~ U(0, 1);    `steps` times  δ ← Π( δ − ε/steps · g / (‖g‖ + 10⁻⁶) ),  g = ∂CE/∂δ
            Π shortens δ to ε, then clamps h + δ into [min h, max h]
    outer   objective( θ_{>l}(h + δ) ),    δ constant

Yuan et al. 2024 (arXiv 2408.10682); HongbangYuan/RobustUnlearning@70a85e8 `adv_npo/trainer.py`, `adv_attack`.
Differs: ε is a share of the example's own norm, because a fixed 8 means something else in every model and at every length;
norms, extremes and δ belong to one example's real tokens (there padding is displaced, too, and extremes are a batch's); the first
position, whose norm dwarfs all others in Llama-like models, is left out of all three; the CE is that of the answer; the inner
loop asks for the gradient of δ alone (there its `zero_grad` also wipes what earlier micro-batches have accumulated).
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import ConfigDict, Field, SkipValidation
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember.displace import SMALL, leaving, lengths, movable, shortened, stride
from unremember.lm import LM
from unremember.tokens import Row, Tokens, pack
from unremember.train import Objective, Part


def bounded(delta: Tensor, limit: Tensor, hidden: Tensor, inside: Tensor) -> Tensor:
    """Π: at most `limit` long, h + δ within the example's own extremes, nothing where `inside` is off.

    delta, hidden: (B, T, H); limit: (B, 1, 1); inside: (B, T, 1) bool -> (B, T, H)
    """
    delta = shortened(delta, limit)
    low = hidden.masked_fill(~inside, torch.inf).amin((1, 2), keepdim=True)
    high = hidden.masked_fill(~inside, -torch.inf).amax((1, 2), keepdim=True)
    return torch.where(inside, (hidden + delta).clamp(low, high) - hidden, torch.zeros_like(delta))


def starts(keys: Sequence[str], inside: Tensor, width: int, seed: int, step: int) -> Tensor:
    """Gaussian directions of norm r ~ U(0, 1), one an example, the same for the same (seed, step, key).

    inside: (B, T, 1) bool -> (B, T, width), on the CPU; what the lanes are filled up with changes nothing.
    """
    drawn = torch.zeros(*inside.shape[:2], width)
    for lane, key in enumerate(keys):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {step} {key}".encode()))
        places = inside[lane, :, 0].cpu()
        direction = torch.randn(int(places.sum()), width, generator=generator)
        share = torch.rand((), generator=generator)
        drawn[lane, places] = share * direction / direction.norm().clamp(min=SMALL)
    return drawn


@contextmanager
def displaced(lm: LM, tokens: Tokens, block: str, delta: Tensor) -> Generator[None]:
    """While the context lasts, `delta` is added to what leaves `block` in passes over these very `tokens`, and in no other."""
    here = [False]

    def arrive(_, __, named):
        here[0] = torch.equal(named["input_ids"], tokens.ids)

    def edit(hidden: Tensor) -> Tensor:
        return hidden + delta.to(hidden.dtype) if here[0] else hidden  # out of place: the clean tensor may be saved

    handle = lm.model.register_forward_pre_hook(arrive, with_kwargs=True)
    try:
        with lm.at(block, edit):
            yield
    finally:
        handle.remove()


@torch.no_grad()
def displacement(
    lm: LM, tokens: Tokens, block: str, radius: float, steps: int, part: Part = "answer", seed: int = 0, step: int = 0
) -> Tensor:
    """The inner loop: for each row, what to add behind `block` so that its `part` becomes likeliest. -> (B, T, H)

    tokens: one row a lane.  No weight's gradient is touched, and every call makes 1 + steps forward passes.
    """
    assert len(tokens.ids) == tokens.rows, "one row a lane"
    hidden, inside = leaving(lm, tokens, block), movable(tokens)
    limit = radius * lengths(torch.where(inside, hidden, torch.zeros_like(hidden)))  # (B, 1, 1)
    drawn = starts(tokens.keys, inside, hidden.shape[-1], seed, step).to(hidden.device)
    delta = bounded(limit * drawn, limit, hidden, inside)
    scored = tokens.lengths(part).clamp(min=1)  # (B,); a silent micro-batch scores nothing
    for _ in range(steps):
        delta.requires_grad_()
        with torch.enable_grad(), displaced(lm, tokens, block, delta):
            loss = (tokens.per_row(-lm.logp(tokens), part) / scored).sum()
        [gradient] = torch.autograd.grad(loss, delta)
        gradient = torch.where(inside, gradient, torch.zeros_like(gradient))  # the first place has no part in the norm
        delta = bounded(stride(delta.detach(), gradient, limit / steps), limit, hidden, inside)
    return delta


@dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True))
class Perturbed:
    """`objective` with its `role` under attack; the other roles pass as they are.

    rows: key -> row of that role, to lay it out again one row a lane, so that every example has a displacement of its own (a pass
    is then larger than the trie was, by what the rows shared).  block: dotted name.  radius: share of the example's norm, 0 = the
    objective itself.  steps: of the inner loop, 0 = a random displacement.  part: which tokens the adversary wants back.
    seed, step: what its starting points depend on beside the example; `before` is told the step.
    """

    objective: SkipValidation[Objective]
    rows: SkipValidation[Mapping[str, Row]]
    block: str
    radius: Annotated[float, Field(ge=0)]
    steps: Annotated[int, Field(ge=0)]
    part: Part = "answer"
    seed: int = 0
    step: Annotated[int, Field(ge=0)] = 0
    role: str = "forget"

    @property
    def alone(self) -> bool:
        return bool(self.radius)

    def before(self, lm: LM, micros: Sequence[Tokens], step: int) -> None:
        self.step = step
        if hook := getattr(self.objective, "before", None):
            hook(lm, micros, step)

    def after(self, lm: LM, micros: Sequence[Tokens]) -> None:
        if hook := getattr(self.objective, "after", None):
            hook(lm, micros)

    def __call__(self, lm: LM, tokens: Tokens) -> Mapping[str, Tensor]:
        if tokens.role != self.role or not self.radius:
            return self.objective(lm, tokens)
        totals = tokens.step_rows, tokens.step_tokens
        apart = pack([[self.rows[key]] for key in tokens.keys], tokens.role, totals).to(tokens.ids.device)
        if not tokens.answer.any():
            apart = apart.silent()
        delta = displacement(lm, apart, self.block, self.radius, self.steps, self.part, self.seed, self.step)
        with displaced(lm, apart, self.block, delta):
            return self.objective(lm, apart)
