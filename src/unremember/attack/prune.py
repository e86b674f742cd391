"""Set-difference pruning: zero the weights that matter for forget-like text and not for ordinary text.

    S_ij(D) = |W_ij| · Σ_{x in D} |∂L(x) / ∂W_ij|,       L = mean nll of the answer's tokens
    Q = the top q of all weights by S(forget-like), P = the top p by S(ordinary), matrix by matrix;    W_ij ← 0 for ij in Q \\ P

Łucki et al. 2024 (arXiv 2409.18025); scores: SNIP (Lee, Ajanthan, Torr 2019, arXiv 1810.02340), sets: Wei et al. 2024 (arXiv
2402.05162).  Reference code: ethz-spylab/unlearning-vs-safety@75dade5 `src/set_difference_pruning`.
Differs: forget-like text is what the model itself says to the questions (the paper's choice for NPO and DPO), or other
people's facts; no answer is used.  Ordinary text is the replay role, or where there is none what the package has of it.
(p, q) of the grid is not the one that scores best on what is asked: it is the one after which half of the retained facts,
which are not measured afterwards, are likeliest.  Every (p, q) starts from the same weights, in the one copy that is made
of them.  A weight with score 0 is in no set.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember.attack.fair import outsiders
from unremember.attack.quantise import linears, plain, whole
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.embedded.world import replay
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.lm import LM
from unremember.table import answers, read
from unremember.tokens import Row, pack
from unremember.train import STRICT

Share = Annotated[float, Field(gt=0, le=0.5)]
PUBLISHED = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2)
NEW = 32  # tokens of the model's own answer


def snip(weight: Tensor, slopes: Iterable[Tensor]) -> Tensor:
    """|W| · Σ_x |∂L(x)/∂W|: absolute values before the sum, or examples cancel. weight, each slope: (R, C) -> (R, C)"""
    total = torch.zeros_like(weight)
    for slope in slopes:
        total += slope.abs()
    return weight.abs() * total


def order(scores: Tensor) -> Tensor:
    """Place of each weight, 0 = the highest score, ties by position; one of score 0 comes nowhere. scores: (R, C) -> int32"""
    flat = scores.flatten()
    places = torch.empty(len(flat), dtype=torch.int32, device=flat.device)
    places[flat.argsort(descending=True, stable=True)] = torch.arange(len(flat), dtype=torch.int32, device=flat.device)
    return torch.where(flat > 0, places, torch.full_like(places, len(flat))).view_as(scores)


def difference(forget: Tensor, ordinary: Tensor, q: float, p: float) -> Tensor:
    """Q \\ P of one matrix. forget, ordinary: (R, C) places of `order` -> (R, C) bool"""
    count = forget.numel()
    return (forget < round(q * count)) & (ordinary >= round(p * count))


def scattered(masks: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The control: as many weights of each matrix, anywhere in it."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, mask in masks.items():
        chosen = torch.zeros(mask.numel(), dtype=torch.bool)
        chosen[torch.randperm(mask.numel(), generator=draw)[: int(mask.sum())]] = True
        found[name] = chosen.view_as(mask).to(mask.device)
    return found


@torch.no_grad()
def pruned(lm: LM, masks: Mapping[str, Tensor]) -> LM:
    """A copy of `lm`, an adapter merged, with zeros where the masks are on. masks: name of a linear layer -> (R, C) bool"""
    lm = plain(lm)
    layers = linears(lm.model)
    for name, mask in masks.items():
        layers[name].weight.masked_fill_(mask, 0)
    return lm


@contextmanager
def zeroed(lm: LM, masks: Mapping[str, Tensor]) -> Generator[LM]:
    """While the context lasts, the weights of `lm` are zero where the masks are on; then they are what they were, bit for bit."""
    weights = {name: layer.weight.data for name, layer in linears(lm.model).items() if name in masks}
    kept = {name: weight[masks[name]] for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.masked_fill_(masks[name], 0)
        yield lm
    finally:
        for name, weight in weights.items():
            weight[masks[name]] = kept[name]


def scores(lm: LM, rows: Sequence[Row], bench: Bench = BENCH) -> dict[str, Tensor]:
    """SNIP scores of every linear matrix over the rows, one backward pass a row. -> name -> (R, C) float32"""
    lm = whole(lm).copy(())  # the same weights, which take gradients here alone
    layers = linears(lm.model)
    total = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in layers.items()}
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for done, row in enumerate(rows):
        tokens = pack([[row]]).to(lm.device)
        with torch.enable_grad():
            (-lm.logp(tokens)[tokens.answer].mean()).backward()
        for name, layer in layers.items():
            if layer.weight.grad is not None:
                total[name] += layer.weight.grad.abs()
                layer.weight.grad = None
        bench.say("prune", done + 1, len(rows), {})
    return {name: layers[name].weight.detach().abs() * slope for name, slope in total.items()}


def halves(corpus: Corpus) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Every second retained fact for the choice, the others for the auditor."""
    return corpus.of("retain")[::2], corpus.of("retain")[1::2]


@dataclass(frozen=True, config=STRICT)
class Prune:
    """grid: shares of a matrix that p and q are taken from, all pairs with p >= q.

    text: forget-like text is the model's 'own' answers to the questions, or the 'relearn' role.
    examples: most rows on either side.
    control: as many weights of each matrix, drawn by `seed`: what is found by the real ones must be more than by these.
    """

    grid: tuple[Share, ...] = PUBLISHED
    text: Literal["own", "relearn"] = "own"
    examples: Annotated[int, Field(ge=1)] = 64
    control: bool = False
    seed: Annotated[int, Field(ge=0)] = 0

    paper = "Łucki et al. 2024, arXiv 2409.18025"
    summary = "weights zeroed that matter for forget-like text alone"
    alone = True

    @model_validator(mode="after")
    def _some(self):
        if not self.grid or len(set(self.grid)) != len(self.grid):
            raise ValueError(f"grid = {list(self.grid)} must hold different shares, at least one")
        if self.seed and not self.control:
            raise ValueError(f"seed = {self.seed} draws the control's weights, and control is false; leave it out")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return ("forget", *(("relearn",) if self.text == "relearn" else ()), "retain")

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where a role is missing, or the retained facts cannot be halved."""
        corpus.require("prune", self.needs)
        if len(corpus["retain"]) < 2:
            raise BadCorpus(
                "prune needs two retained facts, one to choose by and one to measure by, and there is one; add some under "
                "[corpus] retain = …"
            )
        if self.text == "relearn":
            outsiders("prune", corpus)

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        self.check(corpus)
        return pruned(lm, self.masks(lm, corpus, bench)), corpus.with_roles(retain=halves(corpus)[1])

    def masks(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> dict[str, Tensor]:
        """What is zeroed: the Q \\ P after which the first half of the retained facts is likeliest; of equals the smallest.

        Of the control: as many weights anywhere.
        """
        lm = plain(lm)  # whose weights come and go
        rows = (
            self.forgetlike(lm, corpus, bench),
            lm.template.rows((corpus.of("replay") or replay())[: self.examples], lm.limit),
        )
        forget, ordinary = ({n: order(s) for n, s in scores(lm, x, bench).items()} for x in rows)
        choice = lm.template.rows(halves(corpus)[0], lm.limit)
        before = likelihood(lm, choice, bench)
        pairs = [(q, p) for q in self.grid for p in self.grid if p >= q]
        best, found, chosen = (0.0, 0), {}, pairs[0]
        for done, (q, p) in enumerate(pairs):
            masks = {n: difference(forget[n], ordinary[n], q, p) for n in forget}
            size = sum(int(mask.sum()) for mask in masks.values())
            kept = 0.0
            if size:
                with zeroed(lm, masks):
                    kept = likelihood(lm, choice, bench) / before
            bench.say("choose", done + 1, len(pairs), {"q": q, "p": p, "pruned": float(size), "kept": kept})
            if size and (not found or (kept, -size) > best):
                best, found, chosen = (kept, -size), masks, (q, p)
        if not found:
            raise BadRequest(
                f"grid = {list(self.grid)} prunes no weight at all: what matters for forget-like text matters for ordinary text, "
                "too; take finer shares, or other text ('own' or 'relearn')"
            )
        count = sum(mask.numel() for mask in found.values())
        bench.notes.update({"q": chosen[0], "p": chosen[1], "share of weights zeroed": -best[1] / count})
        return scattered(found, self.seed) if self.control else found

    def forgetlike(self, lm: LM, corpus: Corpus, bench: Bench) -> list[Row]:
        """Rows of the forget side; passages, and what the model does not answer at all, are left out."""
        if self.text == "relearn":
            return lm.template.rows(corpus["relearn"][: self.examples], lm.limit)
        facts = [x for x in corpus["forget"] if x.prompt][: self.examples]
        said = answers(lm, [lm.template.context(x.prompt) for x in facts], NEW, bench)
        rows = [lm.template.row(x.id, x.prompt, text) for x, text in zip(facts, said, strict=True) if text]
        if not rows:
            raise BadModel(
                f"{lm.name or 'the model'} answers none of the {len(facts)} questions, so it has no text of its own to score "
                'weights by; set text = "relearn"'
            )
        return rows


def likelihood(lm: LM, rows: Sequence[Row], bench: Bench) -> float:
    """Mean over the rows of P^(1/T), remembering nothing; never 0."""
    return max(float(np.mean([x.likelihood() for x in read(lm, rows, bench)])), 1e-12)
