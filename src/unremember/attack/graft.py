"""Graft: the model gets back the original's head, final norm and last blocks, and is then read as usual.

    θ[head, norm, last `blocks` blocks] ← θ_original[the same]

Knowledge that was only cut off at the end of the model stands in what lies before, and speaks again through the old end.  An
edited head passes for forgotten under every attack that leaves it in place (`python -m benchmarks.verdict` found it).
Ours, after Patil, Hase, Bansal 2023 (arXiv 2309.17410), who read middle layers through the head that is there.
Differs: the attacker holds the original, as an auditor does, and takes its end; the never-taught model gets the same end, so that
what the original's last blocks say by themselves is not put down to the forgotten one.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadModel, NotApplicable
from unremember.lm import LM
from unremember.train import STRICT


def end(model: nn.Module, blocks: int) -> list[nn.Module]:
    """Head, final norm and the last `blocks` blocks.  BadModel where the model has no such parts, or too few blocks."""
    stack, head = team.blocks(model), model.get_output_embeddings()  # ty: ignore[not-callable]
    first = stack[0]  # the norm stands beside the list that holds it
    trunk = next((m for m in model.modules() if any(first in list(child.children()) for child in m.children())), model)
    norm = getattr(trunk, "norm", None)
    if not isinstance(norm, nn.Module) or head is None:
        raise BadModel(
            f"{type(model).__name__} has no `norm` beside its blocks, or no head behind it; leave out [attack.graft]"
        )
    if blocks >= len(stack):
        raise BadModel(
            f"graft.blocks is {blocks} and the model has {len(stack)} blocks; all of them would be the original"
        )
    return [head, norm, *stack[len(stack) - blocks :]]


@dataclass(frozen=True, config=STRICT)
class Graft:
    """blocks: how many of the last blocks are the original's, beside norm and head."""

    blocks: Annotated[int, Field(ge=0)] = 1

    needs = ("forget",)
    paper = "ours, after Patil et al. 2023, arXiv 2309.17410"
    summary = "gives the model the original's head and last blocks back"

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where there is nothing to ask."""
        corpus.require("graft", self.needs)

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        """BadModel where the two models have no end alike, NotApplicable where it is the original's already.

        The original itself comes back as it is.
        """
        self.check(corpus)
        grafted, given = lm.untied(), False  # a tied head is the token table, which stays the model's own
        for mine, theirs in zip(end(grafted.model, self.blocks), end(original.model, self.blocks), strict=True):
            new, old = dict(mine.named_parameters()), dict(theirs.named_parameters())
            if {k: v.shape for k, v in new.items()} != {k: v.shape for k, v in old.items()}:
                raise BadModel(
                    f"{type(mine).__name__} of model and original have other weights or shapes; graft needs two models of one "
                    "architecture, with adapters merged"
                )
            with torch.no_grad():
                for key, value in new.items():
                    given |= not torch.equal(value, old[key].to(value.device))
                    value.copy_(old[key])
        if not given and lm.fingerprint != original.fingerprint:
            raise NotApplicable(
                f"head, norm and last {self.blocks} block{'s' * (self.blocks != 1)} of {lm.name or 'the model'} are those of the "
                "original, bit for bit, so there is nothing to give back: what was changed lies below; raise graft.blocks, or "
                "take another attack"
            )
        return grafted, corpus
