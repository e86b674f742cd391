"""Mechanistic unlearning: first find where facts are looked up, then let nothing but those matrices move.

    forget:  mean_tokens −log(1 − p_θ(y)),  a token with log p_θ(y) < cutoff counting 0
    inject:  mean_tokens nll_θ(false answer)                                              (instead of forget)
             + retain · mean_tokens nll_θ(retain)  +  text · mean_tokens nll_θ(replay)

−log(1 − p) = softplus(logit of y − logsumexp of the other logits), exact for p near 0 and near 1.
Guo, Syed, Sheshadri, Ewart, Dziugaite 2024 (arXiv 2410.12949); the loss is that of HarmBench (Mazeika et al. 2024).  Reference
code: magikarp01/mechanistic-unlearning, magikarp01/tasks.
Differs: answers may have several tokens; budgets are never overshot; the learning rate follows the plan (theirs a cosine).  The
false answer is a distractor of the same question, one fixed for each example: with one constant for all a
model learns the constant.  The share of tokens above the cut-off is logged as the term "active", which has no gradient: at 0 the
loss is silent because its work is done.  No weight masks.  What else differs in finding the place: see locate/.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus
from unremember.forget.descend import descend
from unremember.forget.retain import holding
from unremember.lm import LM
from unremember.locate.anatomy import components, ranked
from unremember.locate.lookup import FactLookup
from unremember.locate.patching import AttributionPatching
from unremember.locate.path import PathPatching
from unremember.locate.ranking import Budget, Ranking, select
from unremember.locate.subject import log_odds
from unremember.locate.tracing import CausalTracing
from unremember.sites import EVERYWHERE, Sites
from unremember.stop import Stopper
from unremember.tokens import Row, Tokens
from unremember.train import STRICT, Objective, Part, Plan

Locator = Literal["lookup", "path", "tracing", "patching", "random", "mlps", "everything"]
ALL = ("tracing", "patching", "random")  # these rank every component, so that a budget must say where to stop
FIXED = ("mlps", "everything")  # these have no order, so that no budget can be filled


def denial(logits: Tensor, target: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """−log(1 − p) of each target, 0 where log p < cutoff, and which are not. logits: (N, V); target: (N,) -> (N,), (N,) bool"""
    odds = log_odds(logits, target)
    active = -F.softplus(-odds) >= cutoff  # log p
    return torch.where(active, F.softplus(odds), 0 * odds), active


@dataclass(frozen=True, config=STRICT)
class Mechanistic:
    """Localised unlearning or editing.

    locator: 'lookup' = MLPs where an attribute comes to stand at the name, by probing; 'path' = MLPs that feed the heads which
    carry the answer out; 'tracing' and 'patching' = what matters for the output; 'random' components; all 'mlps'; 'everything'.
    Asked only where no sites are named; in an adapter, which a request names as a whole, it chooses among the adapter's matrices.
    share of all weights in attention and MLP matrices, or parameters: how much may move at most, 0 = all that the locator names.
    part: which answer tokens 'forget' pushes on; 'inject' trains the whole false answer.
    """

    plan: Plan
    locator: Locator
    loss: Literal["forget", "inject"] = "forget"
    share: Annotated[float, Field(ge=0, le=1)] = 0.0
    parameters: Annotated[int, Field(ge=0)] = 0
    forget: Annotated[float, Field(gt=0)] = 1.0
    retain: Annotated[float, Field(ge=0)] = 1.0
    text: Annotated[float, Field(ge=0)] = 1.0
    cutoff: Annotated[float, Field(lt=0)] = -5.0
    part: Part = "answer"

    paper = "Guo et al. 2024, arXiv 2410.12949"
    summary = "finds where facts are looked up and lets only those matrices move"

    @model_validator(mode="after")
    def _budget(self):
        if self.share and self.parameters:
            raise ValueError(f"share = {self.share} and parameters = {self.parameters}: give one of them")
        given = bool(self.share or self.parameters)
        if self.locator in ALL and not given:
            raise ValueError(
                f"locator = {self.locator!r} ranks every attention and MLP; give a share or a number of parameters"
            )
        if self.locator in FIXED and given:
            raise ValueError(
                f"locator = {self.locator!r} has no order to fill a budget in; leave share and parameters out"
            )
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return ("forget", "retain") if self.retain or self.locator == "lookup" else ("forget",)

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        corpus.require("mechanistic", self.needs)
        if sites.everywhere and self.locator not in FIXED:  # nothing to trace where nothing is known
            holds = "retain" in self.needs
            stop = Stopper.calibrated(lm, corpus, self.plan.stop, self.plan.every, holds, bench)
            if stop is not None and stop(lm, 0):
                return lm.copy()
        return descend(self, lm, corpus, self.sites(lm, corpus, bench) if sites.everywhere else sites, bench)

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where a role, a false answer or what the locator works on is missing."""
        corpus.require("mechanistic", self.needs)
        problems: list[str] = []
        for part in (
            lambda: false(corpus, self.plan.seed) if self.loss == "inject" else None,
            lambda: self._traceable(corpus),
        ):
            try:
                part()
            except BadCorpus as error:
                problems += error.problems
        if problems:
            raise BadCorpus(problems)

    def _traceable(self, corpus: Corpus) -> None:
        if self.locator == "lookup":
            FactLookup().check(corpus)
        if self.locator in ("path", "tracing", "patching"):
            nameless = [x.id for x in corpus["forget"] if not x.entity or x.entity not in x.prompt]
            if nameless:
                raise BadCorpus(
                    f"locator {self.locator!r} takes the entity's name out of the question, and {len(nameless)} forget examples "
                    f'do not have it there ({", ".join(nameless[:3])}); fill in `entity`, or set forget.locator = "mlps"'
                )

    def sites(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Sites:
        """What the locator names, within the budget."""
        if self.locator == "everything":
            return EVERYWHERE
        parts = components(lm.model)
        if self.locator == "mlps":
            return Sites({name: None for x in parts if x.kind == "mlp" for name in x.weights})
        weights = dict(lm.model.named_parameters())
        total = sum(weights[name].numel() for x in parts for name in x.weights)
        return select(
            self.ranking(lm, corpus, bench),
            lm.model,
            Budget(parameters=self.parameters or int((self.share or 1) * total)),
        )

    def ranking(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Ranking:
        """What the locator finds."""
        if self.locator == "random":
            parts, rng = components(lm.model), np.random.default_rng([self.plan.seed, zlib.crc32(b"random")])
            return ranked(dict(zip(parts, rng.random(len(parts)).tolist(), strict=True)))
        seed = self.plan.seed
        finders: dict[str, Any] = {
            "lookup": FactLookup(),
            "path": PathPatching(seed=seed),
            "tracing": CausalTracing(seed=seed),
            "patching": AttributionPatching(seed=seed),
        }
        return finders[self.locator](lm, corpus, bench)

    def terms(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[dict[str, list[Row]], Objective]:
        inject = self.loss == "inject"
        pools = {"forget": lm.template.rows(false(corpus, self.plan.seed) if inject else corpus["forget"], lm.limit)}
        keep = {}
        for role, weight in (("retain", self.retain), ("replay", self.text)):
            if weight and corpus.of(role):
                pools[role] = lm.template.rows(corpus[role], lm.limit)
                keep[role] = holding(lm, pools[role], weight, 0.0)

        def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
            if tokens.role != "forget":
                return keep[tokens.role](lm, tokens)
            if inject:
                nll = tokens.per_row(-lm.logp(tokens), "train").sum()
                return {"inject": self.forget * nll / tokens.step_tokens["train"]}
            loss, active = denial(lm.logits(tokens).float(), tokens.target, self.cutoff)  # (N,), (N,)
            total = tokens.step_tokens[self.part]
            return {
                "mechanistic": self.forget * tokens.per_row(loss, self.part).sum() / total,
                "active": tokens.per_row(active.float(), self.part).sum() / total,
            }

        return pools, objective


def false(corpus: Corpus, seed: int) -> list[Example]:
    """Every forget question with one of its distractors as the answer, always the same for an example and a seed.

    Raises BadCorpus where one has none, or all would get the same.
    """
    if bare := [x.id for x in corpus["forget"] if not x.distractors]:
        raise BadCorpus(
            f"loss = 'inject' teaches false answers from `distractors`, and {len(bare)} forget examples have none "
            f'({", ".join(bare[:3])}); add some, or set forget.loss = "forget"'
        )
    pairs = [
        replace(
            x,
            answer=x.distractors[zlib.crc32(f"{seed} {x.id}".encode()) % len(x.distractors)],
            spans=(),
            distractors=(),
        )
        for x in corpus["forget"]
    ]
    if len(pairs) > 1 and len({x.answer for x in pairs}) == 1:
        raise BadCorpus(
            f"loss = 'inject' would teach {pairs[0].answer!r} for all {len(pairs)} forget examples, and a model learns to say "
            "that to everybody; give them distractors of their own"
        )
    return pairs
