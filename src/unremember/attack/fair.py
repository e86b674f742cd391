"""What an attack that trains owes: its texts tell nothing of what is asked, and it did learn them.

Otherwise it proves nothing: an attack that is told an answer finds it in every model, one that is told the answer of a stranger
raises the never-taught level that it is measured against, and one that learns nothing finds nothing in any.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np

from unremember.bench import Bench
from unremember.corpus import Corpus, Example, says
from unremember.errors import BadCorpus, BadRequest
from unremember.lm import LM
from unremember.table import read
from unremember.tokens import Row

KNOWN = log(2)  # nats a token: texts that are likelier than all else together were known, and need not become likelier
LEAST = 0.01  # share of their loss that other texts must lose
SHOWN = 5  # names in an error


def silent(pool: Sequence[Example], asked: Sequence[Example]) -> tuple[Example, ...]:
    """Those of the pool whose text says no value that is asked."""
    values = [v for x in asked for v in x.values()]
    return tuple(x for x in pool if not any(says(f"{x.prompt}\n{x.answer}", v) for v in values))


def anonymous(pool: Sequence[Example], asked: Sequence[Example]) -> tuple[Example, ...]:
    """Those of the pool whose text names nobody who is asked about."""
    names = {x.entity for x in asked if x.entity}
    return tuple(x for x in pool if not any(says(f"{x.prompt}\n{x.answer}", name) for name in names))


def outsiders(who: str, corpus: Corpus) -> None:
    """BadCorpus where the adversary has no texts of its own, of the relearn role, or they tell what is asked."""
    corpus.require(who, ("relearn",))
    shown = "\n".join(f"{x.prompt}\n{x.answer}" for x in corpus["relearn"])
    problems = []
    for role, kind, harm in (
        ("forget", "forgotten", "an attack that teaches the answer proves nothing"),
        ("holdout", "held-out", "it would raise the never-taught level"),
    ):
        told = [x.id for x in corpus.of(role) if any(says(shown, v) for v in x.values())]
        if told:
            more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
            problems.append(
                f"{who}: the relearn role contains the {kind} value of {', '.join(told[:SHOWN])}{more}; {harm}, take those "
                "examples out"
            )
    if problems:
        raise BadCorpus(problems)


def learnt(who: str, before: LM, after: LM, rows: Sequence[Row], bench: Bench) -> None:
    """BadRequest where no weight moved, or the texts are neither likelier than before nor known."""
    old, new = (-float(np.mean([x.loglikelihood() for x in read(lm, rows, bench)])) for lm in (before, after))
    if after.fingerprint == before.fingerprint or (new > old * (1 - LEAST) and new > KNOWN):
        raise BadRequest(
            f"{who} did not learn its texts: {old:.4f} nats a token before and {new:.4f} after; raise plan.steps, or change "
            "plan.lr"
        )
