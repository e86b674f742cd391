"""LLM unlearning: push the answer down, tie its question to unrelated answers, hold the rest by distribution.

    loss = − forget   · mean_rows min( A(x, y), log V )
           + mismatch · mean_rows A(x, y'),    y' one of the answers that other questions have
           + kl       · mean_tokens KL(p_ref ‖ p_θ)(retain)                    A = mean over the answer tokens of nll

Yao, Xu, Liu 2023 (arXiv 2310.10683).  Reference code: kevinyaobytedance/llm_unlearn@647f309.
Differs: A covers answer tokens only (that code trains the mismatch on the question, too); KL is a divergence (there a
cross-entropy over every place); `answers` mismatched pairs a question are drawn once and a step sees `plan.beside` of them.  An
answer less likely than a uniform guess, log V, is pushed no further: a bound on the forget loss that really holds, where that
code compares a negative loss with +100.  The stopper looks at what is known, not at the loss.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus
from unremember.forget.descend import descend
from unremember.forget.retain import keeping
from unremember.lm import LM
from unremember.sites import EVERYWHERE, Sites
from unremember.tokens import Row, Tokens
from unremember.train import STRICT, Objective, Part, Plan


def capped_ascent(nll: Tensor, length: Tensor, cap: float) -> Tensor:
    """nll: (B,) summed over the answer; length: (B,) its token count, at least 1 -> (B,), flat beyond `cap` nats a token."""
    return -(nll / length).clamp(max=cap)


@dataclass(frozen=True, config=STRICT)
class LLMU:
    """Ascent with random mismatch and KL on what is normal."""

    plan: Plan
    forget: Annotated[float, Field(gt=0)]
    mismatch: Annotated[float, Field(ge=0)]
    kl: Annotated[float, Field(ge=0)] = 1.0
    answers: Annotated[int, Field(ge=1)] = 5
    part: Part = "answer"

    needs = ("forget", "retain")
    paper = "Yao, Xu, Liu 2023, arXiv 2310.10683"
    summary = "ascent, unrelated answers to the same questions, and KL on the rest"

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        return descend(self, lm, corpus, sites, bench)

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where a role is missing or too few answers are unrelated to some forget example."""
        corpus.require("llmu", self.needs)
        if self.mismatch:
            mismatched(corpus, self.answers, self.plan.seed)

    def terms(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[dict[str, list[Row]], Objective]:
        pools, keep = keeping(lm, corpus, 0.0, self.kl)
        if self.mismatch:
            pairs = mismatched(corpus, self.answers, self.plan.seed)
            pools = {"forget": pools["forget"], "mismatch": lm.template.rows(pairs, lm.limit), **pools}
        cap = math.log(lm.model.config.vocab_size)

        def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
            if tokens.role not in ("forget", "mismatch"):
                return keep(lm, tokens)
            part = self.part if tokens.role == "forget" else "answer"
            nll, length = tokens.per_row(-lm.logp(tokens), part), tokens.lengths(part)  # (B,), (B,)
            spoken = length > 0  # a silent micro-batch must add nothing
            nll, length, idle = nll[spoken], length[spoken], 0 * nll.sum()
            if tokens.role == "mismatch":
                return {"mismatch": self.mismatch * (nll / length).sum() / tokens.step_rows + idle}
            return {"llmu": self.forget * capped_ascent(nll, length, cap).sum() / tokens.step_rows + idle}

        return pools, objective


def mismatched(corpus: Corpus, answers: int, seed: int) -> list[Example]:
    """Every forget question with `answers` answers of retained ones, drawn without replacement, none with a value of its own.

    Raises BadCorpus where there are too few to draw from.
    """
    pool = sorted({x.answer for x in corpus.of("retain", "replay")})
    pairs: list[Example] = []
    for number, x in enumerate(corpus["forget"]):
        free = [a for a in pool if not any(value.casefold() in a.casefold() for value in x.values())]
        if len(free) < answers:
            raise BadCorpus(
                f"llmu needs {answers} answers that have nothing to do with {x.id!r} and finds {len(free)} under retain and "
                "replay; add some, or set forget.answers lower"
            )
        drawn = np.random.default_rng([seed, number]).choice(len(free), answers, replace=False)
        pairs += [replace(x, id=f"{x.id}/mismatch{k}", answer=free[i], spans=()) for k, i in enumerate(drawn)]
    return pairs
