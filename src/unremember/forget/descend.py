"""What the methods that descend on an objective share: required roles, the stopper, the loop."""

from __future__ import annotations

from typing import Protocol

from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.lm import LM
from unremember.sites import Sites
from unremember.stop import Stopper
from unremember.tokens import Row
from unremember.train import Objective, Plan, train


class Descent(Protocol):
    """A method that is an objective: `terms` gives role -> rows and what is minimised over them.

    Whatever the objective compares the model with is resolved in `terms`, once, from the LM that came in.
    """

    @property
    def plan(self) -> Plan: ...
    @property
    def needs(self) -> tuple[str, ...]: ...
    def terms(self, lm: LM, corpus: Corpus, bench: Bench) -> tuple[dict[str, list[Row]], Objective]: ...


def descend(method: Descent, lm: LM, corpus: Corpus, sites: Sites, bench: Bench) -> LM:
    """Train on the method's terms until the stopper says so, or for all steps of its plan."""
    corpus.require(type(method).__name__, method.needs)
    plan = method.plan
    stop = Stopper.calibrated(lm, corpus, plan.stop, plan.every, "retain" in method.needs, bench)
    pools, objective = method.terms(lm, corpus, bench)
    return train(lm, objective, pools, plan, sites=sites, stop=stop, bench=bench, stage="forget")
