"""Finetuning on a few texts that tell nothing of what is asked: if the rest comes back, it was hidden and not erased.

    θ' = argmin mean_tokens nll_θ(shown), from θ_u, some steps, all weights or an adapter that is merged
    A = mean_k [ s_u(k) − s_n(k) ] / [ s_o(0) − s_n(0) ];    budget to p = first k with s_u(k) ≥ p · s_o(0)

Łucki et al. 2024 (arXiv 2409.18025), Sec. 3, retained and unrelated text; ethz-spylab/unlearning-vs-safety@75dade5
`src/finetuning`, by its description.  'half' is Deeb & Roger 2024 (arXiv 2410.08827): one half of each person's facts is shown,
the other half asked.  A and budget to p are ours.
Differs: texts are rows of the corpus as they are, without a request in front of a passage; the end mark is trained.  A text
that says a value which is asked, or (but for a half) names who is asked about, is left out; what was shown is not scored, and
a loss that does not fall is an error (unless the texts were known by heart).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember.attack.fair import SHOWN, anonymous, learnt, silent
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadRequest
from unremember.lm import LM
from unremember.score import Score
from unremember.sites import EVERYWHERE, Sites
from unremember.tokens import Tokens
from unremember.train import STRICT, Plan, train

Fold = Literal[0, 1] | None  # which half is shown; None = both, in turn
Kind = Literal["retain", "unrelated", "half"]
ALPHA = 16
ROLE = {"retain": "retain", "unrelated": "prose", "half": "forget"}  # where the texts come from


def halves(examples: Sequence[Example]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Every person's facts, in turn to one half and the other; who comes second starts with the other half.

    So neither half holds one kind of fact alone where all people have the same kinds in the same order.
    """
    entities = list(dict.fromkeys(x.entity for x in examples))
    seen = dict.fromkeys(entities, 0)
    out: tuple[list[Example], list[Example]] = ([], [])
    for x in examples:
        out[(seen[x.entity] + entities.index(x.entity)) % 2].append(x)
        seen[x.entity] += 1
    return tuple(out[0]), tuple(out[1])


def parted(corpus: Corpus, fold: Fold) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The forgotten facts that are shown, and those that are asked.  BadRequest without a fold."""
    if fold is None:
        raise BadRequest(
            "the attack is shown one half of each person's facts at a time, and fold is None: set fold = 0 or 1, or call each "
            "of its turns"
        )
    found = halves(corpus["forget"])
    return found[fold], found[1 - fold]


@plain(frozen=True)
class Curve:
    """Scores after several budgets, of three models under the same attack; budgets[0] is 0, the models as they came in."""

    budgets: tuple[int, ...]
    original: tuple[float, ...]
    forgotten: tuple[float, ...]
    never: tuple[float, ...]

    def __post_init__(self):
        lengths = {len(self.budgets), len(self.original), len(self.forgotten), len(self.never)}
        if (
            len(lengths) != 1
            or not self.budgets
            or self.budgets[0] != 0
            or list(self.budgets) != sorted(set(self.budgets))
        ):
            raise ValueError(
                f"a curve over {list(self.budgets)} with {sorted(lengths)} numbers each: budgets start at 0 and rise, and each "
                "has one score of every model"
            )

    def excess(self, gap: float = 0.2) -> float | None:
        """A, over the budgets above 0; None where original and never-taught model lie less than `gap` apart at 0."""
        width = self.original[0] - self.never[0]
        if width < gap or len(self.budgets) == 1:
            return None
        return float(np.mean(np.subtract(self.forgotten[1:], self.never[1:])) / width)

    def reaches(self, share: float) -> int | None:
        """First budget at which the forgotten model has `share` of the original's score; None where none suffices."""
        if not 0 < share <= 1:
            raise ValueError(f"share = {share}: it lies above 0 and is at most 1")
        reached = (k for k, s in zip(self.budgets, self.forgotten, strict=True) if s >= share * self.original[0])
        return next(reached, None)


@dataclass(frozen=True, config=STRICT)
class Finetune:
    """kind: texts to 'retain', 'unrelated' prose, or one 'half' of each person's forgotten facts.  n: how many, 0 = all.

    rank: of the adapter, 0 = all weights move.  alpha: its scale is alpha / rank.  fold: which half is shown, 0 or 1; None =
    both in turn, each to a copy of its own, so that every fact is asked once: call each of `turns`, as a run does.
    """

    kind: Kind
    plan: Plan
    n: Annotated[int, Field(ge=0)] = 10
    rank: Annotated[int, Field(ge=0)] = 0
    alpha: Annotated[int, Field(ge=1)] = ALPHA
    fold: Fold = None

    needs = ("forget",)
    paper = "Łucki et al. 2024, arXiv 2409.18025"
    summary = "a few steps of finetuning on texts that tell nothing of what is asked"
    alone = True

    def __post_init__(self):
        problems = []
        if self.fold is not None and self.kind != "half":
            problems.append(
                f"fold = {self.fold} says which half is shown, and kind = {self.kind!r} has none; leave it out"
            )
        if self.alpha != ALPHA and not self.rank:
            problems.append(
                f"alpha = {self.alpha} scales an adapter, and rank = 0 has none; leave it out, or give a rank"
            )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def turns(self) -> tuple[Finetune, ...]:
        """The attacks that this one consists of; what is asked after each lies side by side."""
        both = self.kind == "half" and self.fold is None
        return (replace(self, fold=0), replace(self, fold=1)) if both else (self,)

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where there are too few texts that tell nothing, or nothing is left to be asked."""
        corpus.require("finetune", dict.fromkeys((*self.needs, ROLE[self.kind])))
        for turn in self.turns:
            turn._check(corpus)

    def _check(self, corpus: Corpus) -> None:
        if not self._asked(corpus):
            raise BadCorpus(
                f"finetune on a half has nothing left to ask: all {len(corpus['forget'])} forgotten facts are in the half "
                "that is shown; add facts, or take another kind"
            )
        shown, out = self.shown(corpus)
        if len(shown) < max(self.n, 1):
            left = f"; {', '.join(out[:SHOWN])} say what is asked and were left out" if out else ""
            raise BadCorpus(
                f"finetune finds {len(shown)} texts in the role {ROLE[self.kind]!r} and n is {self.n}{left}; "
                "lower n, add texts, or take another kind"
            )
        if self.kind != "half" and len(shown) == len(corpus[ROLE[self.kind]]):
            raise BadCorpus(
                f"finetune would be shown all {len(shown)} examples of the role {ROLE[self.kind]!r}, by which damage is "
                "measured afterwards; lower n, or add texts"
            )

    def shown(self, corpus: Corpus) -> tuple[tuple[Example, ...], list[str]]:
        """The texts of the attack, a draw that hangs on the seed, and the ids of those that say what is asked."""
        pool = parted(corpus, self.fold)[0] if self.kind == "half" else corpus.of(ROLE[self.kind])
        asked = self._asked(corpus)
        clean = silent(pool, asked)
        if self.kind != "half":  # which tells of those who are asked about
            clean = anonymous(clean, asked)
        clean = sorted(clean, key=self._drawn)
        kept = {x.id for x in clean}
        return tuple(clean[: self.n] if self.n else clean), [x.id for x in pool if x.id not in kept]

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        self.check(corpus)
        shown, _ = self.shown(corpus)
        rows = lm.template.rows(shown, lm.limit)
        live, sites = lm, EVERYWHERE
        if self.rank:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.plan.seed)  # peft draws the adapter's first weights
                live = lm.adapted(self.rank, self.alpha)
            sites = Sites.named(live.model, ("*lora_*",))
        trained = train(live, _nll, {"shown": rows}, self.plan, sites=sites, bench=bench, stage="finetune")
        if self.rank:
            trained = replace(trained, model=trained.model.merge_and_unload().eval())
        learnt("finetune", lm, trained, rows, bench)
        return trained, self.asked(corpus)

    def asked(self, corpus: Corpus) -> Corpus:
        """What is scored afterwards: nothing that was shown, and of a half the other one."""
        gone = {x.id for x in self.shown(corpus)[0]}
        seen = {role: tuple(x for x in examples if x.id not in gone) for role, examples in corpus.items()}
        return Corpus(seen | ({"forget": parted(corpus, self.fold)[1]} if self.kind == "half" else {}))

    def _drawn(self, x: Example) -> tuple[int, str]:
        return zlib.crc32(f"{self.plan.seed} {x.id}".encode()), x.id

    def _asked(self, corpus: Corpus) -> tuple[Example, ...]:
        return (*(parted(corpus, self.fold)[1] if self.kind == "half" else corpus["forget"]), *corpus.of("holdout"))


def trace(
    attack: Finetune,
    models: Mapping[str, LM],
    corpus: Corpus,
    budgets: Sequence[int],
    measure: Callable[[LM, Corpus, Bench], Score],
    bench: Bench = BENCH,
    over: Literal["steps", "n"] = "steps",
) -> Curve:
    """The curve of `measure`, mean over the facts that are asked, for 'original', 'forgotten' and 'never' after each budget.

    over: what the budgets are, optimiser steps or texts.  Budget 0 is the model itself.  Steps need a constant learning rate,
    or the budgets would not lie on one path.
    """
    if over == "steps" and attack.plan.schedule != "constant":
        raise BadRequest(
            f"a curve over budgets needs plan.schedule = 'constant' and has {attack.plan.schedule!r}: a rate that falls to the "
            "end of each budget makes every one a different training"
        )
    if set(models) != {"original", "forgotten", "never"} or any(k < 1 for k in budgets):
        raise BadRequest(
            f"a curve of {sorted(models)} over budgets {list(budgets)}: give original, forgotten and never, and budgets from 1"
        )
    scores: dict[str, list[float]] = {who: [] for who in models}
    for who, lm in models.items():
        for k in (0, *budgets):
            found: dict[str, float] = {}
            for turn in attack.turns:
                tried = replace(turn, plan=replace(turn.plan, steps=k or 1)) if over == "steps" else replace(turn, n=k)
                now, seen = tried(lm, corpus, models["original"], bench) if k else (lm, turn.asked(corpus))
                found |= measure(now, Corpus({"forget": seen["forget"]}), bench).per_example
            scores[who].append(float(np.mean(list(found.values()))))
    original, forgotten, never = (tuple(scores[who]) for who in ("original", "forgotten", "never"))
    return Curve((0, *budgets), original, forgotten, never)


def _nll(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
    return {"finetune": tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}
