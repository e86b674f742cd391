"""Ask differently: paraphrased questions and gap sentences that no training step has seen.

Each fact is asked in `wordings` other ways and once as a gap to fill; a score of a fact is then that of its best wording
(any-of-m), for all three models alike.  Lynch et al. 2024 (arXiv 2402.16835), Patil et al. 2023.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.lm import LM
from unremember.train import STRICT

GAP = "Fill in the blank and repeat the whole sentence: {sentence}"


def cloze(example: Example) -> Example | None:
    """The answer with its sensitive values taken out, as a question; None where no span is marked."""
    if not example.spans:
        return None
    sentence = example.answer
    for start, end in sorted(example.spans, reverse=True):
        sentence = sentence[:start] + "____" + sentence[end:]
    return replace(example, id=f"{example.id}#gap", prompt=GAP.format(sentence=sentence))


@dataclass(frozen=True, config=STRICT)
class Rephrase:
    """wordings: how many of an example's paraphrases are tried, beside the gap sentence."""

    wordings: Annotated[int, Field(ge=0)] = 2

    needs = ("forget",)
    paper = "Lynch et al. 2024, arXiv 2402.16835"
    summary = "paraphrased questions and gap sentences, the best wording of each fact"

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        corpus.require("rephrase", self.needs)
        asked = {}
        for role in ("forget", "retain", "holdout"):
            variants = []
            for x in corpus.of(role):
                variants += [
                    replace(x, id=f"{x.id}#{i}", prompt=p) for i, p in enumerate(x.paraphrases[: self.wordings])
                ]
                variants += [gap] if (gap := cloze(x)) else []
            if variants:
                asked[role] = variants
        return lm, Corpus({**corpus, **asked})
