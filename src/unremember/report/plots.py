"""Three drawings of a report, each a pure function `report -> SVG text`, empty where there is nothing to draw.

The colour of a mark is always the verdict that was reached there, from Okabe and Ito's palette, which colour-blind
readers can tell apart.  Figures are 344 points wide, about a phone: their type is as high there as it says here.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

from unremember.errors import BadRequest

COLOURS = {"forgotten": "#0072b2", "remembered": "#d55e00", "over-forgotten": "#e69f00", "not applicable": "#8b929a"}
INK, SOFT, PALE = "#20262d", "#66707a", "#dfe4e8"
DARK = COLOURS | {"over-forgotten": "#9a6700", "not applicable": SOFT}  # for type, which needs more contrast than a bar
WIDTH = 344  # points
ENTITIES = 20  # more rows than this nobody reads as a drawing; the table of the report has them all

STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, and set in the page's own type
    "text.parse_math": False,  # a name such as "$x" is a name
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def tradeoff(report: dict) -> str:
    """What was to go (x) against what was to stay (y): original, forgotten, never-taught, and the path between them."""
    name = leading(report)
    gone, kept = (score(report, "none", name, role) for role in ("forget", "retain"))
    curve = [row for row in report["curve"] if row["forget"] is not None and row["retain"] is not None]
    at = {model: (gone[model], kept[model]) for model in ("original", "forgotten", "never")}
    points = {model: xy for model, xy in at.items() if None not in xy}
    level = gone["never"] if gone["never"] is not None else (curve[-1]["level"] if curve else None)
    if not points and not curve:
        return ""

    def draw(figure):
        ax = axes(figure, 300, left=44, bottom=42, top=34, right=10)
        everything = [value for xy in points.values() for value in xy] + [
            row[k] for row in curve for k in ("forget", "retain")
        ]
        if all(0 <= value <= 1 for value in everything):
            ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
            ticks = (0, 0.25, 0.5, 0.75, 1)
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.grid(color=PALE, linewidth=0.5)
        ax.set_axisbelow(True)
        # the goal is where these two cross: known as little as if never taught, the rest known as well as before
        if level is not None:
            ax.axvline(level, color=INK, linewidth=0.8, dashes=(3, 3))
        if "original" in points:
            ax.axhline(points["original"][1], color=SOFT, linewidth=0.8, dashes=(3, 3))
        if curve:
            path = [(row["forget"], row["retain"]) for row in curve]
            colour = COLOURS.get(verdict(report), SOFT)
            ax.plot(
                *zip(*path, strict=True),
                color=colour,
                linewidth=1.4,
                alpha=0.55,
                marker="o",
                markersize=2.6,
                zorder=3,
                label=f"path, {curve[-1]['step']} steps",
            )
        marks = {
            "original": {"marker": "s", "color": SOFT, "markersize": 8, "label": "original"},
            "forgotten": {
                "marker": "o",
                "color": COLOURS.get(verdict(report), SOFT),
                "markersize": 9,
                "label": "forgotten",
            },
            "never": dict(
                marker="D", color=INK, markersize=10, markerfacecolor="none", markeredgewidth=1.4, label="never taught"
            ),
        }
        for model, xy in points.items():
            ax.plot(*xy, linestyle="none", zorder=4, **marks[model])
        ax.set_xlabel(f"{short(name)} of what was to go  (left: gone)")
        ax.set_ylabel(f"{short(name)} of what was to stay  (up: kept)")
        handles, labels = ax.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: labels[i].startswith("path"))
        figure.legend(
            [handles[i] for i in order],
            [labels[i] for i in order],
            loc="upper center",
            ncols=4,
            handletextpad=0.6,
            columnspacing=1.0,
            handlelength=1.0,
        )

    return svg("tradeoff", f"{short(name)} of what was to go against {short(name)} of what was to stay", 300, draw)


def entities(report: dict) -> str:
    """One bar a name and condition: how well it was known, how well it is known now, and the never-taught level."""
    name = leading(report)
    rows: dict[str, list[tuple[str, str, dict]]] = {}
    for condition in report["conditions"]:
        for judged in condition["entities"]:
            found = evidence(judged, name)
            if found is not None:
                rows.setdefault(judged["name"], []).append((condition["attack"], judged["verdict"], found))
    total = len(rows)
    worst = sorted(rows, key=lambda entity: -max(found["r"] or 0 for *_, found in rows[entity]))[:ENTITIES]
    rows = {entity: bars for entity, bars in rows.items() if entity in worst}
    if not rows:
        return ""
    line, head, gap, top, bottom = 15, 17, 7, 52, 36
    inner = sum(head + gap + line * len(bars) for bars in rows.values())
    height = inner + top + bottom
    seen = [judged for bars in rows.values() for _, judged, _ in bars]
    values = [found[k] for bars in rows.values() for *_, found in bars for k in ("original", "forgotten", "never")]
    ends = [value for value in values if value is not None] or [1.0]
    left, right = min(0.0, *ends), max(ends)
    right = 1.0 if 0.5 < right <= 1 else right or 1.0

    def draw(figure):
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        ax = axes(figure, height, left=76, bottom=bottom, top=top, right=38)
        ax.set(xlim=(left, right), ylim=(inner, 0))
        ax.spines["left"].set_visible(False)
        ax.set_yticks([])
        ax.xaxis.grid(True, color=PALE, linewidth=0.5)
        ax.set_axisbelow(True)
        y = 0.0
        for entity, bars in rows.items():
            y += gap
            ax.annotate(
                short(entity),
                (0, y + head / 2),
                xycoords=("axes fraction", "data"),
                xytext=(-70, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
                fontweight="bold",
                annotation_clip=False,
            )
            y += head
            for attack, judged, found in bars:
                middle, colour = y + line / 2, COLOURS.get(judged, SOFT)
                ax.barh(middle, (found["original"] or 0) - left, left=left, height=line - 4, color=PALE, zorder=2)
                ax.barh(middle, (found["forgotten"] or 0) - left, left=left, height=line - 9, color=colour, zorder=3)
                if found["never"] is not None:
                    ax.plot(
                        [found["never"]] * 2,
                        [middle - 6, middle + 6],
                        color=INK,
                        linewidth=1.6,
                        zorder=4,
                        clip_on=False,
                    )
                ax.annotate(
                    spoken(attack, 13),
                    (0, middle),
                    xycoords=("axes fraction", "data"),
                    xytext=(-6, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    fontsize=9,
                    color=SOFT,
                )
                if found["forgotten"] is not None:
                    ax.annotate(
                        f"{found['forgotten']:.2f}",
                        (1, middle),
                        xycoords=("axes fraction", "data"),
                        xytext=(34, 0),
                        textcoords="offset points",
                        ha="right",
                        va="center",
                        fontsize=9,
                        color=DARK.get(judged, SOFT),
                        fontweight="bold",
                    )
                y += line
        ax.set_xlabel(
            short(name) if total == len(rows) else f"{short(name)}  (the {len(rows)} of {total} best remembered)"
        )
        handles = [
            Patch(color=PALE, label="original"),
            Line2D(
                [], [], color=INK, marker="|", linestyle="none", markersize=9, markeredgewidth=1.6, label="never taught"
            ),
        ]
        handles += [Patch(color=colour, label=f"now: {judged}") for judged, colour in COLOURS.items() if judged in seen]
        figure.legend(
            handles=handles, loc="upper center", ncols=3, handletextpad=0.5, columnspacing=1.0, handlelength=1.2
        )

    return svg("entities", f"{short(name)} of each name, before, now and under attack", height, draw)


def losses(report: dict) -> str:
    """Every term of the loss over the steps, a panel each, because their scales have nothing to do with one another."""
    terms: dict[str, list[tuple[float, float]]] = {}
    for row in report["training"]:
        for name, value in row["terms"].items():
            if value is not None:
                terms.setdefault(name, []).append((row["step"], value))
    if not terms:
        return ""
    columns = min(2, len(terms))
    lines = -(-len(terms) // columns)
    each = 128
    height = each * lines + 18

    def draw(figure):
        from matplotlib.ticker import MaxNLocator

        wide = WIDTH / columns
        for i, (name, curve) in enumerate(terms.items()):
            column, row = i % columns, i // columns
            left, bottom = column * wide + 40, height - (row + 1) * each + 8
            ax = figure.add_axes((left / WIDTH, bottom / height, (wide - 52) / WIDTH, (each - 34) / height))
            ax.plot(
                *zip(*curve, strict=True),
                color=COLOURS["forgotten"],
                linewidth=1.5,
                marker="o" if len(curve) < 3 else None,
                markersize=4,
            )
            ax.set_title(short(name), fontsize=9, fontweight="bold", loc="left", pad=5)
            ax.yaxis.set_major_locator(MaxNLocator(4))
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            ax.grid(color=PALE, linewidth=0.5)
            ax.margins(x=0.02, y=0.1)
        figure.text(0.5, 3 / height, "step", ha="center", va="bottom", color=SOFT)

    return svg("losses", "the terms of the loss over the steps", height, draw)


# what the drawings and the page look up in a report


def leading(report: dict) -> str:
    """The score that stands for the others in a drawing: "probability", or else the first there is evidence on."""
    names = [found["score"] for condition in report["conditions"] for found in condition["overall"]["evidence"]]
    return "probability" if "probability" in names or not names else names[0]


def evidence(judged: dict, name: str) -> dict | None:
    """The triple of one score behind a verdict."""
    return next((found for found in judged["evidence"] if found["score"] == name), None)


def score(report: dict, attack: str, name: str, role: str) -> dict[str, float | None]:
    """The three models' means of one score; None where a model has none."""
    for row in report["scores"]:
        if (row["attack"], row["name"], row["role"]) == (attack, name, role):
            return {model: row[model]["mean"] if row[model] else None for model in ("original", "forgotten", "never")}
    return {"original": None, "forgotten": None, "never": None}


def verdict(report: dict) -> str:
    """The verdict over all names with no attack; "" where nothing was judged."""
    return report["conditions"][0]["overall"]["verdict"] if report["conditions"] else ""


def spoken(attack: str, limit: int = 60) -> str:
    """The name of a condition as a reader says it."""
    return "no attack" if attack == "none" else short(attack, limit)


def short(text: str, limit: int = 40) -> str:
    """One printable line of at most `limit` characters."""
    line = "".join(c for c in " ".join(str(text).split()) if c.isprintable())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


# matplotlib


def axes(figure, height: float, *, left: float, bottom: float, top: float, right: float):
    """The one set of axes of a figure, with its margins in points."""
    across, up = (WIDTH - left - right) / WIDTH, (height - bottom - top) / height
    return figure.add_axes((left / WIDTH, bottom / height, across, up))


def svg(key: str, label: str, height: float, draw: Callable) -> str:
    """Run `draw` on a fresh figure and give it as bare <svg>, the same text every time, fit to be inlined in a page."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as absent:
        raise BadRequest("plots need matplotlib; install unremember[report]") from absent
    from xml.sax.saxutils import quoteattr

    out = io.StringIO()
    # the salt differs per drawing: ids are hashes of content and salt, and several drawings share a page
    settings: Any = STYLE | {"svg.hashsalt": f"unremember {key}"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # DejaVu lacks a name's script: the reader's browser will not
        figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="none")
        draw(figure)
        for ax in figure.axes:
            ax.set_facecolor("none")
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r'<g id="[\w.]+_\d+">', "<g>", text)  # axes_1 …: never referred to, not unique in a page
    text = re.sub(r"<style.*?</style>", "", text, count=1, flags=re.DOTALL)  # "*{…}" would reach the page around it
    opening = f'<svg role="img" aria-label={quoteattr(label)} stroke-linejoin="round" stroke-linecap="butt"'
    return text.replace("<svg", opening, 1)
