"""Ranking: what a locator found.  A selector turns it and a budget into Sites.

A unit is a part of one parameter: a row W[k, :] (all weights into one output), a column W[:, k] (all that one input sends out;
of a down-projection, one neuron), or the whole tensor.  A vector has no columns and counts as one unit under 'row', too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as checked
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unremember.errors import BadRequest
from unremember.sites import Sites

Unit = Literal["row", "column", "tensor"]


@checked(frozen=True, config=ConfigDict(arbitrary_types_allowed=True, extra="forbid"))
class Ranking:
    """Parameter name -> scores of its units, (n,) or (1,): the higher, the more of what was asked for sits there.

    A unit that must never be chosen scores −inf.
    """

    scores: Mapping[str, Tensor]
    unit: Unit

    @model_validator(mode="after")
    def _numbers(self):
        if broken := [name for name, scores in self.scores.items() if scores.isnan().any()]:
            raise ValueError(
                f"scores of {', '.join(broken[:3])} are not numbers; the model or its gradients are broken"
            )
        return self

    def save(self, path: Path) -> None:
        """As safetensors, atomically; the unit stands in its metadata."""
        fresh = path.with_name(f".{path.name}")
        save_file(
            {n: x.detach().float().cpu().contiguous() for n, x in self.scores.items()}, fresh, {"unit": self.unit}
        )
        fresh.replace(path)

    @staticmethod
    def load(path: Path) -> Ranking:
        with safe_open(path, "pt") as file:
            unit = file.metadata()["unit"]
        return Ranking(load_file(path), unit)

    def best(self, count: int) -> list[tuple[str, int]]:
        """The `count` highest units as (parameter, index), ties by name and then by index; −inf never."""
        names = sorted(self.scores)
        flat = torch.cat([self.scores[name].detach().float().cpu().reshape(-1) for name in names])
        order = torch.sort(flat, descending=True, stable=True).indices[: max(count, 0)]
        ends = torch.tensor([self.scores[name].numel() for name in names]).cumsum(0)
        at = torch.searchsorted(ends, order, right=True)
        first = ends - torch.tensor([self.scores[name].numel() for name in names])
        return [
            (names[a], int(k - first[a]))
            for a, k in zip(at.tolist(), order.tolist(), strict=True)
            if flat[k] > -torch.inf
        ]


@checked(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Budget:
    """How much may be chosen; exactly one of: units, a share of all ranked units, or a number of parameters (weights).

    A budget of parameters is never overshot: a unit that no longer fits is passed over for smaller ones.
    """

    units: Annotated[int, Field(ge=1)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    parameters: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one(self):
        given = [name for name in ("units", "share", "parameters") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of units, share and parameters; given: {', '.join(given) or 'none'}")
        return self


def size(weight: Tensor, unit: Unit) -> int:
    """Weights in one unit of a parameter."""
    if unit == "tensor" or weight.dim() < 2:
        return weight.numel()
    return weight.shape[1] if unit == "row" else weight.shape[0]


def select(ranking: Ranking, model: nn.Module, budget: Budget) -> Sites:
    """The best units within the budget.  BadRequest where none fits, or more are asked for than exist."""
    weights = dict(model.named_parameters())
    total = sum(scores.numel() for scores in ranking.scores.values())
    eligible = sum(int((scores > -torch.inf).sum()) for scores in ranking.scores.values())
    wanted = budget.units or (max(1, round(budget.share * total)) if budget.share else eligible)
    if wanted > eligible:
        raise BadRequest(f"{wanted} units were asked for and {eligible} can be chosen; ask for fewer")
    chosen = ranking.best(wanted)
    if budget.parameters is not None:
        left, fitting = budget.parameters, []
        for name, index in chosen:
            if (cost := size(weights[name], ranking.unit)) <= left:
                fitting.append((name, index))
                left -= cost
        chosen = fitting
    if not chosen:
        raise BadRequest(f"a budget of {budget.parameters} parameters holds not one unit; give more")
    return sites(chosen, model, ranking.unit)


def sites(chosen: list[tuple[str, int]], model: nn.Module, unit: Unit) -> Sites:
    """Sites that open exactly these units."""
    weights = dict(model.named_parameters())
    masks: dict[str, Tensor | None] = {}
    picked: dict[str, list[int]] = {}
    for name, index in chosen:
        picked.setdefault(name, []).append(index)
    for name, indices in picked.items():
        weight = weights[name]
        if unit == "tensor" or weight.dim() < 2:
            masks[name] = None
            continue
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        (mask if unit == "row" else mask.T)[indices] = True
        masks[name] = mask
    return Sites(masks)
