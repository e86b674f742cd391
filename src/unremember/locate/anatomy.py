"""Anatomy: the parts of a transformer's blocks by name, and a way to read and to replace what flows through them.

Known are blocks with one attention of q_proj, k_proj, v_proj, o_proj and one gated MLP of gate_proj, up_proj, down_proj
(Llama, Mistral, Qwen, Gemma, SmolLM).  Any other block is refused: a wrong guess would name the wrong weights.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unremember import team
from unremember.errors import BadModel
from unremember.locate.ranking import Ranking

KINDS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
Site = tuple[str, Literal["in", "out"]]  # a module and which side of it


@dataclass(frozen=True)
class Component:
    """One attention or one MLP.  modules: full names, in the order of KINDS; weights: its matrices, LoRA's alone if any."""

    block: int
    kind: str
    modules: tuple[str, ...]
    weights: tuple[str, ...]

    @property
    def inner(self) -> Site:
        """What goes into the last projection: all heads' mixtures of values, or the MLP's hidden activations."""
        return self.modules[-1], "in"

    @property
    def output(self) -> Site:
        """What is added to the residual stream."""
        return self.modules[-1], "out"


def components(model: Any) -> list[Component]:
    """Attention and MLP of every block, from the first on.  BadModel where a block is not of the known kind."""
    names = {id(module): name for name, module in model.named_modules()}
    lora = hasattr(model, "peft_config")
    found = []
    for number, block in enumerate(team.blocks(model)):
        for kind, parts in KINDS.items():
            modules = []
            for part in parts:
                hits = [name for name, _ in block.named_modules() if name.rpartition(".")[2] == part]
                if len(hits) != 1:
                    raise BadModel(
                        f"block {number} has {len(hits)} modules {part!r} and the {kind} of a known architecture has one "
                        f"(known: {', '.join((*KINDS['attention'], *KINDS['mlp']))}); name the parameters under forget.sites"
                    )
                modules.append(f"{names[id(block)]}.{hits[0]}")
            weights = tuple(
                f"{module}.{name}"
                for module in modules
                for name, weight in model.get_submodule(module).named_parameters()
                if weight.dim() > 1 and (not lora or "lora_" in name)
            )
            found.append(Component(number, kind, tuple(modules), weights))
    if not any(component.weights for component in found):
        raise BadModel("the model has no blocks with attention and MLP; name the parameters under forget.sites")
    return found


def embedding(model: Any) -> Site:
    """What the token embeddings give."""
    wanted = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is wanted), "out"


def ranked(scores: Mapping[Component, float]) -> Ranking:
    """One score for all matrices of a component, so that they go together as long as the budget allows."""
    return Ranking({name: torch.tensor([score]) for x, score in scores.items() for name in x.weights}, "tensor")


@contextmanager
def edited(model: nn.Module, edits: Mapping[Site, Callable[[Tensor], Tensor]]) -> Generator[None]:
    """While the context lasts, what passes each site goes through its edit; the hooks always come off."""

    def before(edit):
        return lambda _, inputs: (edit(inputs[0]), *inputs[1:])

    def after(edit):
        return lambda _, __, output: (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    with ExitStack() as stack:
        for (name, side), edit in edits.items():
            module = model.get_submodule(name)
            handle = (
                module.register_forward_pre_hook(before(edit))
                if side == "in"
                else module.register_forward_hook(after(edit))
            )
            stack.callback(handle.remove)
        yield


@contextmanager
def watched(model: nn.Module, sites: Iterable[Site]) -> Generator[dict[Site, Tensor]]:
    """While the context lasts, the dictionary fills with what passes the sites: copies, or with gradients the tensors."""
    seen: dict[Site, Tensor] = {}

    def keeping(site: Site) -> Callable[[Tensor], Tensor]:
        def keep(value: Tensor) -> Tensor:
            seen[site] = value if value.requires_grad else value.clone()
            return value

        return keep

    with edited(model, {site: keeping(site) for site in sites}):
        yield seen
