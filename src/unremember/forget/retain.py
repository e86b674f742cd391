"""What holds the rest in place while something is forgotten: cross-entropy or KL on the retain and replay roles.

    retain · mean_tokens nll_θ(retain)          kl · mean_tokens KL(p_ref ‖ p_θ)(retain)

The reference distribution is that of the model before forgetting, resolved once and kept as float16 numbers.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from unremember.corpus import Corpus
from unremember.forget.reference import distributions, recall
from unremember.lm import LM
from unremember.tokens import Row, Tokens

Keep = Callable[[LM, Tokens], dict[str, Tensor]]


def needed(retain: float, kl: float) -> tuple[str, ...]:
    """The roles that a method with these weights cannot do without."""
    return ("forget", "retain") if retain or kl else ("forget",)


def kl_loss(reference: Tensor, logp: Tensor) -> Tensor:
    """KL(reference ‖ live) at each position. reference, logp: (N, V) log-probabilities -> (N,)"""
    return (reference.exp() * (reference - logp)).sum(-1)


def keeping(lm: LM, corpus: Corpus, retain: float, kl: float) -> tuple[dict[str, list[Row]], Keep]:
    """The rows of the step (forget, and retain and replay where they weigh anything) and the terms that keep the latter."""
    roles = ("forget", *(("retain", "replay") if retain or kl else ()))
    pools = {role: lm.template.rows(corpus.of(role), lm.limit) for role in roles if corpus.of(role)}
    return pools, holding(lm, [row for role in roles[1:] for row in pools.get(role, ())], retain, kl)


def holding(lm: LM, rows: list[Row], weight: float, kl: float) -> Keep:
    """Terms that hold `rows` where `lm` has them: cross-entropy with `weight`, KL to its present distribution with `kl`."""
    reference = distributions(lm, rows) if kl else {}

    def keep(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
        total = tokens.step_tokens["train"]
        if not kl:  # the likelihood alone needs no (N, V) matrix in float32
            return {tokens.role: weight * tokens.per_row(-lm.logp(tokens), "train").sum() / total}
        logp = F.log_softmax(lm.logits(tokens).float(), -1)  # (N, V)
        gap = kl_loss(recall(reference, tokens), logp)
        terms = {f"{tokens.role} KL": kl * tokens.per_row(gap, "train").sum() / total}
        if weight:
            nll = -logp.gather(1, tokens.target[:, None])[:, 0]
            terms[tokens.role] = weight * tokens.per_row(nll, "train").sum() / total
        return terms

    return keep
