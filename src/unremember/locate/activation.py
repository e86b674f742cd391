"""Activation patching: put what flows through a named site in one run into another run, and see what the answer makes of it.

    denoising  e_d(a) = Σ (m(x'; a ← a(x)) − m(x')) / Σ (m(x) − m(x'))      is a enough?
    noising    e_n(a) = Σ (m(x) − m(x; a ← a(x'))) / Σ (m(x) − m(x'))       is a needed?

Of two parts that are both needed (AND) each has e_d = 0 and e_n = 1, of two that do the same (OR) e_d = 1 and e_n = 0, so neither
number stands for the other.  x' = other names' tokens, or Gaussian noise on the subject's embeddings.  Three ablations put
something else into the clean run and have no denoising: zero, the site's mean over all places, another fact's value (resample).
Zero may lie where the site never is, and then break more than the site carries; prefer the other two.

    integrated(a) = (a(x) − a(x')) · (1/n) Σ_j ∂m/∂a at a(x') + (j − ½)/n · (a(x) − a(x')),     first order: the slope at a(x')

Summed over a whole residual stream the integrated form is m(x) − m(x') (completeness); the first order is blind where m is flat.
Vig et al. 2020 (arXiv 2004.12265); Zhang, Nanda 2024 (arXiv 2309.16042); integrated: Sundararajan et al. 2017, Hanna et al. 2024
(arXiv 2403.17806); the definitions as in Bereska, Gavves 2024 (arXiv 2404.14082).  Reference code: none.
Differs: m is a log-odds (subject.py), which needs no false answer and does not saturate; ratios of sums, with the share of
examples that go the other way beside them; midpoints.  Attention patterns are no site: fused attention never writes them down.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.lm import LM
from unremember.locate.anatomy import Component, Site, components, edited, embedding, ranked, watched
from unremember.locate.integrated import midpoints
from unremember.locate.ranking import Ranking
from unremember.locate.subject import Fact, facts, groups, known, laid, noised, required, sigma, some, swapped
from unremember.locate.tracing import places as chosen_places
from unremember.train import STRICT

Edit = Callable[[Tensor], Tensor]
Metric = Callable[[], Tensor]  # a forward pass -> (B,) m of each example
NOTHING: Mapping[Site, Edit] = MappingProxyType({})
FLOOR = 1e-3  # the least mean of m(x) − m(x') of which shares are taken


@plain(frozen=True)
class Part:
    """What is replaced at a site.  dims: [begin, end) of its last dimension; places: bool of its other dimensions; None = all."""

    site: Site
    dims: tuple[int, int] | None = None
    places: Tensor | None = None


@plain(frozen=True)
class Effect:
    """restored, broken, gap: (B,) m(x'; a ← a(x)) − m(x'), m(x) − m(x; a ← a(x')), m(x) − m(x').  An ablation restores None."""

    restored: Tensor | None
    broken: Tensor
    gap: Tensor

    @property
    def denoising(self) -> float | None:
        return None if self.restored is None else float(self.restored.sum() / self.gap.sum())

    @property
    def noising(self) -> float:
        return float(self.broken.sum() / self.gap.sum())

    @property
    def opposed(self) -> float:
        """Share of examples that either direction pushes against the sum: 0 where the mean hides nothing."""
        gains = [x for x in (self.restored, self.broken) if x is not None]
        against = [x * x.sum() < -1e-4 * (self.gap * x.sum()).abs() for x in gains]
        return float(torch.stack(against).any(0).float().mean())

    @staticmethod
    def joined(effects: Sequence[Effect]) -> Effect:
        """The effects of the same patch on several batches as one."""
        restored = [x.restored for x in effects if x.restored is not None]
        broken, gap = torch.cat([x.broken for x in effects]), torch.cat([x.gap for x in effects])
        return Effect(torch.cat(restored) if restored else None, broken, gap)


def atlas(model: Any) -> dict[str, Site]:
    """Name -> site: embedding, and of each block l.in, l.q, l.k, l.v, l.z, l.attention, l.mlp.in/gate/up/hidden/out, l.out.

    l.in and l.out are the residual stream; l.z is what all heads give, l.mlp.hidden the gated product.  BadModel for an unknown
    block.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, Site] = {"embedding": embedding(model)}
    blocks = [names[id(block)] for block in team.blocks(model)]
    for x in components(model):
        at = f"{x.block}"
        outs: list[Site] = [(module, "out") for module in x.modules]
        if x.kind == "attention":
            found[f"{at}.in"] = (blocks[x.block], "in")
            found |= dict(zip((f"{at}.q", f"{at}.k", f"{at}.v"), outs[:3], strict=True))
            found[f"{at}.z"], found[f"{at}.attention"] = x.inner, x.output
        else:
            found[f"{at}.mlp.in"] = (x.modules[0].rpartition(".")[0], "in")
            found[f"{at}.mlp.gate"], found[f"{at}.mlp.up"] = outs[:2]
            found[f"{at}.mlp.hidden"], found[f"{at}.mlp.out"] = x.inner, x.output
            found[f"{at}.out"] = (blocks[x.block], "out")
    return found


def heads(model: Any) -> dict[tuple[int, int], Part]:
    """(block, head) -> its share of what goes into the output projection."""
    config, found = model.config, {}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for x in (x for x in components(model) if x.kind == "attention"):
        inward = model.get_submodule(x.modules[-1]).in_features
        if inward != width * config.num_attention_heads:
            raise BadModel(
                f"block {x.block}: {config.num_attention_heads} heads of {width} do not fill an output projection of {inward} "
                "inputs; this architecture's heads are not known here"
            )
        for number in range(config.num_attention_heads):
            found[x.block, number] = Part(x.inner, (number * width, (number + 1) * width))
    return found


def put(parts: Iterable[Part], values: Mapping[Site, Tensor]) -> dict[Site, Edit]:
    """Edits that set these parts, all together, to what `values` holds at their sites; the rest of each site stays."""
    masks: dict[Site, Tensor] = {}
    for part in parts:
        value = values[part.site]
        own = torch.ones_like(value, dtype=torch.bool)
        if part.dims is not None:
            begin, end = part.dims
            if not 0 <= begin < end <= value.shape[-1]:
                raise BadRequest(f"dimensions [{begin}, {end}) are not within the {value.shape[-1]} of {part.site[0]}")
            own[..., :begin] = own[..., end:] = False
        if part.places is not None:
            if part.places.shape != value.shape[:-1]:
                raise BadRequest(
                    f"places of shape {tuple(part.places.shape)} do not fit {part.site[0]}, which has {tuple(value.shape[:-1])}; "
                    "give one bool for every example and token"
                )
            own &= part.places.to(own.device)[..., None]
        masks[part.site] = masks[part.site] | own if part.site in masks else own
    return {site: _setting(site, values[site], mask) for site, mask in masks.items()}


def _setting(site: Site, value: Tensor, mask: Tensor) -> Edit:
    def edit(current: Tensor) -> Tensor:
        if current.shape != value.shape:
            raise BadCorpus(
                f"at {site[0]} one run has the shape {tuple(current.shape)} and the other {tuple(value.shape)}; clean and "
                "corrupt texts must have as many tokens, one by one"
            )
        return torch.where(mask, value.to(current), current)

    return edit


def apart(gap: Tensor, least: float = FLOOR) -> Tensor:
    """The gap itself; BadModel where it is not finite or too small on average for shares of it to mean anything."""
    mean = float(gap.mean())
    if not abs(mean) >= least:
        raise BadModel(
            f"m(x) − m(x') is {mean:.2g} on average over {len(gap)} examples (at least {least:g} is needed), so shares of it are "
            "noise; choose a corruption that changes the answer, or a metric that sees it"
        )
    return gap


def patched(
    model: nn.Module,
    clean: Metric,
    corrupt: Metric,
    patches: Sequence[Sequence[Part]],
    edits: Mapping[Site, Edit] = NOTHING,
) -> list[Effect]:
    """Both effects of each patch (parts that are replaced together).

    clean, corrupt: forward passes on x and on x', both scored by the answer to x.  edits: what else corrupts x', as noise; at a
    site of both, an edit goes first and the patch has the last word.
    """
    found = _patched(model, clean, corrupt, patches, edits)
    if found:
        apart(found[0].gap)
    return found


@torch.no_grad()
def _patched(
    model: nn.Module, clean: Metric, corrupt: Metric, patches: Sequence[Sequence[Part]], edits: Mapping[Site, Edit]
) -> list[Effect]:
    sites = {part.site for parts in patches for part in parts}
    with watched(model, sites) as high:
        whole = clean()
    with edited(model, edits), watched(model, sites) as low:
        least = corrupt()
    found = []
    for parts in patches:
        with edited(model, edits), edited(model, put(parts, high)):
            restored = corrupt() - least
        with edited(model, put(parts, low)):
            broken = whole - clean()
        found.append(Effect(restored, broken, whole - least))
    return found


@torch.no_grad()
def ablated(
    model: nn.Module, clean: Metric, gap: Tensor, patches: Sequence[Sequence[Part]], values: Mapping[Site, Tensor]
) -> list[Effect]:
    """What putting `values` into the clean run breaks, for each patch.  gap: (B,) what counts as all of it."""
    whole = clean()
    found = []
    for parts in patches:
        with edited(model, put(parts, values)):
            found.append(Effect(None, whole - clean(), gap))
    return found


def slope(model: nn.Module, run: Metric, site: Site, value: Tensor, edits: Mapping[Site, Edit] = NOTHING) -> Tensor:
    """∂ Σ m / ∂ (what passes the site), while it is `value`. -> as value; no parameter's gradient is touched"""
    leaf = value.detach().clone().requires_grad_()
    with torch.enable_grad(), edited(model, edits), edited(model, {site: lambda _: leaf.clone()}):
        [found] = torch.autograd.grad(run().sum() + 0 * leaf.sum(), leaf)  # 0 ·: m may not depend on it at all
    return found


def first_order(
    model: nn.Module, run: Metric, site: Site, start: Tensor, end: Tensor, edits: Mapping[Site, Edit] = NOTHING
) -> Tensor:
    """The gain of every coordinate when the site goes from `start`, its value in `run`, to `end`, by the slope at start."""
    return (end - start) * slope(model, run, site, start, edits)


def integrated(
    model: nn.Module,
    run: Metric,
    site: Site,
    start: Tensor,
    end: Tensor,
    steps: int = 20,
    edits: Mapping[Site, Edit] = NOTHING,
) -> Tensor:
    """The same by the mean slope on the way; summed, it is what patching the whole site gains, up to the rule's error."""
    if steps < 1:
        raise BadRequest(f"{steps} steps on the path; at least 1 is needed")
    slopes = [slope(model, run, site, start + float(t) * (end - start), edits) for t in midpoints(steps)]
    return (end - start) * torch.stack(slopes).mean(0)


@plain(frozen=True)
class Estimate:
    """Share of the gap that one part restores: patched, by the first order, and by the integrated slope."""

    patched: float
    first: float
    integrated: float


@dataclass(frozen=True, config=STRICT)
class ActivationPatching:
    """Ranks attentions and MLPs by what their inner activations restore (denoising) or break (noising).

    corruption: replace = other names' tokens, noise = on the subject's embeddings; zero, mean and resample are ablations, whose
    effects are shares of what replacing costs.  at: which places are patched.  draws: corruptions of each fact.  facts: 0 = all.
    """

    corruption: Literal["replace", "noise", "zero", "mean", "resample"] = "replace"
    direction: Literal["denoising", "noising"] = "denoising"
    at: Literal["all", "subject", "last"] = "all"
    noise: Annotated[float, Field(gt=0)] = 3.0
    draws: Annotated[int, Field(ge=1)] = 1
    facts: Annotated[int, Field(ge=0)] = 32
    seed: Annotated[int, Field(ge=0)] = 0

    needs = ("forget",)
    paper = "Vig et al. 2020, arXiv 2004.12265"
    summary = "what, put from one run into another, restores or breaks the answer"

    @model_validator(mode="after")
    def _possible(self):
        if self.corruption in ("zero", "mean", "resample") and self.direction == "denoising":
            raise ValueError(
                f'corruption = "{self.corruption}" is an ablation of the clean run and restores nothing; direction = "noising"'
            )
        return self

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Ranking:
        found = self.effects(lm, corpus, bench)
        return ranked(
            {x: (e.denoising or 0.0) if self.direction == "denoising" else e.noising for x, e in found.items()}
        )

    def effects(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> dict[Component, Effect]:
        """Both effects of every component's inner activations."""
        parts = components(lm.model)
        return dict(zip(parts, self.measured(lm, corpus, [(Part(x.inner),) for x in parts], bench), strict=True))

    @torch.no_grad()
    def measured(self, lm: LM, corpus: Corpus, patches: Sequence[Sequence[Part]], bench: Bench = BENCH) -> list[Effect]:
        """The effects of any patches.  Their `places` are filled in from `at`."""
        lm, found, among = self._facts(lm, corpus)
        sites = {part.site for parts in patches for part in parts}
        means = _means(lm, found, sites, bench) if self.corruption == "mean" else {}
        scale = self.noise * sigma(lm, found)
        parts_of: list[list[Effect]] = [[] for _ in patches]
        gaps, batches = 0.0, list(groups(found, bench.budget))
        for number, group in enumerate(batches):
            tokens = laid(lm, [fact.row for fact in group])
            places = chosen_places(group, tokens, self.at)
            here = [[replace(part, places=places) for part in parts] for parts in patches]

            def clean(tokens=tokens) -> Tensor:
                return known(lm, tokens)

            for draw in range(self.draws):
                if self.corruption == "noise":
                    edits = {embedding(lm.model): noised(group, scale, self.seed, draw)}
                    effects = _patched(lm.model, clean, clean, here, edits)
                else:
                    other = laid(lm, swapped(group, among, self.seed, draw))

                    def corrupt(other=other) -> Tensor:
                        return known(lm, other)

                    if self.corruption == "replace":
                        effects = _patched(lm.model, clean, corrupt, here, NOTHING)
                    else:
                        gap = clean() - corrupt()
                        effects = ablated(
                            lm.model, clean, gap, here, self._values(lm, group, found, sites, means, draw)
                        )
                for kept, effect in zip(parts_of, effects, strict=True):
                    kept.append(effect)
                gaps += float(effects[0].gap.sum()) / self.draws if effects else 0.0
            bench.say("locate", number + 1, len(batches), {})
        if patches:
            required(gaps, len(found))
        return [Effect.joined(kept) for kept in parts_of]

    def estimates(
        self, lm: LM, corpus: Corpus, parts: Mapping[str, Part], steps: int = 20, bench: Bench = BENCH
    ) -> dict[str, Estimate]:
        """How well slopes stand for patching: one part at a time, tokens replaced, the first draw, all places."""
        lm, found, among = self._facts(lm, corpus)
        sites, gap = {part.site for part in parts.values()}, 0.0
        sums = {name: [0.0, 0.0, 0.0] for name in parts}
        for group in groups(found, bench.budget):
            tokens, other = laid(lm, [fact.row for fact in group]), laid(lm, swapped(group, among, self.seed, 0))

            def corrupt(other=other) -> Tensor:
                return known(lm, other)

            with torch.no_grad(), watched(lm.model, sites) as high:
                whole = known(lm, tokens)
            with torch.no_grad(), watched(lm.model, sites) as low:
                least = corrupt()
            gap += float((whole - least).sum())
            ways = {
                site: (
                    first_order(lm.model, corrupt, site, low[site], high[site]),
                    integrated(lm.model, corrupt, site, low[site], high[site], steps),
                )
                for site in sites
            }
            for name, part in parts.items():
                begin, end = part.dims or (0, low[part.site].shape[-1])
                with torch.no_grad(), edited(lm.model, put([part], high)):
                    gain = corrupt() - least
                for at, value in enumerate((gain, *(way[..., begin:end] for way in ways[part.site]))):
                    sums[name][at] += float(value.sum())
        required(gap, len(found))
        return {name: Estimate(*(value / gap for value in own)) for name, own in sums.items()}

    def _facts(self, lm: LM, corpus: Corpus) -> tuple[LM, list[Fact], list[Fact]]:
        corpus.require("activation patching", self.needs)
        if lm.model.training:
            raise BadModel(
                f"{lm.name or 'the model'} is in training mode, where dropout blurs effects; call model.eval()"
            )
        lm = replace(lm, precision="fp32")
        among = facts(lm, corpus["forget"])
        chosen = {x.id for x in some(corpus["forget"], self.facts, self.seed)}
        return lm, [fact for fact in among if fact.row.key in chosen], among

    def _values(self, lm: LM, group: list[Fact], found: list[Fact], sites: set[Site], means: dict, draw: int) -> dict:
        """What an ablation puts at each site. -> site -> (L, T, D)"""
        rows = [fact.row for fact in group]
        if self.corruption == "resample":
            rows = [fact.row for fact in partners(group, found, self.seed, draw)]
        with watched(lm.model, sites) as seen:
            known(lm, laid(lm, rows))
        if self.corruption == "resample":
            return dict(seen)
        return {site: torch.zeros_like(x) + (means[site] if means else 0) for site, x in seen.items()}


def partners(group: Sequence[Fact], found: Sequence[Fact], seed: int, draw: int) -> list[Fact]:
    """For each fact another one of as many tokens, about someone else.  BadCorpus, all together, where there is none."""
    drawn, problems = [], []
    for fact in group:
        others = [x for x in found if x.entity != fact.entity and len(x.row.ids) == len(fact.row.ids)]
        if not others:
            problems.append(
                f"example {fact.row.key!r}: no fact about someone else has its {len(fact.row.ids)} tokens, so nothing can be "
                'resampled place by place; look at more facts, or take corruption = "mean"'
            )
            continue
        rng = np.random.default_rng([seed, draw, zlib.crc32(fact.row.key.encode())])
        drawn.append(others[int(rng.integers(len(others)))])
    if problems:
        raise BadCorpus(problems)
    return drawn


def _means(lm: LM, found: list[Fact], sites: set[Site], bench: Bench) -> dict[Site, Tensor]:
    """The mean of what passes each site over all tokens of the facts, none of which is padding. -> site -> (D,)"""
    sums: dict[Site, Tensor] = {}
    count = 0
    for group in groups(found, bench.budget):
        tokens = laid(lm, [fact.row for fact in group])
        long = torch.tensor([len(fact.row.ids) - 1 for fact in group], device=lm.device)
        real = torch.arange(tokens.ids.shape[1], device=lm.device) < long[:, None]  # (L, T)
        with watched(lm.model, sites) as seen:
            known(lm, tokens)
        for site in sites:
            sums[site] = sums.get(site, 0) + seen[site][real].double().sum(0)
        count += int(real.sum())
    return {site: (x / count).float() for site, x in sums.items()}
