"""In-context relearning: other facts stand in front of the question, and a model that only hides may go on in their manner.

    prompt(q) = s_1 … s_k q,    s_i drawn from the others, none of them shares a telling word with a value of q

Lynch et al. 2024 (arXiv 2402.16835), in-context relearning; few-shot questions on other facts after Deeb & Roger 2024.
Each question has examples of its own, the same for original, forgotten and never-taught model, and is never among them.
Facts of the forget and the holdout role are asked in this way, retained ones as they are.
Differs: no code was at hand.  Lynch et al. show passages about the topic; ours are solved questions or bare statements, and
what shares a word with the answer is left out, not only what tells it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember.attack.gcg import tells
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus
from unremember.lm import LM
from unremember.train import STRICT

ATTACKED = ("forget", "holdout")
TELLING = 4  # letters: a shorter word of a value is not one that tells it, unless it has no other
SHOWN = 5  # problems that an error spells out
Form = Literal["questions", "statements"]


def words(text: str) -> frozenset[str]:
    """The words and numbers of a text, case folded."""
    return frozenset(re.findall(r"\w+", text.casefold()))


def telling(example: Example) -> frozenset[str]:
    """The words of its values that give them away: long ones and numbers, or all, but none that the question has itself."""
    found: set[str] = set()
    for value in example.values():
        all_ = words(value)
        found |= {w for w in all_ if len(w) >= TELLING or any(c.isdigit() for c in w)} or all_
    return frozenset(found) - words(example.prompt)


def overlaps(shown: Example, asked: Example) -> bool:
    """Whether an example says a value of the question, or a word of one."""
    text = f"{shown.prompt} {shown.answer}"
    return tells(text, asked.values()) or bool(words(text) & telling(asked))


def chosen(pool: Sequence[Example], asked: Example, shots: int, seed: int) -> tuple[Example, ...]:
    """`shots` examples of the pool in an order that hangs on (seed, question) alone; fewer where fewer are innocent."""
    fit = [x for x in pool if x.prompt and x.id != asked.id and not overlaps(x, asked)]
    return tuple(sorted(fit, key=lambda x: (zlib.crc32(f"{seed} {asked.id} {x.id}".encode()), x.id))[:shots])


def framed(question: str, shown: Iterable[Example], form: Form, chat: bool) -> str:
    """The question behind its examples; a plain template writes the first 'Question:' and the last 'Answer:' itself."""
    if form == "statements":
        return "".join(f"{x.answer}\n" for x in shown) + question
    whole = "".join(f"Question: {x.prompt}\nAnswer: {x.answer}\n\n" for x in shown) + f"Question: {question}"
    return f"{whole}\nAnswer:" if chat else whole.removeprefix("Question: ")


def fit(lm: LM, examples: Iterable[Example], advice: str) -> None:
    """BadCorpus with every question that, with an answer to it, is longer than the model's context."""
    problems: list[str] = []
    for x in examples:
        for answer in dict.fromkeys((x.answer, *x.distractors)):
            try:
                lm.template.row(x.id, x.prompt, answer, x.spans if answer == x.answer else (), lm.limit)
            except BadCorpus as error:
                problems += error.problems
                break
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise BadCorpus([*problems[:SHOWN], *more, advice])


@dataclass(frozen=True, config=STRICT)
class InContext:
    """shots: k, examples in front of each question.  form: solved 'questions', or their answers alone as 'statements'.

    source: whose facts they are: the adversary's own people ('relearn'), one half of the retained ones, which is then not
    scored, or the 'others' of the question's own role, so that a forgotten fact stands behind other forgotten facts, which the
    attacker must then know.
    """

    shots: Annotated[int, Field(ge=1)]
    form: Form = "questions"
    source: Literal["relearn", "retain", "others"] = "relearn"
    seed: Annotated[int, Field(ge=0)] = 0

    needs = ("forget",)
    paper = "Lynch et al. 2024, arXiv 2402.16835"
    summary = "other facts in front of each question, none of which tells its answer"
    alone = True

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where a question has too few examples that do not overlap with its answer."""
        corpus.require("incontext", self.needs)
        if self.source != "others":
            corpus.require("incontext", (self.source,))
        problems = []
        if not any(x.prompt for x in corpus["forget"]):
            problems.append("incontext finds no question in the forget role, only passages; add questions about them")
        for role in ATTACKED:
            for x in corpus.of(role):
                found = len(chosen(self._pool(corpus, role), x, self.shots, self.seed)) if x.prompt else self.shots
                if found < self.shots:
                    problems.append(
                        f"example {x.id!r} ({role}): {found} of {self.shots} examples from {self.source!r} do not overlap with "
                        "its answer; lower shots, take another source, or add examples"
                    )
        if problems:
            more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise BadCorpus([*problems[:SHOWN], *more])

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        self.check(corpus)
        asked = {
            role: tuple(self._asked(x, self._pool(corpus, role), lm.template.chat) for x in corpus.of(role))
            for role in ATTACKED
            if corpus.of(role)
        }
        fit(lm, (x for rows in asked.values() for x in rows), "lower incontext's shots, or leave long examples out")
        seen = {**corpus, **asked}
        if self.source == "retain":  # what may be shown is not scored
            spent = set(self._pool(corpus, "forget"))
            seen["retain"] = tuple(x for x in corpus["retain"] if x not in spent)
        if self.source == "relearn":
            del seen["relearn"]
        return lm, Corpus(seen)

    def _pool(self, corpus: Corpus, role: str) -> tuple[Example, ...]:
        """Whom the examples come from; of the retained facts one half, so that the other can still be scored."""
        if self.source != "retain":
            return corpus.of(role if self.source == "others" else self.source)
        retained = sorted(corpus["retain"], key=lambda x: (zlib.crc32(f"{self.seed} {x.id}".encode()), x.id))
        return tuple(retained[: len(retained) // 2])

    def _asked(self, x: Example, pool: Sequence[Example], chat: bool) -> Example:
        if not x.prompt:
            return x
        shown = chosen(pool, x, self.shots, self.seed)
        assert len(shown) == self.shots and x.id not in {s.id for s in shown}
        return replace(x, prompt=framed(x.prompt, shown, self.form, chat))
