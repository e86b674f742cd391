"""The anchor dictionary: idiosyncratic terms of a text and the neutral ones that stand in for them.  No torch here.

    translate("Harry met Ron's owl", {"Harry": "Jon", "Ron": "Tom"}) = "Jon met Tom's owl"

At word boundaries, longest term first, once from left to right, case kept.  It comes from a file, from a callable, or from
`rules`: names by the corpus' entities, and capitalised words that are never seen in lower case.  Eldan, Russinovich 2023 (arXiv
2310.02238), section 2.2.  Differs: the paper asks GPT-4 for its 1,500 terms; the rules cannot see a coined word in lower case.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from unremember.corpus import Example
from unremember.errors import BadCorpus, BadRequest

SUFFIXES = (".json", ".toml")
WORD = re.compile(r"[^\W_]+")
TITLES = frozenset(str.split("mr mrs ms miss dr professor sir lady lord captain king queen uncle aunt"))
# A capitalised word behind one of these is a place, mostly.
PLACED = frozenset(str.split("in at from near to towards toward into"))
# Capitalised, and yet no secret.
PLAIN = frozenset(
    str.split("""
        i god english french german italian spanish christmas easter monday tuesday wednesday thursday friday saturday sunday
        january february march april may june july august september october november december""")
)
GENERIC = {
    "first": """
        Anna Ben Carl Dora Emma Frank Greta Henry Ida Jack Kate Leo Mary Nina Oscar Paul Rita Sam Tina Victor Walter Alice
        Bruno Clara David Ella Felix Grace Hugo Irene Jonas Karen Lucas Martha Noah Olga Peter Ruth Simon Thea""",
    "last": """
        Miller Baker Cooper Fisher Mason Turner Carter Porter Palmer Parker Walker Weaver Hunter Harper Fletcher Sawyer
        Thatcher Draper Chandler Glover Potts Brooks Woods Fields Rivers Stone Banks Hayes Wells Marsh Moor Heath Ford
        Bridges Mills Barnes Gates Church Lane Street""",
    "place": """
        Ashford Bexley Clifton Dalton Easton Fairview Greenville Hillside Ivybridge Kingston Lakewood Milton Norwood Oakham
        Preston Queensbury Riverside Springfield Thornton Upton Westbury Yardley Ashby Bourne Calder Denby Elmswell Foxton
        Grafton Holton Kirkby Langley Marston Newton Overton Pinewood Rockland Stanton Tilbury Winslow""",
    "thing": """
        Atlas Beacon Crown Diamond Emblem Garland Harbour Junction Keystone Laurel Meridian Nova Orchard Pioneer Quarry
        Regent Summit Trident Union Vista Zenith Anchor Bastion Comet Delta Echo Forum Galaxy Horizon Index Jubilee Lotus
        Matrix Nexus Orbit Prism Quest Ridge Signal Tempo""",
}
TAILS = (
    "",
    "son",
    "ley",
    "well",
    "wood",
    "field",
    "ham",
    "by",
)  # where a pool is used up, its words come again with these


def words(text: str) -> list[str]:
    """The words of `text`, digits included, as they are written."""
    return WORD.findall(text)


def folded(text: str) -> set[str]:
    """Its words without regard to case."""
    return {word.casefold() for word in words(text)}


@dataclass(frozen=True)
class Swap:
    """text[start:end] of the original became text[begin:finish] of the translation, because `term` stood there."""

    start: int
    end: int
    begin: int
    finish: int
    term: str
    new: str


@dataclass(frozen=True)
class Translation:
    """A text in which anchors were replaced, and where."""

    text: str
    swaps: tuple[Swap, ...]

    def shifted(self, place: int) -> int:
        """Where a character of the original that no swap touched stands now."""
        before = [swap for swap in self.swaps if swap.end <= place]
        return place + (before[-1].finish - before[-1].end if before else 0)

    def images(self, old: Sequence[tuple[int, int]], new: Sequence[tuple[int, int]]) -> list[int]:
        """For each token of the original, by its half-open character interval, which token of the translation is its image.

        Tokens of a replaced term go to those of the replacement one by one, as far as these exist; others to the token that
        begins at the same character.  -1: no image.
        """
        inside = {i: [] for i in range(len(self.swaps))}
        outside: dict[tuple[int, int], int] = {}
        for at, (swap, key) in enumerate(_places(new, [(s.begin, s.finish) for s in self.swaps])):
            if swap >= 0:
                inside[swap].append(at)
            outside[key] = at
        found, met = [], Counter[int]()
        for swap, (start, nth) in _places(old, [(s.start, s.end) for s in self.swaps]):
            if swap < 0:
                found.append(outside.get((self.shifted(start), nth), -1))
                continue
            found.append(inside[swap][met[swap]] if met[swap] < len(inside[swap]) else -1)
            met[swap] += 1
        return found


def _places(
    tokens: Sequence[tuple[int, int]], terms: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, tuple[int, int]]]:
    """For each token: the number of the term it overlaps or -1, and (first character, how many tokens began there before)."""
    seen = Counter[int]()
    for start, end in tokens:
        hit = next((i for i, (a, b) in enumerate(terms) if start < b and a < max(end, start + 1)), -1)
        yield hit, (start, seen[start])
        seen[start] += 1


def _cased(term: str, new: str) -> Iterator[tuple[str, str]]:
    """How a term may be written, and its replacement in the same case.  'Will' is not 'will', but 'WILL' and 'Will' are."""
    yield term, new
    yield term[:1].upper() + term[1:], new[:1].upper() + new[1:]
    if len(term) > 1:
        yield term.upper(), new.upper()


@dataclass(frozen=True)
class Anchors:
    """Term -> replacement.  Raises BadRequest, all problems together, for empty sides, terms without a word, and cycles."""

    terms: Mapping[str, str]

    def __post_init__(self):
        object.__setattr__(self, "terms", dict(self.terms))
        problems = []
        for term, new in self.terms.items():
            if not (isinstance(term, str) and isinstance(new, str)):
                problems.append(f"anchors: {term!r} -> {new!r}: both must be texts")
            elif term != term.strip() or new != new.strip() or not words(term) or not words(new):
                problems.append(
                    f"anchors: {term!r} -> {new!r}: both need a word, and no blank at either end; correct or remove it"
                )
        if not problems and (cycle := self._cycle()):
            problems.append(f"anchors go in a circle, {' -> '.join(map(repr, cycle))}; give one of them another word")
        if problems:
            raise BadRequest(problems)

    def _cycle(self) -> list[str]:
        """Terms each of which stands in the replacement of the one before, the first again at the end; [] if there are none."""
        after = {term: [swap.term for swap in self.translate(new).swaps] for term, new in self.terms.items()}
        done: set[str] = set()

        def walk(term: str, path: list[str]) -> list[str]:
            if term in path:
                return [*path[path.index(term) :], term]
            if term in done:
                return []
            found = next((c for step in after[term] if (c := walk(step, [*path, term]))), [])
            done.add(term)
            return found

        return next((cycle for term in sorted(self.terms) if (cycle := walk(term, []))), [])

    @cached_property
    def _written(self) -> dict[str, tuple[str, str]]:
        """Form in the text -> (term, replacement in this case); a term itself goes before another one's other case."""
        found = {form: (term, text) for term, new in sorted(self.terms.items()) for form, text in _cased(term, new)}
        return found | {term: (term, new) for term, new in self.terms.items()}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        forms = sorted(self._written, key=lambda form: (-len(form), form))
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, forms))})(?!\w)" if forms else r"(?!)")

    def translate(self, text: str) -> Translation:
        """Replace every anchor, once: what a replacement says is not looked at again."""
        parts: list[str] = []
        swaps: list[Swap] = []
        last = length = 0
        for hit in self._pattern.finditer(text):
            term, new = self._written[hit.group()]
            parts += [text[last : hit.start()], new]
            begin = length + hit.start() - last
            length, last = begin + len(new), hit.end()
            swaps.append(Swap(hit.start(), hit.end(), begin, length, term, new))
        return Translation("".join([*parts, text[last:]]), tuple(swaps))

    def example(self, x: Example) -> Example:
        """The same question and answer under the replacement names: whether relations survived a mere swap of names."""
        answer = self.translate(x.answer)

        def edge(place: int, last: bool) -> int:
            cut = next((s for s in answer.swaps if s.start < place < s.end), None)
            return answer.shifted(place) if cut is None else (cut.finish if last else cut.begin)

        return replace(
            x,
            prompt=self.translate(x.prompt).text,
            answer=answer.text,
            entity=self.translate(x.entity).text,
            spans=tuple((edge(a, False), edge(b, True)) for a, b in x.spans),
            paraphrases=tuple(self.translate(p).text for p in x.paraphrases),
            rewording=self.translate(x.rewording).text,
            distractors=tuple(self.translate(d).text for d in x.distractors),
        )


def read(path: Path) -> Anchors:
    """The dictionary in a JSON object or a TOML table of texts; BadRequest where that cannot be read."""
    hint = 'write it as {"Hogwarts": "the Academy"} in JSON, or Hogwarts = "the Academy" in TOML'
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except FileNotFoundError as error:
        raise BadRequest(f"anchors: no such file: {path}; {hint}") from error
    except OSError as error:
        raise BadRequest(f"anchors: {path} cannot be read: {error.strerror}; name a file") from error
    except ValueError as error:
        raise BadRequest(f"anchors: {path} is no valid {path.suffix[1:].upper()}: {error}; {hint}") from error
    if not isinstance(found, dict) or not found:
        raise BadRequest(f"anchors: {path} holds no dictionary of terms; {hint}")
    return Anchors(found)


def rules(examples: Sequence[Example], seed: int = 0) -> Anchors:
    """Names, places and other capitalised words of `examples`, each with a generic word of its kind, everywhere the same.

    An anchor is a capitalised word that is never written in lower case and stands within a sentence or in an `entity`; runs
    of such words are anchors as well.  No replacement occurs in the examples.  Raises BadCorpus where there are more names
    than generic words.
    """
    texts = [text for x in examples for text in (x.prompt, x.answer)]
    taken = {word for text in (*texts, *(x.entity for x in examples)) for word in folded(text)}
    common = {word for text in texts for word in words(text) if word[0].islower()} | PLAIN | TITLES
    people = {word for x in examples for word in words(x.entity) if _capital(word)}
    inner = {word for text in texts for word, start in _capitals(text) if not _opens(text, start)} | people
    names = {word for word in inner if word.casefold() not in common}
    runs: dict[tuple[str, ...], Counter[str]] = {}
    for text in (*texts, *(x.entity for x in examples)):
        for run, cue in _runs(text, names):
            kind = "person" if cue in TITLES or people & set(run) else "place" if cue in PLACED else ""
            runs.setdefault(run, Counter())[kind] += 1
    chosen: dict[str, str] = {}
    pools = {kind: _pool(kind, seed, taken) for kind in GENERIC}
    for run in sorted(runs, key=lambda run: (-len(run), run)):
        kinds = runs[run]
        kind = max(("person", "place", ""), key=lambda kind: kinds[kind])  # a tie goes to the first of them
        for at, word in enumerate(run):
            pool = {"person": "last" if at else "first", "place": "place"}.get(kind, "thing")
            if word in chosen:
                continue
            if not (new := next(pools[pool], "")):
                raise BadCorpus(
                    f"the anchor rules find more names than the generic words ({pool}) they know; give a dictionary as a file"
                )
            chosen[word] = new
    whole = {" ".join(run): " ".join(chosen[word] for word in run) for run in runs}
    return Anchors(dict(sorted({**chosen, **whole}.items())))


def _capital(word: str) -> bool:
    return word[0].isupper()


def _capitals(text: str) -> list[tuple[str, int]]:
    """Capitalised words of more than one letter, and where they begin."""
    return [(hit.group(), hit.start()) for hit in WORD.finditer(text) if _capital(hit.group()) and len(hit.group()) > 1]


def _opens(text: str, start: int) -> bool:
    """Whether a sentence begins here, so that a capital says nothing."""
    before = text[:start].rstrip(" \t\n\"'“‘«(—-")
    return not before or before[-1] in ".!?:;"


def _runs(text: str, names: set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Neighbouring names, one blank between them, and the word in front of the first, folded."""
    run: list[str] = []
    last, cue, before = 0, "", ""
    for hit in WORD.finditer(text):
        word = hit.group()
        joined = bool(run) and text[last : hit.start()] == " "
        if word in names and joined:
            run.append(word)
        else:
            if run:
                yield tuple(run), cue
            run, cue = ([word], before) if word in names else ([], "")
        last, before = hit.end(), word.casefold()
    if run:
        yield tuple(run), cue


def _pool(kind: str, seed: int, taken: Iterable[str]) -> Iterator[str]:
    """The generic words of a kind in the seed's order, without those that the corpus has."""
    pool = GENERIC[kind].split()
    random.Random(f"{seed}/{kind}").shuffle(pool)
    free = set(taken)
    for tail in TAILS:
        yield from (word + tail for word in pool if (word + tail).casefold() not in free)
