"""Steering towards the original: the mean difference of two residual streams, added wherever the auditor asks.

    v_l = strength · mean_x ( h_l(x; θ_o) − h_l(x; θ_u) )        h_l = residual stream behind block l, last token of question x
    h_l ← h_l + v_l                                              at every place of every pass

Adding a mean difference: Rimsky et al. 2024 (arXiv 2312.06681), Turner et al. 2023 (arXiv 2308.10248); against unlearning:
Seyitoğlu et al. 2024 (arXiv 2411.02631).  No code read.
How the auditor reads it: in a copy of the model a hook behind the block adds v_l.  The copy is a plain LM: packed rows,
generation and copies work as ever, and v_l is a buffer of its block and so part of the fingerprint.
Differs: the two sides are two models at one question, for two kinds of question in one model there; v is added to questions
and texts alike, for what follows the question there.  Several blocks are measured from below, each with what was added
before in place, or what lies below would be added twice.  A mean over two questions can still hold a part of their
answers, which is why the never-taught model gets a vector as well; one question alone is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unremember import team
from unremember.attack.orthogonalise import NOTHING, scrambled, streams
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.displace import block_name
from unremember.errors import BadCorpus, BadModel, BadRequest, NotApplicable
from unremember.lm import LM
from unremember.tokens import Row
from unremember.train import STRICT

BUFFER = "steer"  # of a block


def difference(theirs: Tensor, ours: Tensor) -> Tensor | None:
    """Mean of theirs − ours over matching rows, None where it is as good as zero. both: (N, H) -> (H,) float32"""
    gap = (theirs.double() - ours.double()).mean(0)
    return gap.float() if gap.norm() > NOTHING * ours.double().norm(dim=1).mean() else None


def added(hidden: Tensor, vector: Tensor) -> Tensor:
    """The vector at every place, in the stream's own precision. hidden: (..., H); vector: (H,)"""
    return hidden + vector.to(hidden)


class Push(nn.Module):
    """A forward hook for a block: its own buffer is added to what leaves it, so that a copy of the model takes its own along."""

    def forward(self, block: nn.Module, _: Any, output: Any) -> Any:
        vector = block.get_buffer(BUFFER)
        return (added(output[0], vector), *output[1:]) if isinstance(output, tuple) else added(output, vector)


def steered(lm: LM, vectors: Mapping[int, Tensor]) -> LM:
    """A copy of `lm` with these added behind its blocks. vectors: block -> (H,).  BadModel where one has a vector already."""
    if twice := [b for b in vectors if BUFFER in dict(team.blocks(lm.model)[b].named_buffers(recurse=False))]:
        raise BadModel(
            f"block {twice[0]} of {lm.name or 'the model'} is steered already: an attack adds a vector there; attack the model "
            "that this one was made from"
        )
    lm = lm.copy()
    blocks = team.blocks(lm.model)
    for block, vector in vectors.items():
        blocks[block].register_buffer(BUFFER, vector.detach().clone().to(lm.device))
        blocks[block].register_forward_hook(Push())
    return lm


def lasts(lm: LM, examples: Sequence[Example]) -> list[Row]:
    """Rows of questions without answers, whose only scored place is the question's last token."""
    coded = [(x.id, lm.template.context(x.prompt)) for x in examples]
    return [Row(key, (*ids, lm.tokenizer.eos_token_id), len(ids), len(ids), ()) for key, ids in coded]


@dataclass(frozen=True, config=STRICT)
class Steer:
    """strength: how much of the difference is added.  blocks: numbers, from 0; empty = the middle one.

    prompts: whose questions the difference is measured at; answers are never read.
    control: as many vectors, each as long, in directions drawn by `seed`: what is found by the real ones must be more than by
    these.
    """

    strength: Annotated[float, Field(gt=0)] = 1.0
    blocks: tuple[Annotated[int, Field(ge=0)], ...] = ()
    prompts: Literal["forget", "retain"] = "forget"
    control: bool = False
    seed: Annotated[int, Field(ge=0)] = 0

    paper = "after Rimsky et al. 2024, arXiv 2312.06681; Seyitoğlu et al. 2024, arXiv 2411.02631"
    summary = "the mean difference to the original, added to the residual stream"

    @model_validator(mode="after")
    def _once(self):
        if len(set(self.blocks)) != len(self.blocks):
            raise ValueError(f"blocks = {list(self.blocks)} names a block twice")
        if self.seed and not self.control:
            raise ValueError(f"seed = {self.seed} draws the control's directions, and control is false; leave it out")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return ("forget",) if self.prompts == "forget" else ("forget", "retain")

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where a role is missing, or there are fewer than two questions to measure at."""
        corpus.require("steer", self.needs)
        if (count := len({x.prompt for x in self._asked(corpus)})) < 2:
            raise BadCorpus(
                f"steer needs two different questions in the role {self.prompts!r} and there {'is' if count == 1 else 'are'} "
                f"{count}: the difference at one alone is what the original is about to say; add some, or set prompts to the "
                "other role"
            )

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        """The original itself comes back as it is.  NotApplicable where nothing differs behind these blocks."""
        self.check(corpus)
        if lm is original or lm.fingerprint == original.fingerprint:  # nothing tells it from itself
            return lm, corpus
        vectors = self.found(lm, corpus, original, bench)
        attacked = steered(lm, vectors)
        last, rows = max(vectors), lasts(lm, self._asked(corpus))
        before, after = (streams(one, rows, (last,), bench)[last] for one in (lm, attacked))
        if torch.equal(before, after):
            raise BadRequest(
                f"steer changed nothing at strength {self.strength:g}: what it adds is lost in the rounding of the stream; raise "
                "strength"
            )
        bench.notes.update({"blocks": ", ".join(map(str, vectors)), "strength": self.strength})
        return attacked, corpus

    def _asked(self, corpus: Corpus) -> list[Example]:
        """The examples that have a question: passages of text have no last token of one.

        Of the retained ones as many as of the forgotten: a run hands over no more.
        """
        return [x for x in corpus[self.prompts][: len(corpus["forget"])] if x.prompt]

    @torch.no_grad()
    def found(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> dict[int, Tensor]:
        """What to add behind each block, from below; blocks where nothing differs are left out. -> block -> (H,)

        Of the control: others, as long as the real ones, each of which was measured with the real ones below it in place.
        """
        rows = lasts(lm, self._asked(corpus))
        blocks = self._blocks(lm, original)
        if [row.ids for row in rows] != [row.ids for row in lasts(original, self._asked(corpus))]:
            raise BadModel(
                "model and original read the same question as other tokens; steer needs one tokenizer and template"
            )
        goal = streams(original, rows, blocks, bench)
        vectors: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for block in blocks:
                here = streams(lm, rows, (block,), bench)[block]
                for who, hidden in (("original", goal[block]), ("model", here)):
                    if not hidden.isfinite().all():
                        raise BadModel(
                            f"the residual stream of the {who} behind block {block} is not finite; its weights are broken"
                        )
                gap = difference(goal[block].to(here), here)
                if gap is not None:
                    vectors[block] = self.strength * gap
                    stack.enter_context(lm.at(block_name(lm, block), partial(added, vector=vectors[block])))
        if not vectors:
            raise NotApplicable(
                f"behind block {', '.join(map(str, blocks))} the model is the original, so there is nothing to add; take later "
                "blocks, or another attack if only the head was changed"
            )
        return scrambled(vectors, self.seed) if self.control else vectors

    def _blocks(self, lm: LM, original: LM) -> list[int]:
        """The blocks in order.  BadModel where the models are not alike, BadRequest where they have no such block."""
        sizes = [(len(team.blocks(m)), m.get_input_embeddings().weight.shape[1]) for m in (lm.model, original.model)]
        (count, width), theirs = sizes
        if not count:
            raise BadModel(f"{lm.name or 'the model'} has no list of blocks to add anything between; use a transformer")
        if sizes[0] != theirs:
            raise BadModel(
                f"{lm.name or 'the model'} has {count} blocks of width {width} and the original {theirs[0]} of {theirs[1]}; "
                "steer needs two models of one architecture"
            )
        if wrong := [block for block in self.blocks if block >= count]:
            raise BadRequest(
                f"blocks names block {wrong[0]} and {lm.name or 'the model'} has {count}; allowed are 0 to {count - 1}"
            )
        return sorted(self.blocks) or [(count - 1) // 2]
