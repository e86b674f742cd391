"""How well a model took an update: the new answers, their paraphrases, what is out of scope, and what is left of the old ones.

    reliability        y_new after the question itself (`new`)
    generality         y_new after its paraphrases, the mean over them (`new`)
    locality           the pre-edit answer after an out-of-scope question (`neighbour`, pinned by `pinned`)
    residual conflict  p(y_old|x) / (p(y_old|x) + p(y_new|x)),  p of the whole answer

The first three come in two forms.  "arg-max" is that of editing toolkits: the share of the answer's value tokens (all of them
where no span is given) that are the arg-max, teacher-forced.  "said" is stricter: 1 where the greedy answer is the answer and
nothing else, but for case, white space and a full stop.
The triple: Meng et al. 2022 (arXiv 2202.05262), Mitchell et al. 2022 (arXiv 2110.11309); as used by Ni et al. 2024 (F-Learning,
arXiv 2311.08011).  Residual conflict is ours.  No code was read.
Differs: a measure sees one model, so what locality compares with must stand in the corpus; without `pinned` it is the answer
that the file gives, and the original does not score 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp

import numpy as np

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus
from unremember.lm import LM
from unremember.score import Score
from unremember.table import answers, table

NEW = 32  # tokens of a greedy answer; where expected answers are longer, the longest and 8 more

WHAT = {
    "reliability": "the new answer after its question",
    "generality": "the new answer after paraphrases of its question, the mean over them",
    "locality": "the answer that the corpus gives after an out-of-scope question",
}


@dataclass(frozen=True)
class Editing:
    """measure: 'reliability', 'generality' or 'locality'.  said: greedy answers instead of the arg-max of each token."""

    measure: str = "reliability"
    said: bool = False
    paper = "Meng et al. 2022; Mitchell et al. 2022; Ni et al. 2024"
    summary = "a new answer is given, also to paraphrases, and out-of-scope answers stay"

    @property
    def roles(self) -> tuple[str, ...]:
        return ("neighbour",) if self.measure == "locality" else ("new",)

    @property
    def needs(self) -> tuple[str, ...]:
        return self.roles

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        asked = [
            replace(x, id=f"{x.id}#{i}", prompt=prompt)
            for x in corpus.of(*self.roles)
            for i, prompt in enumerate(x.paraphrases if self.measure == "generality" else (x.prompt,))
        ]
        right = _said(lm, asked, bench) if self.said else _hits(lm, asked, bench)
        found: dict[str, list[float]] = {}
        for x, value in zip(asked, right, strict=True):
            found.setdefault(x.id.rpartition("#")[0], []).append(value)
        how = (
            "greedy answer equal to it"
            if self.said
            else "share of its value tokens that are the arg-max, teacher-forced"
        )
        return Score(
            f"{self.measure}, said" if self.said else self.measure,
            f"{WHAT[self.measure]}: {how}",
            "higher = better updated" if self.measure != "locality" else "higher = less disturbed",
            {key: float(np.mean(values)) for key, values in found.items()},
            self.paper,
        )


@dataclass(frozen=True)
class Conflict:
    """What share the old answer has of the probability of both; the corpus pairs them by their question."""

    roles = ("new",)
    needs = ("forget", "new")
    paper = "ours, after Ni et al. 2024"
    summary = "p(old answer) over p(old) + p(new), both after the same question"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        old = {x.prompt: x for x in corpus.of("forget")}
        if alone := [x.id for x in corpus.of("new") if x.prompt not in old]:
            raise BadCorpus(
                f"residual conflict needs the old answer to each new one, and no forget example asks what {alone[0]!r} asks "
                f"({len(alone)} such); give both the same prompt"
            )
        new = corpus.of("new")
        both = lm.template.rows([*(replace(old[x.prompt], id=f"{x.id}#old") for x in new), *new], lm.limit)
        totals = [reading.total() for reading in table(lm, both, bench)]
        return Score(
            "residual conflict",
            "p(old answer) / (p(old answer) + p(new answer)), p of the whole answer; a longer answer has the lower p",
            "higher = more of the old answer left",
            {x.id: conflict(a, b) for x, a, b in zip(new, totals[: len(new)], totals[len(new) :], strict=True)},
            self.paper,
        )


def conflict(old: float, new: float) -> float:
    """old, new: log-probability of an answer, in nats -> e^old / (e^old + e^new), without overflow"""
    share = 1 / (1 + exp(-abs(old - new)))
    return share if old >= new else 1 - share


def pinned(lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Corpus:
    """`corpus` with every neighbour's answer replaced by what `lm`, the model before the edit, says to it.

    Left out are those to which it says nothing, and those to whose paraphrases it says something else: what a model never
    answered consistently cannot show that an edit disturbed it.  Raises BadCorpus where none is left.
    """
    corpus.require("locality", ("neighbour",))
    asked = [replace(x, prompt=p) for x in corpus["neighbour"] for p in (x.prompt, *x.paraphrases)]
    said: dict[str, list[str]] = {}
    for x, text in zip(asked, _spoken(lm, asked, NEW, bench), strict=True):
        said.setdefault(x.id, []).append(text)
    kept = [
        replace(x, answer=said[x.id][0], spans=(), rewording="", distractors=())
        for x in corpus["neighbour"]
        if said[x.id][0] and len({normal(text) for text in said[x.id]}) == 1
    ]
    if not kept:
        raise BadCorpus(
            f"locality: the model answers none of the {len(corpus['neighbour'])} neighbour questions consistently; add "
            "questions that it can answer"
        )
    return corpus.with_roles(neighbour=kept)


def normal(text: str) -> str:
    """What counts of an answer: no case, no double spaces, no full stop at its end."""
    return " ".join(text.split()).casefold().rstrip(".")


def _hits(lm: LM, asked: list[Example], bench: Bench) -> list[float]:
    readings = table(lm, lm.template.rows(asked, lm.limit), bench)
    return [float(reading.hit[reading.span].mean()) for reading in readings]


def _said(lm: LM, asked: list[Example], bench: Bench) -> list[float]:
    longest = max((len(lm.tokenizer(x.answer).input_ids) for x in asked), default=0)
    said = _spoken(lm, asked, NEW if longest <= NEW else longest + 8, bench)
    return [float(normal(text) == normal(x.answer)) for x, text in zip(asked, said, strict=True)]


def _spoken(lm: LM, asked: list[Example], new: int, bench: Bench) -> list[str]:
    return answers(lm, [lm.template.context(x.prompt) for x in asked], new, bench)
