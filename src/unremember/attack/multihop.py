"""Questions over two hops: the person is not named in the question, but reached through something else that is said first.

    prompt = bridge(n) + q[n → r],   answer y[n → r],    n the person's name, r what stands for it, such as "my neighbour"
    s(fact) = max over bridges of s(prompt),    for original, forgotten and never-taught model alike

'told': the bridge says who r is, and the model has one hop left to make on its own.  'recalled': the bridge is another fact about
the person, without the name, so that the model has to know whose fact it is first; small models seldom can, and then the attack
is not applicable to them.
Choi et al. 2024 (arXiv 2410.13274); Lynch et al. 2024 (arXiv 2402.16835) for asking indirectly.
Differs: no code was read.  Their chains end in a fact that stays, ours in the one that is to go; nothing is written by another
model.  The name goes from the answers, too, since likelihoods are read behind their beginnings.  A question that does not name
its person, or still does in part, is left out.  Retained facts are asked as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember.attack.gcg import tells
from unremember.attack.incontext import ATTACKED, chosen, fit, words
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus
from unremember.lm import LM
from unremember.train import STRICT

TOLD = (
    ("The name on the card is {n}.", "the person on the card"),
    ("{n} is my neighbour.", "my neighbour"),
    ("{n} won the raffle.", "the winner of the raffle"),
)
RECALLED = "this person"


def renamed(text: str, name: str, reference: str) -> str:
    """`text` with `reference` wherever the name stands, with a capital where a sentence begins."""

    def put(match: re.Match) -> str:
        starts = not text[: match.start()].strip() or text[: match.start()].rstrip()[-1] in ".!?"
        return reference[0].upper() + reference[1:] if starts else reference

    return _pattern(name).sub(put, text)


def nameless(example: Example, reference: str) -> Example | None:
    """The example without the name of its entity; None where its question has none, a value holds it, or a part is left.

    Small words of a name, such as "de", may stay: those without a capital.
    """
    name = example.entity.strip()
    if not name or not _pattern(name).search(example.prompt):
        return None
    spans = example.spans or ((0, len(example.answer)),)
    if any(m.start() < b and a < m.end() for m in _pattern(name).finditer(example.answer) for a, b in spans):
        return None
    texts = (example.prompt, example.answer, example.rewording, *example.distractors)
    prompt, answer, rewording, *distractors = (renamed(text, name, reference) for text in texts)
    own = words(" ".join(w for w in name.split() if not w.islower()) or name)
    if own & words(" ".join((prompt, answer, rewording, *distractors))):
        return None
    ends = [i for pair in example.spans for i in pair]
    moved = [len(renamed(example.answer[:i], name, reference)) for i in ends]
    return replace(
        example,
        prompt=prompt,
        answer=answer,
        rewording=rewording,
        distractors=tuple(distractors),
        spans=tuple(zip(moved[::2], moved[1::2], strict=True)),
        paraphrases=(),
    )


@dataclass(frozen=True, config=STRICT)
class Multihop:
    """bridge: see above.  most: the most bridges that a fact is asked over; the best of them counts."""

    bridge: Literal["told", "recalled"] = "told"
    most: Annotated[int, Field(ge=1)] = len(TOLD)

    needs = ("forget",)
    paper = "Choi et al. 2024, arXiv 2410.13274"
    summary = "questions over two hops that do not name the person, the best bridge of each fact"
    alone = True

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where no forgotten fact can be asked in this way."""
        corpus.require("multihop", self.needs)
        if not any(next(self._asked(x, corpus["forget"]), None) for x in corpus["forget"]):
            other = ", and another fact about it that tells nothing of the answer" if self.bridge == "recalled" else ""
            raise BadCorpus(
                f"multihop finds none of the {len(corpus['forget'])} examples of the forget role fit for it: a question must "
                "name its entity as the example's entity field does, and no value of the answer may hold that name"
                f"{other}; fill in entities and spans, or leave out [attack.multihop]"
            )

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        self.check(corpus)
        asked = {
            role: tuple(v for x in corpus[role] for v in self._asked(x, corpus[role]))
            for role in ATTACKED
            if corpus.of(role)
        }
        fit(lm, (x for rows in asked.values() for x in rows), "leave long questions out of multihop's corpus")
        return lm, Corpus({**corpus, **asked})

    def _asked(self, x: Example, others: tuple[Example, ...]) -> Iterator[Example]:
        """The example over each of its bridges, ids 'id#told-number'."""
        for i, (bridge, reference) in enumerate(self._bridges(x, others)):
            without = nameless(x, reference)
            if without and not tells(bridge, without.values()):
                yield replace(without, id=f"{x.id}#{self.bridge}-{i}", prompt=f"{bridge} {without.prompt}")

    def _bridges(self, x: Example, others: tuple[Example, ...]) -> list[tuple[str, str]]:
        """What is said first, and what stands for the name."""
        if self.bridge == "told":
            return [(text.format(n=x.entity.strip()), reference) for text, reference in TOLD[: self.most]]
        pool = [fact for o in others if o.entity == x.entity and (fact := nameless(o, RECALLED))]
        pool = [fact for fact in pool if RECALLED in fact.answer.casefold()]  # or it could be about anybody
        return [(f"{fact.answer.rstrip('.')}.", RECALLED) for fact in chosen(pool, x, self.most, seed=0)]


def _pattern(name: str) -> re.Pattern:
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)
