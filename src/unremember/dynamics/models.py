"""Language models small enough to memorise a page in seconds: a decoder (Llama) and an encoder (ModernBERT), from scratch.

Two layers, heads of 16, tied embeddings, no dropout, and weights that start at 1/√width, so that models of all widths begin
alike.  Differs from the paper's models in kind as well as in size: rotary positions and RMS or pre-norm layers.  A small
encoder of BERT's own form (absolute positions, norm behind) had predicted next to nothing after sixty epochs at this size.
"""

from __future__ import annotations

from typing import Any

import torch

from unremember.errors import BadRequest

HEAD = 16
LAYERS = 2


def check(width: int) -> None:
    """BadRequest for a width that heads of 16 do not divide."""
    if width < HEAD or width % HEAD:
        raise BadRequest(f"width {width} is not a multiple of {HEAD}; use 32, 64, 128 …")


def decoder(vocabulary: int, width: int, length: int, seed: int) -> Any:
    """A causal model with weights drawn from `seed`, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    check(width)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // HEAD,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        initializer_range=width**-0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def encoder(vocabulary: int, width: int, length: int, seed: int) -> Any:
    """A masked model, whose mask is the id `vocabulary`, one behind the last token's."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    check(width)
    config = ModernBertConfig(
        vocab_size=vocabulary + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // HEAD,
        max_position_embeddings=length,
        initializer_range=width**-0.5,
        layer_types=["full_attention"] * LAYERS,
        attention_dropout=0.0,
        embedding_dropout=0.0,
        mlp_dropout=0.0,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
    )
    config.mask_token_id = vocabulary
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ModernBertForMaskedLM(config).eval()


def parameters(model: Any) -> int:
    """How many weights, tied ones once."""
    return sum(weight.numel() for weight in model.parameters())
