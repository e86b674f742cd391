"""One score table per (model, row): everything a likelihood audit needs, from a single teacher-forced pass.

Per scored token: log-probability, whether it is the arg-max, and the mean and standard deviation of log p(v) for v drawn from
the model's own distribution (Min-K%++ of Zhang et al. 2025 needs them).  Content tokens only: no prompt, no end mark, no
chat template.  Tables are remembered by content hash of model and row, so no row is ever read twice by the same model; `saved`
and `recalled` carry what is remembered into another process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.folder import fingerprint
from unremember.lm import LM
from unremember.tokens import Row, pack, packs

ROWS = 32  # positions at a time
FLOOR = -1e4  # nats below the likeliest token


@dataclass(frozen=True)
class Reading:
    """What one model makes of one row, all (T,) over its content tokens: logp, hit, mean, sd, span."""

    logp: np.ndarray
    hit: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    span: np.ndarray

    def likelihood(self, part: str = "answer") -> float:
        """Geometric mean of the token probabilities, P^(1/T), over the whole answer or its sensitive 'span'."""
        return float(np.exp(self.loglikelihood(part)))

    def loglikelihood(self, part: str = "answer") -> float:
        """Mean log-probability a token, in nats."""
        return self.total(part) / int(self.span.sum() if part == "span" else len(self.logp))

    def total(self, part: str = "answer") -> float:
        """Summed log-probability, in nats."""
        return float(self.logp[self.span].sum() if part == "span" else self.logp.sum())


def moments(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a score table holds of each position. logits: (N, V) float32, overwritten; target: (N,)

    -> (N,) each: log p(target), whether target is the arg-max, mean and standard deviation of log p(v) for v ~ p.
    Goes through the positions a few at a time, so that the work stays in the processor's cache.
    """
    parts = []
    for z, wanted in zip(logits.split(ROWS), target.split(ROWS), strict=True):
        top = z.max(-1, keepdim=True)
        hit = top.indices[:, 0] == wanted
        z.sub_(top.values).clamp_(min=FLOOR)  # so that 0 · log 0 = 0
        own = z.gather(1, wanted[:, None])[:, 0]
        weight = z.exp()
        total = weight.sum(-1)
        weight.mul_(z)
        mean, square = weight.sum(-1) / total, torch.linalg.vecdot(weight, z) / total
        parts.append((own - total.log(), hit, mean - total.log(), (square - mean.square()).clamp(min=0).sqrt()))
    own, hit, mean, sd = (torch.cat(column) for column in zip(*parts, strict=True))
    return own, hit, mean, sd


@torch.no_grad()  # not inference_mode: sharded weights that were gathered in it cannot be trained afterwards
def read(lm: LM, rows: Sequence[Row], bench: Bench = BENCH) -> list[Reading]:
    """Read all rows, remembering nothing.  Raises ValueError where the model produces numbers that are not finite."""
    found: dict[int, Reading] = {}
    numbered = [Row(str(i), row.ids, row.start, row.stop, row.span) for i, row in enumerate(rows)]
    groups = packs(numbered, bench.budget)
    turns = -(-len(groups) // team.size())  # every process takes as many, or sharded ones would wait for one another
    mine = [groups[min(i, len(groups) - 1)] for i in range(team.rank(), turns * team.size(), team.size())]
    with lm.lowered():
        for done, group in enumerate(mine):
            tokens = pack(group).to(lm.device)
            found_here = moments(lm.logits(tokens).float(), tokens.target)
            columns = [x.cpu().numpy() for x in (tokens.row, *found_here, tokens.span)]
            keep = tokens.answer.cpu().numpy()
            row, *values = (column[keep] for column in columns)
            if not np.isfinite(values[0]).all():
                raise ValueError(
                    f"{lm.name or 'the model'} gives probabilities that are not finite; its weights are broken"
                )
            edges = np.searchsorted(row, np.arange(tokens.rows + 1))
            for at, key in enumerate(tokens.keys):
                found[int(key)] = Reading(*(v[edges[at] : edges[at + 1]] for v in values))
            bench.say("read", done + 1, len(mine), {})
    found = team.merge(found)
    return [found[i] for i in range(len(rows))]


def table(lm: LM, rows: Sequence[Row], bench: Bench = BENCH) -> list[Reading]:
    """As `read`, but each (model, row) pair is read once in the life of `bench.memory`."""
    known = bench.memory.setdefault(f"{lm.fingerprint}/read", {})
    keys = [fingerprint(row.ids, row.start, row.stop, row.span) for row in rows]
    new = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
    known.update(zip(new, read(lm, list(new.values()), bench), strict=True)) if new else None
    return [known[key] for key in keys]


def continuations(
    lm: LM, prompts: Sequence[tuple[tuple[int, ...], int]], bench: Bench = BENCH
) -> list[tuple[int, ...]]:
    """Greedy continuations of (token prompt, most new tokens), each (model, prompt, length) decoded once."""
    known = bench.memory.setdefault(f"{lm.fingerprint}/say", {})
    fresh = sorted({p for p in prompts if p not in known}, key=lambda p: (p[1], len(p[0]), p[0]))
    mine = fresh[team.rank() :: team.size()]
    said: dict = {}
    for first in range(0, len(mine), bench.batch):
        part = mine[first : first + bench.batch]
        said.update(zip(part, lm.generate(*zip(*part, strict=True), bench.batch), strict=True))
        bench.say("speak", first + len(part), len(mine), {})
    known.update(team.merge(said))
    return [known[p] for p in prompts]


def answers(lm: LM, prompts: Sequence[tuple[int, ...]], new: int, bench: Bench = BENCH) -> list[str]:
    """Greedy answers to token prompts, as text."""
    said = continuations(lm, [(p, new) for p in prompts], bench)
    return [lm.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]


def saved(lm: LM, bench: Bench = BENCH) -> dict:
    """What the bench remembers of a model's readings and answers, as plain JSON; exact, a float32 being a float64."""
    readings, said = (bench.memory.get(f"{lm.fingerprint}/{part}", {}) for part in ("read", "say"))
    return {
        "model": lm.fingerprint,
        "read": {key: [column.tolist() for column in vars(x).values()] for key, x in readings.items()},
        "say": [[list(ids), new, list(answer)] for (ids, new), answer in said.items()],
    }


def recalled(lm: LM, known: dict, bench: Bench = BENCH) -> None:
    """Give the bench back what was `saved` of this model; what was saved of another, or of other weights, is left."""
    if known["model"] != lm.fingerprint:
        return
    kinds = (np.float32, bool, np.float32, np.float32, bool)
    bench.memory.setdefault(f"{lm.fingerprint}/read", {}).update(
        {
            key: Reading(*(np.array(x, dtype=kind) for x, kind in zip(columns, kinds, strict=True)))
            for key, columns in known["read"].items()
        }
    )
    bench.memory.setdefault(f"{lm.fingerprint}/say", {}).update(
        {(tuple(ids), new): tuple(answer) for ids, new, answer in known["say"]}
    )
