"""What a scan found, as sentences and as a page: how much, how sure, and against which chance level.

Everything is a pure function of the dictionary in scan.json.  The page quotes what is memorised; it needs no network, no script.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from unremember.errors import BadRequest
from unremember.folder import write_text
from unremember.report.html import number
from unremember.report.plots import COLOURS, PALE, SOFT, WIDTH, svg

FIRST = 100  # passages on the page; scan.json has all
ALIKE = 0.8  # windows of chance that are shorter than this share of the scanned ones, or longer than its inverse, are others
SCORES = {
    "run": "longest run of tokens predicted right",
    "match": "share of tokens that are the likeliest",
    "strength": "extraction strength",
    "probability": "mean log-probability a token",
    "min-k++": "Min-K%++",
    "zlib": "log-probability a byte of zlib",
    "reference": "mean log-probability above that of the control",
}


def several(n: int, what: str) -> str:
    """1 window, 2 windows."""
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def words(result: dict) -> str:
    """What was found, and how sure that is, in one paragraph."""
    windows, chance, settings = result["windows"], result["chance"], result["settings"]
    where = len({x["document"] for x in result["passages"] if x["forget"]})
    said = [x["said"] for x in result["passages"] if x["said"] is not None]
    alpha = settings["alpha"]
    found = f"{several(windows['found'], 'window')} of {windows['n']:,}"
    if not windows["found"]:
        return (
            f"Nothing was found: no window of {windows['n']:,} beats chance ({several(chance['windows'], 'window')}) at a false "
            f"discovery rate of {alpha:.0%}. With so much chance to compare with, "
            f"{several(chance['together at least'], 'window')} would have had to beat all of it together; less cannot be seen."
        )
    first = (
        f"{several(result['forget'], 'passage')} to forget, in {several(where, 'document')}."
        if result["forget"]
        else "No passage to forget."
    )
    if chance["kind"] == "holdout":
        sure = (
            f"{found} beat the windows of never-seen documents; at a false discovery rate of {alpha:.0%}, at most about "
            f"{several(round(alpha * windows['found']), 'window')} of these is expected to be chance."
        )
    else:
        sure = (
            f"{found} beat windows with shuffled words, which memorised text does, and common or predictable text does, too: "
            f"this is no error rate. To forget are the passages of which the model says {settings['says']:.0%} or more by itself."
        )
    whole = sum(s == 1 for s in said)
    spoken = (
        f" The model was asked for {several(len(said), 'passage')} and said {whole} of them word for word."
        if said
        else ""
    )
    return f"{first} {sure}{spoken}"


def cautions(result: dict) -> list[str]:
    """What a reader should know before believing it."""
    windows, chance, documents = result["windows"], result["chance"], result["documents"]
    out = []
    ratio = chance["tokens a window"] / windows["tokens a window"]
    if not ALIKE <= ratio <= 1 / ALIKE:
        out.append(
            f"Windows of chance have {chance['tokens a window']:.0f} tokens and scanned ones {windows['tokens a window']:.0f} "
            "(medians), so that they are not alike; choose documents as long, or a smaller window."
        )
    if windows["without a run"]:
        out.append(
            f"{several(windows['without a run'], 'window')} beat chance without a run of {result['settings']['least']} tokens "
            "predicted right, and made no passage."
        )
    if unasked := sum(x["said"] is None for x in result["passages"]):
        held = ", and is not in the forget set for that" if chance["kind"] == "shuffled" else ""
        out.append(f"The model was not asked for {several(unasked, 'passage')}, beyond the budget{held}.")
    if documents["short"]:
        out.append(
            f"{several(documents['short'], 'document')} shorter than the shortest run: nothing can be found there."
        )
    if documents["bad"]:
        out.append(
            f"{several(documents['bad'], 'problem')} with documents, which were left out: "
            + "; ".join(documents["problems"])
        )
    if documents["ignored"]:
        out.append(f"{several(documents['ignored'], 'file')} with other suffixes passed over.")
    out += [f"Left out of the forget set: {problem}" for problem in result["left out"]]
    return out


def levels(result: dict) -> str:
    """Share of windows that score at least so high: the scanned ones and chance."""
    left, bottom, height = 40, 36, 170
    share = np.linspace(1, 0, len(result["windows"]["quantiles"]))

    def draw(figure):
        ax = figure.add_axes(
            (left / WIDTH, bottom / height, (WIDTH - left - 8) / WIDTH, (height - bottom - 14) / height)
        )
        for kind, colour, name in (("chance", SOFT, "chance"), ("windows", COLOURS["remembered"], "scanned")):
            ax.plot(result[kind]["quantiles"], share, color=colour, linewidth=1.6, label=name)
        ax.set(ylim=(-0.03, 1.03), xlabel=SCORES[result["settings"]["score"]], ylabel="share of windows")
        ax.grid(color=PALE, linewidth=0.5)
        ax.set_axisbelow(True)
        ax.locator_params(axis="x", nbins=5)
        ax.legend(frameon=False, loc="upper right", fontsize=9)

    return svg("levels", "share of windows that score at least so high, scanned and chance", height, draw)


def marked(passage: dict) -> list[tuple[str, bool]]:
    """The text in pieces, with whether each one is a span."""
    pieces, at = [], 0
    for a, b in passage["spans"]:
        pieces += [(passage["text"][at:a], False), (passage["text"][a:b], True)]
        at = b
    return [piece for piece in (*pieces, (passage["text"][at:], False)) if piece[0]]


def page(result: dict) -> str:
    """The scan as one page."""
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as absent:
        raise BadRequest("the page needs jinja2; install unremember[report]") from absent

    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"number": number, "marked": marked, "several": several}
    cost: dict[str, Any] = result["cost"]
    template = files("unremember.report").joinpath("scan.html").read_text("utf-8")
    return env.from_string(template).render(
        result=result,
        words=words(result),
        cautions=cautions(result),
        score=SCORES[result["settings"]["score"]],
        passages=result["passages"][:FIRST],
        speed=cost["tokens"] / cost["seconds"] if cost["seconds"] else None,
        drawing=Markup(levels(result)),
    )


def write(result: dict, folder: Path) -> Path:
    """Write scan.html beside scan.json; returns its path."""
    path = folder / "scan.html"
    write_text(path, page(result))
    return path
