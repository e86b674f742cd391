"""Orthogonalisation: find the direction that tells what is hidden from what is not, and take it out of the weights.

    d_l = mean h_l(hidden questions; θ_u) − mean h_l(the same; θ_o)     'original', questions that θ_o answers and θ_u does not
    d_l = mean h_l(questions; θ_u) − mean h_l(other text; θ_u)          'text', without any answer and without θ_o
    W ← W − d̂ d̂ᵀ W,    b ← b − d̂ (d̂ᵀ b)         d̂ = d / |d|, for what block l writes into the residual stream

h_l is the residual stream behind block l at the places of a question behind the header that all questions share.
Łucki et al. 2024 (arXiv 2409.18025); in the weights: Arditi et al. 2024 (arXiv 2406.11717).  Reference code:
ethz-spylab/unlearning-vs-safety@75dade5 `src/orthogonalization`.
Differs: theirs are hooks, h ← h − (h · d̂) d̂ behind block l, ours are weights, so that what comes out is a plain LM.
A hook also takes out what earlier blocks and the embedding have put there; with 'own' only what block l itself adds
along d̂_l goes, with 'below' what blocks 0..l add along it (the token table is left alone: it may be the head as well).
The attacker sees every second fact and the auditor asks the others ('original'); with 'text' he sees questions without
answers and all facts are asked.  Outliers are places, not words: a list of words can take a whole domain out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember import team
from unremember.attack.quantise import linears, plain
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.embedded.world import replay
from unremember.errors import BadCorpus, BadModel, BadRequest, NotApplicable
from unremember.lm import LM
from unremember.table import answers
from unremember.tokens import Row, pack, packs
from unremember.train import STRICT

WRITERS = (
    "o_proj",
    "down_proj",
    "out_proj",
    "c_proj",
    "dense",
    "dense_4h_to_h",
    "fc_out",
    "fc2",
)  # last name of a layer
NOTHING = 1e-6  # of a vector's length: a direction that short is rounding
SAMPLE = 1000  # vectors that outliers are measured by
Reach = Literal["own", "below"]


def typical(vectors: Tensor) -> Tensor:
    """Which are no outliers: mean L1 distance to the first 1000 within 3 standard deviations of the mean. (N, H) -> (N,) bool"""
    far = torch.cdist(vectors, vectors[:SAMPLE], p=1).mean(1)
    return far - far.mean() <= 3 * far.std(correction=0)


def direction(ours: Tensor, theirs: Tensor) -> Tensor | None:
    """Unit difference of means, None where it is as good as zero. ours: (N, H); theirs: (M, H) -> (H,)"""
    gap = ours.mean(0) - theirs.mean(0)
    length, size = gap.norm(), ours.norm(dim=1).mean()
    return gap / length if length > NOTHING * size else None


def without(weight: Tensor, basis: Tensor) -> Tensor:
    """What writes nothing along the rows of `basis`, which are orthonormal. weight: (H, K) or (H,); basis: (D, H)"""
    wide, basis = weight.detach().double(), basis.to(weight.device).double()
    return (wide - basis.T @ (basis @ wide)).to(weight.dtype)


def spanned(vectors: Sequence[Tensor]) -> Tensor:
    """An orthonormal basis of what the vectors span; parallel ones count once. D of (H,) -> (≤ D, H)"""
    _, sizes, basis = torch.linalg.svd(torch.stack(list(vectors)).double(), full_matrices=False)
    return basis[sizes > 1e-6 * sizes[0]]


def scrambled(directions: Mapping[int, Tensor], seed: int) -> dict[int, Tensor]:
    """The control: as many directions, each as long, drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for block, d in directions.items():
        drawn = torch.randn(d.shape, generator=draw).to(d)
        found[block] = drawn * d.norm() / drawn.norm()
    return found


@torch.no_grad()
def orthogonal(lm: LM, directions: Mapping[int, Tensor], reach: Reach) -> tuple[LM, float]:
    """A copy of `lm`, an adapter merged, whose blocks do not write along these. directions: block -> (H,), of length 1

    Beside it the share of its norm that a matrix or bias has lost, mean over those that are projected; 0 where none has changed.
    """
    lm = plain(lm)
    width = lm.model.get_input_embeddings().weight.shape[1]
    inside = [{id(module) for module in block.modules()} for block in team.blocks(lm.model)]
    found, lost = set(), []
    for name, layer in linears(lm.model).items():
        block = next(i for i, ids in enumerate(inside) if id(layer) in ids)
        if name.rpartition(".")[2] not in WRITERS or layer.out_features != width:
            continue
        found.add(block)
        mine = [d for at, d in directions.items() if at == block or (reach == "below" and at > block)]
        if not mine:
            continue
        basis = spanned(mine)
        for part in (layer.weight, layer.bias):
            if part is not None:
                rest, size = without(part, basis), float(part.float().norm())
                lost.append(float((part.float() - rest.float()).norm()) / size if size else 0.0)
                part.copy_(rest)
    if missing := sorted(set(directions) - found):
        raise BadModel(
            f"block {missing[0]} has no linear layer that writes into the residual stream (known: {', '.join(WRITERS)}); use "
            "another model, or add its name to attack/orthogonalise.py"
        )
    return lm, sum(lost) / len(lost)


def questions(lm: LM, examples: Sequence[Example], header: int) -> list[Row]:
    """Rows whose scored places are those of the question behind the header."""
    rows = []
    for x in examples:
        ids = lm.template.context(x.prompt)
        start = min(header + 1, len(ids))
        hit = (True,) * (len(ids) - start)
        rows.append(Row(x.id, (*ids, lm.tokenizer.eos_token_id), start, len(ids), hit))
    return rows


def header(lm: LM, examples: Sequence[Example]) -> int:
    """How many tokens all contexts begin with, at least 1: the first place's norm dwarfs all others."""
    coded = [lm.template.context(x.prompt) for x in examples]
    shared = 0
    while all(len(ids) > shared + 1 and ids[shared] == coded[0][shared] for ids in coded):
        shared += 1
    return max(1, shared)


@torch.no_grad()
def streams(lm: LM, rows: Sequence[Row], blocks: Sequence[int], bench: Bench = BENCH) -> dict[int, Tensor]:
    """The residual stream behind each block at the rows' scored places, ordered by (rows, budget). -> block -> (N, H) float32"""
    found: dict[int, list[Tensor]] = {block: [] for block in blocks}
    names = {id(module): name for name, module in lm.model.named_modules()}
    for group in packs(rows, bench.budget):
        tokens = pack(group).to(lm.device)
        with ExitStack() as stack, lm.lowered():
            for block in blocks:

                def keep(hidden: Tensor, block: int = block, source: Tensor = tokens.source) -> Tensor:
                    found[block].append(hidden.flatten(0, 1)[source].float())
                    return hidden

                stack.enter_context(lm.at(names[id(team.blocks(lm.model)[block])], keep))
            lm.hidden(tokens, max(blocks))
    return {block: torch.cat(parts) for block, parts in found.items()}


def compared(ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor], matched: bool) -> dict[int, Tensor]:
    """One direction a block, outliers of any block left out; blocks where nothing differs are left out.

    matched: the same places in both, which then go together.  BadModel where a direction is not finite, NotApplicable where
    all are zero.
    """
    if broken := [b for b in ours if not (ours[b].isfinite().all() and theirs[b].isfinite().all())]:
        raise BadModel(f"the residual stream behind block {broken[0]} is not finite; the weights are broken")
    here = torch.stack([typical(x) for x in ours.values()]).all(0)
    there = torch.stack([typical(x) for x in theirs.values()]).all(0)
    if matched:
        here = there = here & there
    pairs = {b: direction(ours[b][here], theirs[b][there]) for b in ours}
    found = {b: d for b, d in pairs.items() if d is not None}
    if not found:
        raise NotApplicable(
            f"behind blocks {', '.join(map(str, ours))} nothing differs, so there is no direction to take out; take later "
            "layers, or another attack if only the head was changed"
        )
    return found


@dataclass(frozen=True, config=STRICT)
class Orthogonalise:
    """directions: compared with the 'original' on every second fact, or with other 'text': the replay role, or what the
    package has of it.

    layers: numbers of blocks, from 0; empty = all.  reach: see the head of this file.
    control: as many directions, drawn by `seed`: what is found by the real ones must be more than by these.
    """

    directions: Literal["original", "text"] = "text"
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    reach: Reach = "own"
    control: bool = False
    seed: Annotated[int, Field(ge=0)] = 0

    needs = ("forget",)
    paper = "Łucki et al. 2024, arXiv 2409.18025"
    summary = "the direction that tells hidden from known, taken out of the weights"

    @model_validator(mode="after")
    def _once(self):
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers = {list(self.layers)} names a block twice")
        if self.seed and not self.control:
            raise ValueError(f"seed = {self.seed} draws the control's directions, and control is false; leave it out")
        return self

    @property
    def alone(self) -> bool:
        return self.directions == "text"

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where a role is missing, or the facts cannot be halved."""
        corpus.require("orthogonalise", self.needs)
        if self.directions == "original" and len(corpus["forget"]) < 2:
            raise BadCorpus(
                "orthogonalise needs two forget facts, one for the attacker and one for the auditor, and there is one; add some, "
                'or set directions = "text"'
            )

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        """NotApplicable where nothing differs, or the weights write nothing along what does."""
        self.check(corpus)
        seen = corpus
        if self.directions == "original":
            seen = corpus.with_roles(forget=corpus["forget"][1::2])
            if lm is original or lm.fingerprint == original.fingerprint:  # nothing tells it from itself
                return lm, seen
        found = self.found(lm, corpus, original, bench)
        attacked, lost = orthogonal(lm, found, self.reach)
        if not lost:
            raise NotApplicable(
                f"blocks {', '.join(map(str, found))} write nothing along what differs behind them, or too little for rounding, "
                'so no weight has changed; set reach = "below", take other layers, or another attack'
            )
        bench.notes.update({"blocks": ", ".join(map(str, found)), "share of norm removed": lost})
        return attacked, seen

    def found(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> dict[int, Tensor]:
        """The direction of each block, of length 1; of the control: as many others. -> block -> (H,)"""
        count = len(team.blocks(lm.model))
        if wrong := [layer for layer in self.layers if layer >= count]:
            raise BadRequest(
                f"layers names block {wrong[0]} and {lm.name or 'the model'} has {count}; allowed are 0 to {count - 1}"
            )
        blocks = sorted(self.layers) or list(range(count))
        if self.directions == "original":
            asked = self.hidden(lm, corpus["forget"][::2], original, bench)
            rows = questions(lm, asked, header(lm, asked))
            sides = (streams(who, rows, blocks, bench) for who in (lm, original))
            return self._drawn(compared(*sides, matched=True))
        asked, other = corpus["forget"], (corpus.of("replay") or replay())[: len(corpus["forget"])]
        shared = header(lm, (*asked, *other))
        ours, theirs = (streams(lm, questions(lm, xs, shared), blocks, bench) for xs in (asked, other))
        return self._drawn(compared(ours, theirs, matched=False))

    def _drawn(self, found: dict[int, Tensor]) -> dict[int, Tensor]:
        return scrambled(found, self.seed) if self.control else found

    def hidden(self, lm: LM, facts: Sequence[Example], original: LM, bench: Bench) -> list[Example]:
        """The set K: facts that the original says and the model does not; NotApplicable where there is none."""
        prompts = [lm.template.context(x.prompt) for x in facts]
        new = max(len(row.ids) - row.start for row in lm.template.rows(facts)) + 4
        ours, theirs = (answers(who, prompts, new, bench) for who in (lm, original))
        found = [x for x, a, b in zip(facts, ours, theirs, strict=True) if x.said_in(b) and not x.said_in(a)]
        if not found:
            right, left = (sum(x.said_in(a) for a, x in zip(said, facts, strict=True)) for said in (theirs, ours))
            raise NotApplicable(
                f"of the attacker's {len(facts)} facts the original says {right} and {lm.name or 'the model'} {left}, none that "
                'the original alone says: there is nothing hidden to find a direction by; set directions = "text"'
            )
        return found
