"""Text to tensors: rows of prompt and answer, packed so that nothing is computed twice and nothing is padded.

Prompt and answer are tokenised separately and joined.  Rows that go through the model together are laid out as tries, one a
lane: a prefix that several rows share (the system prompt, the question before its four options) occupies one place, every
token sees exactly its own ancestors, and its position is its depth.  What comes out equals one forward pass a row, up to
rounding (tests hold the two against each other).  Lanes are filled up with places that nobody sees, whatever token stands
there, so pad = eos can hide nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unremember.corpus import Example
from unremember.errors import BadCorpus

PLAIN = "Question: {prompt}\nAnswer:"


@dataclass(frozen=True)
class Row:
    """One encoded prompt and answer: ids[:start] is context, ids[start:stop] the answer, ids[stop:] its end mark.

    span: for each of the stop - start answer tokens, whether it overlaps a sensitive interval.
    """

    key: str
    ids: tuple[int, ...]
    start: int
    stop: int
    span: tuple[bool, ...]


@dataclass(frozen=True)
class Template:
    """How a prompt becomes context: the tokenizer's own chat template, or plain question and answer."""

    tokenizer: Any  # a fast tokenizer of transformers, with character offsets
    chat: bool

    def context(self, prompt: str) -> tuple[int, ...]:
        """Token ids in front of the answer; an empty prompt is a passage and gets only what the tokenizer adds itself."""
        if not prompt:
            return tuple(i for i in self.tokenizer("").input_ids if i != self.tokenizer.eos_token_id)
        if self.chat:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
        return tuple(self.tokenizer(PLAIN.format(prompt=prompt)).input_ids)

    def row(self, key: str, prompt: str, answer: str, spans: Iterable[tuple[int, int]] = (), limit: int = 0) -> Row:
        """Encode; BadCorpus where the answer has no token to score or the whole is longer than `limit` (0 = no limit)."""
        lead = " " if prompt and not self.chat else ""
        context = self.context(prompt)
        coded = self.tokenizer(lead + answer, add_special_tokens=False, return_offsets_mapping=True)
        answer_ids = tuple(coded.input_ids)
        spans = tuple(spans) or ((0, len(answer)),)
        hit = tuple(
            any(a + len(lead) < end and begin < b + len(lead) for a, b in spans) for begin, end in coded.offset_mapping
        )
        start = max(len(context), 1)  # without any context the first token has nothing to be predicted from
        skipped = start - len(context)
        ids = context + answer_ids + (self.tokenizer.eos_token_id,)
        if len(answer_ids) - skipped < 1:
            raise BadCorpus(f"example {key!r}: the answer {answer!r} has no token to score; make it longer")
        if not any(hit[skipped:]):
            raise BadCorpus(f"example {key!r}: its spans cover no token that can be scored; widen them")
        if limit and len(ids) > limit:
            raise BadCorpus(
                f"example {key!r} is {len(ids)} tokens long and the model's context is {limit}; shorten or split it"
            )
        return Row(key, ids, start, len(ids) - 1, hit[skipped:])

    def rows(self, examples: Iterable[Example], limit: int = 0) -> list[Row]:
        return [self.row(x.id, x.prompt, x.answer, x.spans, limit) for x in examples]


@dataclass(frozen=True)
class Tokens:
    """One packed micro-batch of one role, which knows the totals of its whole step.

    ids, positions (L, T), a lane a line; visible (L, 1, T, T) bool, True where the column may be seen.
    One entry a scored token, in row order: row, source (place in L·T whose output predicts it), target (its id) and the
    masks answer, span, end, all (N,).  rows: how many rows are here; keys: their names.
    step_rows, step_tokens: over all micro-batches of the step and all processes, so that sums add up to exact means.
    """

    role: str
    ids: Tensor
    positions: Tensor
    visible: Tensor
    row: Tensor
    source: Tensor
    target: Tensor
    answer: Tensor
    span: Tensor
    end: Tensor
    keys: tuple[str, ...]
    step_rows: int
    step_tokens: dict[str, int]

    @property
    def rows(self) -> int:
        return len(self.keys)

    def mask(self, part: str) -> Tensor:
        """(N,) bool. part: 'answer' content tokens; 'span' the sensitive ones; 'train' content and end mark."""
        return {"answer": self.answer, "span": self.span, "train": self.answer | self.end}[part]

    def per_row(self, values: Tensor, part: str) -> Tensor:
        """Sum (N,) values over the tokens of `part`, row by row. -> (rows,)"""
        kept = torch.where(self.mask(part), values, torch.zeros_like(values))
        return torch.zeros(self.rows, dtype=values.dtype, device=values.device).index_add(0, self.row, kept)

    def lengths(self, part: str) -> Tensor:
        """Number of tokens of `part`, row by row. -> (rows,)"""
        return self.per_row(torch.ones(len(self.row), device=self.row.device), part)

    def silent(self) -> Tokens:
        """The same computation with nothing scored: keeps processes in step where one has fewer micro-batches."""
        none = torch.zeros_like(self.answer)
        return replace(self, answer=none, span=none, end=none)

    def to(self, device: torch.device | str) -> Tokens:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def pack(lanes: Sequence[Sequence[Row]], role: str = "", totals: tuple[int, dict[str, int]] | None = None) -> Tokens:
    """Lay each lane's rows out as one trie. totals: (rows, tokens a mask) of the whole step; by default those of these rows."""
    rows = [row for lane in lanes for row in lane]
    tries = [_trie(lane) for lane in lanes]
    width = max(len(ids) for ids, _, _, _ in tries)
    ids = torch.zeros(len(lanes), width, dtype=torch.long)
    positions = torch.zeros(len(lanes), width, dtype=torch.long)
    visible = torch.eye(width, dtype=torch.bool).repeat(len(lanes), 1, 1)
    scored: list[tuple[int, int, int, bool, bool, bool]] = []  # row, source, target, answer, span, end
    number = 0
    for at, (lane, (coded, depth, parent, sources)) in enumerate(zip(lanes, tries, strict=True)):
        ids[at, : len(coded)] = torch.tensor(coded)
        positions[at, : len(coded)] = torch.tensor(depth)
        for place, above in enumerate(parent):  # parents come before children
            if above >= 0:
                visible[at, place] |= visible[at, above]
        for row, places in zip(lane, sources, strict=True):
            for step, place in enumerate(places):
                inside = row.start + step < row.stop
                span = inside and row.span[step]
                scored.append((number, at * width + place, row.ids[row.start + step], inside, span, not inside))
            number += 1
    columns = (torch.tensor(column) for column in zip(*scored, strict=True))
    row, source, target, answer, span, end = columns
    step_rows, step_tokens = totals or (len(rows), count(rows))
    keys = tuple(row.key for row in rows)
    return Tokens(
        role, ids, positions, visible[:, None], row, source, target, answer, span, end, keys, step_rows, step_tokens
    )


def joined(group: Sequence[Tokens]) -> Tokens:
    """Micro-batches as one: their lanes one under another, what is scored in the same order.  Totals are those of the first."""
    width = max(t.ids.shape[1] for t in group)
    wide = [width - t.ids.shape[1] for t in group]
    lanes = [0, *accumulate(len(t.ids) for t in group)]
    rows = [0, *accumulate(t.rows for t in group)]
    eye = torch.eye(width, dtype=torch.bool, device=group[0].ids.device)
    visible = eye.repeat(lanes[-1], 1, 1)[:, None]
    source = []
    for t, at in zip(group, lanes, strict=False):
        lane, place = t.source.div(t.ids.shape[1], rounding_mode="floor"), t.source % t.ids.shape[1]
        visible[at : at + len(t.ids), :, : t.ids.shape[1], : t.ids.shape[1]] = t.visible
        source.append((at + lane) * width + place)
    return replace(
        group[0],
        ids=torch.cat([F.pad(t.ids, (0, more)) for t, more in zip(group, wide, strict=True)]),
        positions=torch.cat([F.pad(t.positions, (0, more)) for t, more in zip(group, wide, strict=True)]),
        visible=visible,
        row=torch.cat([t.row + at for t, at in zip(group, rows, strict=False)]),
        source=torch.cat(source),
        keys=tuple(key for t in group for key in t.keys),
        **{name: torch.cat([getattr(t, name) for t in group]) for name in ("target", "answer", "span", "end")},
    )


def fitting(shapes: Sequence[tuple[int, ...]], budget: int) -> list[list[int]]:
    """Which neighbours fit into one pass of at most `budget` places, in their order. shapes: lanes and width of each."""
    groups: list[list[int]] = []
    for at, _ in enumerate(shapes):
        last = [*groups[-1], at] if groups else []
        if last and sum(shapes[i][0] for i in last) * max(shapes[i][1] for i in last) <= budget:
            groups[-1] = last
        else:
            groups.append([at])
    return groups


def _trie(rows: Sequence[Row]) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """Ids, depths and parents of the places, and for each row the places that predict its scored tokens."""
    ids: list[int] = []
    depth: list[int] = []
    parent: list[int] = []
    sources: list[list[int]] = []
    child: dict[tuple[int, int], int] = {}
    for row in rows:
        place, path = -1, []
        for at, token in enumerate(row.ids[:-1]):  # the last token is predicted but predicts nothing: it needs no place
            if (place, token) not in child:
                child[place, token] = len(ids)
                ids.append(token)
                depth.append(at)
                parent.append(place)
            place = child[place, token]
            path.append(place)
        sources.append(path[row.start - 1 :])
    return ids, depth, parent, sources


def count(rows: Iterable[Row]) -> dict[str, int]:
    """How many tokens each mask holds over all of `rows`."""
    total = {"answer": 0, "span": 0, "train": 0}
    for row in rows:
        total["answer"] += row.stop - row.start
        total["span"] += sum(row.span)
        total["train"] += len(row.ids) - row.start
    return total


def lanes(rows: Sequence[Row], width: int) -> list[list[Row]]:
    """Split rows, neighbours in the trie together, into lanes of at most `width` places (a longer row stands alone)."""
    groups: list[list[Row]] = []
    used, last = 0, ()
    for row in sorted(rows, key=lambda r: (r.ids, r.key)):
        shared = _shared(last, row.ids)
        if groups and used + len(row.ids) - shared <= width:
            groups[-1].append(row)
            used += len(row.ids) - shared
        else:
            groups.append([row])
            used = len(row.ids)
        last = row.ids
    return groups


def shares(rows: Sequence[Row], count: int) -> list[list[Row]]:
    """Split rows, neighbours in the trie together, into `count` shares of about as many places; some may be empty."""
    rows = sorted(rows, key=lambda r: (r.ids, r.key))
    paths = [row.ids[:-1] for row in rows]  # the last token needs no place
    new = [len(path) - _shared(last, path) for last, path in zip([(), *paths], paths, strict=False)]
    found: list[list[Row]] = [[] for _ in range(count)]
    for row, end, size in zip(rows, accumulate(new), new, strict=True):
        found[min(count - 1, (2 * end - size) * count // (2 * sum(new)))].append(row)  # where its middle lies
    return found


def packs(rows: Sequence[Row], budget: int, width: int = 256, even: bool = False) -> list[list[list[Row]]]:
    """Split rows into micro-batches of at most `budget` places, each a list of lanes of about `width`.

    Wide lanes share more and lose more to attention, whose cost is quadratic in them.  even: as many lanes, but none wider than
    that takes, so that a few rows leave none half empty.
    """
    groups: list[list[list[Row]]] = []
    longest, width = 0, min(width, budget)
    if even:
        most = len(lanes(rows, width))
        width = 1 + bisect_left(range(1, width), True, key=lambda each: len(lanes(rows, each)) <= most)
    for lane in sorted(lanes(rows, width), key=lambda lane: max(len(row.ids) for row in lane)):
        longest = max(longest, width, *(len(row.ids) for row in lane))
        if groups and (len(groups[-1]) + 1) * longest <= budget:
            groups[-1].append(lane)
        else:
            groups.append([lane])
            longest = max(len(row.ids) for row in lane)
    return groups


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
