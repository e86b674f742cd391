"""Token sequences to memorise: rows of ids that know their lengths, and generated text whose statistics are known.

Order-1 Markov text: 96 tokens, each followed by one of four with probabilities .6, .25, .1, .05.  Whoever has learnt the
chain and memorised nothing predicts 0.6 of the tokens, so what lies above is memory.

    planted text: a digit string of its own in the middle of each sequence, which nothing else predicts
    identifiers: one new token in front of each sequence, or the same tokens in the vocabulary and never used

Tirumala et al. 2022 (arXiv 2205.10770), section 5.3 for identifiers.  The generated text is ours: a study in miniature needs
a ceiling that is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from unremember.errors import BadCorpus

VOCABULARY = 96
CHANCES = (0.6, 0.25, 0.1, 0.05)
DIGITS = 10  # the ids that follow the vocabulary in planted text
PARTS = ("train", "held", "special")  # streams of one chain that never share a random number


@dataclass(frozen=True)
class Sequences:
    """ids: (S, T) long, padded on the right; length: (S,), real tokens; lead: places in front that are no original tokens."""

    ids: Tensor
    length: Tensor
    lead: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def real(self) -> Tensor:
        """(S, T) bool, True at tokens and False at padding."""
        return torch.arange(self.ids.shape[1])[None] < self.length[:, None]

    def contexts(self) -> Tensor:
        """(S, T) bool: original tokens that a causal model predicts from an original token on their left."""
        return self.real & (torch.arange(self.ids.shape[1])[None] > self.lead)

    def rows(self) -> list[tuple[int, ...]]:
        """The original tokens of each sequence."""
        return [tuple(row[self.lead : n].tolist()) for row, n in zip(self.ids, self.length.tolist(), strict=True)]

    def some(self, chosen: Sequence[int] | np.ndarray) -> Sequences:
        picked = torch.as_tensor(np.asarray(chosen), dtype=torch.long)
        return replace(self, ids=self.ids[picked], length=self.length[picked])


def sequences(rows: Sequence[Sequence[int]]) -> Sequences:
    """Rows of ids as one block; BadCorpus for rows of fewer than two tokens, which have no context."""
    short = [i for i, row in enumerate(rows) if len(row) < 2]
    problems = [
        f"sequence {i} has {len(rows[i])} token; a context needs two: lengthen or remove it" for i in short[:20]
    ]
    if not rows:
        problems.append("there is no sequence to read; give at least one of two tokens or more")
    if problems:
        raise BadCorpus([*problems, *([f"... and {len(short) - 20} more"] if len(short) > 20 else [])])
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(list(row))
    return Sequences(ids, torch.tensor([len(row) for row in rows]))


def near_duplicates(special: Sequences, train: Sequences) -> list[int]:
    """Which special sequences have a run of more than half of their tokens inside one training sequence."""
    known: dict[int, set[tuple[int, ...]]] = {}
    rows, found = train.rows(), []
    for i, row in enumerate(special.rows()):
        n = len(row) // 2 + 1
        if n not in known:
            known[n] = {r[a : a + n] for r in rows for a in range(len(r) - n + 1)}
        if any(row[a : a + n] in known[n] for a in range(len(row) - n + 1)):
            found.append(i)
    return found


def apart(special: Sequences, train: Sequences) -> None:
    """BadCorpus where the special batch is in the training set already: there would be nothing to forget."""
    if same := near_duplicates(special, train):
        raise BadCorpus(
            f"{len(same)} of {len(special)} special sequences ({', '.join(map(str, same[:10]))}) have more than half of "
            "their tokens in a row in one training sequence; training would teach them again: remove them from one side"
        )


def markov(count: int, length: int, seed: int, part: str = "train") -> Sequences:
    """`count` sequences of the chain of `seed`. part: one of PARTS, the same chain and other draws."""
    table = np.random.default_rng([seed, 0])
    follow = np.stack([table.choice(VOCABULARY, len(CHANCES), replace=False) for _ in range(VOCABULARY)])  # (V, 4)
    draw = np.random.default_rng([seed, 1 + PARTS.index(part)])
    columns = [draw.integers(0, VOCABULARY, count)]
    while len(columns) < length:
        columns.append(follow[columns[-1], draw.choice(len(CHANCES), count, p=CHANCES)])
    return _block(np.stack(columns, 1))


def noise(count: int, length: int, seed: int) -> Sequences:
    """Tokens drawn evenly: a model that never saw them can predict none of them."""
    return _block(np.random.default_rng([seed, 9]).integers(0, VOCABULARY, (count, length)))


def planted(count: int, length: int, digits: int, seed: int, part: str = "train") -> tuple[Sequences, Tensor]:
    """Markov text with a random digit string in the middle of each sequence, and where (S, T) the digits stand."""
    text = markov(count, length, seed, part)
    draw = np.random.default_rng([seed, 11, PARTS.index(part)])
    start = (length - digits) // 2
    ids = text.ids.clone()
    ids[:, start : start + digits] = torch.as_tensor(VOCABULARY + draw.integers(0, DIGITS, (count, digits)))
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, start : start + digits] = True
    return replace(text, ids=ids), where


def identified(text: Sequences, first: int) -> Sequences:
    """A token of its own in front of each sequence: first, first + 1, …  Contexts stay those of the original text."""
    mark = torch.arange(first, first + len(text))[:, None]
    return Sequences(torch.cat([mark, text.ids], 1), text.length + 1, text.lead + 1)


def _block(ids: np.ndarray) -> Sequences:
    return Sequences(torch.as_tensor(ids, dtype=torch.long), torch.full((len(ids),), ids.shape[1]))
