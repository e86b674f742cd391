"""Rows as a Hugging Face collator makes them: padded to the longest, with an attention mask and labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unremember.lm import LM
from unremember.tokens import Row

IGNORE = -100


def padded(rows: Sequence[Row], end: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels, all (B, T).  end: whether the end mark is a label, too."""
    width = max(len(row.ids) for row in rows)
    ids, mask, labels = (torch.full((len(rows), width), fill) for fill in (2, 0, IGNORE))
    for at, row in enumerate(rows):
        stop = len(row.ids) if end else row.stop
        ids[at, : len(row.ids)], mask[at, : len(row.ids)] = torch.tensor(row.ids), 1
        labels[at, row.start : stop] = torch.tensor(row.ids[row.start : stop])
    return ids, mask, labels


def logits(lm: LM, model, ids: Tensor, mask: Tensor) -> Tensor:
    """Those that predict the next place, of all places. -> (B, T - 1, V) float32"""
    with torch.autocast("cpu", torch.bfloat16, enabled=lm.precision == "bf16"):
        return model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()


def nll(z: Tensor, labels: Tensor) -> Tensor:
    """Of each labelled place, 0 elsewhere. -> (B, T - 1)"""
    return F.cross_entropy(z.transpose(1, 2), labels[:, 1:], ignore_index=IGNORE, reduction="none")
