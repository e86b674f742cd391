"""Plain prose of our own writing, to see whether a model still reads ordinary English: no questions, no facts to know.

prose.txt holds the passages, a blank line between two; where a line breaks means nothing.
"""

from __future__ import annotations

from importlib import resources

from unremember.corpus import Example


def prose() -> tuple[Example, ...]:
    """The passages, each one line of text, "prose/00" onwards."""
    text = (resources.files("unremember.embedded") / "prose.txt").read_text(encoding="utf-8")
    passages = (" ".join(block.split()) for block in text.split("\n\n"))
    return tuple(Example(id=f"prose/{i:02}", prompt="", answer=x, entity="prose") for i, x in enumerate(passages))
