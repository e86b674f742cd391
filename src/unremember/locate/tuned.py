"""Tuned lens: the logit lens with one affine map a level, which turns what stands there into what the last block would read.

    logits_l = W_U · norm(A_l h_l + b_l),    A_l = I and b_l = 0 at the start,    minimise mean KL(p_final ‖ p_l) on ordinary text

Belrose et al. 2023 (arXiv 2303.08112).
Differs: the text is what it is given, a few thousand tokens and not the Pile, and a map has H² numbers; so each level keeps the
map that was best on passages set aside, the identity included.  Adam with a falling rate instead of Nesterov momentum; b_l is
learnt in units of the level's typical entry, or it would stand still where the stream is long.  The last level has no map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass as plain
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unremember.bench import BENCH, Bench
from unremember.corpus import Example
from unremember.errors import BadCorpus, BadModel, Diverged
from unremember.lm import LM
from unremember.locate.lens import PLACES, Lens, LogitLens, stream
from unremember.tokens import pack, packs
from unremember.train import STRICT


@plain(frozen=True)
class TunedLens:
    """delta: (levels − 1, H, H), A − I; bias: (levels − 1, H); model: fingerprint of the one that it was tuned on."""

    logit: LogitLens
    delta: Tensor
    bias: Tensor
    model: str = ""

    def __call__(self, level: int, hidden: Tensor) -> Tensor:
        if level < len(self.delta):
            hidden = hidden + hidden @ self.delta[level].T + self.bias[level]
        return self.logit(level, hidden)

    @staticmethod
    def identity(lm: LM) -> TunedLens:
        """The untrained lens, which is the logit lens."""
        logit, width = LogitLens.of(lm.model), lm.model.get_input_embeddings().weight.shape[1]
        return TunedLens(
            logit,
            torch.zeros(logit.levels - 1, width, width, device=lm.device),
            torch.zeros(logit.levels - 1, width, device=lm.device),
        )

    def save(self, path: Path) -> None:
        """As safetensors, atomically; the model's fingerprint stands in its metadata."""
        fresh = path.with_name(f".{path.name}")
        whole = {"delta": self.delta.cpu().contiguous(), "bias": self.bias.cpu().contiguous()}
        save_file(whole, fresh, {"model": self.model})
        fresh.replace(path)

    @staticmethod
    def load(path: Path, lm: LM) -> TunedLens:
        """For this model, or for one that was made from the model it was tuned on.  BadModel where the shapes do not fit."""
        try:
            with safe_open(path, "pt") as file:
                tuned_on = (file.metadata() or {}).get("model", "")
            saved = load_file(path)
        except (OSError, SafetensorError) as error:
            raise BadModel(f"{path} is no tuned lens: {error}; tune one and save it there") from error
        start = TunedLens.identity(lm)
        wanted = {"delta": tuple(start.delta.shape), "bias": tuple(start.bias.shape)}
        if (shapes := {name: tuple(x.shape) for name, x in saved.items()}) != wanted:
            raise BadModel(
                f"{path} holds {shapes} and a lens for {lm.name or 'this model'} has {wanted}; it was tuned on another kind of "
                "model, tune one on this"
            )
        return TunedLens(start.logit, saved["delta"].to(lm.device), saved["bias"].to(lm.device), tuned_on)


def kl(final: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(final) ‖ softmax(logits)) of each line. (N, V) each -> (N,)"""
    p = final.log_softmax(-1)
    return (p.exp() * (p - logits.log_softmax(-1))).sum(-1)


@torch.no_grad()
def divergence(lens: Lens, hidden: Tensor) -> np.ndarray:
    """Mean KL from what the model says to what the lens shows, level by level. hidden: (levels, N, H) -> (levels,)"""
    last = len(hidden) - 1
    total = np.zeros(len(hidden))
    for part in hidden.split(PLACES, dim=1):
        final = lens(last, part[last])
        total += [float(kl(final, lens(level, h)).sum()) for level, h in enumerate(part)]
    return total / hidden.shape[1]


def read(lm: LM, examples: Sequence[Example], bench: Bench = BENCH) -> Tensor:
    """The residual stream at every place of the texts that predicts a token, text by text in the order of their ids.

    -> (levels, N, H)
    """
    rows = [lm.template.row(x.id, "", x.answer, (), lm.limit) for x in examples]
    found: dict[str, Tensor] = {}
    for group in packs(rows, bench.budget):
        tokens = pack(group).to(lm.device)
        hidden = stream(lm, tokens)
        for at, key in enumerate(tokens.keys):
            found[key] = hidden[:, (tokens.row == at) & tokens.answer].float()
    return torch.cat([found[key] for key in sorted(found)], 1)


@dataclass(frozen=True, config=STRICT)
class Tune:
    """steps: of Adam.  lr: its peak rate, falling to zero.  batch: places a step.  aside: share of the texts set aside.

    every: steps between two looks at those.  seed: which texts, and which places a step.
    """

    steps: Annotated[int, Field(ge=0)] = 250
    lr: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    batch: Annotated[int, Field(ge=1)] = 128
    aside: Annotated[float, Field(gt=0, lt=1)] = 0.2
    every: Annotated[int, Field(ge=1)] = 25
    seed: int = 0

    def __call__(self, lm: LM, examples: Sequence[Example], bench: Bench = BENCH) -> TunedLens:
        """A lens for this model.  BadCorpus for less than two texts: one is learnt from, one says when to stop."""
        if len(examples) < 2:
            raise BadCorpus(
                f"a lens is tuned on some texts and checked on others, and there are {len(examples)}; add plain text under "
                "[corpus] prose = …"
            )
        ordered = sorted(examples, key=lambda x: x.id)
        order = np.random.default_rng(self.seed).permutation(len(ordered)).tolist()
        held = max(1, round(self.aside * len(ordered)))
        kept, seen = (read(lm, [ordered[i] for i in part], bench) for part in (order[:held], order[held:]))
        return self.fitted(TunedLens.identity(lm), seen, kept, lm.fingerprint, bench)

    def fitted(self, start: TunedLens, seen: Tensor, kept: Tensor, model: str = "", bench: Bench = BENCH) -> TunedLens:
        """seen, kept: (levels, N, H) to learn from, and to choose by."""
        last, rng = len(seen) - 1, np.random.default_rng([self.seed, 1])
        unit = (
            seen[:last].square().mean(2).sqrt().median(1).values[:, None]
        )  # (levels − 1, 1); robust to the first token
        delta, shift = start.delta.clone(), start.bias / unit
        grad = torch.zeros_like(delta), torch.zeros_like(shift)
        delta.grad, shift.grad = grad
        best, least = (start.delta.clone(), start.bias.clone()), divergence(start, kept)
        adam = torch.optim.Adam([delta, shift], self.lr)
        for step in range(1, self.steps + 1):
            adam.param_groups[0]["lr"] = self.lr * (1 - (step - 1) / self.steps)
            places = torch.from_numpy(rng.integers(0, seen.shape[1], self.batch)).to(seen.device)
            with torch.no_grad():
                final = start.logit(last, seen[last, places])
            total = 0.0
            for level in range(last):  # one at a time: the logits of all would be many
                h = seen[level, places]
                turn, move = (x.detach()[level].requires_grad_() for x in (delta, shift))
                with torch.enable_grad():
                    loss = kl(final, start.logit(level, h + h @ turn.T + move * unit[level])).mean()
                grad[0][level], grad[1][level] = torch.autograd.grad(loss, [turn, move])
                total += float(loss.detach()) / last
            if not np.isfinite(total):
                raise Diverged(step, {"KL": total})
            adam.step()
            if step % self.every == 0 or step == self.steps:
                now = TunedLens(start.logit, delta, shift * unit)
                for level, value in enumerate(divergence(now, kept)[:last]):
                    if value < least[level]:
                        least[level] = value
                        best[0][level], best[1][level] = now.delta[level], now.bias[level]
            bench.say("tune", step, self.steps, {"KL": total})
        return TunedLens(start.logit, *best, model)
