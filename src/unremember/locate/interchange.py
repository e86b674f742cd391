"""Interchange interventions: does a site carry a variable of a story about the model?  And a search for where in it.

    swap(b, s)  = the model on base b, with the site's value of source s
    IIA         = share of pairs (b, s) for which the model then says what the story says when its variable is swapped
    aligned     : only k dimensions are swapped, h ← h_b + (h_s − h_b) R Rᵀ,  R (D, k) orthonormal, learnt on other pairs

Geiger, Lu, Icard, Potts 2021 (arXiv 2106.02997); distributed alignment search: Geiger, Wu, Potts, Icard, Goodman 2024 (arXiv
2303.02536), Sec. 3.  Reference code: stanfordnlp/pyvene, from memory.
Differs: the share of pairs that come out right without any swap stands beside every IIA, and the same search on a model of random
weights beside every alignment, since a flexible map fits anything; k as large as the site, and test pairs that were trained on,
are refused.  A whole residual stream carries all that is upstream of it: IIA is high there before a variable is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass as plain
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from unremember.errors import BadCorpus, BadRequest, Diverged
from unremember.locate.activation import Part, put
from unremember.locate.anatomy import edited, watched
from unremember.train import STRICT

Run = Callable[[nn.Module, Tensor], Tensor]  # model, inputs (N, …) -> logits (N, C)


@plain(frozen=True)
class Swaps:
    """base, source: (N, …) inputs of equal shape.  wanted: (N,) what the story says to base with source's variable in it."""

    base: Tensor
    source: Tensor
    wanted: Tensor

    def __post_init__(self):
        if self.base.shape != self.source.shape or len(self.base) != len(self.wanted) or not len(self.wanted):
            raise BadCorpus(
                f"bases {tuple(self.base.shape)}, sources {tuple(self.source.shape)} and answers {tuple(self.wanted.shape)} do "
                "not pair up; give as many of each, at least one, and texts of as many tokens"
            )

    def keys(self) -> set[tuple]:
        """What tells pairs apart."""
        both = zip(self.base.flatten(1).tolist(), self.source.flatten(1).tolist(), strict=True)
        return {(tuple(a), tuple(b)) for a, b in both}

    def some(self, at: Tensor) -> Swaps:
        return Swaps(self.base[at], self.source[at], self.wanted[at])


@plain(frozen=True)
class Tally:
    """hits: (N,) whether swapping gave what the story says.  before: the same of the base run, where nothing was swapped."""

    hits: Tensor
    before: Tensor

    @property
    def iia(self) -> float:
        return float(self.hits.float().mean())

    @property
    def chance(self) -> float:
        return float(self.before.float().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, after Wilson."""
        n, p, z = len(self.hits), self.iia, 1.96
        middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def swapped_logits(model: nn.Module, run: Run, part: Part, swaps: Swaps, basis: Tensor | None = None) -> Tensor:
    """Logits of the bases with the sources' values at the part, or at the `basis` (D, k) of its site alone. -> (N, C)"""
    with torch.no_grad(), watched(model, [part.site]) as theirs:
        run(model, swaps.source)
    source = theirs[part.site].detach()
    if basis is None:
        edits = put([part], theirs)
    else:
        if part.dims is not None:
            raise BadRequest("a basis and dims were both given; a basis is of the whole site, so leave out dims")

        def moved(base: Tensor) -> Tensor:
            turned = base + (source - base) @ basis @ basis.T
            return turned if part.places is None else torch.where(part.places[..., None], turned, base)

        edits = {part.site: moved}
    with edited(model, edits):
        return run(model, swaps.base)


@torch.no_grad()
def tally(model: nn.Module, run: Run, part: Part, swaps: Swaps, basis: Tensor | None = None) -> Tally:
    """IIA of a part, whole or on a basis."""
    swapped, plain_run = swapped_logits(model, run, part, swaps, basis), run(model, swaps.base)
    return Tally(swapped.argmax(-1) == swaps.wanted, plain_run.argmax(-1) == swaps.wanted)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy whose matrices are drawn anew, normal with their own spread; vectors (norms, biases) stay."""
    fresh, random = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in fresh.parameters():
            if weight.dim() > 1:
                drawn = torch.randn(weight.shape, generator=random) * float(weight.float().std())
                weight.copy_(drawn)
    return fresh


@plain(frozen=True)
class Alignment:
    """basis: (D, k).  test, train: tallies on pairs not trained on and trained on; control: on test, of a random model."""

    basis: Tensor
    test: Tally
    train: Tally
    control: Tally


@dataclass(frozen=True, config=STRICT)
class AlignmentSearch:
    """Learns the k orthonormal directions of a site whose swap does what the story says.  batch: pairs a step, 0 = all."""

    k: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)] = 200
    lr: Annotated[float, Field(gt=0, lt=1)] = 0.02
    batch: Annotated[int, Field(ge=0)] = 64
    seed: Annotated[int, Field(ge=0)] = 0

    paper = "Geiger et al. 2024, arXiv 2303.02536"
    summary = "directions of a site that carry a variable, with a random model as control"

    def __call__(self, model: nn.Module, run: Run, part: Part, train: Swaps, test: Swaps) -> Alignment:
        """BadCorpus where a test pair was trained on; BadRequest where k leaves nothing of the site unswapped."""
        if both := len(train.keys() & test.keys()):
            raise BadCorpus(
                f"{both} pairs are in train and in test; an alignment must be scored on pairs it has not seen"
            )
        basis = self._learnt(model, run, part, train)
        control = randomised(model, self.seed)
        theirs = self._learnt(control, run, part, train)
        return Alignment(
            basis,
            tally(model, run, part, test, basis),
            tally(model, run, part, train, basis),
            tally(control, run, part, test, theirs),
        )

    def _learnt(self, model: nn.Module, run: Run, part: Part, train: Swaps) -> Tensor:
        with torch.no_grad(), watched(model, [part.site]) as seen:
            run(model, train.base[:1] if part.places is None else train.base)
        width = seen[part.site].shape[-1]
        if self.k >= width:
            raise BadRequest(
                f"k = {self.k} of the site's {width} dimensions swaps all of it, and there is nothing to find; take a smaller k"
            )
        random = torch.Generator().manual_seed(self.seed)
        free = torch.randn(width, self.k, generator=random).to(seen[part.site].device).requires_grad_()
        optimiser = torch.optim.Adam([free], lr=self.lr)
        count = min(self.batch or len(train.wanted), len(train.wanted))
        for step in range(self.steps):
            at = torch.randperm(len(train.wanted), generator=random)[:count]
            here = part if part.places is None else replace(part, places=part.places[at])
            with torch.enable_grad():
                logits = swapped_logits(model, run, here, train.some(at), torch.linalg.qr(free).Q)
                loss = (
                    F.cross_entropy(logits.float(), train.wanted[at]) + 0 * free.sum()
                )  # 0 ·: nobody may read the site
                [free.grad] = torch.autograd.grad(loss, [free])
            if not torch.isfinite(free.grad).all():
                raise Diverged(step + 1, {"alignment": float(loss)})
            optimiser.step()
        return torch.linalg.qr(free.detach()).Q
