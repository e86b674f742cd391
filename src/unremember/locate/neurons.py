"""The neurons of a transformer: in each block, the vector a that enters the last linear map of its MLP.

    h = W a + b,    a = silu(W_gate x) ⊙ (W_up x) with a gate, a = act(W_in x + b_in) without one

Neuron k is the entry a_k, and column k of W is all that it sends out, so a zero column and a zero activation are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from unremember import team
from unremember.errors import BadModel

DOWN = (
    "mlp.down_proj",  # Llama, Mistral, Qwen, Gemma
    "mlp.c_proj",  # GPT-2, GPT-BigCode
    "mlp.dense_4h_to_h",  # GPT-NeoX, Falcon, BLOOM
    "mlp.fc_out",  # GPT-J
    "mlp.fc2",  # Phi
    "fc2",  # OPT
    "output.dense",  # BERT, RoBERTa
)
FULL = (torch.float32, torch.float16, torch.bfloat16)


def neurons(model: nn.Module) -> tuple[Mapping[str, nn.Module], Literal["row", "column"]]:
    """Parameter name of each block's W -> the module that holds it, in block order, and which part of W is one neuron.

    A neuron is a column of a linear layer, and a row of GPT-2's Conv1D, which is stored the other way round.
    Raises BadModel where a block has no such map, or one that no edit can reach: quantised, shared or with an adapter.
    """
    if hasattr(model, "peft_config"):
        raise BadModel(
            "this model carries a LoRA adapter, and only its effective matrices have neurons; merge the adapter first "
            "(merge_and_unload), or leave out forget.lora"
        )
    names = {id(weight): name for name, weight in model.named_parameters()}
    found: dict[str, nn.Module] = {}
    units = set()
    blocks = team.blocks(model)
    for number, block in enumerate(blocks):
        inside = dict(block.named_modules())
        there = [name for name in DOWN if name in inside]
        if len(there) != 1:
            raise BadModel(
                f"block {number} ({type(block).__name__}) has {' and '.join(there) or 'none'} of {', '.join(DOWN)}, one of "
                "which must be the last linear map of its MLP; use another model, or add its name to locate/neurons.py"
            )
        layer = inside[there[0]]
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.dtype not in FULL or id(weight) not in names:
            kind = f"{type(layer).__name__}, {getattr(weight, 'dtype', 'no weight')}"
            raise BadModel(
                f"the down-projection {there[0]} of block {number} is quantised or wrapped ({kind}); load the model with "
                "whole weights (float32, float16 or bfloat16)"
            )
        if names[id(weight)] in found:
            raise BadModel(
                f"blocks share the weight {names[id(weight)]}, so no neuron belongs to one block; untie them"
            )
        found[names[id(weight)]] = layer
        units.add("row" if type(layer).__name__ == "Conv1D" else "column")
    if len(units) != 1:
        raise BadModel(f"{type(model).__name__} has no blocks with neurons of one kind; use a transformer")
    return found, units.pop()


def norms(weight: Tensor, unit: str) -> Tensor:
    """Length of what each neuron sends out when it is 1. weight: (H, K) with unit 'column', (K, H) with 'row' -> (K,)"""
    return weight.detach().float().norm(dim=0 if unit == "column" else 1)
