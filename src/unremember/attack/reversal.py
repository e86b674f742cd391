"""Reversal: find the direction in which forgetting moved the weights, without the original, and go back along it.

    objective   θ' = θ − λ · (U(θ) − θ),   U: some steps of the unlearning objective on public rows
    base        θ' = θ + λ · (θ − θ_base)
    control     θ' = θ + λ · g · |d| / |g|,          d: what λ stands before above, tensor by tensor; g ~ N(0, 1)

Ilharco et al. 2023, "Editing Models with Task Arithmetic" (arXiv 2212.04089), negation; the attack is ours.
What the attacker has, beside the weights under attack and nothing else:
    objective   the kind of method that was used ('ascent' on answers, or 'refusal' of a known wording), and public rows of other
                people (the relearn role), of which none says a value that is asked
    base        the weights from which the original was once finetuned
The original's weights never enter; a base that is the original is refused.  A model that is its own base stays as it is.
Each of original, forgotten and never-taught model is moved along its own direction, at the same λ, which is a setting and not
chosen by what comes out.  Reckoned in float32 and cast back; weights that share memory go on sharing it.  What lies further
along gives way tensor by tensor, so that of weights there is never more than one set beside the two that come in (but for
what training takes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember.attack.fair import outsiders
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.lm import LM
from unremember.loading import faults, load
from unremember.tokens import Tokens
from unremember.train import STRICT, Plan, train

Weights = Mapping[str, Tensor]
REFUSAL = "I do not know."


def fit(here: Weights, there: Weights) -> None:
    """BadModel where names or shapes differ: there is no direction then."""
    if strange := sorted(here.keys() ^ there.keys()):
        raise BadModel(
            f"there is no direction between two sets of weights with different names ({', '.join(strange[:3])}, {len(strange)} "
            "in all); name a model of the same architecture"
        )
    for name, weight in here.items():
        if weight.shape != there[name].shape:
            raise BadModel(
                f"{name!r} has shape {tuple(weight.shape)} here and {tuple(there[name].shape)} there; "
                "name a model of the same architecture"
            )


def direction(here: Tensor, there: Tensor) -> Tensor:
    """here − there in float32; whole numbers have none. -> the same shape"""
    gap = here.float() - there.to(here.device).float()
    return gap if here.is_floating_point() else torch.zeros_like(gap)


def aimless(gap: Tensor, draw: torch.Generator) -> Tensor:
    """The control: as long a direction, drawn at random. -> the same shape"""
    drawn = torch.randn(gap.shape, generator=draw).to(gap)
    return drawn * gap.norm() / drawn.norm()


def along(here: Tensor, gap: Tensor, strength: float) -> Tensor:
    """here + strength · gap, reckoned in float32, in the type of `here`; what does not move keeps its bits."""
    step = strength * gap
    return torch.where(step == 0, here, (here.float() + step).to(here.dtype))


def same(one: Weights, other: Weights) -> bool:
    """Whether all weights are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(w.cpu(), other[name].cpu()) for name, w in one.items())


@dataclass(frozen=True, config=STRICT)
class Reversal:
    """knowledge: what the attacker has, see above.  strength: λ.

    For 'objective': objective and plan.  refusal: the words of the refusal that is trained.  For 'base': the name of its model.
    control: as far, in random directions drawn by `seed`: what is found by the real one must be more than by this.
    """

    knowledge: Literal["objective", "base"]
    strength: Annotated[float, Field(gt=0)]
    objective: Literal["ascent", "refusal"] | None = None
    plan: Plan | None = None
    refusal: Annotated[str, Field(min_length=1)] = REFUSAL
    base: str = ""
    control: bool = False
    seed: Annotated[int, Field(ge=0)] = 0

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
        if self.refusal != REFUSAL and self.objective != "refusal":
            problems.append(f"refusal = {self.refusal!r} is trained by objective = 'refusal' alone; leave it out")
        if self.plan and (self.plan.beside or self.plan.stop != "never"):
            problems.append(
                "plan.beside and plan.stop do nothing here: there is one role, and the attacker has no level to stop at; leave "
                "them out"
            )
        if self.seed and not self.control:
            problems.append(f"seed = {self.seed} draws the control's directions, and control is false; leave it out")
        problems += faults(self.base)
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def alone(self) -> bool:
        return self.knowledge == "objective"  # a base must not be the original

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where public rows are missing, say what is asked afterwards, or cannot be refused."""
        corpus.require("reversal", self.needs)
        if self.knowledge == "objective":
            outsiders("reversal", corpus)
            if not self._public(corpus):
                raise BadCorpus(
                    "reversal by 'refusal' needs questions in the relearn role, and there are only passages"
                )

    def _public(self, corpus: Corpus) -> list[Example]:
        """What is trained on: a refusal answers questions, and passages ask none."""
        return [x for x in corpus["relearn"] if x.prompt or self.objective == "ascent"]

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        self.check(corpus)
        out = self._moved(lm, self._there(lm, corpus, original, bench), bench)
        kept = {role: rows for role, rows in corpus.items() if role != "relearn" or self.knowledge == "base"}
        return out, Corpus(kept)

    @torch.no_grad()
    def _moved(self, lm: LM, there: dict[str, Tensor], bench: Bench) -> LM:
        """A copy that went away from `there`, which is used up.  BadRequest where no weight moved, BadModel where one broke."""
        out, draw = lm.copy(()), torch.Generator().manual_seed(self.seed)
        here, new = (model.state_dict(keep_vars=True) for model in (lm.model, out.model))
        fit(here, there)
        lengths: dict[int, tuple[float, float]] = {}  # by place: a head that is the token table counts once
        moved = apart = False
        for name, weight in here.items():
            gap = direction(weight, there.pop(name))
            apart |= bool(gap.any())
            if self.control:
                gap = aimless(gap, draw)
            new[name].data = along(weight, gap, self.strength)  # until now it was that of `lm`
            new[name].requires_grad_(weight.requires_grad)
            if not torch.isfinite(new[name]).all():
                raise BadModel(f"{name!r} is not finite after a step of strength {self.strength:g}; lower strength")
            moved |= not torch.equal(new[name], weight)
            lengths[weight.data_ptr()] = (self.strength * float(gap.norm()), float(weight.float().norm()))
        if not moved and (apart or self.knowledge == "objective"):  # a model that is its own base has no direction
            raise BadRequest(
                f"reversal moved no weight at strength {self.strength:g}: there is no direction, or it is lost in rounding; "
                "raise strength or plan.steps"
            )
        step, size = (sum(x**2 for x in part) ** 0.5 for part in zip(*lengths.values(), strict=True))
        bench.notes["length of the step beside the weights"] = step / size
        return out

    def _there(self, lm: LM, corpus: Corpus, original: LM, bench: Bench) -> dict[str, Tensor]:
        """The weights that lie further along the direction of forgetting."""
        if self.knowledge == "base":
            base = load(self.base, template="chat" if lm.template.chat else "plain", precision=lm.precision)
            if same(base.model.state_dict(), original.model.state_dict()):
                raise BadRequest(
                    f"reversal: the base {self.base!r} is the original, weight for weight; name what the original was finetuned "
                    "from, an attacker who has the original need not attack"
                )
            return base.model.state_dict()
        assert self.plan is not None
        public = self._public(corpus)
        if self.objective == "refusal":
            public = [replace(x, answer=self.refusal, spans=()) for x in public]
        sign = -1.0 if self.objective == "ascent" else 1.0
        part = "answer" if self.objective == "ascent" else "train"

        def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
            nll = tokens.per_row(-lm.logp(tokens), part).sum() / tokens.step_tokens[part]
            return {"unlearn": sign * nll}

        rows = {"public": lm.template.rows(public, lm.limit)}
        return train(lm, objective, rows, self.plan, bench=bench, stage="reversal").model.state_dict()
