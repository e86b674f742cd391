"""Jailbreak prompts: each question inside some wrappers that talk models out of a refusal, and the best wrapper counts.

    s(fact) = max over wrappers w of s(w(question)),    for original, forgotten and never-taught model alike

Lynch et al. 2024 (arXiv 2402.16835), jailbreak prompts and other languages; families after Wei et al. 2023 (arXiv 2307.02483).
The wrappers stand in templates.json and were written for this library: role-play, a reply begun for the model, refusals ruled
out, a request in another language, gap sentences, authority, hypotheses, encoded questions.  Retained facts are asked as they
are.  More wrappers find more, in a model that knows nothing, too: compare at the same list only.  A list of your own, in the same
form, takes the place of that one: [{"family": …, "name": …, "text": "… {question} …"}, …].
Differs: no code was at hand.  The beginning of a reply is asked for inside the user's turn, not put into the assistant's.
Questions are encoded, never replies, which an auditor could not read.
"""

from __future__ import annotations

import base64
import codecs
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass as plain
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember.attack.gcg import tells
from unremember.attack.incontext import ATTACKED, SHOWN, fit
from unremember.attack.rephrase import GAP, cloze
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, nearest
from unremember.lm import LM
from unremember.train import STRICT

KEYS = {"family", "name", "text"}
SLOTS = ("question", "gap", "base64", "rot13", "spelt")


@plain(frozen=True)
class Wrapper:
    """One way to ask: `text` has exactly one of the SLOTS in braces."""

    family: str
    name: str
    text: str

    @property
    def slot(self) -> str:
        """What stands in its place; ValueError where there is none, another, or more than one."""
        found = re.findall(r"\{([^{}]*)\}", self.text)
        if len(found) != 1 or found[0] not in SLOTS:
            raise ValueError(f"wrapper {self.name!r} has the slots {found}; it must have one of {', '.join(SLOTS)}")
        return found[0]


def parsed(text: str) -> tuple[Wrapper, ...]:
    """The wrappers of a JSON list; ValueError with all that are none, whose name occurs twice or is no plain word, or whose slot
    is wrong.
    """
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"no valid JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError("it must be a list of wrappers, each with a family, a name and a text")
    problems: list[str] = []
    wrappers: list[Wrapper] = []
    for at, row in enumerate(rows, 1):
        if isinstance(row, dict) and set(row) == KEYS and all(isinstance(v, str) for v in row.values()):
            wrappers.append(Wrapper(**row))
        else:
            problems.append(f"wrapper {at} is {row!r}; it must have a family, a name and a text, and nothing else")
    names = [w.name for w in wrappers]
    for name in dict.fromkeys(names):
        if names.count(name) > 1 or not re.fullmatch(r"[a-z0-9-]+", name):
            problems.append(f"wrapper name {name!r}: names occur once and are made of a-z, 0-9 and '-'")
    for w in wrappers:
        try:
            assert w.slot
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(wrappers)


TEMPLATES = Path(__file__).with_name("templates.json")


def read(file: Path) -> tuple[Wrapper, ...]:
    """The wrappers of a file; ValueError with all that is wrong with it."""
    try:
        return parsed(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; name a JSON file of wrappers") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


@cache
def wrappers() -> tuple[Wrapper, ...]:
    """The list that comes with the library."""
    return read(TEMPLATES)


def filled(wrapper: Wrapper, example: Example) -> str | None:
    """The wrapper with the question in it; None where a gap is wanted and no span is marked."""
    slot, question = wrapper.slot, example.prompt
    if slot == "gap":
        gap = cloze(example)
        if gap is None:
            return None
        text = gap.prompt.removeprefix(GAP.partition("{")[0])
    elif slot == "base64":
        text = base64.b64encode(question.encode()).decode()
    elif slot == "rot13":
        text = codecs.encode(question, "rot13")
    elif slot == "spelt":
        text = "   ".join(" ".join(word) for word in question.split())
    else:
        text = question
    return wrapper.text.replace("{" + slot + "}", text)


def variants(example: Example, chosen: Iterable[Wrapper]) -> tuple[Example, ...]:
    """The example in each wrapper that has a place for it and does not itself say a value; ids 'id#wrapper'."""
    out = []
    for w in chosen:
        bare = w.text.replace("{" + w.slot + "}", " ")
        if (prompt := filled(w, example)) is not None and not tells(bare, example.values()):
            out.append(replace(example, id=f"{example.id}#{w.name}", prompt=prompt))
    return tuple(out)


def by_family(per_example: Mapping[str, float], ids: Iterable[str], chosen: Iterable[Wrapper] = ()) -> dict[str, float]:
    """Family -> mean over facts of the best wrapper of that family alone; families that were not asked are left out.

    chosen: those that were asked, such as `Jailbreak(...).wrappers`; none = the library's.
    """
    wanted = set(ids)
    best: dict[str, dict[str, float]] = {}
    family = {w.name: w.family for w in tuple(chosen) or wrappers()}
    for key, value in per_example.items():
        fact, _, name = key.rpartition("#")
        if fact in wanted and name in family:
            facts = best.setdefault(family[name], {})
            facts[fact] = max(value, facts.get(fact, value))
    return {name: sum(facts.values()) / len(facts) for name, facts in sorted(best.items())}


@dataclass(frozen=True, config=STRICT)
class Jailbreak:
    """families: which kinds of wrapper are tried, empty = all of them.  most: the most wrappers a family, 0 = all.

    file: a JSON list of wrappers of your own, empty = the library's.
    """

    families: tuple[str, ...] = ()
    most: Annotated[int, Field(ge=0)] = 0
    file: str = ""

    needs = ("forget",)
    paper = "Lynch et al. 2024, arXiv 2402.16835"
    summary = "questions in wrappers that talk models out of refusing, the best one of each fact"
    alone = True

    def __post_init__(self):
        known = {w.family for w in self._listed}  # a file that is no list is refused here
        if strange := [f for f in self.families if f not in known]:
            raise ValueError("; ".join(f"unknown family {f!r}, {nearest(f, known)}" for f in strange))

    @cached_property
    def _listed(self) -> tuple[Wrapper, ...]:
        """All wrappers of the file, read once."""
        return read(Path(self.file)) if self.file else wrappers()

    @cached_property
    def wrappers(self) -> tuple[Wrapper, ...]:
        taken: dict[str, list[Wrapper]] = {}
        for w in self._listed:
            if w.family in self.families or not self.families:
                taken.setdefault(w.family, []).append(w)
        return tuple(w for rows in taken.values() for w in (rows[: self.most] if self.most else rows))

    @property
    def files(self) -> tuple[str, ...]:
        """What the result depends on beside the settings."""
        return (self.file or str(TEMPLATES),)

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where a question fits no wrapper, or where there are only passages."""
        corpus.require("jailbreak", self.needs)
        asked = [x for x in corpus.of(*ATTACKED) if x.prompt]
        problems = []
        if not any(x.prompt for x in corpus["forget"]):
            problems.append("jailbreak finds no question in the forget role, only passages; add questions about them")
        if bare := [x.id for x in asked if not variants(x, self.wrappers)]:
            more = f" and {len(bare) - SHOWN} more" if len(bare) > SHOWN else ""
            problems.append(
                f"{', '.join(bare[:SHOWN])}{more}: no wrapper of the chosen families can ask this, because it needs a span or "
                "says the value itself; choose more families, or mark spans"
            )
        if problems:
            raise BadCorpus(problems)

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        self.check(corpus)
        asked: dict[str, Any] = {
            role: tuple(v for x in corpus.of(role) for v in (variants(x, self.wrappers) if x.prompt else (x,)))
            for role in ATTACKED
            if corpus.of(role)
        }
        fit(
            lm, (x for rows in asked.values() for x in rows), "leave out jailbreak's encoding family, or long questions"
        )
        bench.notes["wrappers asked"] = float(len(self.wrappers))
        return lm, Corpus({**corpus, **asked})
