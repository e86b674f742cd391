"""Familiarity: does the model still say, or find likely, what only a reader of the text could know?

    completion    mean_prompts (5 · [class 1] + 1 · [class 2]) / 5        classes of the greedy completion:
                  1 a gold string that the prompt lacks    2 a theme word that the prompt lacks    3 nothing of the kind (3 and 4)
    probability   mean_prompts Σ_{v in idiosyncratic} p(v | prompt)       the next token, where the first gold string begins

Eldan, Russinovich 2023 (arXiv 2310.02238), section 3.  Differs: strings are looked for where the paper asks GPT-4 and a person,
so classes 3 and 4 are one; divided by 5, so that 1 is the most; prompts and lists are those of the corpus, fixed before any
model was asked.  A passage is asked by its text up to the first span.  An example whose gold strings all stand in its prompt
is not measured.  Names may have been swapped while relations survive: measure the corpus of `Anchors.example`, too, which asks
under the replacement names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unremember.audit.answers import NEW, spoken
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example, says
from unremember.errors import BadCorpus
from unremember.lm import LM
from unremember.score import Score
from unremember.table import answers, table
from unremember.tokens import Row

Lists = dict[str, tuple[list[str], list[str]]]  # id -> gold strings, theme words
WEIGHTS = {1: 5.0, 2: 1.0, 3: 0.0}  # of the classes


def opening(x: Example) -> str:
    """What the model is given: the question, or a passage up to its first sensitive value."""
    return x.prompt or (x.answer[: x.spans[0][0]].rstrip() if x.spans else "")


def grade(completion: str, prompt: str, gold: Sequence[str], theme: Sequence[str]) -> int:
    """The class of a completion, 1 to 3; what the prompt says does not count."""
    for number, strings in ((1, gold), (2, theme)):
        if any(says(completion, s) and not says(prompt, s) for s in strings):
            return number
    return 3


@dataclass(frozen=True)
class Familiarity:
    """measure: 'completion' or 'probability'.

    gold: strings that only the text tells; none = the example's own sensitive values.
    theme: words that are typical of it; none = the sensitive values of the other examples of its role.
    """

    measure: str = "completion"
    gold: tuple[str, ...] = ()
    theme: tuple[str, ...] = ()
    roles: tuple[str, ...] = ("forget", "retain", "holdout")
    needs = ("forget",)
    paper = "Eldan, Russinovich 2023"
    summary = "what only a reader of the text could say, in completions or as the next token"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        lists = self.lists(corpus)
        probable = self.measure == "probability"
        found = self._probable(lm, corpus, lists, bench) if probable else self._said(lm, corpus, lists, bench)
        return Score(
            "probability familiarity" if probable else "familiarity",
            "summed probability of the next tokens with which a gold string begins"
            if probable
            else "(5 · [says a gold string] + 1 · [else a theme word]) / 5, of the greedy completion",
            "higher = more familiar",
            found,
            self.paper,
        )

    def lists(self, corpus: Corpus) -> dict[str, tuple[list[str], list[str]]]:
        """id -> gold strings and theme words that its opening lacks; BadCorpus where no opening leaves anything to say."""
        found = {}
        for role in self.roles:
            told = {x.id: x.values() for x in corpus.of(role) if x.prompt or x.spans}
            for x in corpus.of(role):
                own, start = self.gold or told.get(x.id, ()), opening(x)
                near = self.theme or tuple(v for key, values in told.items() if key != x.id for v in values)
                kept = [v for v in own if not says(start, v)]
                if start and kept:
                    found[x.id] = kept, [v for v in near if v not in own and not says(start, v)]
        if not found:
            raise BadCorpus(
                "familiarity finds no opening that leaves its gold strings unsaid: one that tells the answer measures nothing; "
                "add questions whose answers (or spans) are not in them, or mark spans within the passages"
            )
        return found

    def _said(self, lm: LM, corpus: Corpus, lists: Lists, bench: Bench) -> dict[str, float]:
        asked = [x for x in corpus.of(*self.roles) if x.id in lists]
        starts = [lm.template.row(x.id, "", opening(x)).ids[:-1] for x in asked if not x.prompt]
        told = iter(answers(lm, starts, NEW, bench))
        said = spoken(lm, corpus, self.roles, bench) | {x.id: next(told) for x in asked if not x.prompt}
        return {x.id: WEIGHTS[grade(said[x.id], opening(x), *lists[x.id])] / WEIGHTS[1] for x in asked}

    def _probable(self, lm: LM, corpus: Corpus, lists: Lists, bench: Bench) -> dict[str, float]:
        asked = [x for x in corpus.of(*self.roles) if x.id in lists]
        rows = [row for x in asked for row in candidates(lm, x, lists[x.id][0])]
        first: dict[str, dict[int, float]] = {x.id: {} for x in asked}
        for row, reading in zip(rows, table(lm, rows, bench), strict=True):
            at = row.span.index(True)
            first[row.key][row.ids[row.start + at]] = float(np.exp(reading.logp[at]))  # a token counts once
        return {key: sum(values.values()) for key, values in first.items()}


def candidates(lm: LM, x: Example, gold: Sequence[str]) -> list[Row]:
    """Rows that say a gold string, in any case, where the answer's first sensitive value begins; one for each first token."""
    begin = x.spans[0][0] if x.spans else 0
    found: dict[int, Row] = {}
    for text in (form for s in gold for form in (s, s.lower(), s.upper(), s[:1].upper() + s[1:])):
        row = lm.template.row(x.id, x.prompt, x.answer[:begin] + text, ((begin, begin + len(text)),), lm.limit)
        found.setdefault(row.ids[row.start + row.span.index(True)], row)
    return list(found.values())
