"""Selective unlearning: gradient ascent on the sensitive tokens alone, and three ways to say which these are.

    loss = (1/|M|) · Σ_{t ∈ M} log p_θ(x_t | x_<t),    M the span tokens of the whole step
         + retain · mean_tokens nll_θ(retain)  +  kl · mean_tokens KL(p_ref ‖ p_θ)(retain)

The loss is that of `ascent` with part = "span", bit for bit (a test compares the weights); what SeUL adds is where the spans
come from.  `given`: those of the corpus.  `offline`: rules read the text beforehand (annotate.py).  `online`: the tokens that
surprise a scorer most, s_t = −log q(x_t | x_<t).  Audits and stopping look at the corpus' own spans in all three cases.
Wang, Zeng, Guo, Wong, Gottlob 2025 (arXiv 2402.05813).  No code was published, and only the abstract could be read: the
reduction and the online rule are ours.
Differs: spans are chosen once, before the first step, not while unlearning runs; a scorer must be named, and one that is the
model itself is warned of, since it has memorised what should surprise it; what the prompt says already is never marked online
or offline; offline, rules stand for the LLMs unless an LLM's spans are in the corpus.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PlainValidator
from pydantic.dataclasses import dataclass

from unremember.annotate import MOST, Span, annotated, named, normal, together
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.forget.ascent import Ascent
from unremember.forget.descend import descend
from unremember.forget.retain import needed
from unremember.lm import LM
from unremember.loading import check, load
from unremember.sites import EVERYWHERE, Sites
from unremember.table import read
from unremember.tokens import Row, Template, count
from unremember.train import STRICT, Objective, Plan

Annotator = Literal["date", "digits", "email", "money", "names", "phone", "presidio", "url"]
SHOWN = 5
WORDS = re.compile(r"[^\W_]+")


def surprising(surprisal: np.ndarray, share: float, deviations: float = 0.0) -> np.ndarray:
    """(T,) -> (T,) bool: the highest `share`, rounded up; with deviations > 0 what exceeds mean + deviations · sd instead."""
    if deviations:
        return surprisal > surprisal.mean() + deviations * surprisal.std()
    marked = np.zeros(len(surprisal), dtype=bool)
    marked[np.argsort(-surprisal, kind="stable")[: math.ceil(share * len(surprisal) - 1e-9)]] = True
    return marked


def bridged(marked: np.ndarray, gap: int) -> np.ndarray:
    """(T,) bool -> (T,) bool, with gaps of at most `gap` tokens between marked ones filled."""
    places = np.flatnonzero(marked)
    whole = marked.copy()
    for left, right in pairwise(places):
        whole[left:right] |= right - left - 1 <= gap
    return whole


def open_to(prompt: str, text: str, pieces: list[Span]) -> np.ndarray:
    """(T,) bool: whether a token may be marked: neither punctuation alone nor part of a word that the prompt says already.

    pieces: where each token stands in `text`.
    """
    asked = set(WORDS.findall(prompt.casefold()))
    parts = [WORDS.findall(text[slice(*_words(text, *piece))].casefold()) for piece in pieces]
    return np.array([bool(set(words) - asked) for words in parts], dtype=bool)


def intervals(text: str, pieces: list[Span], marked: np.ndarray) -> list[Span]:
    """(T,) bool -> character intervals of the marked tokens, those of neighbours joined, words whole."""
    places = np.flatnonzero(marked)
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else []
    spans = normal(text, [(pieces[run[0]][0], pieces[run[-1]][1]) for run in runs])
    return normal(text, [_words(text, a, b) for a, b in spans])


def _words(text: str, a: int, b: int) -> Span:
    """[a, b), white space aside, widened until no word is cut."""
    if not text[a:b].strip():
        return a, b
    [(a, b)] = normal(text, [(a, b)])
    while a and _letters(text[a - 1 : a + 1]):
        a -= 1
    while b < len(text) and _letters(text[b - 1 : b + 1]):
        b += 1
    return a, b


def _letters(pair: str) -> bool:
    return pair.replace("_", "a").isalnum()


def _known(scorer: object) -> object:
    """'' (none), the name of a model, or an LM."""
    if isinstance(scorer, LM) or scorer == "":
        return scorer
    if not isinstance(scorer, str):
        raise ValueError("it must be the name of a model")
    try:
        check(scorer)
    except BadModel as error:
        raise ValueError(str(error)) from error
    return scorer


@dataclass(frozen=True, config=STRICT)
class SeUL:
    """Ascent on chosen spans.

    spans: 'given', 'offline' (by `annotators`) or 'online' (by surprise).
    scorer: for 'online', a model that knows the style of the texts and has not seen them: a name, or in Python an LM.
    minus: rank by the scorer's surprise less that of the model itself: surprising *and* memorised.
    share: of an answer's tokens are marked, punctuation and the prompt's words apart.  deviations: > 0 marks instead what lies
    so many standard deviations above the answer's mean.
    gap: marked tokens with at most so many others between them are one span.
    """

    plan: Plan
    retain: Annotated[float, Field(ge=0)] = 0.0
    kl: Annotated[float, Field(ge=0)] = 0.0
    spans: Literal["given", "offline", "online"] = "given"
    annotators: Annotated[tuple[Annotator, ...], Field(min_length=1)] = (
        "date", "digits", "email", "money", "names", "phone", "url",
    )  # fmt: skip
    scorer: Annotated[Any, PlainValidator(_known)] = ""
    minus: bool = False
    share: Annotated[float, Field(gt=0, le=1)] = 0.3
    deviations: Annotated[float, Field(ge=0)] = 0.0
    gap: Annotated[int, Field(ge=0)] = 1

    paper = "Wang et al. 2025, arXiv 2402.05813"
    summary = "gradient ascent on sensitive spans: given, found by rules, or found by surprise"

    @property
    def needs(self) -> tuple[str, ...]:
        return needed(self.retain, self.kl)

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        return descend(self, lm, corpus, sites, bench)

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where a role is missing or an example has no span, BadRequest where there is no scorer to find them."""
        corpus.require("seul", self.needs)
        if self.spans != "online":
            self._beforehand(corpus)
        elif isinstance(self.scorer, str) and not self.scorer:
            raise BadRequest(
                "seul with spans = 'online' needs a scorer that has not seen the forget texts, and forget.scorer is empty; name "
                "a model that was trained on other texts of the kind (the model itself finds all that it memorised likely)"
            )

    def terms(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[dict[str, list[Row]], Objective]:
        pools, objective = Ascent(self.plan, self.retain, self.kl, part="span").terms(lm, corpus, bench)
        rows = lm.template.rows(self.choose(lm, corpus, bench), lm.limit)
        total = count(rows)
        if total["span"] > MOST * total["answer"]:
            warnings.warn(
                f"seul: its spans cover {total['span'] / total['answer']:.0%} of the answers' tokens; this is ascent on all of "
                "them by another name, so narrow the spans or use ascent",
                stacklevel=2,
            )
        return {**pools, "forget": rows}, objective

    def choose(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[Example, ...]:
        """The forget examples with the spans that are pushed on: a copy, the corpus keeps its own."""
        self.check(corpus)
        return self._beforehand(corpus) if self.spans != "online" else self._online(lm, corpus, bench)

    def _beforehand(self, corpus: Corpus) -> tuple[Example, ...]:
        """By the corpus, or by rules."""
        if self.spans == "given":
            advice = "mark them (`unremember annotate` does), or set forget.spans to 'offline' or 'online'"
            bare = [x.id for x in corpus["forget"] if not x.spans]
            return _all_marked(corpus["forget"], [f"example {key!r} has no spans; {advice}" for key in bare])
        propose = together(*map(named, self.annotators))
        found = annotated([replace(x, spans=()) for x in corpus["forget"]], propose)
        return _all_marked(found.examples, found.problems)

    def _online(self, lm: LM, corpus: Corpus, bench: Bench) -> tuple[Example, ...]:
        """By surprise."""
        asked = [replace(x, spans=()) for x in corpus["forget"]]
        scorer = self._scorer(lm)
        rows = scorer.template.rows(asked, scorer.limit)
        surprisal = [-x.logp for x in read(scorer, rows, bench)]
        if self.minus:
            mine = lm.template.rows(asked, lm.limit)
            if any(a.ids[a.start : a.stop] != b.ids[b.start : b.stop] for a, b in zip(rows, mine, strict=True)):
                raise BadModel(
                    f"seul with minus = true compares token by token, and the scorer {scorer.name!r} cuts the text differently; "
                    "name one with the tokenizer of the model, or set forget.minus = false"
                )
            surprisal = [s + x.logp for s, x in zip(surprisal, read(lm, mine, bench), strict=True)]
        found = []
        for x, s in zip(asked, surprisal, strict=True):
            pieces = _pieces(scorer.template, x, len(s))
            free = open_to(x.prompt, x.answer, pieces)
            marked = np.zeros(len(s), dtype=bool)
            marked[free] = surprising(s[free], self.share, self.deviations)
            spans = intervals(x.answer, pieces, bridged(marked, self.gap))
            found.append(replace(x, spans=tuple(spans)))
        advice = "raise forget.share, lower forget.deviations, or mark it by hand"
        bare = [x.id for x in found if not x.spans]
        return _all_marked(found, [f"nothing in example {key!r} surprises the scorer enough; {advice}" for key in bare])

    def _scorer(self, lm: LM) -> LM:
        """The LM that is asked; warns where it is the one that is to forget."""
        scorer = self.scorer
        if isinstance(scorer, str):
            template = "auto" if lm.template.chat else "plain"
            scorer = load(scorer, template=template, precision=lm.precision, device=str(lm.device))
        # an adapter changes the fingerprint, and not the name
        if scorer.fingerprint == lm.fingerprint or self.scorer == lm.name:
            warnings.warn(
                "seul: the scorer is the model that is to forget; what it has memorised surprises it nowhere, so that its "
                "ranking is noise; name a model that has not seen the texts",
                stacklevel=2,
            )
        return scorer


def _all_marked(examples: Sequence[Example], problems: Sequence[str]) -> tuple[Example, ...]:
    """The examples, all of which have spans, or BadCorpus with the problems."""
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise BadCorpus(f"seul: {problem}" for problem in [*problems[:SHOWN], *more])
    return tuple(examples)


def _pieces(template: Template, x: Example, scored: int) -> list[Span]:
    """Where the last `scored` tokens of the answer stand in it; a space that leads the answer is none of it."""
    lead = " " if x.prompt and not template.chat else ""
    coded = template.tokenizer(lead + x.answer, add_special_tokens=False, return_offsets_mapping=True)
    return [(max(a - len(lead), 0), max(b - len(lead), 0)) for a, b in coded.offset_mapping][-scored:]
