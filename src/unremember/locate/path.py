"""Fact lookup by path patching: the MLPs that write what the heads which carry the answer out will read.

    effect = Σ (d(patched) − d(corrupt)) / Σ (d(clean) − d(corrupt)),   sums over facts

1.  Extraction heads: each head's output, clean into corrupt, by the direct path: all other heads stay as in the corrupt run, MLPs
    go along.  The `heads` largest |effect| of those that reach `least`.
2.  Every MLP's output below the first such head, clean into corrupt, by whatever leads to the residual stream in front of that
    head without passing another head; from there on everything runs.  MLPs with |effect| ≥ `least` are the lookup.

Guo et al. 2024 (arXiv 2410.12949), Sec. 3; path patching: Goldowsky-Dill et al. 2023 (arXiv 2304.05969).  Reference code:
magikarp01/mechanistic-unlearning, which sets the receiving layer by hand.
Differs: the receiver is found as written; a head that does not reach `least` is no extraction head even among the first ten;
the name in the answer is corrupt, too.  Like there, an MLP with a negative effect is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadModel
from unremember.lm import LM
from unremember.locate.anatomy import Component, Site, components, edited, ranked, watched
from unremember.locate.ranking import Ranking
from unremember.locate.subject import facts, groups, known, laid, required, some, swapped
from unremember.train import STRICT

Patch = dict[Site, tuple[int, int]]  # site -> [begin, end) of its dimensions that are clean; its others are corrupt
NONE, ALL = (0, 0), (0, 1 << 30)


@dataclass(frozen=True, config=STRICT)
class PathPatching:
    """heads: the most extraction heads.  least: the smallest |effect| that counts.  facts: the most looked at, 0 = all."""

    heads: Annotated[int, Field(ge=1)] = 10
    least: Annotated[float, Field(gt=0, lt=1)] = 0.02
    facts: Annotated[int, Field(ge=0)] = 16
    seed: int = 0

    needs = ("forget",)
    paper = "Guo et al. 2024, arXiv 2410.12949"
    summary = "MLPs that feed the heads which carry the answer out"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Ranking:
        first, effects = self.lookup(lm, corpus, bench)
        scores = {x: abs(effects.get(x, 0.0)) for x in components(lm.model)}
        if max(scores.values()) < self.least:
            raise BadModel(
                f"no MLP below block {first}, where the first extraction head sits, has an effect of {self.least:g} (largest: "
                f'{max(scores.values()):.3f}); lower `least` or `heads`, or take another locator, as in forget.locator = "mlps"'
            )
        return ranked({x: score if score >= self.least else -torch.inf for x, score in scores.items()})

    def lookup(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[int, dict[Component, float]]:
        """The block of the first extraction head, and the effects of the MLPs below it."""
        parts = components(lm.model)
        carried = self.extraction(lm, corpus, bench)
        most = sorted(carried, key=lambda head: -abs(carried[head]))[: self.heads]
        chosen = [head for head in most if abs(carried[head]) >= self.least]
        if not chosen:
            raise BadModel(
                f"no head carries {self.least:g} of the answer out by itself (largest: {abs(carried[most[0]]):.3f}); lower "
                '`least`, or take another locator, as in forget.locator = "mlps"'
            )
        first = min(block for block, _ in chosen)
        below = [x for x in parts if x.kind == "mlp" and x.block < first]
        frozen: Patch = {x.inner: NONE for x in parts if x.kind == "attention" and x.block < first}
        return first, dict(
            zip(below, self._effects(lm, corpus, [{**frozen, x.output: ALL} for x in below], bench), strict=True)
        )

    def extraction(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> dict[tuple[int, int], float]:
        """(block, head) -> effect by the direct path."""
        config, parts = lm.model.config, [x for x in components(lm.model) if x.kind == "attention"]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = [(x, head) for x in parts for head in range(config.num_attention_heads)]
        frozen: Patch = {x.inner: NONE for x in parts}
        runs: list[Patch] = [{**frozen, x.inner: (head * width, (head + 1) * width)} for x, head in heads]
        effects = self._effects(lm, corpus, runs, bench)
        return {(x.block, head): effect for (x, head), effect in zip(heads, effects, strict=True)}

    @torch.no_grad()
    def _effects(self, lm: LM, corpus: Corpus, runs: list[Patch], bench: Bench) -> list[float]:
        corpus.require("path", self.needs)
        lm = replace(lm, precision="fp32")
        among = facts(lm, corpus["forget"])
        chosen = {x.id for x in some(corpus["forget"], self.facts, self.seed)}
        found = [fact for fact in among if fact.row.key in chosen]
        sites = {site for run in runs for site in run}
        gains, gap = [0.0] * len(runs), 0.0
        for group in groups(found, bench.budget):
            with watched(lm.model, sites) as clean:
                whole = known(lm, laid(lm, [fact.row for fact in group]))
            tokens = laid(lm, swapped(group, among, self.seed, 0))
            with watched(lm.model, sites) as corrupt:
                low = known(lm, tokens)
            gap += float((whole - low).sum())
            for i, run in enumerate(runs):
                with edited(lm.model, {site: _mixed(clean[site], corrupt[site], *run[site]) for site in run}):
                    gains[i] += float((known(lm, tokens) - low).sum())
                bench.say("locate", i + 1, len(runs), {})
        required(gap, len(found))
        return [gain / gap for gain in gains]


def _mixed(clean: Tensor, corrupt: Tensor, begin: int, end: int) -> Callable[[Tensor], Tensor]:
    """The value of the corrupt run, dimensions [begin, end) those of the clean one."""
    value = corrupt.clone()
    value[..., begin:end] = clean[..., begin:end]
    return lambda _: value
