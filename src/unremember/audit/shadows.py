"""LiRA: is the model's score of a text more than that of models which never saw it?  Offline, by shadow models.

    Λ = Φ(z),   z = (s − μ_out) / σ_out                              offline: models that did not see the text
    Λ = log N(s; μ_in, σ_in) − log N(s; μ_out, σ_out)                online: also those that did

    s = mean log-probability of the answer, or logit of its probability;   below 64 models a side one σ for all texts, pooled

Carlini et al. 2022 (S&P, arXiv 2112.03570), section VI.  Reference code: none read; the formulas are the paper's.
Shadows come in pairs, taught one half of all texts each and the other half: every text is in and out equally often.  They are
taught and not unlearned, so after unlearning the out side alone has a meaning.
Differs: reported is z, in the order of Λ, which is 1 for every certain member.  Only the numbers of a shadow are kept, a file
each, and a run that was stopped goes on.  Fewer than eight shadows are refused, and a single reference model is no LiRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from scipy.special import ndtr
from torch import Tensor

from unremember import team
from unremember.audit.membership import MEMBER, asked
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadFolder, BadModel, BadRequest
from unremember.folder import claim, fingerprint, read_json, write_json
from unremember.lm import LM
from unremember.score import Score
from unremember.table import read, table
from unremember.tokens import Row, Tokens
from unremember.train import Plan, train

FEWEST = 8
POOL = 64  # models a side; below, one deviation for all texts
FLAT = 1e-6  # a smaller deviation: the shadows are all the same
SURE = 1e-7  # nats: as near to probability 1 as the logit goes


# ── statistics ──


def logit(total: np.ndarray) -> np.ndarray:
    """log(p / (1 − p)) of summed log-probabilities, near p = 1 without loss of digits."""
    total = np.minimum(np.asarray(total, dtype=float), -SURE)
    return total - np.log(-np.expm1(total))


def halves(count: int, size: int, seed: int) -> np.ndarray:
    """(count, size) bool: what each shadow is taught; shadows 2i and 2i + 1 share all texts out between them."""
    seen = np.zeros((count, size), dtype=bool)
    for pair in range(count // 2):
        chosen = np.random.default_rng([seed, pair]).permutation(size)[: size // 2]
        seen[2 * pair, chosen] = True
        seen[2 * pair + 1] = ~seen[2 * pair]
    return seen


def moments(scores: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each text over the models that `which` marks.  (S, N), (S, N) bool -> (N,), (N,)

    With fewer than 64 models a text the variances, each with n − 1, are pooled over texts.
    """
    n = which.sum(0)
    if n.min() < 2:
        raise ValueError(f"a text has {n.min()} models on a side; two are the fewest with a deviation")
    mean = np.where(which, scores, 0).sum(0) / n
    squares = (np.where(which, scores - mean, 0) ** 2).sum(0)
    if n.min() < POOL:
        return mean, np.full(len(mean), np.sqrt(squares.sum() / (n - 1).sum()))
    return mean, np.sqrt(squares / (n - 1))


def standing(s: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """z: how many deviations each score lies above those of models that never saw the text."""
    return (s - mean) / sd


def offline(z: np.ndarray) -> np.ndarray:
    """Λ = 1 − P(Z > z), uniform on [0, 1] for strangers."""
    return ndtr(z)


def online(s: np.ndarray, inside: tuple[np.ndarray, np.ndarray], outside: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """log N(s; inside) − log N(s; outside); each side a mean and a deviation, (N,) each"""

    def density(mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
        return -0.5 * ((s - mean) / sd) ** 2 - np.log(sd)

    return density(*inside) - density(*outside)


# ── shadow models ──


def _even(count: int) -> int:
    if count < FEWEST or count % 2:
        raise ValueError(f"{count} shadows: at least {FEWEST} are needed, in pairs; give an even number of 8 or more")
    return count


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True))
class Shadows:
    """base: the LM that shadows start from, as the audited model did before it was taught.  plan: how they are taught.

    count: how many, an even number.  always: roles that every shadow learns, since the audited model learnt them, too.
    measure: 'mean' log-probability a token, or 'logit' of the whole answer's probability (for one short answer).
    kind: 'offline', or 'online' = against the shadows that saw the text, too (before unlearning).
    folder: where the numbers are kept, one file a shadow; None = nowhere.
    """

    base: Any
    plan: Plan
    count: Annotated[int, AfterValidator(_even)] = 16
    always: tuple[str, ...] = ()
    measure: Literal["mean", "logit"] = "mean"
    kind: Literal["offline", "online"] = "offline"
    folder: Path | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    roles: tuple[str, ...] = ("forget", "holdout")
    needs = ("forget", "holdout")
    paper = "Carlini et al. 2022"
    summary = "membership by how far the score lies above those of shadow models that never saw the text"

    def check(self, lm: LM, corpus: Corpus) -> None:
        """Everything that is wrong, before a shadow is taught."""
        corpus.require("LiRA", (*self.needs, *self.always))
        asked(corpus, self.roles)
        if not isinstance(self.base, LM):
            raise BadModel(f"LiRA: the base is {type(self.base).__name__}; give an LM, for instance load('NAME')")
        if self.base.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
            raise BadModel(
                f"LiRA: the base {self.base.name!r} has other tokens than {lm.name!r}; name the model it was taught from"
            )
        if twice := set(self.always) & set(self.roles):
            raise BadRequest(
                f"LiRA: {', '.join(sorted(twice))} is always taught and also shared out in halves; remove it from `always`"
            )
        if self.plan.stop != "never":
            raise BadRequest(f"LiRA: plan.stop is {self.plan.stop!r}, and a shadow takes all its steps; leave stop out")
        if (size := len(corpus.of(*self.roles))) < 4:
            raise BadCorpus(f"LiRA: {size} examples in {', '.join(self.roles)} make no halves to teach; add some")

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        self.check(lm, corpus)
        examples = corpus.of(*self.roles)
        rows = lm.template.rows(examples, lm.limit)
        mine = self._numbers([[r.loglikelihood(), r.total()] for r in table(lm, rows, bench)])
        seen = halves(self.count, len(rows), self.seed)
        shadows = np.stack([self._numbers(x) for x in self.scores(lm, corpus, rows, seen, bench)])  # (S, N)
        outside = moments(shadows, ~seen)
        if outside[1].min() < FLAT:
            raise BadRequest(
                f"LiRA: the shadows' scores do not differ (deviation {outside[1].min():.1e}), so no z can be told; teach them "
                f"more: raise plan.steps ({self.plan.steps}) or plan.lr ({self.plan.lr:g})"
            )
        side = f"{self.count // 2} of {self.count} shadow models that never saw the text"
        if self.kind == "online":
            values = online(mine, moments(shadows, seen), outside)
            formula = f"log-likelihood ratio of the score between models that saw the text and {side}"
        else:
            values = standing(mine, *outside)
            formula = f"(s − μ) / σ of the score among {side}; Φ of it is LiRA's offline number"
        return Score(
            f"membership LiRA {self.kind}",
            f"{formula}; s = {'mean log-probability' if self.measure == 'mean' else 'logit of the probability'} of the answer",
            MEMBER,
            dict(zip((x.id for x in examples), map(float, values), strict=True)),
            self.paper,
        )

    def scores(
        self, lm: LM, corpus: Corpus, rows: Sequence[Row], seen: np.ndarray, bench: Bench = BENCH
    ) -> list[list[list[float]]]:
        """Of every shadow: [mean, sum] of the log-probabilities of each row; from the folder where they are there."""
        base = replace(self.base, template=lm.template)
        always = lm.template.rows(corpus.of(*self.always), lm.limit)
        if self.folder and team.rank() == 0:
            claim(self.folder)
        team.wait()
        found = []
        for number, taught in enumerate(seen):
            lessons = [*(row for row, own in zip(rows, taught, strict=True) if own), *always]
            plan = replace(self.plan, seed=self.plan.seed + number)
            texts = [[(row.ids, row.start, row.stop) for row in some] for some in (rows, lessons)]
            made_from = fingerprint(base.fingerprint, repr(plan), texts)
            file = self.folder / f"shadow-{number:03}.json" if self.folder else None
            kept = _kept(file, made_from) if file else None
            if kept is None:
                kept = self._taught(base, lessons, rows, plan, number, bench)
                if file and team.rank() == 0:
                    write_json(file, {"made from": made_from, "scores": kept})
            found.append(kept)
        return found

    def _taught(
        self, base: LM, lessons: list[Row], rows: Sequence[Row], plan: Plan, number: int, bench: Bench
    ) -> list[list[float]]:
        own = replace(bench, folder=self.folder / f"teaching-{number:03}" if self.folder else None, log=None)
        shadow = train(base, _teaching, {"lessons": lessons}, plan, bench=own, stage=f"shadow {number + 1}")
        return [[r.loglikelihood(), r.total()] for r in read(shadow, rows, bench)]

    def _numbers(self, pairs: Sequence[Sequence[float]]) -> np.ndarray:
        """(N, 2) -> (N,)"""
        both = np.asarray(pairs, dtype=float)
        return both[:, 0] if self.measure == "mean" else logit(both[:, 1])


def _kept(file: Path, made_from: str) -> list[list[float]] | None:
    """What an earlier run left of a shadow of the same making; BadFolder where the file is of another one."""
    found = read_json(file)
    if found is None:
        return None
    if found.get("made from") != made_from:
        raise BadFolder(
            f"{file} is of shadows with another base, plan, seed or corpus; remove the folder, or choose another one"
        )
    return found["scores"]


def _teaching(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
    return {"lessons": tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}
