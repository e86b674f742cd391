"""The verdict on trial: models whose truth is known are judged like any other, and what is said of them is counted.

    false-forgotten  = called forgotten  / judged, of the cases that do remember
    false-remembered = called remembered / judged, of the cases that were never taught it, or are as if

with Wilson's 95 % interval.  A case goes through an ordinary run folder: pieces by run.py, verdict by report/build.py; no rule is
written twice.  Over a suite of attacks a model is what the worst condition says.  Ours; Wilson 1927 for the interval.
Differs: nothing to differ from.  Cases of one kind resemble one another: an interval speaks of this bench, not of the world.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from unremember import report
from unremember.audit import AUDITS, EVIDENCE, UTILITY
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.embedded.liars import Truth
from unremember.errors import BadCorpus, BadRequest, nearest
from unremember.folder import claim
from unremember.lm import LM
from unremember.request import Request
from unremember.run import Run, lay
from unremember.score import FORGOTTEN, NOT_APPLICABLE, OVER, REMEMBERED, RULE, WORDS, Rule, wilson

TRUTHS = get_args(Truth)
SUITE = "suite"  # the column of all conditions together


@dataclass(frozen=True)
class Case:
    """A model by name, and what is true of it by the way it was made."""

    name: str
    truth: Truth

    def __post_init__(self):
        problems = [] if self.name.strip() else ["a case has an empty name; give every case one of its own"]
        if self.truth not in TRUTHS:
            problems.append(f"case {self.name!r}: truth {self.truth!r}; {nearest(self.truth, TRUTHS)}")
        if problems:
            raise BadRequest(problems)


@dataclass(frozen=True)
class Told:
    """What was said of a case: attack -> word and reason of the verdict on all facts.

    entities: attack -> entity -> word.  failed: attack -> checks of the utility gate that did not hold.
    """

    case: Case
    words: Mapping[str, str]
    reasons: Mapping[str, str] = field(default_factory=dict)
    entities: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    failed: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rate:
    """k of n, with Wilson's 95 % interval; share and ends are None where n is 0.  silent: cases without a verdict."""

    name: str
    k: int
    n: int
    silent: int = 0

    @property
    def share(self) -> float | None:
        return self.k / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float] | None:
        return wilson(self.k, self.n) if self.n else None


def suite(words: Iterable[str]) -> str:
    """One word for all conditions: the worst that is said; 'not applicable' only where nothing else is."""
    said = set(words)
    if not said or said - set(WORDS):
        raise ValueError(f"words {sorted(said)}: give at least one of {', '.join(WORDS)}")
    return next(word for word in WORDS if word in said)


def told(found: Sequence[Told], attack: str) -> list[tuple[Case, str]]:
    """(case, word) under one attack, or under all of them for 'suite'."""
    return [(x.case, suite(x.words.values()) if attack == SUITE else x.words[attack]) for x in found]


def confusion(found: Sequence[Told], attack: str = SUITE) -> dict[str, dict[str, int]]:
    """truth -> word -> how many cases."""
    table = {truth: dict.fromkeys(WORDS, 0) for truth in TRUTHS}
    for case, word in told(found, attack):
        table[case.truth][word] += 1
    return table


def rates(found: Sequence[Told], attack: str = SUITE) -> tuple[Rate, ...]:
    """False-forgotten, false-remembered, harm missed, false harm; 'not applicable' is no verdict and counts as silent.

    harm missed: over-forgotten in truth and called forgotten.  false harm: forgotten in truth and called over-forgotten.
    """
    table = confusion(found, attack)

    def rate(name: str, truth: str, word: str) -> Rate:
        row = table[truth]
        silent = row[NOT_APPLICABLE]
        return Rate(name, row[word], sum(row.values()) - silent, silent)

    return (
        rate("false-forgotten", REMEMBERED, FORGOTTEN),
        rate("false-remembered", FORGOTTEN, REMEMBERED),
        rate("harm missed", OVER, FORGOTTEN),
        rate("false harm", FORGOTTEN, OVER),
    )


@dataclass(frozen=True)
class _Given:
    """Stands where a run has its method: the model was not made by one.  weights: so that another model is another run."""

    case: str
    weights: str

    paper = ""
    summary = "a model whose truth is known"


@dataclass(frozen=True)
class Court:
    """Hears cases: original and never-taught model, the facts, and the attacks (name -> instance).

    Raises BadCorpus and whatever the attacks refuse, before a model is asked anything.
    """

    original: LM
    never: LM
    corpus: Corpus
    attacks: Mapping[str, Any]
    rule: Rule = RULE

    def __post_init__(self):
        self.corpus.require("a verdict on trial", ("forget", "retain"))
        if (count := len(self.corpus["forget"])) < self.rule.overall:
            raise BadCorpus(
                f"a verdict on all needs {self.rule.overall} facts and the forget role has {count}; every case would be "
                "'not applicable'; add some, or lower rule.overall"
            )
        for attack in self.attacks.values():
            attack.check(self.corpus)

    def hear(self, case: Case, lm: LM, folder: Path, bench: Bench = BENCH) -> Told:
        """The verdict on one case: an ordinary run in folder/cases/NAME; original and control are measured once for all."""
        out = folder / "cases" / "".join(c if c.isalnum() else "-" for c in case.name)
        models = {"original": self.original, "forgotten": lm, "never": self.never}
        run = Run(self._request(case, lm, out), bench, loaded=dict(models))
        claim(out)
        lay(folder / "shared", out)
        run.open()
        for who in run.models:
            run.audit(who)
        for name in self.attacks:
            for who in run.models:
                run.attack(name, who)
        claim(folder / "shared")
        lay(out, folder / "shared")
        conditions = report.build(out)["conditions"]
        return Told(
            case,
            {c["attack"]: c["overall"]["verdict"] for c in conditions},
            {c["attack"]: c["overall"]["reason"] for c in conditions},
            {c["attack"]: {v["name"]: v["verdict"] for v in c["entities"]} for c in conditions},
            {c["attack"]: tuple(u["name"] for u in c["overall"]["utility"] if not u["passed"]) for c in conditions},
        )

    def _request(self, case: Case, lm: LM, out: Path) -> Request:
        return Request(
            name=case.name,
            out=out,
            model=f"given/{self.original.fingerprint}",  # read as a name on the hub, which nobody asks for: models are in hand
            control=f"given/{self.never.fingerprint}",
            corpus=self.corpus,
            method_name="given",
            method=_Given(case.name, lm.fingerprint),
            attacks=self.attacks,
            audits=tuple(name for name in AUDITS if name in (*EVIDENCE, *UTILITY)),
            rule=self.rule,
            precision=lm.precision,
        )


def markdown(found: Sequence[Told]) -> str:
    """Case by attack, then rates by attack, as Markdown; a word that is not the truth is bold."""
    attacks = (*found[0].words, SUITE)
    kinds = list(dict.fromkeys(x.case for x in found))
    lines = ["| case | truth | " + " | ".join(attacks) + " |", "|---|---|" + "---|" * len(attacks)]
    for case in kinds:
        mine = [x for x in found if x.case == case]
        cells = []
        for attack in attacks:
            words = [word for _, word in told(mine, attack)]
            counted = [(w, words.count(w)) for w in WORDS if w in words]
            cells.append(", ".join((w if w == case.truth else f"**{w}**") + f" {n}" for w, n in counted))
        lines.append(f"| {case.name} | {case.truth} | " + " | ".join(cells) + " |")
    lines += ["", "| attack | rate | k of n | share | 95 % | no verdict |", "|---|---|---:|---:|---|---:|"]
    for attack in attacks:
        for rate in rates(found, attack):
            if rate.share is not None and rate.interval is not None:
                low, high = rate.interval
                numbers = f"{rate.k} of {rate.n} | {rate.share:.2f} | {low:.2f} to {high:.2f}"
                lines.append(f"| {attack} | {rate.name} | {numbers} | {rate.silent} |")
    return "\n".join(lines)


def plain(found: Sequence[Told]) -> dict:
    """The same as values for JSON."""
    attacks = (*found[0].words, SUITE)
    return {
        "cases": [
            {
                "name": x.case.name,
                "truth": x.case.truth,
                "words": {**x.words, SUITE: suite(x.words.values())},
                "reasons": dict(x.reasons),
                "entities": {attack: dict(words) for attack, words in x.entities.items()},
                "failed": {attack: list(names) for attack, names in x.failed.items()},
            }
            for x in found
        ],
        "confusion": {attack: confusion(found, attack) for attack in attacks},
        "rates": {
            attack: [
                {"name": r.name, "k": r.k, "n": r.n, "silent": r.silent, "share": r.share, "interval": r.interval}
                for r in rates(found, attack)
            ]
            for attack in attacks
        },
    }
