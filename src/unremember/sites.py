"""Sites: which parameters may move.  What is absent stays as it is, bit for bit, weight decay included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from unremember import team
from unremember.errors import BadRequest, nearest


@dataclass(frozen=True)
class Sites:
    """Parameter name -> mask of its shape, or None for all of it.  `everywhere` stands for every parameter."""

    masks: Mapping[str, Tensor | None]
    everywhere: bool = False

    @staticmethod
    def named(model: nn.Module, patterns: Iterable[str]) -> Sites:
        """All parameters whose name matches one of the shell patterns; BadRequest for a pattern that matches none."""
        names = [name for name, _ in model.named_parameters()]
        patterns = tuple(patterns)
        if not patterns:
            return EVERYWHERE
        if unmatched := [p for p in patterns if not any(fnmatchcase(n, p) for n in names)]:
            raise BadRequest(f"sites: {p!r} matches no parameter of this model; {nearest(p, names)}" for p in unmatched)
        return Sites({n: None for n in names if any(fnmatchcase(n, p) for p in patterns)})

    def moving(self, model: nn.Module) -> set[str]:
        """The names of all parameters of which anything may move."""
        adapter = hasattr(model, "peft_config")  # "everywhere" in a LoRA model is its adapter: the base must not move
        return {
            name
            for name, _ in model.named_parameters()
            if name in self.masks or (self.everywhere and (not adapter or "lora_" in name))
        }

    def open(self, model: nn.Module) -> dict[str, Tensor]:
        """Let gradients reach only these sites; returns {name: values to put back where the mask is off}."""
        kept, moving = {}, self.moving(model)
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in moving)
            if not self.everywhere and self.masks.get(name) is not None:
                kept[name] = weight.detach().clone()
        return kept

    @torch.no_grad()
    def hold(self, model: nn.Module, kept: Mapping[str, Tensor]) -> None:
        """Put back, after a step, everything outside the masks."""
        for name, weight in model.named_parameters():
            mask = self.masks.get(name)
            if mask is not None and name in kept:
                weight.copy_(torch.where(team.like(mask, weight), weight, team.like(kept[name], weight)))


EVERYWHERE = Sites({}, everywhere=True)
