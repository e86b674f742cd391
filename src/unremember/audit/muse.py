"""MUSE's two memorisation scores: VerbMem, does the model go on with a text, and KnowMem, does it answer questions on it?

    VerbMem = mean over texts of ROUGE-L F1( greedy(x_≤l), x_{l+1…l+128} )
    KnowMem = mean over questions of ROUGE-L F1( greedy(few-shot examples, question), answer ),   32 tokens

Shi et al. 2025 (arXiv 2407.06460), Sec. 3.1; jaechan-repo/muse_bench@e000038, verbmem/get_rouge.py and knowmem/get_rouge_qa.py.
ROUGE by Google's rouge-score with the stemmer off, as in that code (open-unlearning switches it on, and so do our ROUGE audits).
Differs: VerbMem reads the answer as raw text, as EL_n does, gives at most half of it, and lets the model say as many tokens
as the truth has and no more, so that a text which ends is not punished for what would follow.  Its reference is cut out by
place, never by deleting the prompt's words from the text, which would delete their repetitions too.  KnowMem's examples are
general questions of ours; a model with a chat template gets them, like the question, inside one user message.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadRequest
from unremember.lm import LM
from unremember.score import Score
from unremember.table import continuations
from unremember.tokens import PLAIN, Template
from unremember.train import STRICT

SHOTS = (
    ("What is the capital of France?", "Paris."),
    ("How many legs does a spider have?", "Eight."),
    ("What do bees make?", "Honey."),
)
ENDS = ("\n\n", "\nQuestion", "Question:")  # a model that goes on with a question of its own has answered before it


def scorer(stem: bool):
    """rouge-score's ROUGE-L; BadRequest where it is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise BadRequest("ROUGE needs rouge-score; install unremember[audit]") from error
    return RougeScorer(["rougeL"], use_stemmer=stem)


def first_answer(said: str) -> str:
    """What was said before the first of ENDS."""
    for end in ENDS:
        said = said.split(end)[0]
    return said


def asked(template: Template, question: str, shots: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
    """Token ids of the question behind its examples."""
    before = "".join(f"{PLAIN.format(prompt=q)} {a}\n\n" for q, a in shots)
    whole = before + PLAIN.format(prompt=question)
    if not shots or template.chat:
        return template.context(whole if shots else question)
    return template.context(whole.removeprefix("Question: ").removesuffix("\nAnswer:"))  # the template puts these back


@dataclass(frozen=True, config=STRICT)
class VerbMem:
    """context: l, tokens that are given (at most half of the text).  new: most tokens that are compared.  stem: stem words."""

    context: Annotated[int, Field(ge=1)] = 50
    new: Annotated[int, Field(ge=1)] = 128
    stem: bool = False
    roles: tuple[str, ...] = ("forget", "retain", "holdout")
    needs = ("forget",)
    paper = "Shi et al. 2025"
    summary = "ROUGE-L F1 between a text and how the model goes on with its beginning"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        rouge, problems, cut = scorer(self.stem), [], {}
        lead = len(lm.template.context(""))
        for x in corpus.of(*self.roles):
            try:
                row = lm.template.row(x.id, "", x.answer)
            except BadCorpus as error:
                problems += error.problems
                continue
            given = lead + min(self.context, (row.stop - lead) // 2)
            truth = row.ids[given : min(row.stop, given + self.new)]
            if lm.limit and given + len(truth) > lm.limit:
                problems.append(
                    f"example {x.id!r}: context and continuation are {given + len(truth)} tokens and the model's context is "
                    f"{lm.limit}; lower context or new"
                )
            cut[x.id] = row.ids[:given], truth
        if problems:
            raise BadCorpus(problems)
        said = continuations(lm, [(given, len(truth)) for given, truth in cut.values()], bench)
        values = {}
        for (key, (_, truth)), ids in zip(cut.items(), said, strict=True):
            texts = (lm.tokenizer.decode(x, skip_special_tokens=True) for x in (truth, ids))
            values[key] = float(rouge.score(*texts)["rougeL"].fmeasure)
        return Score(
            "VerbMem",
            f"ROUGE-L F1, words {'stemmed' if self.stem else 'as they are'}, of the greedy continuation of the first "
            f"{self.context} tokens (at most half) of the answer as raw text, against its next {self.new}",
            "higher = better remembered",
            values,
            self.paper,
        )


@dataclass(frozen=True, config=STRICT)
class KnowMem:
    """shots: (question, answer) examples in front of every question.  new: most tokens of an answer.  stem: stem words."""

    shots: tuple[tuple[str, str], ...] = SHOTS
    new: Annotated[int, Field(ge=1)] = 32
    stem: bool = False
    roles: tuple[str, ...] = ("forget", "retain", "holdout")
    needs = ("forget",)
    paper = "Shi et al. 2025"
    summary = "ROUGE-L F1 between the true answer and the greedy one, after a few general examples"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        rouge = scorer(self.stem)
        examples = [x for x in corpus.of(*self.roles) if x.prompt]
        prompts = [asked(lm.template, x.prompt, self.shots) for x in examples]
        shown = {q.strip() for q, _ in self.shots}
        problems = [
            f"example {x.id!r} is among the few-shot examples; give others as shots"
            for x in examples
            if x.prompt.strip() in shown
        ] + [
            f"example {x.id!r}: {len(ids)} tokens of prompt and {self.new} of answer, and the model's context is {lm.limit}; "
            "give fewer or shorter shots"
            for x, ids in zip(examples, prompts, strict=True)
            if lm.limit and len(ids) + self.new > lm.limit
        ]
        if problems:
            raise BadCorpus(problems)
        said = continuations(lm, [(ids, self.new) for ids in prompts], bench)
        texts = [first_answer(lm.tokenizer.decode(ids, skip_special_tokens=True)) for ids in said]
        return Score(
            "KnowMem",
            f"ROUGE-L F1, words {'stemmed' if self.stem else 'as they are'}, of the greedy answer of at most {self.new} tokens "
            f"after {len(self.shots)} examples of other questions",
            "higher = better remembered",
            {
                x.id: float(rouge.score(x.answer, text)["rougeL"].fmeasure)
                for x, text in zip(examples, texts, strict=True)
            },
            self.paper,
        )
