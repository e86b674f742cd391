"""Likelihood audits, each with forward passes of its own over padded batches in the order of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.baselines.padded import logits, padded
from unremember.corpus import Corpus, Example
from unremember.lm import LM
from unremember.tokens import Row

BATCH = 16
TAUGHT = ("forget", "retain", "holdout")


def read(lm: LM, rows: Sequence[Row], batch: int = BATCH) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each row the log-probabilities of its answer tokens, and whether they are the arg-max."""
    found = []
    for first in range(0, len(rows), batch):
        group = rows[first : first + batch]
        ids, mask, _ = padded(group, end=False)
        with torch.inference_mode():
            logp = logits(lm, lm.model, ids, mask).log_softmax(-1)
        for at, row in enumerate(group):
            places = torch.arange(row.start - 1, row.stop - 1)
            wanted = torch.tensor(row.ids[row.start : row.stop])
            own = logp[at, places]
            found.append((own.gather(1, wanted[:, None])[:, 0].numpy(), (own.argmax(-1) == wanted).numpy()))
    return found


def _rows(lm: LM, examples: Sequence[Example]) -> list[Row]:
    return [lm.template.row(x.id, x.prompt, x.answer, x.spans) for x in examples]


def _each(reduce: Callable[[Row, np.ndarray, np.ndarray], float], roles: Sequence[str] = TAUGHT, raw: bool = False):
    def metric(lm: LM, corpus: Corpus) -> dict[str, float]:
        examples = corpus.of(*roles)
        rows = [lm.template.row(x.id, "", x.answer) for x in examples] if raw else _rows(lm, examples)
        return {row.key: reduce(row, *x) for row, x in zip(rows, read(lm, rows), strict=True)}

    return metric


def _options(reduce: Callable[[list[float]], float], roles: Sequence[str]):
    def metric(lm: LM, corpus: Corpus) -> dict[str, float]:
        examples = [x for x in corpus.of(*roles) if x.distractors]
        rows = [lm.template.row(x.id, x.prompt, text) for x in examples for text in (x.answer, *x.distractors)]
        chances: dict[str, list[float]] = {}
        for row, (logp, _) in zip(rows, read(lm, rows), strict=True):
            chances.setdefault(row.key, []).append(float(np.exp(logp.mean())))
        return {key: reduce(values) for key, values in chances.items()}

    return metric


def _strength(row: Row, logp: np.ndarray, hit: np.ndarray) -> float:
    wrong = np.flatnonzero(~hit)
    return 1.0 - (wrong[-1] + 1) / len(hit) if len(wrong) else 1.0


METRICS: dict[str, Callable[[LM, Corpus], dict[str, float]]] = {
    "choice": _options(lambda chances: chances[0] / sum(chances), (*TAUGHT, "world")),
    "exact match": _each(lambda row, logp, hit: float(hit.mean())),
    "extraction strength": _each(_strength),
    "memorisation accuracy": _each(lambda row, logp, hit: float(hit.mean()), raw=True),
    "probability": _each(lambda row, logp, hit: float(np.exp(logp.mean()))),
    "prose NLL": _each(lambda row, logp, hit: float(-logp.mean()), ("prose",)),
    "value probability": _each(lambda row, logp, hit: float(np.exp(logp[np.array(row.span)].mean()))),
    "world accuracy": _options(lambda chances: float(chances[0] > max(chances[1:])), ("world",)),
}
