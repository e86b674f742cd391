"""Controls: what a ranking must beat.  As many units in every layer as it chose, drawn at random, or matched in strength.

    random:   uniform over the units of the same parameter that were not chosen
    matched:  the assignment of others to the chosen with the least Σ |s − s'|,    s_k = mean |a_k| · ‖W[:, k]‖

a at the places that predict the forget tokens.  Random units say little in a layer where few are active; matched ones write
as much into the residual stream, and differ from the chosen only in what they write.
Wu et al. 2023, DEPN (arXiv 2310.20138), report that random neurons gave half of its drop in exposure.  Reference code:
flamewei123/DEPN@f779dd9, whose shell script draws random neurons by mistake (`--do_random_kn False` is true there).
Differs: the chosen units themselves are left out, and so the two cannot overlap; matching is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadRequest
from unremember.lm import LM
from unremember.locate.gradients import Gradients
from unremember.locate.integrated import IntegratedGradients
from unremember.locate.neurons import neurons, norms
from unremember.locate.ranking import Ranking
from unremember.tokens import pack, packs
from unremember.train import Part

HOLDS = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
Like = Ranking | IntegratedGradients | Gradients  # a ranking, or the settings of what makes one


@dataclass(frozen=True, config=HOLDS)
class Random:
    """Ranks `units` units at random, parameter by parameter as many as the best `units` of `like` have; nothing else.

    Among themselves they are ordered at random, too.
    """

    like: Like
    units: Annotated[int, Field(ge=1)]
    seed: int = 0

    @property
    def needs(self) -> tuple[str, ...]:
        return () if isinstance(self.like, Ranking) else self.like.needs

    paper = "Wu et al. 2023, arXiv 2310.20138"
    summary = "as many units of each parameter as another ranking chose, drawn at random"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Ranking:
        like = _ranked(self.like, lm, corpus, bench)
        draw = np.random.default_rng(self.seed)
        found = {}
        for name, chosen, free in _apart(like, self.units):
            found[name] = torch.from_numpy(draw.choice(free.numpy(), len(chosen), replace=False))
        order = (draw.permutation(self.units) + 1.0).tolist()
        return _only(like, found, order)


@dataclass(frozen=True, config=HOLDS)
class ActivityMatched:
    """Ranks `units` neurons that write as strongly as the best `units` of `like`, each in the layer of the one it matches.

    They stand in the order of those they match.
    """

    like: Like
    units: Annotated[int, Field(ge=1)]
    part: Part = "span"

    needs = ("forget",)
    paper = "ours, after Wu et al. 2023, arXiv 2310.20138"
    summary = "neurons of the same layers with the same activity times column norm as those that another ranking chose"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Ranking:
        corpus.require("the activity-matched control", self.needs)
        like = _ranked(self.like, lm, corpus, bench)
        layers, unit = neurons(lm.model)
        if like.unit != unit or not set(like.scores) <= set(layers):
            raise BadRequest(
                f"an activity-matched control needs a ranking of neurons, which are the {unit}s of {', '.join(layers)}; "
                f"this one ranks {like.unit}s of {', '.join(list(like.scores)[:3])}; use the random control"
            )
        strength = writing(lm, corpus["forget"], self.part, bench)
        best = {at: place for place, at in enumerate(like.best(self.units))}
        found, order = {}, []
        for name, chosen, free in _apart(like, self.units):
            found[name] = matched(strength[name], chosen, free)
            order += [float(self.units - best[name, int(k)]) for k in chosen]
        return _only(like, found, order)


def matched(strength: Tensor, chosen: Tensor, free: Tensor) -> Tensor:
    """strength: (K,); chosen: (n,) indices; free: (f,) indices, f ≥ n -> (n,) indices out of free, each used once."""
    cost = (strength[chosen][:, None] - strength[free][None]).abs()  # (n, f)
    return free[linear_sum_assignment(cost.numpy())[1]]


@torch.no_grad()
def writing(lm: LM, examples: Sequence[Example], part: Part, bench: Bench = BENCH) -> dict[str, Tensor]:
    """Parameter -> (K,) mean |a_k| over the places that predict the tokens of `part`, times what the neuron sends out at 1."""
    layers, unit = neurons(lm.model)
    sums: dict[str, Tensor] = {}
    count = 0
    for group in packs(lm.template.rows(examples, lm.limit), bench.budget):
        tokens = pack(group).to(lm.device)
        places = tokens.source[tokens.mask(part)]
        count += len(places)
        seen: dict[str, Tensor] = {}

        def keep(name: str, seen: dict[str, Tensor] = seen):
            return lambda _, inputs: seen.update({name: inputs[0].flatten(0, -2)})

        hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
        try:
            lm.logits(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        for name, a in seen.items():
            sums[name] = sums.get(name, 0) + a[places].float().abs().sum(0)
    return {name: (sums[name] / count * norms(lm.model.get_parameter(name), unit)).cpu() for name in layers}


def _ranked(like: Like, lm: LM, corpus: Corpus, bench: Bench) -> Ranking:
    return like if isinstance(like, Ranking) else like(lm, corpus, bench)


def _apart(like: Ranking, units: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(parameter, indices that `like` chooses, indices that it does not) where it chooses any; BadRequest for too many."""
    best = like.best(units)
    if len(best) < units:
        raise BadRequest(f"{units} units were asked for and the ranking holds {len(best)}; ask for fewer")
    for name in sorted({name for name, _ in best}):
        chosen = torch.tensor([k for n, k in best if n == name])
        rest = torch.ones(like.scores[name].numel(), dtype=torch.bool)
        rest[chosen] = False
        free = rest.nonzero()[:, 0]
        if len(free) < len(chosen):
            raise BadRequest(
                f"{len(chosen)} of the {rest.numel()} units of {name} were chosen and {len(free)} are left, too few for a "
                "control that shares none; choose fewer"
            )
        yield name, chosen, free


def _only(like: Ranking, found: dict[str, Tensor], order: Sequence[float]) -> Ranking:
    """A ranking of these units alone, with the scores `order`, one after another."""
    scores = {name: torch.full((values.numel(),), -torch.inf) for name, values in like.scores.items()}
    left = list(order)
    for name, indices in found.items():
        scores[name][indices] = torch.tensor([float(left.pop(0)) for _ in indices])
    return Ranking(scores, like.unit)
