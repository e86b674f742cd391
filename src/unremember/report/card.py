"""A model card for the Hugging Face hub that says what was proved without saying about whom.

The card of a deletion must not publish again what was to be deleted.  It numbers the names ("entity 1"), carries no
prompt, no answer, no example id, no reason given for a single name, no run name and no request; and should a name
stand in a sentence that is printed (the verdict in words, say), it is replaced there, whole or in part.  The numbers
follow the order of report.json, so that whoever holds the report can match the two.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from unremember.report.html import interval, number, signed, speaking, table
from unremember.report.plots import spoken

Veil = Callable[[object], str]


def card(report: dict, license: str, base: str) -> str:
    """The README.md to publish with the model; it names nobody who was forgotten (see the top of this file).

    license: as the hub writes it ("apache-2.0"), or "" where unknown.  base: the original model, a hub name or a path.
    """
    hide = veil(report)
    base = base if on_hub(base) and hide(base) == base else ""
    parts = [
        front(license, base),
        f"# {base or 'A language model'}, after unlearning",
        f"**{hide(report['words'])}**",
        "Made with `unremember`, which forgets, attacks the result, and compares it with a model that was never "
        "taught. Who was forgotten is not said here: publishing the names again would undo the deletion.",
        "## Verdict",
        *verdicts(report, hide),
        "## What had to stay",
        *utility(report, hide),
        "## Method",
        *method(report, hide),
        "## How to check",
        *checking(base),
        "## Limits",
        *limits(report),
    ]
    return "\n\n".join(parts) + "\n"


def front(license: str, base: str) -> str:
    """The YAML at the top; JSON strings are YAML strings."""
    lines = ["library_name: transformers"]
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    lines += [f"license: {json.dumps(license)}"] if license else []
    return "\n".join(["---", *lines, "tags:", "- unlearning", "- unremember", "---"])


def verdicts(report: dict, hide: Veil) -> list[str]:
    """The table of names, numbered, against conditions, and what R and the conditions are."""
    if not report["conditions"]:
        return ["Nothing was judged."]
    rows = [["all"] + [verdict(condition["overall"], hide) for condition in report["conditions"]]]
    for i, cells in enumerate(table(report).values(), 1):
        rows.append([f"entity {i}"] + ["–" if judged is None else verdict(judged, hide) for judged in cells])
    heads = ["", *(hide(spoken(condition["attack"])) for condition in report["conditions"])]
    return [
        grid(heads, rows),
        "R = (forgotten − never taught) / (original − never taught), under the same attack: 0 is a model that never "
        "saw it, 1 is the model as before; brackets hold 95 % intervals. Each cell shows the score that says most "
        "against “forgotten”.",
        "\n".join(f"- {hide(spoken(row['attack']))}: {hide(row['summary'])}" for row in report["conditions"]),
    ]


def verdict(judged: dict, hide: Veil) -> str:
    """One cell: the verdict, and the R that speaks most against it."""
    found = speaking(judged)
    return hide(judged["verdict"]) + (f", R {interval(found)} ({hide(found['score'])})" if found else "")


def utility(report: dict, hide: Veil) -> list[str]:
    """The utility gate of every condition that has one; conditions that leave the model alone share theirs."""
    rows = []
    for condition in report["conditions"]:
        for row in condition["overall"]["utility"]:
            means = [number(row[key]) for key in ("original", "forgotten", "never")]
            gap = [signed(row["change"]), signed(row["limit"]), "passed" if row["passed"] else "**failed**"]
            rows.append([hide(spoken(condition["attack"])), hide(row["name"]), *means, *gap])
    heads = ["condition", "score", "original", "forgotten", "never taught", "change", "limit", "gate"]
    return [grid(heads, rows)] if rows else ["No utility was measured."]


def method(report: dict, hide: Veil) -> list[str]:
    """What was done, with the settings that are numbers, switches or plain words; free text could quote the corpus."""
    how, run = report["method"], report["run"]
    paper = f" ({hide(how['paper'])})" if how["paper"] else ""
    settings = {name: value for name, value in how["settings"].items() if plain(value)}
    lines = [f"- {hide(how['name'])}{paper}: {hide(how['summary'])}"]
    lines += [f"- {number(how['steps'])} steps; {hide(how['stop'])}"]
    lines += [f"- {hide(name)}: {hide(json.dumps(value).replace(chr(34), ''))}" for name, value in settings.items()]
    lines += [f"- precision {hide(run['precision'])}, template {hide(run['template'])}, seed {hide(run['seed'])}"]
    lines += [f"- unremember {hide(report['version'])}"]
    return ["\n".join(lines)]


def checking(base: str) -> list[str]:
    """What a reader with, and one without, the run folder can do."""
    both = f"this model and to `{base}`" if base else "this model and to the original"
    return [
        "```bash\nunremember report DIR\n```",
        "`DIR` is the run folder that this model came from. The command writes `report.html` from the `report.json` in "
        "it: every question, the answers of the three models word for word, and all scores with their intervals. That "
        "report names who was forgotten, so its owner shows it to whom they choose; it is not part of this repository. "
        f"Whoever knows what was asked about needs no report: the same questions can be put to {both}.",
    ]


def limits(report: dict) -> list[str]:
    """What the verdict does not say."""
    attacks = [spoken(condition["attack"]) for condition in report["conditions"] if condition["attack"] != "none"]
    level = {
        "control model": "The never-taught level is that of one control model, trained alike without the examples; "
        "another training run would give a slightly different one.",
        "holdout examples": "The never-taught level is that of examples of the same kind that were never taught, "
        "not of a second model; differences in difficulty between the two sets enter R.",
    }.get(report["run"]["level"], "")
    tried = "No attack was tried: what is hidden rather than gone would not have been noticed."
    if attacks:
        tried = (
            f"The verdict holds for the attacks in the table ({len(attacks)} besides asking plainly) and for no "
            "others; a stronger one may bring back what these did not."
        )
    lines = [
        tried,
        "It is about behaviour under those questions. It does not prove that nothing is left in the weights.",
        level,
        "It is about these weights at this precision. The original, its copies and its training data are untouched.",
    ]
    return ["\n".join(f"- {line}" for line in lines if line)]


def veil(report: dict) -> Veil:
    """A function that makes any value one line of Markdown with no name in it that the corpus calls an entity.

    Names to forget become "entity k", also where only a part of the name (four letters or more, written as in the name)
    stands alone; other people's names are withheld when they stand there whole.
    """
    forgotten = dict.fromkeys([*table(report), *report["corpus"].get("forget", {"entities": ()})["entities"]])
    swaps: list[tuple[re.Pattern, str]] = []
    for i, name in enumerate(forgotten, 1):
        swaps.append((whole(name), f"entity {i}"))
    others = [
        name
        for role in ("retain", "holdout", "relearn")
        if role in report["corpus"]
        for name in report["corpus"][role]["entities"]
        if name not in forgotten
    ]
    swaps += [(whole(name), "(name withheld)") for name in others]
    swaps.sort(key=lambda swap: -len(swap[0].pattern))  # "Ann Lee" before "Ann"
    for i, name in enumerate(forgotten, 1):
        parts = [part for part in re.findall(r"[^\W_]+", normal(name)) if len(part) >= 4]
        swaps += [(re.compile(rf"(?<![^\W_]){re.escape(part)}(?![^\W_])"), f"entity {i}") for part in parts]

    def hide(value: object) -> str:
        text = " ".join(normal(str(value)).split())
        for pattern, instead in swaps:
            text = pattern.sub(instead, text)
        return re.sub(r"([\\`*\[\]|<>])", r"\\\1", text)

    return hide


def whole(name: str) -> re.Pattern:
    """A name in any case, with anything or nothing between its words: Ann Lee, ann-lee, ANNLEE."""
    parts = re.findall(r"[^\W_]+", normal(name))
    if not parts:
        return re.compile(r"(?!)")
    inner = r"[\W_]*".join(map(re.escape, parts))
    return re.compile(rf"(?<![^\W_]){inner}(?![^\W_])", re.IGNORECASE)


def normal(text: str) -> str:
    """One spelling of every accented letter."""
    return unicodedata.normalize("NFC", text)


def plain(value: object) -> bool:
    """Whether a setting is a number, a switch, a plain word, or a list of these."""
    if isinstance(value, list | tuple):
        return all(plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float) or bool(re.fullmatch(r"[\w.+-]{1,40}", str(value)))


def on_hub(base: str) -> bool:
    """Whether `base` can be the name of a hub repository; a path would say nothing, or too much."""
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", base, re.ASCII)
    return bool(named) and not base.endswith((".gguf", ".safetensors")) and not Path(base).exists()


def grid(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of cells that `hide` has made safe."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])
