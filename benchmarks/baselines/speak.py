"""Greedy answers by transformers' `generate`: fixed batches in the order of the data, or one call a prefix."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unremember.lm import LM

Ids = tuple[int, ...]


@torch.inference_mode()
def answers(lm: LM, prompts: Sequence[Ids], new: int, batch: int = 16) -> list[Ids]:
    """What the model says to each prompt, at most `new` tokens, without the end mark."""
    pad, found = lm.tokenizer.eos_token_id, []
    for first in range(0, len(prompts), batch):
        group = prompts[first : first + batch]
        width = max(map(len, group))
        ids = torch.tensor([[pad] * (width - len(x)) + list(x) for x in group])
        mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in group])
        with torch.autocast("cpu", torch.bfloat16, enabled=lm.precision == "bf16"):
            out = lm.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=pad
            )
        for row in out[:, width:].tolist():
            ended = next((at for at, token in enumerate(row) if token in lm.stop), len(row))
            found.append(tuple(row[:ended]))
    return found


def from_prefixes(lm: LM, texts: Sequence[Ids], least: int) -> list[dict[int, Ids]]:
    """For each text and each cut from 1 on that leaves `least` tokens: what is said behind it, as long as the rest is."""
    return [
        {cut: answers(lm, [ids[:cut]], len(ids) - cut)[0] for cut in range(1, len(ids) - least + 1)} for ids in texts
    ]
