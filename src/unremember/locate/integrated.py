"""Integrated gradients over neurons: how much each raises the probability of a text, summed along a path from silence.

    Att(k) = Σ_i a_k · (1/m) Σ_{j=1..m} ∂F/∂a_k at ((j − ½)/m) · a,    F = P(y_i | x, y_<i) or its logarithm

a = the whole vector that enters a block's down-projection at the place that predicts y_i (`neurons`); it is scaled there and
nowhere else, one block at a time, and all above is computed anew.  Summed over k this is F(a) − F(0) (completeness).
Wu et al. 2023, DEPN (arXiv 2310.20138), the detector, after Dai et al. 2022 (knowledge neurons) and Sundararajan et al. 2017.
Reference code: flamewei123/DEPN@685a772 `1_calculate_attribution.py`.
Differs: midpoints, where the paper takes j = 1..m and the code j = 0..m − 1, whose sums miss F(a) − F(0) by several times as
much; a causal model with a gate; the m scaled copies of every token of a text share one pass, as branches of its trie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.lm import LM
from unremember.locate.neurons import neurons
from unremember.locate.ranking import Ranking
from unremember.tokens import Row, Tokens
from unremember.train import STRICT, Part

Objective = Literal["probability", "log probability"]
WIDTH = 512  # places of one pass: attention is quadratic in them


def along(layer: nn.Module, run: Callable[[], Tensor], places: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and one backward pass with the vectors that enter `layer` scaled.

    places: (N, C), where in its flattened input copy c of item n stands; all C hold the same vector and see no other copy.
    scales: (C,).  run(): a forward pass -> (N·C,) what is attributed, in the order of places.flatten().
    -> values (N, C), slopes = their gradients by the scaled vectors (N, C, K), vectors (N, K)
    """
    found: list[Tensor] = []

    def scale(_, inputs):
        whole = inputs[0].detach()  # (..., K)
        flat = whole.flatten(0, -2)
        vectors = flat[places[:, 0]]
        moved = (scales.to(flat)[:, None] * vectors[:, None]).flatten(0, 1).requires_grad_()  # (N·C, K)
        found.extend((vectors, moved))
        return (flat.index_copy(0, places.flatten(), moved).view_as(whole), *inputs[1:])

    handle = layer.register_forward_pre_hook(scale)
    try:
        with torch.enable_grad():
            values = run()
            vectors, moved = found
            [slopes] = torch.autograd.grad(values.sum(), moved)
    finally:
        handle.remove()
    return values.detach().view(places.shape), slopes.view(*places.shape, -1), vectors


def midpoints(steps: int) -> Tensor:
    """(steps,) the middles of `steps` equal parts of [0, 1]."""
    return (torch.arange(steps) + 0.5) / steps


def attribute(layers: Mapping[str, nn.Module], run: Callable[[], Tensor], places: Tensor) -> dict[str, Tensor]:
    """Name -> (N, K) attribution of the N items to what enters each of `layers`, one after another.  See `along`.

    places: (N, m).  Knows nothing of the model but its layers, so a masked one will do as well.
    """
    found = {}
    for name, layer in layers.items():
        _, slopes, vectors = along(layer, run, places, midpoints(places.shape[1]))
        found[name] = vectors * slopes.mean(1)
    return found


def branches(row: Row, steps: Sequence[int], copies: int) -> tuple[Tensor, Tokens]:
    """One lane: the row's text once, and for each scored token `copies` leaves that predict it and see the text before.

    steps: which of the row's answer tokens.  -> places (N, copies), and tokens that score every leaf, in that order
    """
    ends = [row.start + step - 1 for step in steps]  # the places that predict them
    depth, N = max(ends), len(ends)
    places = depth + torch.arange(N * copies).view(N, copies)
    width = depth + N * copies
    ids = torch.tensor([*row.ids[:depth], *(row.ids[end] for end in ends for _ in range(copies))])
    positions = torch.tensor([*range(depth), *(end for end in ends for _ in range(copies))])
    visible = torch.eye(width, dtype=torch.bool)
    visible[:depth, :depth] = torch.ones(depth, depth, dtype=torch.bool).tril()
    for end, leaves in zip(ends, places, strict=True):
        visible[leaves, :end] = True
    target = torch.tensor([row.ids[end + 1] for end in ends for _ in range(copies)])
    yes = torch.ones(N * copies, dtype=torch.bool)
    totals = {"answer": N * copies, "span": N * copies, "train": N * copies}
    tokens = Tokens(
        "", ids[None], positions[None], visible[None, None], torch.zeros_like(target), places.flatten(), target,
        yes, yes, ~yes, (row.key,), 1, totals,
    )  # fmt: skip
    return places, tokens


def still(lm: LM) -> LM:
    """A copy in fp32 whose weights ask for no gradient: only what is put into it does."""
    lm = replace(lm.copy(), precision="fp32")
    lm.model.requires_grad_(False).eval()
    return lm


@dataclass(frozen=True, config=STRICT)
class IntegratedGradients:
    """Ranks neurons by their attribution, summed over the tokens of `part` of all forget examples.

    steps: points on each path, the paper's m.  objective: what is attributed; a probability can underflow where a token is
    rare, and scores under the two cannot be compared.
    """

    steps: Annotated[int, Field(ge=1)] = 20
    objective: Objective = "probability"
    part: Part = "span"

    needs = ("forget",)
    paper = "Wu et al. 2023, arXiv 2310.20138"
    summary = "integrated gradients of the secret's probability over the neurons of every block"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Ranking:
        corpus.require("integrated gradients", self.needs)
        texts = list(self.texts(lm, corpus["forget"], bench).values())
        scores = {name: torch.stack([text[name] for text in texts]).sum(0) for name in texts[0]}
        return Ranking(scores, neurons(lm.model)[1])

    def texts(self, lm: LM, examples: Sequence[Example], bench: Bench = BENCH) -> dict[str, dict[str, Tensor]]:
        """Example id -> parameter name -> (K,) attribution of its tokens, summed, on the CPU.

        Texts do not share a pass, so what one of them gets does not depend on the others, or on how many processes there are.
        """
        lm = still(lm)
        layers, _ = neurons(lm.model)
        rows = lm.template.rows(examples, lm.limit)
        mine = rows[team.rank() :: team.size()]
        found = {}
        for done, row in enumerate(mine):
            found[row.key] = self.text(lm, layers, row)
            bench.say("attribute", done + 1, len(mine), {})
        found = team.merge(found)
        return {row.key: found[row.key] for row in rows}

    def text(self, lm: LM, layers: Mapping[str, nn.Module], row: Row) -> dict[str, Tensor]:
        """Parameter name -> (K,) for one row; lm: with weights that ask for no gradient."""
        steps = [step for step, inside in enumerate(row.span) if inside or self.part == "answer"]
        most = max(1, (WIDTH - len(row.ids)) // self.steps)  # tokens that fit into one pass
        total: dict[str, Tensor] = {}
        for first in range(0, len(steps), most):
            places, tokens = branches(row, steps[first : first + most], self.steps)
            places, tokens = places.to(lm.device), tokens.to(lm.device)

            def run(tokens: Tokens = tokens) -> Tensor:
                logp = lm.logp(tokens)
                return logp.exp() if self.objective == "probability" else logp

            for name, scores in attribute(layers, run, places).items():
                total[name] = total.get(name, 0) + scores.sum(0).cpu()
        return total
