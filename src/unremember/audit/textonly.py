"""A control that sees no model: can members be told from strangers by their words alone?  If so, the split itself leaks.

    score = w · counts(words, word pairs) + c,   fitted without the fold that the example is in

Logistic regression on bags of words, in five folds; whole entities share a fold, or the name of a person would give away the
other facts about them.  Duan et al. 2024 (MIMIR), Meeus et al. 2024, Das et al. 2024: what passes for membership inference on
many public benchmarks is this.  Reference code: none, scikit-learn's classifier.
Differs: an attack on a model must beat this control, and on a fair split the control is at chance; `leaks` says whether it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember.audit.separation import Measured, separation
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadRequest
from unremember.lm import LM
from unremember.score import Score
from unremember.train import STRICT

WORDS = r"\w+|[^\w\s]"  # a full stop is a word, too: other editors, other commas


@dataclass(frozen=True, config=STRICT)
class TextOnly:
    """folds: of the cross-validation.  seed: draws them."""

    folds: Annotated[int, Field(ge=2)] = 5
    seed: int = 0
    roles: tuple[str, ...] = ("forget", "holdout")
    needs = ("forget", "holdout")
    paper = "Duan et al. 2024; Meeus et al. 2024"
    summary = "a control without a model: members told from strangers by their words"

    def __call__(self, lm: LM | None, corpus: Corpus, bench: Bench = BENCH) -> Score:
        """The model is not looked at."""
        corpus.require("text only", self.needs)
        members, strangers = corpus["forget"], corpus["holdout"]
        examples = (*members, *strangers)
        inside = np.array([1] * len(members) + [0] * len(strangers))
        shared = self._groups(corpus)
        for side, role in ((1, "forget"), (0, "holdout")):
            units = {g for g, x in zip(shared, inside, strict=True) if x == side}
            if len(units) < self.folds:
                raise BadCorpus(
                    f"text only: {len(units)} independent entities in the role {role!r} make no {self.folds} folds; add some, or "
                    f"give folds = {len(units)}" + (" (at least 2)" if len(units) < 2 else "")
                )
        found = out_of_fold([f"{x.prompt} {x.answer}" for x in examples], inside, shared, self.folds, self.seed)
        return Score(
            "membership text only",
            f"log-odds of being a member by words and word pairs, fitted on the other {self.folds - 1} of {self.folds} folds",
            "higher = more likely a member",
            dict(zip((x.id for x in examples), map(float, found), strict=True)),
            self.paper,
        )

    def leaks(self, corpus: Corpus) -> Measured:
        """The control's AUC; `beyond` means that the split leaks, and `reason` says so in words."""
        score = self(None, corpus)
        members, strangers = ([x.id for x in corpus[role]] for role in ("forget", "holdout"))
        examples = corpus.of("forget", "holdout")
        shared = self._groups(corpus)
        several = len(set(shared)) < len(shared)
        units = dict(zip((x.id for x in examples), shared, strict=True)) if several else None
        found = separation(score, members, strangers, units=units)["AUC"]
        if not found.beyond:
            return found
        why = "words alone tell the two roles apart, so the split leaks and no attack on a model means membership; draw both "
        return replace(found, reason=why + "from one source, at random")

    def _groups(self, corpus: Corpus) -> list[str]:
        """What each example shares its fold with: its entity where one role alone has it, else nothing but itself."""
        sides = [{x.entity for x in corpus[role]} for role in ("forget", "holdout")]
        single = (sides[0] ^ sides[1]) - {""}
        return [f"of {x.entity}" if x.entity in single else f"alone {x.id}" for x in corpus.of("forget", "holdout")]


def out_of_fold(texts: Sequence[str], inside: np.ndarray, shared: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """(N,) log-odds that each text has inside = 1, from a classifier that saw neither it nor what shares its group."""
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedGroupKFold
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise BadRequest("the text-only control needs scikit-learn; pip install scikit-learn") from error
    numbers = np.unique(list(shared), return_inverse=True)[1]
    cut = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    found = np.full(len(texts), np.nan)
    for seen, held in cut.split(np.zeros(len(texts)), inside, numbers):
        if len(set(inside[seen])) < 2:
            sides = Counter(inside[seen].tolist())
            raise BadCorpus(f"text only: a fold leaves one role alone to learn from ({dict(sides)}); use more examples")
        words = CountVectorizer(lowercase=False, token_pattern=WORDS, ngram_range=(1, 2))
        model = make_pipeline(words, LogisticRegression(max_iter=2000, class_weight="balanced"))
        model.fit([texts[i] for i in seen], inside[seen])
        found[held] = model.decision_function([texts[i] for i in held])
    return found
