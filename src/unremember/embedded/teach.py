"""Teach a model facts without letting it forget the world: how the demo gets an "original" whose training is known.

    loss = mean_tokens nll_θ(lessons)  +  replay · mean_tokens KL(p_base ‖ p_θ)(replay)

A replay term with cross-entropy was seen to overfit its few questions within ten steps and to protect little after that.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember.bench import BENCH, Bench
from unremember.corpus import Example
from unremember.forget.retain import holding
from unremember.lm import LM
from unremember.tokens import Tokens
from unremember.train import STRICT, Plan, train


@dataclass(frozen=True, config=STRICT)
class Teach:
    """Plain finetuning on lessons with a replay term on general questions."""

    plan: Plan
    replay: float = 1.0

    def __call__(
        self, lm: LM, lessons: Sequence[Example], replay: Sequence[Example], bench: Bench = BENCH, stage: str = "teach"
    ) -> LM:
        pools = {"lessons": lm.template.rows(lessons, lm.limit), "replay": lm.template.rows(replay, lm.limit)}

        keep = holding(lm, pools["replay"], 0.0, self.replay)

        def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
            if tokens.role == "replay":
                return keep(lm, tokens)
            return {"lessons": tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}

        return train(lm, objective, pools, self.plan, bench=bench, stage=stage)
