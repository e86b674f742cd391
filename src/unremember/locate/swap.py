"""Residual use: is what was unlearnt still in the stream?  Layer by layer, one model's residual stream is put into the other.

    into(l) = Σ (d_u(h_l ← original) − d_u) / Σ (d_o − d_u)     the original's stream behind block l, into the unlearned model
    back(l) = Σ (d_o − d_o(h_l ← unlearned)) / Σ (d_o − d_u)    the unlearned model's stream, into the original
    kept(l) = 1 − back(l)                                       what the original's upper blocks still read out of it

Same prompt, same tokens, all places; d the log-odds of subject.py, o the original, u the unlearned model; l = 0 the embeddings.
`into` that rises only late, with `kept` high until there, says that knowledge is computed as before and hidden at the end.
Ours, after Patil et al. 2023 (arXiv 2309.17410) and activation patching (activation.py).  Reference code: none.
Differs: nothing to differ from.  Two models are in memory, never a third.
A low `kept` says that the original's blocks cannot read it, not that nobody can: a stream that was only turned looks forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadModel
from unremember.lm import LM
from unremember.locate.activation import Part, put
from unremember.locate.anatomy import Site, edited, embedding, watched
from unremember.locate.subject import facts, groups, known, laid, required, some
from unremember.train import STRICT

DRAWS = 1000


@plain(frozen=True)
class Use:
    """Per level 0 … blocks: shares of the gap, their 95 % intervals over facts, and the facts' own gains.

    gains_into, gains_back: (levels, facts); gap: (facts,) what unlearning took from each.
    """

    gains_into: np.ndarray
    gains_back: np.ndarray
    gap: np.ndarray
    keys: tuple[str, ...]

    @property
    def into(self) -> tuple[float, ...]:
        return tuple((self.gains_into.sum(1) / self.gap.sum()).tolist())

    @property
    def back(self) -> tuple[float, ...]:
        return tuple((self.gains_back.sum(1) / self.gap.sum()).tolist())

    @property
    def kept(self) -> tuple[float, ...]:
        return tuple(1 - share for share in self.back)

    @property
    def onset(self) -> int | None:
        """The first level from which on the original's stream brings back at least half; None = never, not even at the end."""
        low = [level for level, share in enumerate(self.into) if share < 0.5]
        first = max(low, default=-1) + 1
        return first if first < len(self.into) else None

    def interval(self, gains: np.ndarray, draws: int = DRAWS) -> list[tuple[float, float]]:
        """95 % bootstrap over facts of a level's share, the pairs of gain and gap kept together."""
        pick = np.random.default_rng(0).integers(0, len(self.gap), (draws, len(self.gap)))
        shares = gains[:, pick].sum(2) / self.gap[pick].sum(1)  # (levels, draws)
        return [(float(a), float(b)) for a, b in np.quantile(shares, [0.025, 0.975], axis=1).T]


def levels(lm: LM) -> list[Site]:
    """The residual stream: the embeddings, and what each block gives."""
    names = {id(module): name for name, module in lm.model.named_modules()}
    return [embedding(lm.model), *((names[id(block)], "out") for block in team.blocks(lm.model))]


def alike(original: LM, unlearned: LM) -> None:
    """BadModel, all problems together, where one model's stream means nothing to the other."""
    problems = []
    pairs: Sequence[tuple[str, object, object]] = [
        ("blocks", len(team.blocks(original.model)), len(team.blocks(unlearned.model))),
        ("dimensions", original.model.config.hidden_size, unlearned.model.config.hidden_size),
        ("tokens in the vocabulary", len(original.tokenizer), len(unlearned.tokenizer)),
        ("template", original.template.row("", "What?", "That.").ids, unlearned.template.row("", "What?", "That.").ids),
    ]
    for what, a, b in pairs:
        if a != b:
            problems.append(
                f"the original has {what} {a} and the unlearned model {b}; compare a model with its own copy"
            )
    problems += [
        f"{x.name or 'a model'} is in training mode; call model.eval()"
        for x in (original, unlearned)
        if x.model.training
    ]
    if problems:
        raise BadModel(problems)


@dataclass(frozen=True, config=STRICT)
class ResidualUse:
    """facts: the most that are looked at, 0 = all; drawn by seed."""

    facts: Annotated[int, Field(ge=0)] = 32
    seed: Annotated[int, Field(ge=0)] = 0

    needs = ("forget",)
    paper = "ours, after Patil et al. 2023, arXiv 2309.17410"
    summary = "how much of a secret returns when the original's stream is put in, layer by layer"

    @torch.no_grad()
    def __call__(self, original: LM, unlearned: LM, corpus: Corpus, bench: Bench = BENCH) -> Use:
        """BadModel where the two are not alike, or unlearning took less than a nat of log-odds from a fact on average."""
        corpus.require("residual use", self.needs)
        alike(original, unlearned)
        original, unlearned = replace(original, precision="fp32"), replace(unlearned, precision="fp32")
        found = facts(original, some(corpus["forget"], self.facts, self.seed))
        theirs, ours = levels(original), levels(unlearned)
        into: list[list[np.ndarray]] = [[] for _ in theirs]
        back: list[list[np.ndarray]] = [[] for _ in theirs]
        gap, keys = [], []
        batches = list(groups(found, bench.budget))
        for number, group in enumerate(batches):
            tokens = laid(original, [fact.row for fact in group])
            with watched(original.model, theirs) as high:
                whole = known(original, tokens)
            with watched(unlearned.model, ours) as low:
                least = known(unlearned, tokens)
            for level, (a, b) in enumerate(zip(theirs, ours, strict=True)):
                with edited(unlearned.model, put([Part(b)], {b: high[a]})):
                    into[level].append((known(unlearned, tokens) - least).cpu().numpy())
                with edited(original.model, put([Part(a)], {a: low[b]})):
                    back[level].append((whole - known(original, tokens)).cpu().numpy())
            gap.append((whole - least).cpu().numpy())
            keys += [fact.row.key for fact in group]
            bench.say("locate", number + 1, len(batches), {})
        lost = np.concatenate(gap)
        try:
            required(float(lost.sum()), len(lost))
        except BadModel:
            raise BadModel(
                f"unlearning took {lost.mean():.2f} nats of log-odds from each of {len(lost)} facts on average, and shares of "
                "less than 1 are noise; compare with a model that has forgotten more, or choose facts that it forgot"
            ) from None
        joined = [np.stack([np.concatenate(x) for x in way]) for way in (into, back)]
        return Use(joined[0], joined[1], lost, tuple(keys))
