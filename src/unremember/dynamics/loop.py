"""Training under control: epochs whose order and masks are a pure function of (seed, epoch, update), and forks that keep all.

    causal: loss = mean over tokens of −log p(x_t | x_<t)         masked: the same over the places that were masked
    M_update(U) = M on the batch of update U, from the pass that makes the update

Tirumala et al. 2022 (arXiv 2205.10770), appendix: Adam, β = 0.9/0.98, ε = 1e-8, no weight decay, no dropout, mask rate 0.15.
Differs: the model stays in evaluation mode, which is the same without dropout and holds for models that have some.  A masked
token is always replaced by the mask.  Masks for reading are the same at every epoch, those for training are fresh.
This is not `unremember.train`: there the optimiser lives and dies with one call, and here a run stops after each epoch to be
read, forks in two that share their Adam moments, and takes a batch from elsewhere once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass as plain
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unremember.dynamics.memorise import hits, share, unit_length
from unremember.dynamics.text import Sequences
from unremember.errors import BadModel, Diverged
from unremember.train import STRICT

Kind = Literal["causal", "masked"]
FRESH, FIXED, SPECIAL = 0, 1, 2  # streams of masks


@dataclass(frozen=True, config=STRICT)
class Regime:
    """lr: peak learning rate.  batch: sequences an update.  kind: what is predicted.  mask: share of tokens masked.
    warmup: updates of linear rise.  total: update at which a linear fall reaches 0; 0 = no fall.
    """

    lr: Annotated[float, Field(gt=0, lt=1)]
    batch: Annotated[int, Field(ge=1)] = 32
    kind: Kind = "causal"
    mask: Annotated[float, Field(gt=0, lt=1)] = 0.15
    warmup: Annotated[int, Field(ge=0)] = 0
    total: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0

    def rate(self, update: int) -> float:
        """Learning rate of 0-based `update`."""
        rise = min(1.0, (update + 1) / (self.warmup + 1))
        return self.lr * rise * (max(0.0, 1 - update / self.total) if self.total else 1.0)


@plain(frozen=True)
class Reading:
    """A model's teacher-forced look at sequences, all (S, T): whether memorised, whether a context, prediction, −log p."""

    hit: np.ndarray
    counted: np.ndarray
    predicted: np.ndarray
    nll: np.ndarray
    kind: Kind

    @property
    def m(self) -> float | None:
        return share(self.hit, self.counted)

    @property
    def loss(self) -> float | None:
        """Mean −log p a context, in nats."""
        return float(self.nll[self.counted].mean()) if self.counted.any() else None

    @property
    def unit(self) -> float | None:
        """Mean memory unit length; of a causal model alone, since masked places are no neighbours."""
        if self.kind == "masked":
            return None
        return unit_length(h[c] for h, c in zip(self.hit, self.counted, strict=True))


class Training:
    """A model and its optimiser on their way.  The model that comes in is copied; `fork` copies both."""

    def __init__(self, model: Any, regime: Regime):
        self.regime, self.model = regime, copy.deepcopy(model).eval()
        self.epoch, self.update, self.inserted = 0, 0, 0
        self.mask_id = getattr(model.config, "mask_token_id", None)
        if regime.kind == "masked" and self.mask_id is None:
            raise BadModel("a masked model needs config.mask_token_id, the id that hides a token; set it")
        self.optimiser = self._adam()

    def fork(self) -> Training:
        """A second run that goes on from here: the same weights, the same Adam moments, the same order to come."""
        other = Training(self.model, self.regime)
        other.optimiser.load_state_dict(copy.deepcopy(self.optimiser.state_dict()))
        other.epoch, other.update, other.inserted = self.epoch, self.update, self.inserted
        return other

    def moments(self) -> dict:
        """The optimiser's state, copied."""
        return copy.deepcopy(self.optimiser.state_dict())

    def train(self, text: Sequences) -> list[float]:
        """One epoch; returns M_update of each of its updates."""
        order = np.random.default_rng([self.regime.seed, self.epoch]).permutation(len(text))
        found = []
        for start in range(0, len(text), self.regime.batch):
            part = text.some(order[start : start + self.regime.batch])
            found.append(self._step(part, (FRESH, self.epoch, start), self.regime.rate(self.update)))
            self.update += 1
        self.epoch += 1
        return found

    def insert(self, special: Sequences) -> float:
        """One update on the whole special batch, at the learning rate of now; returns M on it before the update."""
        self.inserted += 1
        return self._step(special, (SPECIAL, self.inserted), self.regime.rate(self.update))

    @torch.no_grad()
    def read(self, text: Sequences) -> Reading:
        """Read with the weights as they are; masks depend on the seed alone."""
        return read(self.model, text, self.regime, self.mask_id)

    def _adam(self) -> torch.optim.Optimizer:
        weights = [w for w in self.model.parameters() if w.requires_grad]
        return torch.optim.AdamW(weights, lr=self.regime.lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, fused=True)

    def _step(self, text: Sequences, stream: tuple[int, ...], rate: float) -> float:
        counted = masks(text, self.regime, stream) if self.regime.kind == "masked" else text.contexts()
        # a causal model learns every token that has something on its left, the first behind an identifier too
        learnt = counted if self.regime.kind == "masked" else replace(text, lead=0).contexts()
        logits, target = logits_at(self.model, text, learnt, self.regime.kind, self.mask_id)
        loss = nn.functional.cross_entropy(logits, target)
        loss.backward()
        if not torch.isfinite(loss):
            raise Diverged(self.update + 1, {"loss": float(loss.detach())})
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        return share(hits(logits.detach(), target).cpu().numpy(), counted[learnt].numpy()) or 0.0


def masks(text: Sequences, regime: Regime, stream: tuple[int, ...]) -> Tensor:
    """(S, T) bool: the tokens to hide, each with probability regime.mask; one at least, or there would be no loss."""
    draw = np.random.default_rng([regime.seed, 77, *stream]).random(tuple(text.ids.shape))
    allowed = (text.real & (torch.arange(text.ids.shape[1])[None] >= text.lead)).numpy()
    chosen = (draw < regime.mask) & allowed
    if not chosen.any():
        chosen.flat[int(np.where(allowed, draw, 2.0).argmin())] = True
    return torch.as_tensor(chosen)


def logits_at(
    model: Any, text: Sequences, chosen: Tensor, kind: Kind, mask_id: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (N, V) that predict the chosen (S, T) tokens, and those tokens (N,)."""
    device = next(model.parameters()).device
    ids, chosen = text.ids.to(device), chosen.to(device)
    if kind == "causal":  # padding stands on the right, where no token looks
        return model(input_ids=ids).logits[:, :-1][chosen[:, 1:]].float(), ids[:, 1:][chosen[:, 1:]]
    assert mask_id is not None  # Training and `checkpoints` refuse a masked model without one
    hidden = ids.masked_fill(chosen, mask_id)
    seen = None if bool(text.real.all()) else text.real.long().to(device)
    return model(input_ids=hidden, attention_mask=seen).logits[chosen].float(), ids[chosen]


@torch.no_grad()
def read(model: Any, text: Sequences, regime: Regime, mask_id: int | None = None) -> Reading:
    """Read sequences a batch at a time; weights and mode stay as they are."""
    mode = model.training
    model.eval()
    counted = masks(text, regime, (FIXED,)) if regime.kind == "masked" else text.contexts()
    hit = torch.zeros_like(counted)
    predicted = torch.full_like(text.ids, -1)
    nll = torch.zeros(text.ids.shape)
    try:
        for start in range(0, len(text), regime.batch):
            here = slice(start, start + regime.batch)
            keep = counted[here]
            if not keep.any():
                continue
            part = replace(text, ids=text.ids[here], length=text.length[here])
            logits, target = logits_at(model, part, keep, regime.kind, mask_id)
            hit[here][keep] = hits(logits, target).cpu()
            predicted[here][keep] = logits.argmax(-1).cpu()
            nll[here][keep] = nn.functional.cross_entropy(logits, target, reduction="none").cpu()
    finally:
        model.train(mode)
    return Reading(hit.numpy(), counted.numpy(), predicted.numpy(), nll.numpy(), regime.kind)
