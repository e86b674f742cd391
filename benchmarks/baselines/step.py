"""Training steps: two padded batches, the reference model run beside the live one, AdamW as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines.padded import IGNORE, logits, nll, padded
from unremember import team
from unremember.forget.rmu import RMU
from unremember.lm import LM
from unremember.tokens import Row

BETA = 0.1


def step(lm: LM, name: str, forget: Sequence[Row], retain: Sequence[Row], lr: float, rmu: RMU) -> Callable[[], float]:
    """One step of 'ascent' (on all rows), 'npo', 'npo + KL' or 'rmu' (with these settings) on lm's own weights -> its loss."""
    lm.model.set_attn_implementation("sdpa")  # what a script gets that asks for nothing; load() gives ours
    live, block = lm.model, rmu.block(lm)
    reference = lm.copy().model.requires_grad_(False) if name != "ascent" else None
    old = padded([*forget, *retain] if name == "ascent" else forget, end=False)
    kept = padded(retain, end=True)

    def losses() -> Tensor:
        if name == "rmu":
            return scrambled()
        unlikely = nll(logits(lm, live, *old[:2]), old[2])
        if name == "ascent":
            return -unlikely.sum() / (old[2] != IGNORE).sum()
        with torch.no_grad():
            before = nll(logits(lm, reference, *old[:2]), old[2]).sum(1)
        pushed = -2 / BETA * F.logsigmoid(BETA * (unlikely.sum(1) - before)).mean()
        z, there = logits(lm, live, *kept[:2]), kept[2][:, 1:] != IGNORE
        if name == "npo":
            return pushed + nll(z, kept[2]).sum() / there.sum()
        with torch.no_grad():
            former = logits(lm, reference, *kept[:2]).log_softmax(-1)
        apart = (former.exp() * (former - z.log_softmax(-1))).sum(-1)
        return pushed + (apart * there).sum() / there.sum()

    def stream(model, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=lm.precision == "bf16"):
            out = model(input_ids=batch[0], attention_mask=batch[1], output_hidden_states=True)
        return out.hidden_states[block + 1][:, :-1].float()

    answers = padded(retain, end=False)
    there = {name: batch[2][:, 1:] != IGNORE for name, batch in (("old", old), ("kept", answers))}
    draw = torch.rand(live.config.hidden_size, generator=torch.Generator().manual_seed(rmu.plan.seed))
    if name == "rmu":
        with torch.no_grad():
            whole = padded(forget, end=True)  # the scale is measured at the end marks, too
            norms = stream(reference, whole)[whole[2][:, 1:] != IGNORE].norm(dim=-1)
            target = rmu.scale * norms.median() * draw / draw.norm()
        live.requires_grad_(False)
        for part in team.blocks(live)[max(0, block - 2) : block + 1]:
            part.mlp.down_proj.weight.requires_grad_(True)

    def scrambled() -> Tensor:
        pushed = (stream(live, old) - target).square().mean(-1)[there["old"]].mean()
        with torch.no_grad():
            former = stream(reference, answers)
        held = (stream(live, answers) - former).square().mean(-1)[there["kept"]].mean()
        return pushed + rmu.alpha * held

    moving = [w for w in live.parameters() if w.requires_grad]
    optimiser = torch.optim.AdamW(moving, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=False, fused=False)

    def take() -> float:
        loss = losses()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach())

    return take
