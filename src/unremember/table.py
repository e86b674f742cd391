"""One score table per (model, row): everything a likelihood audit needs, from a single teacher-forced pass.

Per scored token: log-probability, whether it is the arg-max, and the mean and standard deviation of log p(v) for v drawn from
the model's own distribution (Min-K%++ of Zhang et al. 2025 needs them).  Content tokens only: no prompt, no end mark, no
chat template.  Tables are remembered by content hash of model and row, so no row is ever read twice by the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.folder import fingerprint
from unremember.lm import LM
from unremember.tokens import Row, pack, packs


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


def moments(logp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of log p(v) under p itself. logp: (N, V) normalised -> (N,), (N,)"""
    p = logp.exp()
    mean = (p * logp).nan_to_num(nan=0.0).sum(-1)  # 0 · log 0 = 0
    square = (p * logp.square()).nan_to_num(nan=0.0).sum(-1)
    return mean, (square - mean.square()).clamp(min=0).sqrt()


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
            logits = lm.logits(tokens).float()
            logp = F.log_softmax(logits, -1)
            mean, sd = moments(logp)
            own = logp.gather(1, tokens.target[:, None])[:, 0]
            columns = [
                x.cpu().numpy() for x in (tokens.row, own, logits.argmax(-1) == tokens.target, mean, sd, tokens.span)
            ]
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
        longest = max(new for _, new in part)
        coded = lm.generate([ids for ids, _ in part], longest, bench.batch)
        said.update({p: c[: p[1]] for p, c in zip(part, coded, strict=True)})
        bench.say("speak", first + len(part), len(mine), {})
    known.update(team.merge(said))
    return [known[p] for p in prompts]


def answers(lm: LM, prompts: Sequence[tuple[int, ...]], new: int, bench: Bench = BENCH) -> list[str]:
    """Greedy answers to token prompts, as text."""
    said = continuations(lm, [(p, new) for p in prompts], bench)
    return [lm.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
