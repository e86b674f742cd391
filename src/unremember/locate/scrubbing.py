"""Causal scrubbing: a story about a model is tested by exchanging everything that it says does not matter.

    score = 1 − (L_scrubbed − L_original) / (L_random − L_original)

A story is a tree over the model's own sites.  Each node says by which variable of the input its site matters to the node above,
and which of the sites it reads matter to it in turn.  Going down from the output, an input is replaced by a random one with the
same variable; sites that the story does not name get any input at all.  L_random: the answer to a random input.
Chan et al. 2022 (Causal Scrubbing, Redwood Research, alignmentforum.org).  Reference code: none published that was read.
Differs: one random input a node for all sites that it does not name; the wiring is checked (what is said to feed a site must
determine it); and it is always reported how many inputs the story allows to be exchanged, because one that calls everything
important scores 1 and says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.locate.anatomy import Site, edited, watched

Run = Callable[[nn.Module, Tensor], Tensor]  # model, inputs (N, …) -> logits (N, C)
Wiring = Mapping[Site, tuple[Site, ...]]  # site -> all sites that it reads; one that is no key reads the input itself
LEAST = 1e-3


@dataclass(frozen=True)
class Node:
    """site: where.  variable: inputs (N, …) -> (N,) whole numbers, what of the input matters there.

    children: the sites it reads that matter, in the story; () = none of them does, None = nothing is said, it is taken whole.
    """

    site: Site
    variable: Callable[[Tensor], Tensor]
    children: tuple[Node, ...] | None = None


@dataclass(frozen=True)
class Scrubbed:
    """score: 1 = as good as the model, 0 = as good as a random answer; low, high: 95 % over inputs.

    freedom: site -> how many other inputs the story allows in the place of one, on average.  exchanged: share of all draws that
    were another input.  Both 0: nothing was tested.
    """

    score: float
    low: float
    high: float
    original: float
    scrubbed: float
    random: float
    freedom: Mapping[str, float]
    exchanged: float
    n: int


def nll(logits: Tensor, wanted: Tensor) -> Tensor:
    """-> (N,)"""
    return F.cross_entropy(logits.float(), wanted, reduction="none")


@torch.no_grad()
def scrub(
    model: nn.Module,
    run: Run,
    inputs: Tensor,
    wanted: Tensor,
    output: Site,
    story: Sequence[Node],
    wiring: Wiring,
    loss: Callable[[Tensor, Tensor], Tensor] = nll,
    draws: int = 4,
    seed: int = 0,
) -> Scrubbed:
    """story: the nodes that `output` reads; `output`: the site from which on there is nothing but the answer.

    Raises BadRequest, all problems together, where the story names what nothing reads, or the wiring leaves something out;
    BadModel where the model's answers are no better than random ones.
    """
    if len(inputs) != len(wanted) or len(inputs) < 2 or draws < 1:
        raise BadCorpus(
            f"{len(inputs)} inputs, {len(wanted)} answers and {draws} draws; give at least two inputs, an answer each"
        )
    sites = {output, *wiring, *(site for feeders in wiring.values() for site in feeders)}
    with watched(model, sites) as kept:
        original = run(model, inputs)
    _check(model, run, inputs, output, story, wiring, kept)
    rng, n = np.random.default_rng(seed), len(inputs)
    free: dict[str, list[float]] = {}
    moved: list[float] = []
    classes: dict[int, Tensor] = {}

    def drawn(node: Node, at: Tensor) -> Tensor:
        """For each input a random one with the same variable."""
        if id(node) not in classes:
            classes[id(node)] = node.variable(inputs)
        label = classes[id(node)]
        alike = label[at][:, None] == label[None]  # (N, N)
        free.setdefault(_name(node.site), []).append(float(alike.sum(1).float().mean()) - 1)
        chosen = [rng.choice(row.nonzero()[:, 0].numpy()) for row in alike.cpu()]
        return torch.as_tensor(np.array(chosen))

    def value(node: Node, at: Tensor) -> Tensor:
        """The site's value for the inputs `at`, scrubbed below."""
        if node.children is None or node.site not in wiring:
            return kept[node.site][at]
        return _computed(model, run, inputs, node.site, fed(node.site, node.children, at))[0]

    def fed(site: Site, children: Sequence[Node], at: Tensor) -> dict[Site, Tensor]:
        """What the site reads, for the inputs `at`, scrubbed."""
        named = {child.site: child for child in children}
        anyone = torch.as_tensor(rng.integers(0, n, n))
        values = {}
        for feeder in wiring[site]:
            if feeder in named:
                other = drawn(named[feeder], at)
                moved.append(float((other != at).float().mean()))
                values[feeder] = value(named[feeder], other)
            else:
                free.setdefault(_name(feeder), []).append(n - 1.0)
                moved.append(float((anyone != at).float().mean()))
                values[feeder] = kept[feeder][anyone]
        return values

    here = torch.arange(n)
    clean = loss(original, wanted)
    answers = [_computed(model, run, inputs, output, fed(output, story, here))[1] for _ in range(draws)]
    lost = torch.stack([loss(answer, wanted) for answer in answers]).mean(0)
    blind = torch.stack([loss(original[torch.as_tensor(rng.integers(0, n, n))], wanted) for _ in range(draws)]).mean(0)
    gap = float((blind - clean).mean())
    if not gap >= LEAST:
        raise BadModel(
            f"a random answer costs only {gap:.2g} more than the model's own over {n} inputs, so there is nothing to explain; "
            "take inputs whose answers differ and which the model answers"
        )
    pick = np.random.default_rng(0).integers(0, n, (1000, n))
    above, apart = (lost - clean).double().cpu().numpy(), (blind - clean).double().cpu().numpy()
    spread = np.quantile(1 - above[pick].mean(1) / np.maximum(apart[pick].mean(1), LEAST), [0.025, 0.975])
    return Scrubbed(
        1 - float(above.mean()) / gap, float(spread[0]), float(spread[1]), float(clean.mean()), float(lost.mean()),
        float(blind.mean()), {name: float(np.mean(x)) for name, x in free.items()}, float(np.mean(moved)) if moved else 0.0, n,
    )  # fmt: skip


def _name(site: Site) -> str:
    return f"{site[0]}.{site[1]}"


def _computed(
    model: nn.Module, run: Run, inputs: Tensor, site: Site, values: Mapping[Site, Tensor]
) -> tuple[Tensor, Tensor]:
    """What the site gives when all that it reads is set, and what the model then answers."""
    with edited(model, {feeder: _set(x) for feeder, x in values.items()}), watched(model, [site]) as seen:
        answer = run(model, inputs)
    return seen[site], answer


def _set(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


def _check(
    model: nn.Module, run: Run, inputs: Tensor, output: Site, story: Sequence[Node], wiring: Wiring, kept: Mapping
) -> None:
    problems = []

    def walk(site: Site, children: Sequence[Node]) -> None:
        names = [child.site for child in children]
        for child in children:
            if child.site not in wiring.get(site, ()):
                problems.append(
                    f"the story says that {_name(site)} reads {_name(child.site)}, and the wiring does not; wired: "
                    f"{', '.join(map(_name, wiring.get(site, ()))) or 'none'}"
                )
            if names.count(child.site) > 1:
                problems.append(f"{_name(child.site)} stands twice below {_name(site)}; name it once")
            label = child.variable(inputs)
            if label.shape != (len(inputs),) or label.is_floating_point():
                problems.append(
                    f"the variable at {_name(child.site)} gives {label.dtype} of shape {tuple(label.shape)}; it must be one "
                    "whole number an input"
                )
            walk(child.site, child.children or ())

    walk(output, story)
    if output not in wiring:
        problems.append(f"the wiring does not say what {_name(output)} reads")
    other = inputs.roll(1, 0)
    for site, feeders in wiring.items():
        found, _ = _computed(model, run, other, site, {feeder: kept[feeder] for feeder in feeders})
        if not torch.allclose(found, kept[site], atol=1e-4, rtol=1e-4):
            problems.append(
                f"{_name(site)} reads more than {', '.join(map(_name, feeders)) or 'nothing'}: with these set it still depends "
                "on the input; name all that feeds it"
            )
    if problems:
        raise BadRequest(problems)
