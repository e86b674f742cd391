"""How far apart two models are on the same rows: Jensen-Shannon divergence, and what became of each example's perplexity.

    JSD = mean_tokens ½ KL(p ‖ m) + ½ KL(q ‖ m),   m = ½ (p + q),   at most log 2
    Diff1 = mean_rows |ppl_b − ppl_u|     LPD = mean_rows |ppl_b − ppl_u| / ppl_b     PDLP = share of rows with ppl_u > ppl_b

b the baseline (original or retrained), u the unlearned model, ppl = exp(mean nll a token).  Wang et al. 2023 (arXiv
2305.06535), section 4; their code, Lingzhi-WANG/KGAUnlearn@703dd79, calls the last two Diff2 and Diff3.
Differs: that code computes ½ KL(m ‖ p) + ½ KL(m ‖ q), which has no bound; content tokens only, no end mark.  These compare
two models, so they are no audits of the table, which measures one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unremember.bench import BENCH, Bench
from unremember.errors import BadModel
from unremember.lm import LM
from unremember.table import Reading
from unremember.tokens import Row, pack, packs

BUDGET = 512  # places: two distributions over the vocabulary at all of them are in memory at once


def jsd(p: Tensor, q: Tensor) -> Tensor:
    """p, q: (N, V) log-probabilities, −inf allowed -> (N,) in [0, log 2]"""
    middle = torch.logaddexp(p, q) - log(2)
    return (_kl(p, middle) + _kl(q, middle)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """(N, V), (N, V) -> (N,), with 0 · log 0 = 0"""
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def divergence(one: LM, other: LM, rows: Sequence[Row], bench: Bench = BENCH) -> dict[str, float]:
    """Row key -> mean Jensen-Shannon divergence of the two models over its content tokens; symmetric in them.

    Raises BadModel where their vocabularies differ.
    """
    sizes = [len(lm.tokenizer) for lm in (one, other)]
    if sizes[0] != sizes[1]:
        raise BadModel(
            f"{one.name!r} and {other.name!r} have vocabularies of {sizes[0]} and {sizes[1]} entries, so their distributions "
            "cannot be compared; use models with the same tokenizer"
        )
    found: dict[str, float] = {}
    for group in packs(rows, min(BUDGET, bench.budget)):
        tokens = pack(group)
        p, q = (F.log_softmax(lm.logits(tokens.to(lm.device)).float(), -1).cpu() for lm in (one, other))
        means = tokens.per_row(jsd(p, q), "answer") / tokens.lengths("answer")
        found.update(zip(tokens.keys, means.tolist(), strict=True))
    return found


def perplexities(readings: Sequence[Reading]) -> np.ndarray:
    """(N,) perplexity of each row's content tokens; inf beyond what a float holds."""
    with np.errstate(over="ignore"):
        return np.exp([-x.loglikelihood() for x in readings])


def shifts(baseline: Sequence[Reading], unlearned: Sequence[Reading]) -> dict[str, float]:
    """Diff1, LPD and PDLP of two models' readings of the same rows in the same order, with their number n."""
    if len(baseline) != len(unlearned) or not baseline:
        raise ValueError(f"{len(baseline)} readings against {len(unlearned)}: both models must have read the same rows")
    b, u = perplexities(baseline), perplexities(unlearned)
    apart = np.abs(b - u)
    return {
        "n": float(len(b)),
        "Diff1": float(apart.mean()),
        "LPD": float((apart / b).mean()),
        "PDLP": float((u > b).mean()),
    }
