"""Where one fact sits, as drawings and a page: the map of what brings it back, what each layer would say, who writes it.

Everything is a pure function of plain dictionaries with the fields of a FactMap (`dataclasses.asdict`): of one model, or two, as
it was and after unlearning.  The page needs nothing else: no network, no script.
"""

from __future__ import annotations

import json
from importlib.resources import files
from math import exp, log
from pathlib import Path
from typing import Any

from unremember.errors import BadRequest
from unremember.folder import write_text
from unremember.report.html import number
from unremember.report.plots import COLOURS, INK, PALE, SOFT, WIDTH, axes, short, svg

SCHEMA = "unremember.fact/1"
BEFORE, AFTER = COLOURS["remembered"], COLOURS["forgotten"]
MLP, ATTENTION = "#009e73", "#cc79a7"  # Okabe and Ito, as the verdicts' colours
CELL = 8.0  # points a row of the map is high, where there are many
TITLES = {
    "residual": "one layer's whole state put back",
    "mlp": "MLPs of {window} layers put back",
    "attention": "attentions of {window} layers put back",
    "residual, mlp severed": "whole state back, later MLPs held",
    "residual, attention severed": "whole state back, attentions held",
}


def heat(fact: dict, kind: str) -> str:
    """The map of one kind of state: words from left to right, layers from the bottom up, dark = it brings the answer back."""
    cells = fact["effects"][kind]
    rows, columns = len(cells), len(cells[0])
    cell = min(18.0, max(CELL, 190 / rows))
    words = [short(word, 16) for word in fact["words"]]
    bottom, top, left, right = 28 + 5.2 * max(map(len, words)), 40, 46, 14
    height = rows * cell + bottom + top
    best = max((cells[r][c], r, c) for r in range(rows) for c in range(columns))

    def draw(figure):
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.patches import Rectangle

        ax = axes(figure, height, left=left, bottom=bottom, top=top, right=right)
        shades = LinearSegmentedColormap.from_list("share", ["#f4f6f8", "#9ecae8", AFTER, "#08306b"])
        ax.pcolormesh(cells, cmap=shades, vmin=0, vmax=1, edgecolors="white", linewidth=0.4)
        ax.add_patch(Rectangle((best[2], best[1]), 1, 1, fill=False, edgecolor=BEFORE, linewidth=1.6, zorder=4))
        ax.set(xlim=(0, columns), ylim=(0, rows))
        if 0 < fact["asked"] < columns:  # the same name may stand on either side
            ax.axvline(fact["asked"], color=SOFT, linewidth=1.2, dashes=(3, 2), ymin=-0.02, ymax=1.0, clip_on=False)
            for at, side in ((fact["asked"] / 2, "question"), ((fact["asked"] + columns) / 2, "answer")):
                figure.text(
                    (left + at / columns * (WIDTH - left - right)) / WIDTH, 4 / height, side, color=SOFT, ha="center"
                )
        ax.set_xticks([c + 0.5 for c in range(columns)], words, rotation=90)
        for label, named in zip(ax.get_xticklabels(), fact["subject"], strict=True):
            label.set(color=BEFORE if named else INK, fontweight="bold" if named else "normal")
        step = 1 if rows <= 12 else 5
        ax.set_yticks([r + 0.5 for r in range(0, rows, step)], [str(r) for r in range(0, rows, step)])
        ax.tick_params(length=0)
        ax.set_ylabel("layer")
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        title = TITLES[kind].format(window=fact["window"])
        figure.text(left / WIDTH, 1 - 13 / height, title, fontsize=10, fontweight="bold", va="center")
        part = "the question's" if best[2] < fact["asked"] else "the answer's"
        where = f"most: {best[0]:.0%} at {part} “{words[best[2]]}”, layer {best[1]}"
        figure.text(left / WIDTH, 1 - 29 / height, where, fontsize=9, color=BEFORE, va="center")
        scale = figure.add_axes((1 - 100 / WIDTH, 1 - 17 / height, 40 / WIDTH, 7 / height))
        scale.pcolormesh([[i / 20 for i in range(21)]], cmap=shades, vmin=0, vmax=1)
        scale.set_axis_off()
        for x, text, side in ((-104, "0", "right"), (-57, "≥ 100 %", "left")):
            figure.text(1 + x / WIDTH, 1 - 13 / height, text, fontsize=9, color=SOFT, ha=side, va="center")

    return svg(
        f"heat {kind}", f"what brings the answer back: {TITLES[kind].format(window=fact['window'])}", height, draw
    )


def seen(before: dict, after: dict | None = None) -> str:
    """The lens: the secret's rank and probability layer by layer, geometric means over its tokens, before and after."""
    height = 290

    def draw(figure):
        alone = short(before["model"] or "model", 28)
        sides: list[tuple[dict, str, str, Any]] = [(before, BEFORE, "before" if after else alone, "-")]
        sides += [(after, AFTER, "after", (0, (4, 1.5)))] if after else []
        upper = axes(figure, height, left=52, bottom=160, top=28, right=12)
        lower = axes(figure, height, left=52, bottom=36, top=158, right=12)
        worst = 1.0
        for fact, colour, label, dash in sides:
            ranks = [exp(sum(map(log, line)) / len(line)) for line in fact["rank"]]
            odds = [exp(sum(log(max(p, 1e-30)) for p in line) / len(line)) for line in fact["probability"]]
            worst = max(worst, *ranks)
            upper.plot(range(len(ranks)), ranks, color=colour, linewidth=1.8, linestyle=dash, label=label)
            lower.plot(range(len(odds)), odds, color=colour, linewidth=1.8, linestyle=dash)
        upper.set_yscale("log")
        upper.set_ylim(worst * 1.6, 0.75)
        ticks = [t for t in (1, 10, 100, 1_000, 10_000, 100_000) if t <= worst * 1.6]
        upper.set_yticks(ticks, [f"{t:,}" for t in ticks])
        upper.yaxis.minorticks_off()
        upper.tick_params(labelbottom=False)
        upper.set_ylabel("rank (1 = said)")
        lower.set_ylim(-0.03, 1.03)
        lower.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        lower.set_ylabel("probability")
        lower.set_xlabel("after this many layers")
        last = len(before["rank"]) - 1
        for ax in (upper, lower):
            ax.set_xlim(-0.3, last + 0.3)
            step = 1 if last <= 12 else 5
            ax.set_xticks(range(0, last + 1, step))
            ax.grid(color=PALE, linewidth=0.5)
            ax.set_axisbelow(True)
        figure.legend(loc="upper center", ncols=2)

    return svg("lens", "rank and probability of the secret by layer", height, draw)


def written(before: dict, after: dict | None = None) -> str:
    """Attribution: what each layer's attention and MLP add to the secret's logit by themselves, mean over its tokens."""
    sides = [(before, "before" if after else "")] + ([(after, "after")] if after else [])
    each, top, bottom = 118, 30, 34
    height = each * len(sides) + top + bottom - 8
    means = [
        {kind: [sum(line) / len(line) for line in fact[kind]] for kind in ("attention", "mlp")} for fact, _ in sides
    ]
    ends = [v for side in means for line in side.values() for v in line]

    def draw(figure):
        from matplotlib.patches import Patch

        for i, ((fact, label), mean) in enumerate(zip(sides, means, strict=True)):
            under = bottom + each * (len(sides) - 1 - i)
            ax = axes(figure, height, left=46, bottom=under, top=height - under - each + 14, right=12)
            blocks = len(fact["mlp"])
            for kind, colour, off in (("attention", ATTENTION, -0.21), ("mlp", MLP, 0.21)):
                ax.bar([b + off for b in range(blocks)], mean[kind], width=0.42, color=colour)
            ax.axhline(0, color=SOFT, linewidth=0.6)
            pad = 0.06 * (max(ends) - min(ends) or 1)
            ax.set(xlim=(-0.7, blocks - 0.3), ylim=(min(0, *ends) - pad, max(0, *ends) + pad))
            step = 1 if blocks <= 12 else 5
            ax.set_xticks(range(0, blocks, step))
            ax.yaxis.grid(True, color=PALE, linewidth=0.5)
            ax.set_axisbelow(True)
            ax.set_ylabel("added logit")
            ax.tick_params(labelbottom=i == len(sides) - 1)
            if label:
                ax.set_title(label, fontsize=9, fontweight="bold", loc="left", pad=2, color=(BEFORE, AFTER)[i])
            if i == len(sides) - 1:
                ax.set_xlabel("layer")
        handles = [Patch(color=ATTENTION, label="attention"), Patch(color=MLP, label="MLP")]
        figure.legend(handles=handles, loc="upper center", ncols=2, handlelength=1.2)

    return svg("written", "what each layer adds to the secret's logit", height, draw)


def page(before: dict, after: dict | None = None) -> str:
    """The page of a fact, of one model or of two."""
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as absent:
        raise BadRequest("the page of a fact needs jinja2; install unremember[report]") from absent

    maps = {"before" if after else "": before} | ({"after": after} if after else {})
    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"number": number}
    template = files("unremember.report").joinpath("map.html").read_text("utf-8")
    return made.from_string(template).render(
        fact=before,
        after=after,
        maps=maps,
        heats={label: {kind: Markup(heat(fact, kind)) for kind in fact["effects"]} for label, fact in maps.items()},
        seen=Markup(seen(before, after)),
        written=Markup(written(before, after)),
        first={label: first(fact) for label, fact in maps.items()},
    )


def first(fact: dict) -> int | None:
    """The first level from which every secret token stays at rank 1, None where none does."""
    from_here = None
    for level, line in reversed(list(enumerate(fact["rank"]))):
        if max(line) > 1:
            break
        from_here = level
    return from_here


def write(before: dict, after: dict | None, folder: Path) -> Path:
    """fact.json, then fact.html, each atomically; returns the page."""
    whole = {"schema": SCHEMA, "before": before, "after": after}
    write_text(folder / "fact.json", json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    path = folder / "fact.html"
    write_text(path, page(before, after))
    return path
