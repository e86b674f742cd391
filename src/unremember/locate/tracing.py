"""Causal tracing: take the subject out of a question, put one component's activations back, and see how much returns.

    score(c) = Σ (d(corrupt; c ← clean) − d(corrupt)) / Σ (d(clean) − d(corrupt)),   sums over facts and draws

d as in subject.py; corrupt = Gaussian noise of `noise` standard deviations of this model's own embeddings on the subject's
embeddings, or its tokens swapped for other names'.  What is put back: an MLP's hidden activations (what goes into its
down-projection), or what all heads of an attention give (what goes into its output projection).
Meng, Bau, Andonian, Belinkov 2022 (arXiv 2202.05262), Sec. 2.1; as a locator for unlearning, "CT" in Guo et al. 2024 (arXiv
2410.12949).  Reference code: magikarp01/mechanistic-unlearning.
Differs: an attention is put back whole, not head by head, because whole matrices are opened; one layer at a time, no window; the
scale of the noise is measured; one ratio of sums, so that a fact which the corruption hardly hurts cannot explode.
Tracing finds what carries the answer out as readily as what looks it up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.lm import LM
from unremember.locate.anatomy import Component, components, edited, embedding, ranked, watched
from unremember.locate.ranking import Ranking
from unremember.locate.subject import Fact, facts, groups, known, laid, noised, required, sigma, some, swapped
from unremember.tokens import Tokens
from unremember.train import STRICT


@dataclass(frozen=True, config=STRICT)
class CausalTracing:
    """at: where activations are put back: all places, the subject's, or the last = those that predict the value.

    draws: corruptions of each fact.  facts: the most that are traced, 0 = all.
    """

    corruption: Literal["noise", "swap"] = "noise"
    at: Literal["all", "subject", "last"] = "all"
    noise: Annotated[float, Field(gt=0)] = 3.0
    draws: Annotated[int, Field(ge=1)] = 3
    facts: Annotated[int, Field(ge=0)] = 16
    seed: int = 0

    needs = ("forget",)
    paper = "Meng et al. 2022, arXiv 2202.05262"
    summary = "what, put back into a run without the subject, brings the answer back"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Ranking:
        return ranked(self.effects(lm, corpus, bench))

    def effects(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> dict[Component, float]:
        """Share of the subject's worth that each component alone restores; 1 = all of it."""
        corpus.require("tracing", self.needs)
        parts = components(lm.model)
        return dict(zip(parts, self.restored(lm, corpus, [(x,) for x in parts], bench), strict=True))

    @torch.no_grad()
    def restored(self, lm: LM, corpus: Corpus, sets: list[tuple[Component, ...]], bench: Bench = BENCH) -> list[float]:
        """The same for sets of components that are put back together."""
        lm = replace(lm, precision="fp32")
        found = facts(lm, some(corpus["forget"], self.facts, self.seed))
        among = facts(lm, corpus["forget"]) if self.corruption == "swap" else found
        scale, embed = self.noise * sigma(lm, found), embedding(lm.model)
        sites = {x.inner for parts in sets for x in parts}
        gains, gap = [0.0] * len(sets), 0.0
        batches = list(groups(found, bench.budget))
        for number, group in enumerate(batches):
            tokens = laid(lm, [fact.row for fact in group])
            back = places(group, tokens, self.at)[:, :, None]
            with watched(lm.model, sites) as clean:
                whole = known(lm, tokens)
            for draw in range(self.draws):
                edits: dict = {}
                if self.corruption == "swap":
                    tokens = laid(lm, swapped(group, among, self.seed, draw))
                else:
                    edits = {embed: noised(group, scale, self.seed, draw)}
                with edited(lm.model, edits):
                    low = known(lm, tokens)
                gap += float((whole - low).sum())
                for i, parts in enumerate(sets):
                    put = {x.inner: _put(clean[x.inner], back) for x in parts}
                    with edited(lm.model, edits | put):
                        gains[i] += float((known(lm, tokens) - low).sum())
            bench.say("locate", number + 1, len(batches), {})
        required(gap / self.draws, len(found))
        return [gain / gap for gain in gains]


def _put(clean: Tensor, back: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value: torch.where(back, clean, value)


def places(group: list[Fact], tokens: Tokens, at: str) -> Tensor:
    """(L, T) bool: where activations are put back."""
    chosen = torch.full_like(tokens.ids, at == "all", dtype=torch.bool)
    if at == "subject":
        for lane, fact in enumerate(group):
            chosen[lane, list(fact.subject)] = True
    if at == "last":
        chosen.view(-1)[tokens.source[tokens.span]] = True
    return chosen
