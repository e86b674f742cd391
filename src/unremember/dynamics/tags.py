"""Parts of speech of words, of the tokens that make them up, and of what a model says in their place.

    R(p): is the predicted token, put in the place of the true one, of class p?          (memorise.recall counts)

Tirumala et al. 2022 (arXiv 2205.10770), section 6, with spaCy's tagger; no code was published.
Differs: the tagger is a small averaged perceptron with the tags of Universal Dependencies (denckring-en-pos).  Whole numbers
are NUM by rule, because it was trained on words.  Words are tagged; every piece of a word has its tag, and all pieces count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from unremember.errors import BadRequest

CLASSES = ("NUM", "PROPN", "NOUN", "ADJ", "VERB")
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+(?:[.,:]\d+)*|[^\w\s]|_")
Tagger = Callable[[Sequence[str]], Sequence[str]]  # the words of one sentence -> a tag each


def perceptron() -> Tagger:
    """The tagger of denckring-en-pos; BadRequest where it is not installed."""
    try:
        from denckring_en_pos import tagger
    except ImportError as absent:
        raise BadRequest("parts of speech need a tagger; pip install denckring-en-pos, or leave them out") from absent
    model = tagger()
    return lambda words: [label.partition("|")[0] for label in model.tag(words)]


def spans(text: str) -> list[tuple[int, int]]:
    """Half-open character intervals of the words, numbers and signs of a text."""
    return [found.span() for found in WORD.finditer(text)]


def tags(words: Sequence[str], tagger: Tagger) -> list[str]:
    """A tag for each word of one sentence: NUM for what is digits, "" for signs, else the tagger's, who sees no sign."""
    told = [i for i, word in enumerate(words) if any(c.isalnum() for c in word)]
    found = [""] * len(words)
    for i, tag in zip(told, tagger([words[i] for i in told]), strict=True):
        found[i] = "NUM" if words[i][0].isdigit() else tag
    return found


def inherited(text: str, offsets: Sequence[tuple[int, int]], tagger: Tagger) -> list[str]:
    """The tag of each token: that of the word in which its first character stands, spaces in front passed over.

    offsets: character interval of each token in `text`, as fast tokenizers give them.  "" for spaces and signs.
    """
    words = spans(text)
    told = tags([text[a:b] for a, b in words], tagger)
    found = []
    for begin, end in offsets:
        while begin < end and text[begin].isspace():
            begin += 1
        here = (tag for (a, b), tag in zip(words, told, strict=True) if a <= begin < b) if begin < end else iter(())
        found.append(next(here, ""))
    return found


def instead(text: str, place: tuple[int, int], said: str, tagger: Tagger) -> str:
    """The tag of `said` where it stands in the place of text[a:b], in its sentence; "" for a sign or nothing."""
    a, b = place
    gap = text[a:b][: len(text[a:b]) - len(text[a:b].lstrip())]  # a token often brings the space in front of it
    changed = text[:a] + (said if said[:1].isspace() else gap + said) + text[b:]
    length = len(changed) - len(text) + (b - a)
    return inherited(changed, [(a, a + length)], tagger)[0] if said.strip() else ""
