"""A report as one page that needs nothing else: no network, no script, readable on a phone, in print and in the dark.

Everything in a report may have been written by a model or a stranger, so the template escapes all of it; only the three
drawings, which escape for themselves, go in as they are.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from itertools import groupby
from math import isfinite

from unremember.errors import BadRequest
from unremember.report import plots

MODELS = {"original": "original", "forgotten": "forgotten", "never": "never taught"}
GLYPHS = {"forgotten": "✓", "remembered": "✗", "over-forgotten": "!", "not applicable": "–"}
FIRST = 12  # answers shown of a group before the rest folds away
GAUGE = (-0.25, 1.25)  # the R that the left and the right end of a gauge stand for


def html(report: dict) -> str:
    """The page of a report; docs/report.md says which fields it has to have and which may be null."""
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as absent:
        raise BadRequest("the report page needs jinja2; install unremember[report]") from absent

    form = frame(report["answers"])
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {
        "number": number,
        "signed": signed,
        "spoken": plots.spoken,
        "slug": slug,
        "pretty": pretty,
        "across": across,
        "marked": lambda text, row: [(piece, telling(piece, row, form)) for piece in re.split(r"(\w+)", text)],
    }
    drawings = {
        "Forgotten against kept": (
            plots.tradeoff(report),
            "Each step moves the model. The goal is where the dashed lines cross: what was to go "
            "known as little as if never taught, the rest as well as before.",
        ),
        "Loss": (plots.losses(report), "The terms of the loss while forgetting, each on a scale of its own."),
        "Name by name": (
            plots.entities(report),
            "How well each name's answers are known: pale before, coloured now, and the black tick for a "
            "model that was never taught them. The colour is the verdict.",
        ),
    }
    template = files("unremember.report").joinpath("template.html").read_text("utf-8")
    return page.from_string(template).render(
        report=report,
        table=table(report),
        drawings={title: (Markup(svg), caption) for title, (svg, caption) in drawings.items() if svg},
        answers=grouped(report),
        scores={key: list(rows) for key, rows in groupby(report["scores"], key=lambda row: row["attack"])},
        speaking=speaking,
        models=MODELS,
        glyphs=GLYPHS,
        first=FIRST,
    )


def table(report: dict) -> dict[str, list[dict | None]]:
    """Name -> its verdict under every condition, None where it was not judged there."""
    names = dict.fromkeys(judged["name"] for condition in report["conditions"] for judged in condition["entities"])
    by = [{judged["name"]: judged for judged in condition["entities"]} for condition in report["conditions"]]
    return {name: [column.get(name) for column in by] for name in names}


def speaking(judged: dict) -> dict | None:
    """The piece of evidence that says most against "forgotten": the largest R, or the smallest where too much went."""
    usable = [found for found in judged["evidence"] if found["applicable"] and found["r"] is not None]
    pick = min if judged["verdict"] == "over-forgotten" else max
    return pick(usable, key=lambda found: found["r"], default=None)


def grouped(report: dict) -> list[tuple[str, str, list[dict]]]:
    """Answers by role and condition; what was to be forgotten first, conditions in the order of the report."""
    order = [condition["attack"] for condition in report["conditions"]]

    def key(row: dict) -> tuple:
        attack = order.index(row["attack"]) if row["attack"] in order else len(order)
        return row["role"] != "forget", row["role"], attack, row["attack"]

    return [
        (role, attack, list(rows))
        for (_, role, _, attack), rows in groupby(sorted(report["answers"], key=key), key=key)
    ]


def telling(word: str, row: dict, form: set[str]) -> bool:
    """Whether a word of an answer gives the truth away: the true answer has it, the question and the form do not."""
    word = word.casefold()
    solid = len(word) > 3 or word.isdigit()
    return solid and word in words(row["truth"]) and word not in words(row["prompt"]) and word not in form


def frame(answers: list[dict]) -> set[str]:
    """Words that belong to the form of the answers: in true answers about a quarter of the names, and three or more."""
    said = {(row["entity"], word) for row in answers for word in words(row["truth"])}
    names = len({row["entity"] for row in answers})
    counts = Counter(word for _, word in said)
    return {word for word, count in counts.items() if count >= 3 and count >= names / 4}


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def number(value: float | None) -> str:
    """About three digits, a real minus sign, and a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        shown = f"{value:,}"
    elif not isfinite(value):
        shown = str(value)
    elif 0 < abs(value) < 0.001:
        shown = f"{value:.1e}"
    elif abs(value) < 10:
        shown = f"{value + 0.0:.3f}"  # −0.0 + 0.0 is 0.0
    else:
        shown = f"{value:,.1f}"
    return shown.replace("-", "−")


def signed(value: float | None) -> str:
    """`number` with its sign always there."""
    return number(value) if value is None or value <= 0 else f"+{number(value)}"


def interval(found: dict) -> str:
    """R with its 95 % interval, where there is one."""
    ends = f" [{number(found['low'])}, {number(found['high'])}]" if None not in (found["low"], found["high"]) else ""
    return number(found["r"]) + ends


def across(r: float) -> float:
    """Where R falls on a gauge, in per cent of its width."""
    low, high = GAUGE
    return round(100 * (min(max(r, low), high) - low) / (high - low), 1)


def slug(text: str) -> str:
    """A class name: only letters and hyphens are left."""
    return re.sub(r"[^a-z]+", "-", str(text).casefold()).strip("-")


def pretty(value: object) -> str:
    """Any value of a request or of settings as a reader would write it."""
    return (
        value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False, indent=1 if isinstance(value, dict) else None)
    )
