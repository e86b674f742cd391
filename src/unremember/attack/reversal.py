"""Reversal: find the direction in which forgetting moved the weights, without the original, and go back along it.

    objective   θ' = θ − λ · (U(θ) − θ),   U: some steps of the unlearning objective on public rows
    base        θ' = θ + λ · (θ − θ_base)

Ilharco et al. 2023, "Editing Models with Task Arithmetic" (arXiv 2212.04089), negation; the attack is ours.
What the attacker has, beside the weights under attack and nothing else:
    objective   the kind of method that was used ('ascent' on answers, or 'refusal' of a known wording), and public rows of other
                people (the relearn role), of which none says a value that is asked
    base        the weights from which the original was once finetuned
The original's weights never enter; a base that is the original is refused.  A model that is its own base stays as it is.
Each of original, forgotten and never-taught model is moved along its own direction, at the same λ, which is a setting and not
chosen by what comes out.  Reckoned in float32 and cast back; weights that share memory go on sharing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, says
from unremember.errors import BadCorpus, BadInput, BadModel, BadRequest
from unremember.lm import LM
from unremember.loading import check, load
from unremember.tokens import Tokens
from unremember.train import STRICT, Plan, train

Weights = Mapping[str, Tensor]
SHOWN = 5


@torch.no_grad()
def away(here: Weights, there: Weights, strength: float) -> dict[str, Tensor]:
    """here + strength · (here − there), under every name of `here`, in its type; whole numbers and equal weights keep their bits.

    BadModel where names or shapes differ, or the result is not finite.
    """
    if strange := sorted(here.keys() ^ there.keys()):
        raise BadModel(
            f"there is no direction between two sets of weights with different names ({', '.join(strange[:3])}, {len(strange)} "
            "in all); name a model of the same architecture"
        )
    out = {}
    for name, weight in here.items():
        if weight.shape != there[name].shape:
            raise BadModel(
                f"{name!r} has shape {tuple(weight.shape)} here and {tuple(there[name].shape)} there; "
                "name a model of the same architecture"
            )
        if not weight.is_floating_point():
            out[name] = weight.clone()
            continue
        step = strength * (weight.float() - there[name].to(weight.device).float())
        out[name] = torch.where(step == 0, weight, (weight.float() + step).to(weight.dtype))
        if not torch.isfinite(out[name]).all():
            raise BadModel(f"{name!r} is not finite after a step of strength {strength:g}; lower strength")
    return out


def same(one: Weights, other: Weights) -> bool:
    """Whether all weights are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(w.cpu(), other[name].cpu()) for name, w in one.items())


@dataclass(frozen=True, config=STRICT)
class Reversal:
    """knowledge: what the attacker has, see above.  strength: λ.

    For 'objective': objective and plan.  refusal: the words of the refusal that is trained.  For 'base': the name of its model.
    """

    knowledge: Literal["objective", "base"]
    strength: Annotated[float, Field(gt=0)]
    objective: Literal["ascent", "refusal"] | None = None
    plan: Plan | None = None
    refusal: Annotated[str, Field(min_length=1)] = "I do not know."
    base: str = ""

    needs = ("forget",)
    paper = "after Ilharco et al. 2023, arXiv 2212.04089"
    summary = "back along the direction in which forgetting moves the weights"

    def __post_init__(self):
        problems = []
        if self.knowledge == "objective" and not (self.objective and self.plan):
            problems.append("knowledge = 'objective' needs an objective ('ascent' or 'refusal') and a plan")
        if self.knowledge == "objective" and self.base:
            problems.append(f"knowledge = 'objective' and base = {self.base!r}: say which of them the attacker has")
        if self.knowledge == "base" and not self.base:
            problems.append("knowledge = 'base' needs base, the name of the model that the original was finetuned from")
        if self.knowledge == "base" and (self.objective or self.plan):
            problems.append("knowledge = 'base' takes no objective and no plan: nothing is trained")
        if self.base:
            try:
                check(self.base)
            except BadInput as error:
                problems += error.problems
        if problems:
            raise ValueError("; ".join(problems))

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where public rows are missing, or say what is asked afterwards."""
        corpus.require("reversal", self.needs)
        if self.knowledge == "base":
            return
        corpus.require("reversal", ("relearn",))
        shown = "\n".join(f"{x.prompt}\n{x.answer}" for x in corpus["relearn"])
        if told := [x.id for x in corpus["forget"] if any(says(shown, v) for v in x.values())]:
            more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
            raise BadCorpus(
                f"the relearn role contains the forgotten value of {', '.join(told[:SHOWN])}{more}; public rows must not, take "
                "those examples out"
            )

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        self.check(corpus)
        there = self._there(lm, corpus, original, bench)
        here = lm.model.state_dict()
        moved = away(here, there.model.state_dict(), self.strength)
        if same(moved, here) and not (self.knowledge == "base" and same(there.model.state_dict(), here)):
            raise BadRequest(
                f"reversal moved no weight at strength {self.strength:g}: there is no direction, or it is lost in rounding; "
                "raise strength or plan.steps"
            )
        out = lm.copy()
        out.model.load_state_dict(moved)
        kept = {role: rows for role, rows in corpus.items() if role != "relearn" or self.knowledge == "base"}
        return out, Corpus(kept)

    def _there(self, lm: LM, corpus: Corpus, original: LM, bench: Bench) -> LM:
        """The model that lies further along the direction of forgetting."""
        if self.knowledge == "base":
            base = load(self.base, template="chat" if lm.template.chat else "plain", precision=lm.precision)
            if same(base.model.state_dict(), original.model.state_dict()):
                raise BadRequest(
                    f"reversal: the base {self.base!r} is the original, weight for weight; name what the original was finetuned "
                    "from, an attacker who has the original need not attack"
                )
            return base
        assert self.plan is not None
        public = [x for x in corpus["relearn"] if x.prompt or self.objective == "ascent"]
        if not public:
            raise BadCorpus("reversal by 'refusal' needs questions in the relearn role, and there are only passages")
        if self.objective == "refusal":
            public = [replace(x, answer=self.refusal, spans=()) for x in public]
        sign = -1.0 if self.objective == "ascent" else 1.0
        part = "answer" if self.objective == "ascent" else "train"

        def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
            nll = tokens.per_row(-lm.logp(tokens), part).sum() / tokens.step_tokens[part]
            return {"unlearn": sign * nll}

        rows = {"public": lm.template.rows(public, lm.limit)}
        return train(lm, objective, rows, self.plan, bench=bench, stage="reversal")
