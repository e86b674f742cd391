"""DEPN: find the neurons that most raise the probability of private tokens, and switch exactly those off.  No training.

    detector     Att_x(k) = Σ_i integrated gradients of P(y_i | x, y_<i) by neuron k, one block at a time
    candidates   Att_x(k) ≥ threshold · max_k Att_x(k) > 0, text by text
    aggregator   neurons ordered by Σ_x [k is a candidate of x] ('votes') or by Σ_x Att_x(k) ('sum')
    editor       column k of the down-projection ← 0, for the first `neurons` of them

Wu et al. 2023 (arXiv 2310.20138).  Reference code: flamewei123/DEPN@685a772 `1_calculate_attribution.py`, @75c8115
`2_filter_privacy_neurons.py`, @f779dd9 `3_edit_privacy_neurons.py`.
Differs: causal models with gated MLPs, where the paper has BERT; midpoints on the path; ties in votes go to the larger sum, then
to the earlier neuron; a text whose maximum is not positive has no candidates; no filter for what is memorised, so the forget
role must hold what is; it may stop at the never-taught level, with fewer neurons.  That code's shell script edits random
neurons (`--do_random_kn False` is true), and its aggregator compares numbers with strings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadRequest
from unremember.forget.zero import Removed, zero
from unremember.lm import LM
from unremember.locate.integrated import IntegratedGradients, Objective
from unremember.locate.neurons import neurons
from unremember.locate.ranking import Ranking
from unremember.locate.ranking import sites as opened
from unremember.sites import EVERYWHERE, Sites
from unremember.stop import Stopper
from unremember.stop import check as check_level
from unremember.train import STRICT, Part, rewind

Aggregate = Literal["votes", "sum"]


def candidates(attribution: Tensor, threshold: float) -> Tensor:
    """(R, U) attributions of U neurons to R texts -> (R, U) bool: at least `threshold` of the text's positive maximum."""
    most = attribution.amax(1, keepdim=True)
    return (most > 0) & (attribution >= threshold * most)


def aggregate(attribution: Tensor, threshold: float, by: Aggregate) -> Tensor:
    """(R, U) -> (U,) U for the first neuron to go, U − 1 for the second, and so on; −inf for those that must stay."""
    chosen, total = candidates(attribution, threshold), attribution.sum(0)
    votes = chosen.sum(0)
    first = votes.to(total) if by == "votes" else total
    allowed = (votes > 0) & ((total > 0) | (by == "votes"))
    order = np.lexsort((-total.numpy(), -first.numpy(), ~allowed.numpy()))  # stable: ties in both go by index
    scores = torch.full(total.shape, -torch.inf)
    places = torch.from_numpy(order)[: int(allowed.sum())]
    scores[places] = len(total) - torch.arange(len(places), dtype=scores.dtype)
    return scores


@dataclass(frozen=True, config=STRICT)
class DEPN:
    """Detector, aggregator and editor.

    neurons: how many are switched off, the paper's z; with `stop` the most that are, and 0 for none.  threshold: see above.
    steps, objective, part: of the detector (`IntegratedGradients`).  sample: forget examples it looks at, drawn with `seed`;
    0 = all of them.  stop, every: as in Plan, `every` counted in neurons between two looks.
    """

    neurons: Annotated[int, Field(ge=0)]
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.1
    aggregate: Aggregate = "votes"
    steps: Annotated[int, Field(ge=1)] = 20
    objective: Objective = "probability"
    part: Part = "span"
    sample: Annotated[int, Field(ge=0)] = 0
    seed: int = 0
    stop: Annotated[str, Field(pattern="^(probability|accuracy|preference|never)$")] = "never"
    every: Annotated[int, Field(ge=1)] = 1

    needs = ("forget",)
    paper = "Wu et al. 2023, arXiv 2310.20138"
    summary = "finds the neurons that raise the secrets' probability and switches them off, without training"

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where a role is missing, a forget text stands there twice, or there is no level to stop at."""
        corpus.require("depn", self.needs)
        seen: dict[tuple[str, str], str] = {}
        twice = []
        for x in corpus["forget"]:
            if (former := seen.setdefault((x.prompt, x.answer), x.id)) != x.id:
                twice.append(f"forget: {x.id!r} is the same text as {former!r} and would vote twice; remove one")
        if twice:
            raise BadCorpus(twice)
        if self.stop != "never":
            check_level(corpus, self.stop)

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        return self.edit(lm, corpus, sites, bench)[0]

    def edit(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> tuple[LM, Removed]:
        """The edited copy, and the columns that `undo` puts back."""
        self.check(corpus)
        _, unit = neurons(lm.model)
        stop = Stopper.calibrated(lm, corpus, self.stop, self.every, False, bench)
        result, removed = zero(lm, Sites({}))
        if bench.log and team.rank() == 0:
            rewind(bench.log, "forget", 0)  # what an interrupted run wrote is all done again
        if not self.neurons or (stop and stop(lm, 0)):
            result.model.eval()
            return result, removed
        order = self.order(self.ranking(lm, corpus, sites, bench))
        most = len(order)
        for count in [*range(self.every, most, self.every), most] if stop else [most]:
            result, removed = zero(lm, opened(order[:count], lm.model, unit))
            result.model.eval()
            done = bool(stop and stop(result, count))
            _note(bench, count, {"look": stop.looks[-1], "stopped": done} if stop else {})
            bench.say("forget", count, most, {})
            if done:
                break
        return result, removed

    def ranking(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> Ranking:
        """Detector and aggregator: the neurons in the order in which they go, within `sites`."""
        detector = IntegratedGradients(self.steps, self.objective, self.part)
        texts = corpus["forget"]
        if 0 < self.sample < len(texts):
            drawn = np.random.default_rng(self.seed).choice(len(texts), self.sample, replace=False)
            texts = [texts[i] for i in sorted(drawn)]
        found = list(detector.texts(lm, texts, bench).values())
        names = list(found[0])
        attribution = torch.stack([torch.cat([text[name] for name in names]) for text in found])  # (R, U)
        pieces = aggregate(attribution, self.threshold, self.aggregate).split([len(found[0][n]) for n in names])
        unit = neurons(lm.model)[1]
        scores = {
            name: piece.where(_inside(sites, name, lm.model.get_parameter(name), unit), torch.tensor(-torch.inf))
            for name, piece in zip(names, pieces, strict=True)
        }
        return Ranking(scores, unit)

    def order(self, ranking: Ranking) -> list[tuple[str, int]]:
        """The neurons to switch off, the first one first; BadRequest where there are too few."""
        order = ranking.best(self.neurons)
        if not order:
            raise BadRequest(
                "depn finds no neuron that raises the probability of the secrets within the sites; open more of them, or where "
                f'probabilities underflow set forget.objective = "log probability" (it is {self.objective!r})'
            )
        if len(order) < self.neurons and self.stop == "never":
            raise BadRequest(
                f"forget.neurons is {self.neurons} and depn has {len(order)} candidates at threshold {self.threshold:g}; "
                "ask for fewer, or lower forget.threshold"
            )
        return order


def _inside(sites: Sites, name: str, weight: Tensor, unit: str) -> Tensor:
    """(K,) which neurons may be switched off: those whose whole row or column is open."""
    size = weight.shape[1] if unit == "column" else weight.shape[0]
    mask = sites.masks.get(name)
    if sites.everywhere or (name in sites.masks and mask is None):
        return torch.ones(size, dtype=torch.bool)
    return torch.zeros(size, dtype=torch.bool) if mask is None else mask.cpu().all(0 if unit == "column" else 1)


def _note(bench: Bench, count: int, look: Mapping) -> None:
    """One line in the form of those that training writes; a step is a neuron, and nothing is trained on."""
    if bench.log and team.rank() == 0:
        line = {"stage": "forget", "step": count, "terms": {}, "norm": 0.0, "lr": 0.0, "places": 0, "tokens": 0, **look}
        with bench.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
