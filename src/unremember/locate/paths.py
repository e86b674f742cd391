"""Path patching, one edge at a time: what a sender does to the answer through one receiver, and through nothing else.

    1  run x and x', keep the sender's value in x' and every frozen site's value in x
    2  run x with the sender's value of x' and all frozen sites at their values in x; keep what then goes into the receiver
    3  run x with only that put into the receiver:      effect = m(x) − m(3)

Swap x and x' for denoising.  Frozen: all other heads always; MLPs too with `mlps=True` (then "direct" means past no MLP), else
they run and carry the sender on.  What comes after the receiver runs.  A sender that cannot reach the receiver gives exactly 0.
Wang et al. 2023 (arXiv 2211.00593), App. B; Goldowsky-Dill et al. 2023 (arXiv 2304.05969).  Reference code:
magikarp01/mechanistic-unlearning, read for path.py.
Differs: any site may send or receive; in a linear model the effects of a sender by all its first edges add up to patching it.
path.py is one use of the idea (who feeds the heads that carry facts out); this is the instrument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unremember.errors import BadRequest
from unremember.locate.activation import NOTHING, Edit, Metric, Part, put
from unremember.locate.anatomy import Site, components, edited, watched


@dataclass(frozen=True)
class PathEffect:
    """change, total: (B,) m(x) − m(x by this path) and m(x) − m(x')."""

    change: Tensor
    total: Tensor

    @property
    def share(self) -> float:
        """Of what separates the runs; a ratio of sums."""
        return float(self.change.sum() / self.total.sum())


def rest(model: Any, mlps: bool) -> list[Site]:
    """The sites that are frozen in a language model: what all heads give, and with `mlps` what MLPs give."""
    return [x.inner if x.kind == "attention" else x.output for x in components(model) if mlps or x.kind == "attention"]


@torch.no_grad()
def through(
    model: nn.Module,
    run: Metric,
    other: Metric,
    sender: Part,
    receiver: Iterable[Part],
    frozen: Iterable[Site],
    edits: Mapping[Site, Edit] = NOTHING,
) -> PathEffect:
    """The effect of `sender` on `run` by way of `receiver`: parts that receive together, as an MLP's two projections do.

    other: the pass that the sender's value comes from.  frozen: sites held at their values in `run`; the sender's own site may be
    among them, then its other dimensions stay.  edits: what corrupts `other`, if not its tokens.
    """
    receiver, frozen = list(receiver), set(frozen)
    if not receiver:
        raise BadRequest("no receiver; name at least one part that the sender may reach")
    if sender.site in {part.site for part in receiver}:
        raise BadRequest(f"{sender.site[0]} would send to itself; name another receiver")
    with watched(model, frozen | {sender.site}) as kept:
        whole = run()
    with edited(model, edits), watched(model, [sender.site]) as sent:
        total = whole - other()
    held = {site: _held(kept[site]) for site in frozen}
    sites = {part.site for part in receiver}
    # Watched after all edits: a receiver that is frozen itself would be seen as frozen, so it is not held here.
    with (
        edited(model, {site: edit for site, edit in held.items() if site not in sites}),
        edited(model, put([sender], sent)),
        watched(model, sites) as reached,
    ):
        run()
    with edited(model, put(receiver, reached)):
        return PathEffect(whole - run(), total)


def _held(value: Tensor) -> Edit:
    return lambda _: value
