"""Subject: a fact with its subject and without it, token for token alike, and how well the model knows it either way.

    d = Σ over the value's tokens of log p / (1 − p)  =  logit of the token − log Σ exp(logits of all others)

The subject is wherever the entity's name stands in the row, in the question and in the answer alike: an answer often begins with
the name, and a name left standing there would give the fact away.  It is taken out by noise on its embeddings, or by names of
others in its place.
Differs from the literature's logit(true) − logit(false): no false answer is needed, values of several tokens add up, and unlike
log p the number does not saturate for facts that are known by heart.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unremember.corpus import Example
from unremember.errors import BadCorpus, BadModel
from unremember.lm import LM
from unremember.tokens import PLAIN, Row, Template, Tokens, pack

FLOOR = 1.0  # nats of log-odds that taking out the subject must cost a fact on average


@dataclass(frozen=True)
class Fact:
    """row: one whose span is the value's tokens; subject: places of the name in row.ids; last: its last one in the question."""

    row: Row
    entity: str
    subject: tuple[int, ...]
    last: int


def log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """log p/(1 − p) of each target, exact at both ends. logits: (N, V); target: (N,) -> (N,)"""
    own = logits.gather(1, target[:, None])  # (N, 1)
    others = logits.scatter(1, target[:, None], -torch.inf)
    return own[:, 0] - others.logsumexp(-1)


def known(lm: LM, tokens: Tokens) -> Tensor:
    """d of each row. -> (rows,)"""
    return tokens.per_row(log_odds(lm.logits(tokens).float(), tokens.target), "span")


def places(template: Template, x: Example) -> tuple[int, ...]:
    """Places of the row's ids whose tokens hold the entity's name, whole words only, in question and answer."""
    context, at = template.context(x.prompt), []
    if x.prompt:
        text = PLAIN.format(prompt=x.prompt)
        if template.chat:
            text = template.tokenizer.apply_chat_template(
                [{"role": "user", "content": x.prompt}], add_generation_prompt=True, tokenize=False
            )
        coded = template.tokenizer(text, add_special_tokens=not template.chat, return_offsets_mapping=True)
        assert tuple(coded.input_ids) == context, "tokenised as the template does it"
        at += _overlapping(text, x.entity, coded.offset_mapping, 0)
    answer = (" " if x.prompt and not template.chat else "") + x.answer
    coded = template.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    return tuple(at + _overlapping(answer, x.entity, coded.offset_mapping, len(context)))


def _overlapping(text: str, name: str, offsets: Sequence[tuple[int, int]], first: int) -> list[int]:
    if not name:
        return []
    spans = [found.span() for found in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
    return [
        first + i for i, (a, b) in enumerate(offsets) if a < b and any(a < end and begin < b for begin, end in spans)
    ]


def facts(lm: LM, examples: Sequence[Example]) -> list[Fact]:
    """Each example with its subject's places.  BadCorpus, all together, where the question lacks the entity's name."""
    found, problems = [], []
    for x in examples:
        row = lm.template.row(x.id, x.prompt, x.answer, x.spans, lm.limit)
        subject = places(lm.template, x)
        asked = [place for place in subject if place < row.start]
        value = tuple(hit and row.start + i not in subject for i, hit in enumerate(row.span))
        if not asked:
            problems.append(
                f"example {x.id!r}: its entity {x.entity!r} does not stand in its question {x.prompt[:60]!r}, so there is no "
                "subject to trace; fill in `entity` with the name as it is written there"
            )
        elif not any(value):
            problems.append(
                f"example {x.id!r}: its value is only the entity's name, which tracing takes out; mark something else in `spans`"
            )
        else:
            found.append(Fact(replace(row, span=value), x.entity, subject, asked[-1]))
    if problems:
        raise BadCorpus(problems)
    return found


def some(examples: Sequence[Example], most: int, seed: int) -> list[Example]:
    """At most `most` of the examples (0 = all), drawn by seed, in their order."""
    if not most or len(examples) <= most:
        return list(examples)
    chosen = np.random.default_rng(seed).choice(len(examples), most, replace=False)
    return [examples[i] for i in sorted(chosen.tolist())]


def groups(found: Sequence[Fact], budget: int) -> Iterator[list[Fact]]:
    """The facts cut into groups of at most `budget` places when each has a lane of its own."""
    group: list[Fact] = []
    for fact in sorted(found, key=lambda fact: (len(fact.row.ids), fact.row.key)):
        if group and (len(group) + 1) * len(fact.row.ids) > budget:
            yield group
            group = []
        group.append(fact)
    if group:
        yield group


def laid(lm: LM, rows: Sequence[Row]) -> Tokens:
    """One row a lane: place p of lane i is token p of row i."""
    return pack([[row] for row in rows]).to(lm.device)


def swapped(found: Sequence[Fact], among: Sequence[Fact], seed: int, draw: int) -> list[Row]:
    """The rows with every token of the name replaced by one from other entities' names `among`, none of its own.

    The same token always by the same one, so that a name in question and answer stays one name.
    """
    names: dict[str, set[int]] = {}
    for fact in among:
        names.setdefault(fact.entity, set()).update(fact.row.ids[p] for p in fact.subject)
    rows = []
    for fact in found:
        own = sorted({fact.row.ids[p] for p in fact.subject})
        others = sorted({i for name, ids in names.items() if name != fact.entity for i in ids} - set(own))
        if not others:
            raise BadCorpus(
                f"example {fact.row.key!r}: no other entity has a name to put in the place of {fact.entity!r}; add facts about "
                'someone else, or trace with corruption = "noise"'
            )
        rng = np.random.default_rng([seed, draw, zlib.crc32(fact.row.key.encode())])
        drawn = rng.choice(len(others), len(own), replace=len(others) < len(own))
        put = dict(zip(own, (others[i] for i in drawn), strict=True))
        ids = tuple(put[i] if p in fact.subject else i for p, i in enumerate(fact.row.ids))
        rows.append(replace(fact.row, ids=ids))
    return rows


@torch.no_grad()
def sigma(lm: LM, found: Sequence[Fact]) -> float:
    """Standard deviation of this model's embeddings over the text of the facts."""
    ids = torch.tensor([i for fact in found for i in fact.row.ids], device=lm.device)
    embed: Any = lm.model.get_input_embeddings()
    return float(embed(ids).float().std())


def noised(found: Sequence[Fact], scale: float, seed: int, draw: int) -> Callable[[Tensor], Tensor]:
    """An edit of the embeddings: Gaussian noise on the subject's places, the same however the facts are grouped."""

    def edit(embedded: Tensor) -> Tensor:  # (L, T, H)
        noise = torch.zeros(embedded.shape)
        for lane, fact in enumerate(found):
            seeded = np.random.default_rng([seed, draw, zlib.crc32(fact.row.key.encode())])
            drawn = seeded.standard_normal((len(fact.subject), embedded.shape[2]))
            noise[lane, list(fact.subject)] = scale * torch.from_numpy(drawn).float()
        return embedded + noise.to(embedded)

    return edit


def required(gap: float, count: int) -> None:
    """BadModel where taking out the subject costs a fact less than the floor on average: shares of that would be noise."""
    if not gap / count >= FLOOR:
        raise BadModel(
            f"taking out the subject changes the log-odds of the {count} facts by {gap / count:.2f} nats on average, and shares "
            f"of less than {FLOOR:g} are noise: the model hardly knows them, or does not look at the name; choose facts that "
            'it knows, or set forget.locator = "mlps"'
        )
