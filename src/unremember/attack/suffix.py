"""Dynamic unlearning attack: look for a short suffix that makes a model answer questions about a person it was to forget.

    q = argmin_q Σ_j −log p_θ(y_j | x_j, q),    one q for all questions x_j about one person,
        y_j the answer up to its last secret

Yuan et al. 2024 (arXiv 2408.10682), Sec. 3.  Reference code: HongbangYuan/RobustUnlearning@70a85e8 holds no suffix optimiser.
The suffix stands behind the question in the user's turn, and the auditor reads the questions with it.  People to be forgotten and
people never taught are attacked alike, each with a suffix of their own.  Retained questions are asked as they are.
Whose θ: that of the model under attack, of its original, or, where the attacker holds neither, of a surrogate.  What was found on
another model is carried over as text: the slots are found in the searched model's template, the question is asked in the
attacked one's own.
Differs: tokens of the answers are barred from the suffix; settings are ours, the paper's are not in its text; no cross-target
cell (models of other targets are not at hand), but a surrogate of any make; 'other' is ours and the strictest: what the attack
was shown is not scored.

A search that sees an answer can force any text, true or false, out of any model.  So attack the never-taught model with the same
settings, and with `target = "wrong"`, which looks for false answers and is scored on them: `excess` is the gain on the true ones
less that on the false.  A run refuses that control: its report would show what is scored on false answers as if they were true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from typing import Any, Literal

import numpy as np
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
from unremember.attack.incontext import fit
from unremember.attack.reversal import same
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadInput, BadModel, BadRequest
from unremember.folder import fingerprint
from unremember.lm import LM
from unremember.loading import faults, load
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
    """scenario: whose weights the attacker holds: those of the 'forgotten' model (of the one under attack), of the 'original', or
    of 'neither', but of a surrogate.  surrogate: its name, for 'neither' alone.  generalisation: see `folds`.
    target: 'wrong' is the control of `excess`, and not for a run.
    """

    search: Search
    scenario: Literal["forgotten", "original", "neither"] = "forgotten"
    generalisation: Generalisation = "other"
    target: Target = "answer"
    surrogate: str = ""

    needs = ("forget",)
    paper = "Yuan et al. 2024, arXiv 2408.10682"
    summary = "a suffix to the question, found by gradients, that makes the model answer"

    def __post_init__(self):
        problems = []
        if self.scenario == "neither" and not self.surrogate:
            problems.append(
                "scenario = 'neither' needs surrogate, the name of the model that the attacker searches instead"
            )
        if self.scenario != "neither" and self.surrogate:
            problems.append(
                f"surrogate = {self.surrogate!r} and scenario = {self.scenario!r}: nobody would search it; leave it out, or take "
                "scenario = 'neither'"
            )
        problems += faults(self.surrogate)
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def alone(self) -> bool:
        return self.scenario == "forgotten"

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where there is nothing to ask or to be shown, or where a run would score false answers."""
        refuse("suffix", self.needs, corpus, self.generalisation, self.target, lambda x: x.entity, run=True)

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        refuse("suffix", self.needs, corpus, self.generalisation, self.target, lambda x: x.entity)
        victim = self._searched(lm, original)
        mask, values = bar(victim, corpus)
        corpus = falsified(corpus) if self.target == "wrong" else corpus
        asked: dict[str, Example] = {}
        found: list[tuple[str, Found]] = []
        for role, rows in groups(corpus, lambda x: x.entity):
            for fold in folds(rows, self.generalisation):
                best = self._found(victim, fold, mask, values, bench)
                assert not tells(best.text, values), "the suffix tells an answer"
                found.append((role, best))
                asked |= {x.id: replace(x, prompt=x.prompt + best.text) for x in fold.asked}
        if not any(f.solved or f.loss < f.first for _, f in found):
            raise BadRequest(
                f"no suffix of {self.search.steps} step(s) does better than {self.search.start!r} repeated, so nothing was "
                "attacked; take more steps or candidates"
            )
        if victim is not lm:  # where the slots were found, there is room; another template may take more
            fit(lm, asked.values(), "take fewer tokens for the suffix, or leave out long questions")
        noted(bench, "suffix", "mellowmax of the logits" if self.search.mellowmax else "nats a token", found)
        seen = {role: tuple(asked.get(x.id, x) for x in corpus.of(role)) for role in ATTACKED if corpus.of(role)}
        return lm, Corpus({**corpus, **seen})

    def _searched(self, lm: LM, original: LM) -> LM:
        """The model whose weights the attacker holds, which asks in the same manner as the one under attack."""
        if self.scenario == "forgotten":
            return lm
        victim = original
        if self.scenario == "neither":
            chat = "chat" if lm.template.chat else "plain"
            victim = load(self.surrogate, template=chat, precision=lm.precision, device=str(lm.device))
            weights = victim.model.state_dict()
            for who, held in (("original", original), ("model under attack", lm)):
                if same(held.model.state_dict(), weights):
                    raise BadRequest(
                        f"suffix: the surrogate {self.surrogate!r} is the {who}, weight for weight; name a model that the "
                        "attacker could have, or take scenario = 'original' or 'forgotten'"
                    )
        if victim.template.chat != lm.template.chat:
            manner = {True: "in its chat template", False: "plainly"}
            raise BadModel(
                f"the model that is searched is asked {manner[victim.template.chat]} and the attacked one "
                f"{manner[lm.template.chat]}; a suffix is carried over between models that are asked alike"
            )
        return victim

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
    run: bool = False,
) -> None:
    """BadCorpus with everything that keeps an attack of this kind from working on `corpus`, or from standing in a run."""
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
    if run and target == "wrong":
        problems.append(
            f'{who}: target = "wrong" scores false answers, which a report would show as true; leave it out, and call '
            "unremember.attack.suffix.excess from Python for that control"
        )
    if problems:
        raise BadCorpus(problems)


def noted(bench: Bench, kind: str, unit: str, found: Sequence[tuple[str, Found]]) -> None:
    """Leave on the bench what was found for the forget role, means over its strings; found: (role, string) each."""
    mine = [f for role, f in found if role == "forget"]
    bench.notes.update(
        {
            f"{kind}es found": float(len(mine)),
            f"{kind} with the least loss": min(mine, key=lambda f: f.loss).text,
            f"loss before, {unit}": float(np.mean([f.first for f in mine])),
            f"loss after, {unit}": float(np.mean([f.loss for f in mine])),
        }
    )


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
