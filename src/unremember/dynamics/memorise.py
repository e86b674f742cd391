"""What it means that a model has memorised a token, and the shares and lengths that follow from it.  Nothing is trained here.

    a context (s, y) is memorised where y alone has the highest logit:  z_y > z_v  for every v ≠ y
    M(f) = memorised contexts / contexts          R(p) = share of the positions of class p whose prediction is of class p
    R_mem(p) = share of the positions of class p whose prediction is the exact token
    L = mean length of the maximal runs of memorised tokens

Tirumala, Markosyan, Zettlemoyer, Aghajanyan 2022 (arXiv 2205.10770), sections 3, 4 and appendix.  No code was published.
Differs: a tie at the top counts as not memorised, or a model whose logits are all equal could score; a share of nothing is
None, not 0; contexts are counted one by one, never averaged by sequence first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS = 64  # positions at a time: a vocabulary of fifty thousand makes wide matrices


def hits(logits: Tensor, target: Tensor) -> Tensor:
    """Whether the true token alone is on top. logits: (N, V), target: (N,) -> (N,) bool.  ValueError where one is NaN."""
    found = [torch.zeros(0, dtype=torch.bool, device=logits.device)]
    for z, wanted in zip(logits.split(ROWS), target.split(ROWS), strict=True):
        top = z.amax(-1, keepdim=True)
        if torch.isnan(top).any():
            raise ValueError("logits that are not numbers; the model's weights are broken")
        own = z.gather(1, wanted[:, None])
        found.append(((own == top) & ((z == top).sum(-1, keepdim=True) == 1))[:, 0])
    return torch.cat(found)


def share(hit: np.ndarray, counted: np.ndarray | None = None) -> float | None:
    """M: memorised contexts over contexts; None where there is no context. hit, counted: bool of one shape."""
    kept = hit if counted is None else hit[counted]
    return float(kept.mean()) if kept.size else None


def runs(hit: Sequence[bool]) -> list[int]:
    """Lengths of the maximal runs of consecutively memorised tokens in one sequence."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(hit, dtype=int), [0]])))
    return [int(n) for n in edges[1::2] - edges[::2]]


def unit_length(sequences: Iterable[Sequence[bool]]) -> float | None:
    """L: mean over all runs of all sequences, each a run's length once; None where nothing is memorised."""
    lengths = [n for hit in sequences for n in runs(hit)]
    return float(np.mean(lengths)) if lengths else None


@dataclass(frozen=True)
class Recall:
    """One class of tokens: how many positions, the share predicted as that class, and the share predicted exactly.

    Both shares are None, undefined, where the class has no position.
    """

    n: int
    kind: float | None
    exact: float | None


def recall(true: Sequence[str], predicted: Sequence[str], hit: Sequence[bool], classes: Sequence[str]) -> dict:
    """Class -> Recall. true, predicted: the class of the true and of the predicted token, position by position."""
    a, b, exact = np.asarray(true, dtype=object), np.asarray(predicted, dtype=object), np.asarray(hit, dtype=bool)
    found = {}
    for name in classes:
        here = a == name
        found[name] = Recall(int(here.sum()), share(b[here] == name), share(exact[here]))
    return found
