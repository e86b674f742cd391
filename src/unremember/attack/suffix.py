"""Dynamic unlearning attack: look for a short suffix that makes a model answer questions about a person it was to forget.

    q = argmin_q Σ_j −log p_θ(y_j | x_j, q),    one q for all questions x_j about one person,
        y_j the answer up to its last secret

Yuan et al. 2024 (arXiv 2408.10682), Sec. 3.  Reference code: HongbangYuan/RobustUnlearning@70a85e8 holds no suffix optimiser.
The suffix stands behind the question in the user's turn, and the auditor reads the questions with it.  People to be forgotten and
people never taught are attacked alike, each with a suffix of their own.  Retained questions are asked as they are.
Differs: tokens of the answers are barred from the suffix; settings are ours, the paper's are not in its text; no cross-target
cell (models of other targets are not at hand); 'other' is ours and the strictest: what the attack was shown is not scored.

A search that sees an answer can force any text, true or false, out of any model.  So attack the never-taught model with the same
settings, and with `target = "wrong"`, which looks for false answers and is scored on them: `excess` is the gain on the true ones
less that on the false.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from unremember.attack.gcg import (
    Behaviour,
    Found,
    Ids,
    Search,
    Victim,
    allowed,
    behaviour,
    decoded,
    search,
    started,
    survives,
    tells,
)
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadInput, BadRequest
from unremember.folder import fingerprint
from unremember.lm import LM
from unremember.table import table
from unremember.tokens import Template
from unremember.train import STRICT

Generalisation = Literal["within", "cross", "other"]
Target = Literal["answer", "wrong"]
ATTACKED = ("forget", "holdout")
SHOWN = 5  # names in an error


@plain(frozen=True)
class Fold:
    """What an attack is shown, and what is asked afterwards."""

    shown: tuple[Example, ...]
    asked: tuple[Example, ...]


def folds(examples: Sequence[Example], generalisation: Generalisation) -> list[Fold]:
    """within: shown what is asked.  cross: shown other wordings of it.  other: each half is asked with what the other taught."""
    rows = tuple(examples)
    if generalisation == "other":
        halves = (rows[::2], rows[1::2])
        return [Fold(halves[1 - i], half) for i, half in enumerate(halves)]
    if generalisation == "within":
        return [Fold(rows, rows)]
    return [
        Fold(tuple(replace(x, id=f"{x.id}#{i}", prompt=p) for x in rows for i, p in enumerate(x.paraphrases)), rows)
    ]


def groups(corpus: Corpus, by: Callable[[Example], str]) -> list[tuple[str, tuple[Example, ...]]]:
    """Questions of the attacked roles, those with the same `by` together; roles apart.  Passages have no user's turn."""
    out: dict[tuple[str, str], list[Example]] = {}
    for role in ATTACKED:
        for x in corpus.of(role):
            if x.prompt:
                out.setdefault((role, by(x)), []).append(x)
    return [(role, tuple(rows)) for (role, _), rows in out.items()]


def wrong(example: Example) -> Example | None:
    """The same question with its first distractor for an answer, spans where the values differ; None without one."""
    if not example.distractors:
        return None
    answer, *rest = example.distractors
    spans: tuple[tuple[int, int], ...] = ()
    if len(example.spans) == 1:
        [(start, end)] = example.spans
        stop = len(answer) - (len(example.answer) - end)
        if start < stop and answer[:start] == example.answer[:start] and answer[stop:] == example.answer[end:]:
            spans = ((start, stop),)
    return replace(example, answer=answer, spans=spans, distractors=(example.answer, *rest), rewording="")


def aimed(template: Template, example: Example, limit: int) -> Ids:
    """Token ids of the answer up to its last secret, as an auditor's row encodes them."""
    row = template.row(example.id, example.prompt, example.answer, example.spans, limit)
    last = max(i for i, inside in enumerate(row.span) if inside)
    return row.ids[row.start : row.start + last + 1]


def once(behaviours: Iterable[Behaviour]) -> tuple[Behaviour, ...]:
    """Without those that say the same as an earlier one: a prompt that comes twice would weigh double."""
    out: dict[tuple[Ids, Ids, Ids], Behaviour] = {}
    for b in behaviours:
        out.setdefault((b.before, b.after, b.target), b)
    return tuple(out.values())


def bar(lm: LM, corpus: Corpus) -> tuple[Any, tuple[str, ...]]:
    """The tokens that a string may hold, and the values that it must not tell, be they true or false."""
    asked = [x for x in corpus.of("forget", "retain", "holdout")]
    false = [w for x in asked if (w := wrong(x))]
    values = tuple(v for x in (*asked, *false) for v in x.values())
    answers = [x.answer for role in ATTACKED for x in (*corpus.of(role), *filter(None, map(wrong, corpus.of(role))))]
    size = lm.model.get_input_embeddings().weight.shape[0]
    return allowed(lm.tokenizer, size, answers, values), values


@dataclass(frozen=True, config=STRICT)
class Suffix:
    """scenario: whose weights the attacker holds, those of the 'forgotten' model (of the one under attack), or of the 'original',
    from which the suffix is carried over.  generalisation: see `folds`.  target: 'wrong' is the control of `excess`.
    """

    search: Search
    scenario: Literal["forgotten", "original"] = "forgotten"
    generalisation: Generalisation = "other"
    target: Target = "answer"

    needs = ("forget",)
    paper = "Yuan et al. 2024, arXiv 2408.10682"
    summary = "a suffix to the question, found by gradients, that makes the model answer"

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where there is nothing to ask, to be shown, or to say instead."""
        refuse("suffix", self.needs, corpus, self.generalisation, self.target, lambda x: x.entity)

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        self.check(corpus)
        victim = original if self.scenario == "original" else lm
        mask, values = bar(victim, corpus)
        corpus = falsified(corpus) if self.target == "wrong" else corpus
        asked: dict[str, Example] = {}
        found: list[Found] = []
        for _, rows in groups(corpus, lambda x: x.entity):
            for fold in folds(rows, self.generalisation):
                best = self._found(victim, fold, mask, values, bench)
                assert not tells(best.text, values), "the suffix tells an answer"
                found.append(best)
                asked |= {x.id: replace(x, prompt=x.prompt + best.text) for x in fold.asked}
        if not any(f.solved or f.loss < f.curve[0] for f in found):
            raise BadRequest(
                f"no suffix of {self.search.steps} step(s) does better than {self.search.start!r} repeated, so nothing was "
                "attacked; take more steps or candidates"
            )
        seen = {role: tuple(asked.get(x.id, x) for x in corpus.of(role)) for role in ATTACKED if corpus.of(role)}
        return lm, Corpus({**corpus, **seen})

    def _found(self, lm: LM, fold: Fold, mask: Any, values: tuple[str, ...], bench: Bench) -> Found:
        """The suffix for one fold, looked for once in the life of `bench.memory`."""
        template, start = lm.template, started(lm.template, self.search.start, self.search.tokens)
        shown = slots(template, fold.shown, start, lambda x: (x.prompt, ""), lm.limit)
        asked = slots(template, fold.asked, start, lambda x: (x.prompt, ""), lm.limit)
        if self.generalisation != "other" and (short := [b.key for b in shown if len(b.target) < 2]):
            raise BadCorpus(
                f"the answers of {', '.join(short[:SHOWN])} are one token, which a search that is shown them forces out of any "
                'model; take generalisation = "other", or longer answers'
            )
        known = bench.memory.setdefault(f"{lm.fingerprint}/suffix", {})
        key = fingerprint(repr(self.search), [repr(b) for b in (*shown, *asked)], values, mask.nonzero()[:, 0].tolist())
        if key not in known:
            victim = Victim(lm, once(shown), bench.budget, self.search.mellowmax)

            places = tuple(dict.fromkeys((*shown, *asked)))

            def keep(ids: Ids) -> bool:
                return not tells(decoded(template, ids), values) and survives(template, places, ids)

            known[key] = search(victim, self.search, mask, keep, bench, "suffix")
        return known[key]


def slots(
    template: Template,
    examples: Iterable[Example],
    start: Ids,
    frame: Callable[[Example], tuple[str, str]],
    limit: int,
) -> tuple[Behaviour, ...]:
    """Each example with a slot in its prompt and its answer for a target; BadCorpus with all that have none."""
    out, problems = [], []
    for x in examples:
        try:
            out.append(behaviour(template, x.id, *frame(x), aimed(template, x, limit), start, limit))
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadCorpus(problems)
    return tuple(out)


def falsified(corpus: Corpus) -> Corpus:
    """The attacked roles with a false answer for each question."""
    false = {role: tuple(wrong(x) or x for x in corpus.of(role)) for role in ATTACKED if corpus.of(role)}
    return Corpus({**corpus, **false})


def refuse(
    who: str,
    needs: Sequence[str],
    corpus: Corpus,
    generalisation: Generalisation,
    target: Target,
    by: Callable[[Example], str],
) -> None:
    """BadCorpus with everything that keeps an attack of this kind from working on `corpus`."""
    corpus.require(who, needs)
    problems = []
    found = groups(corpus, by)
    rows = [x for _, group in found for x in group]
    if not any(role == "forget" for role, _ in found):
        problems.append(f"{who} finds passages alone in the forget role, and no prompt to stand in; give them prompts")
    if generalisation == "cross" and (bare := [x.id for x in rows if not x.paraphrases]):
        problems.append(
            f'generalisation = "cross" is shown paraphrases, and {_few(bare)} have none; add some, or take "other" or "within"'
        )
    if generalisation == "other" and (lone := [group[0].id for _, group in found if len(group) < 2]):
        problems.append(
            f'generalisation = "other" is shown one half of the questions about a person and asks the other, and {_few(lone)} '
            'stand alone; add questions, name their entity, or take "cross" or "within"'
        )
    if target == "wrong" and (bare := [x.id for x in rows if not x.distractors]):
        problems.append(f'target = "wrong" needs distractors, and {_few(bare)} have none; add some')
    if problems:
        raise BadCorpus(problems)


def _few(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")


# ── what forcing alone would do ──


@plain(frozen=True)
class Excess:
    """One fact: by how much the attack raises the probability of its true value, and the same attack that of a false one."""

    answer: float
    wrong: float

    @property
    def gain(self) -> float:
        return self.answer - self.wrong


def excess(attack: Any, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> dict[str, Excess]:
    """For each forget question gain(y) − gain(y'), in probability a token of the value (geometric mean).

    attack: one with a `target`, such as Suffix or Soft; it is carried out twice, at the same budget.
    """
    gains: list[dict[str, float]] = []
    for target in ("answer", "wrong"):
        attacked, seen = replace(attack, target=target)(lm, corpus, original, bench)
        plainly = falsified(corpus) if target == "wrong" else corpus
        before, after = _values(lm, plainly, bench), _values(attacked, seen, bench)
        gains.append({key: after[key] - before[key] for key in before})
    return {key: Excess(gains[0][key], gains[1][key]) for key in gains[0]}


def _values(lm: LM, corpus: Corpus, bench: Bench) -> dict[str, float]:
    rows = [x for x in corpus["forget"] if x.prompt]
    readings = table(lm, lm.template.rows(rows, lm.limit), bench)
    return {x.id: r.likelihood("span") for x, r in zip(rows, readings, strict=True)}
