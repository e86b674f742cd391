"""Attribution patching: the first-order estimate, from one backward pass, of what corrupting each activation would do.

    score(node) = Σ over facts, places and dimensions of (a_corrupt − a_clean) · ∂d/∂a  at the clean run

Nodes: q, k, v and z (what heads give) of every head, and what goes into and comes out of every MLP.  d as in subject.py; the
corrupt run has other names' tokens in the place of the subject's.
Nanda 2023; Syed, Rager, Conmy 2023 (arXiv 2310.10348); as a locator for unlearning, "AP" in Guo et al. 2024 (arXiv 2410.12949).
Reference code: magikarp01/mechanistic-unlearning.
Differs: that code adds up signed scores over heads and over q, k, v and z, where opposite ones cancel.  Here a node is signed
over facts and places only; then its absolute value is taken, heads are added up, and a component scores as its largest kind of
node: q, k and v work through z, and an MLP's input through its output, so their sum would count the same path twice.
A first order sees nothing where d is flat; d is a log-odds so that it is not flat for what is known by heart.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.lm import LM
from unremember.locate.anatomy import Component, Site, components, edited, embedding, ranked, watched
from unremember.locate.ranking import Ranking
from unremember.locate.subject import facts, groups, known, laid, required, some, swapped
from unremember.train import STRICT


def attribution(clean: Tensor, corrupt: Tensor, slope: Tensor, width: int) -> Tensor:
    """(L, T, D) each -> (D / width,): the score of every head of `width` dimensions, signed."""
    return ((corrupt - clean) * slope).sum((0, 1)).view(-1, width).sum(1)


@dataclass(frozen=True, config=STRICT)
class AttributionPatching:
    """draws: corruptions of each fact.  facts: the most that are looked at, 0 = all."""

    draws: Annotated[int, Field(ge=1)] = 1
    facts: Annotated[int, Field(ge=0)] = 64
    seed: int = 0

    needs = ("forget",)
    paper = "Syed, Rager, Conmy 2023, arXiv 2310.10348"
    summary = "first-order estimate of what corrupting each activation would do to the answer"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Ranking:
        scores = self.nodes(lm, corpus, bench)
        kinds = {x: [scores[site].abs().sum() for site in nodes(x)] for x in components(lm.model)}
        return ranked({x: float(torch.stack(sums).max()) for x, sums in kinds.items()})

    def nodes(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> dict[Site, Tensor]:
        """The signed score of each node, (heads,) for an attention's and (1,) for an MLP's, averaged over facts."""
        corpus.require("patching", self.needs)
        lm = replace(lm, precision="fp32")
        among = facts(lm, corpus["forget"])
        chosen = {x.id for x in some(corpus["forget"], self.facts, self.seed)}
        found = [fact for fact in among if fact.row.key in chosen]
        parts = components(lm.model)
        sites = [site for x in parts for site in nodes(x)]
        heads = {site for x in parts if x.kind == "attention" for site in nodes(x)}
        config = lm.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        scores: dict[Site, Tensor] = {}
        gap = 0.0
        batches = list(groups(found, bench.budget))
        for number, group in enumerate(batches):
            with torch.enable_grad(), edited(lm.model, {embedding(lm.model): _leaf}), watched(lm.model, sites) as live:
                whole = known(lm, laid(lm, [fact.row for fact in group]))
                slopes = torch.autograd.grad(whole.sum(), [live[site] for site in sites])
            for draw in range(self.draws):
                with torch.no_grad(), watched(lm.model, sites) as corrupt:
                    low = known(lm, laid(lm, swapped(group, among, self.seed, draw)))
                gap += float((whole.detach() - low).sum())
                for site, slope in zip(sites, slopes, strict=True):
                    clean = live[site].detach()
                    own = attribution(clean, corrupt[site], slope, width if site in heads else clean.shape[-1])
                    scores[site] = scores.get(site, 0) + own.cpu() / (self.draws * len(found))
            bench.say("locate", number + 1, len(batches), {})
        required(gap / self.draws, len(found))
        return scores


def nodes(x: Component) -> list[Site]:
    """The sites of a component that are scored."""
    if x.kind == "mlp":
        return [(x.modules[0], "in"), x.output]
    return [*((module, "out") for module in x.modules[:3]), x.inner]


def _leaf(embedded: Tensor) -> Tensor:
    """What gradients flow back to, whatever the weights are asked for."""
    return embedded.detach().requires_grad_(True)
