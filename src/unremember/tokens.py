"""Text to tensors: rows of prompt and answer, packed so that nothing is computed twice and nothing is padded.

Prompt and answer are tokenised separately and joined.  Rows that go through the model together are laid out as a trie:
a prefix that several rows share (the system prompt, the question before its four options) occupies one place, every token
sees exactly its own ancestors, and its position is its depth.  What comes out equals one padded forward pass a row, up to
rounding (tests hold the two against each other); there is no padding token, so pad = eos can hide nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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

    tokenizer: object
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

    ids, positions (1, T); visible (1, 1, T, T) bool, True where the column may be seen.
    One entry a scored token, in row order: row, source (place in T whose output predicts it), target (its id) and the
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


def pack(rows: Sequence[Row], role: str = "", totals: tuple[int, dict[str, int]] | None = None) -> Tokens:
    """Lay `rows` out as one trie. totals: (rows, tokens a mask) of the whole step; by default those of these rows."""
    ids: list[int] = []
    depth: list[int] = []
    parent: list[int] = []
    child: dict[tuple[int, int], int] = {}
    scored: list[tuple[int, int, int, bool, bool, bool]] = []  # row, source, target, answer, span, end
    for number, row in enumerate(rows):
        place = -1
        for at, token in enumerate(row.ids):
            if at >= row.start:
                inside = at < row.stop
                scored.append(
                    (number, place, token, inside, inside and row.span[at - row.start], not inside)  #
                )
            if at == len(row.ids) - 1:
                break  # the last token is predicted but predicts nothing: it needs no place
            if (place, token) not in child:
                child[place, token] = len(ids)
                ids.append(token)
                depth.append(at)
                parent.append(place)
            place = child[place, token]
    size = len(ids)
    visible = torch.eye(size, dtype=torch.bool)
    for at, above in enumerate(parent):  # parents come before children
        if above >= 0:
            visible[at] |= visible[above]
    number, source, target, answer, span, end = (torch.tensor(column) for column in zip(*scored, strict=True))
    return Tokens(
        role=role,
        ids=torch.tensor(ids)[None],
        positions=torch.tensor(depth)[None],
        visible=visible[None, None],
        row=number,
        source=source,
        target=target,
        answer=answer,
        span=span,
        end=end,
        keys=tuple(row.key for row in rows),
        step_rows=totals[0] if totals else len(rows),
        step_tokens=totals[1] if totals else count(rows),
    )


def count(rows: Iterable[Row]) -> dict[str, int]:
    """How many tokens each mask holds over all of `rows`."""
    total = {"answer": 0, "span": 0, "train": 0}
    for row in rows:
        total["answer"] += row.stop - row.start
        total["span"] += sum(row.span)
        total["train"] += len(row.ids) - row.start
    return total


def packs(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """Split rows, neighbours in the trie together, into groups of at most `budget` places (a longer row stands alone)."""
    groups: list[list[Row]] = []
    used, last = 0, ()
    for row in sorted(rows, key=lambda r: (r.ids, r.key)):
        shared = next((i for i, (a, b) in enumerate(zip(last, row.ids, strict=False)) if a != b), min(len(last), len(row.ids)))
        if groups and used + len(row.ids) - shared <= budget:
            groups[-1].append(row)
            used += len(row.ids) - shared
        else:
            groups.append([row])
            used = len(row.ids)
        last = row.ids
    return groups
