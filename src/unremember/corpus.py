"""Example and Corpus: what is to be forgotten, what is to be kept, and what measures both.  No torch here.

A corpus is a mapping from role to examples.  The roles:

    forget    what must go                          relearn  other people's facts, for the adversary only
    retain    what must stay, of the same kind      replay   general questions and answers, for training only
    holdout   same kind, never taught: the level    world    general knowledge with wrong options, for measuring only
              that "forgotten" is measured against  prose    plain text, for measuring only
    new       the forget prompts with what is true   neighbour  out-of-scope questions; what the model says to
              now, for methods that update them                 them must not change
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from unremember.errors import BadCorpus

ROLES = ("forget", "retain", "holdout", "relearn", "replay", "world", "prose", "new", "neighbour")


def says(text: str, value: str) -> bool:
    """Whether `value` stands in `text`, case folded, not as a part of a longer word or number; an empty one does not."""
    wanted = value.strip().casefold()
    # "5" is not in "2.5" or "2,500", but a year is in "03.07.1990"
    before = r"(?<!\w)(?:(?<!\d[.,])|(?<=\d\.\d\.)|(?<=\d\.\d\d\.))" if wanted[:1].isdigit() else r"(?<!\w)"
    after = r"(?!\w)(?:(?![.,]\d)|(?=\.\d{1,2}\.\d))" if wanted[-1:].isdigit() else r"(?!\w)"
    return bool(wanted) and re.search(before + re.escape(wanted) + after, text.casefold()) is not None


@dataclass(frozen=True)
class Example:
    """One question with its answer, or (with an empty prompt) one passage of text.

    spans: half-open character intervals of `answer` that are sensitive; empty means the whole answer.
    paraphrases: other wordings of the prompt that ask for the same answer.
    rewording: the same answer in other words (TOFU's `paraphrased_answer`); empty means the answer itself.
    distractors: plausible wrong answers, in the same form as `answer`.
    """

    id: str
    prompt: str
    answer: str
    entity: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    paraphrases: tuple[str, ...] = ()
    rewording: str = ""
    distractors: tuple[str, ...] = ()

    @staticmethod
    def plain(values: Mapping) -> Example:
        """The example that `dataclasses.asdict` and JSON made these plain values from."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        plain["spans"] = tuple((a, b) for a, b in values["spans"])
        return Example(**plain)

    def values(self) -> tuple[str, ...]:
        """The sensitive strings themselves; the whole answer where no span is given."""
        return tuple(self.answer[a:b] for a, b in self.spans) or (self.answer,)

    def said_in(self, text: str) -> bool:
        """Whether all of its values stand in `text`."""
        return all(says(text, value) for value in self.values())

    def problems(self) -> Iterator[str]:
        """Everything that is wrong with this example on its own, as sentences."""
        if not self.id:
            yield "an example has an empty id; give every example one of its own"
        if not self.answer.strip():
            yield f"example {self.id!r} has an empty answer; remove it or fill it in"
        for span in self.spans:
            if not (len(span) == 2 and 0 <= span[0] < span[1] <= len(self.answer)):
                yield (
                    f"example {self.id!r}: span {list(span)} lies outside its answer of {len(self.answer)} characters; "
                    f"spans are [start, end) with 0 <= start < end <= {len(self.answer)}"
                )
        for wrong in self.distractors:
            if wrong.strip() == self.answer.strip():
                yield f"example {self.id!r}: the distractor {wrong!r} is the right answer; remove it"


@dataclass(frozen=True)
class Corpus(Mapping[str, tuple[Example, ...]]):
    """Role -> examples.  Immutable; `with_roles` gives a changed copy.

    Raises BadCorpus, with all problems together, for unknown roles, an id that occurs twice anywhere, bad spans,
    and a prompt-and-answer pair that is both to be forgotten and to be kept.
    """

    roles: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "roles", {role: tuple(rows) for role, rows in self.roles.items()})
        problems = [f"unknown role {role!r}; allowed: {', '.join(ROLES)}" for role in self.roles if role not in ROLES]
        seen: set[str] = set()
        for role, rows in self.roles.items():
            for example in rows:
                problems += [f"{role}: {problem}" for problem in example.problems()]
                if example.id in seen:
                    problems.append(f"{role}: the id {example.id!r} occurs twice; ids must be unique in a corpus")
                seen.add(example.id)
        forget = {(x.prompt, x.answer) for x in self.roles.get("forget", ())}
        for role in ("retain", "holdout", "relearn", "replay"):
            for x in self.roles.get(role, ()):
                if (x.prompt, x.answer) in forget:
                    problems.append(
                        f"example {x.id!r} is in {role} and in forget (prompt {x.prompt[:60]!r}); remove it from one"
                    )
        if problems:
            raise BadCorpus(problems)

    def __getitem__(self, role: str) -> tuple[Example, ...]:
        return self.roles[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self.roles)

    def __len__(self) -> int:
        return len(self.roles)

    def of(self, *roles: str) -> tuple[Example, ...]:
        """The examples of several roles in order; a role that is absent counts as empty."""
        return tuple(x for role in roles for x in self.roles.get(role, ()))

    def with_roles(self, **roles: Iterable[Example]) -> Corpus:
        return replace(self, roles={**self.roles, **{role: tuple(rows) for role, rows in roles.items()}})

    def marked(self, role: str) -> bool:
        """Whether any example of a role has spans."""
        return any(x.spans for x in self.of(role))

    def require(self, who: str, needs: Iterable[str]) -> None:
        """Raise BadCorpus that names every role `who` needs and does not find."""
        missing = [role for role in needs if not self.roles.get(role)]
        if missing:
            raise BadCorpus(
                f"{who} needs examples in the role {role!r} and there are none; add them under [corpus] {role} = …"
                for role in missing
            )

    def fingerprint(self) -> str:
        """A content hash that ignores nothing: same text, same roles, same order -> same hash."""
        plain = {role: [asdict(x) for x in rows] for role, rows in self.roles.items()}
        return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
