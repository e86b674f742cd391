"""Questions that almost everybody can answer, each with three wrong answers, to see what unlearning broke by accident.

world.json is our own list: {"q", "stem", "right", "wrong"}, the answer being "stem right.".  Every third question is
for training (replay) and the others for measuring (world).  The list is in such an order that both parts hold every
topic from beginning to end, and that no country, animal or right answer of one part is asked about in the other.
"""

from __future__ import annotations

import json
from importlib import resources

from unremember.corpus import Example


def world() -> tuple[Example, ...]:
    """General knowledge for measuring only: two thirds of the list, "world/000" onwards, topics mixed."""
    return _examples("world", [row for i, row in enumerate(_rows()) if i % 3 != 2])


def replay() -> tuple[Example, ...]:
    """General knowledge for training only: the other third of the list, "replay/000" onwards, topics mixed."""
    return _examples("replay", _rows()[2::3])


def _rows() -> list[dict]:
    text = (resources.files("unremember.embedded") / "world.json").read_text(encoding="utf-8")
    return json.loads(text)


def _examples(part: str, rows: list[dict]) -> tuple[Example, ...]:
    return tuple(
        Example(
            id=f"{part}/{i:03}",
            prompt=row["q"],
            answer=f"{row['stem']} {row['right']}.",
            entity=part,
            spans=((len(row["stem"]) + 1, len(row["stem"]) + 1 + len(row["right"])),),
            distractors=tuple(f"{row['stem']} {wrong}." for wrong in row["wrong"]),
        )
        for i, row in enumerate(rows)
    )
