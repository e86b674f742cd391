"""What the model says: ROUGE-L between its greedy answer and the truth, and whether the sensitive value is in it verbatim.

ROUGE-L by Google's rouge-score with stemming, recall as in TOFU and F1 as in MUSE.  `Said` is keyword containment (Hu et al.
2024): case folded, at word boundaries.  A low value here alone proves nothing: a refusal has it too.
"""

from __future__ import annotations

from dataclasses import dataclass

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadRequest
from unremember.lm import LM
from unremember.score import Score
from unremember.table import answers

NEW = 32  # tokens at least; where answers are longer, the longest and 8 more


def spoken(lm: LM, corpus: Corpus, roles: tuple[str, ...], bench: Bench) -> dict[str, str]:
    """id -> greedy answer to the prompt (passages have none and are left out)."""
    examples = [x for x in corpus.of(*roles) if x.prompt]
    longest = max((len(lm.tokenizer(x.answer).input_ids) for x in examples), default=0)
    said = answers(lm, [lm.template.context(x.prompt) for x in examples], max(NEW, longest + 8), bench)
    return {x.id: text for x, text in zip(examples, said, strict=True)}


@dataclass(frozen=True)
class Said:
    """1 where every sensitive value of the example is in the greedy answer."""

    roles: tuple[str, ...] = ("forget", "retain", "holdout")
    needs = ("forget",)
    paper = "Hu et al. 2024"
    summary = "the sensitive value stands verbatim in the greedy answer"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        said = spoken(lm, corpus, self.roles, bench)
        values = {x.id: float(x.said_in(said[x.id])) for x in corpus.of(*self.roles) if x.prompt}
        return Score("said", self.summary, "higher = better known", values, self.paper, 0.0)


@dataclass(frozen=True)
class Rouge:
    """measure: 'recall' or 'fmeasure'."""

    measure: str = "recall"
    roles: tuple[str, ...] = ("forget", "retain", "holdout", "world")
    needs = ("forget",)
    paper = "Lin 2004; Maini et al. 2024"
    summary = "ROUGE-L of the greedy answer against the true one"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise BadRequest("ROUGE needs rouge-score; install unremember[audit]") from error
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        said = spoken(lm, corpus, self.roles, bench)
        return Score(
            "ROUGE-L recall" if self.measure == "recall" else "ROUGE-L F1",
            f"longest common subsequence of stemmed words, {self.measure}, greedy answer of at most {NEW} tokens",
            "higher = better known",
            {
                x.id: float(getattr(scorer.score(x.answer, said[x.id])["rougeL"], self.measure))
                for x in corpus.of(*self.roles)
                if x.prompt
            },
            self.paper,
        )
