"""A comparison of methods as a page, a table and drawings: what each keeps on its way to the never-taught level.

Everything is a pure function of the dictionary in compare.json.  The page needs nothing else: no network, no script.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from csv import writer
from importlib.resources import files
from statistics import mean
from typing import Any

from unremember.errors import BadRequest
from unremember.report.html import number, slug
from unremember.report.plots import COLOURS, INK, PALE, SOFT, WIDTH, short, svg
from unremember.score import WORDS

COLUMNS = 3  # panels side by side, on a figure as wide as three of the report's
REACHED, NOT = COLOURS["forgotten"], COLOURS["remembered"]


def methods(result: dict) -> dict[str, list[dict]]:
    """Method -> its rows, one a seed; those that kept most come first, those that failed or stopped short last."""
    found: dict[str, list[dict]] = {}
    for row in result["rows"]:
        found.setdefault(row["method"], []).append(row)

    def order(name: str) -> tuple:
        rows = [r for r in found[name] if not r["failed"]]
        reached = sum(r["reached"] for r in rows)
        return -reached, -mean(score(r) for r in rows) if rows else 0.0, name

    return {name: found[name] for name in sorted(found, key=order)}


def score(row: dict) -> float:
    """Share of what should have stayed that is there: the smaller of retained facts and world knowledge."""
    world = row["world"] / row["world before"] if row["world"] is not None and row["world before"] else 1.0
    return min(row["kept"] if row["kept"] is not None else 1.0, world)


def lines(result: dict) -> list[dict]:
    """One line a method: means over its seeds, with the lowest and highest where there are several."""
    out = []
    for name, rows in methods(result).items():
        good = [r for r in rows if not r["failed"]]
        line: dict[str, Any] = {
            "method": name,
            "seeds": len(rows),
            "failed": sorted({r["failed"] for r in rows if r["failed"]}),
        }
        if good:
            line |= {
                "reached": sum(r["reached"] for r in good),
                "verdicts": attacked(good, "verdicts"),
                "reasons": attacked(good, "reasons"),
                "settings": good[0]["settings"],
                **{
                    key: spread([r[key] for r in good])
                    for key in ("kept", "said", "leaked", "world", "prose", "steps", "seconds", "peak bytes")
                },
                "back": {a: spread(found) for a, found in attacked(good, "r").items()},
                **{
                    f"kept at {r}": spread([x["at"][r]["kept"] for x in good if x["at"][r]])
                    for r in ("0.5", "0.25", "0.1")
                },
            }
        out.append(line)
    return out


def attacked(rows: Sequence[dict], key: str) -> dict[str, list]:
    """Attack -> what the rows say under it; a row that was not put to it says nothing."""
    return {a: [r[key][a] for r in rows if a in r[key]] for a in dict.fromkeys(a for r in rows for a in r[key])}


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, lowest and highest of the numbers there are."""
    there = [float(v) for v in values if v is not None]
    return {"mean": mean(there), "low": min(there), "high": max(there), "n": len(there)} if there else None


CSV = (
    "method", "seed", "failed", "reached", "steps", "kept", "said", "leaked", "world", "prose", "seconds", "peak bytes", "stop",
)  # fmt: skip


def csv(result: dict) -> str:
    """One row a method and seed; the same numbers as compare.json, without its curves."""
    out = io.StringIO()
    table = writer(out, lineterminator="\n")
    attacks = sorted({a for row in result["rows"] for a in row.get("verdicts", ())})
    heads = [*(f"verdict {a}" for a in attacks), *(f"R {a}" for a in attacks)]
    table.writerow([*CSV, *heads, *(f"kept at R {r}" for r in ("0.5", "0.25", "0.1"))])
    for row in result["rows"]:
        verdicts = [row.get("verdicts", {}).get(a, "") for a in attacks]
        back = ["" if (r := row.get("r", {}).get(a)) is None else r for a in attacks]
        at = [(row.get("at", {}).get(r) or {}).get("kept", "") for r in ("0.5", "0.25", "0.1")]
        table.writerow([*("" if (v := row.get(key, "")) is None else v for key in CSV), *verdicts, *back, *at])
    return out.getvalue()


def markdown(result: dict) -> str:
    """The table of the page, for a README: a line a method, mean over its seeds (lowest to highest).

    All attacks are one column, where a seed has the worst that was said of it, and one for what brings most back.
    """
    heads = [
        "method", "level", "unattacked", "attacked", "most back, R", "facts kept", "world", "prose, nats", "still said", "steps",
        "seconds", "peak GB",
    ]  # fmt: skip
    rows = [heads, ["---"] * len(heads)]
    most = {x["method"]: x for x in withstood(result)}
    seeds = methods(result)
    for line in lines(result):
        name = line["method"]
        if "reached" not in line:
            why = " ".join("; ".join(line["failed"]).split()).replace("|", "\\|")
            rows.append([f"`{name}`", f"failed: {why}"] + [""] * (len(heads) - 2))
            continue
        words = [", ".join(counted(line["verdicts"].get("none", []))) or "–"]
        words.append(", ".join(counted([x for row in seeds[name] if (x := under_attack(row))])) or "–")
        words.append(back(most.get(name)))
        numbers = [
            ranged(line["kept"]),
            ranged(line["world"]),
            ranged(line["prose"], "{:+.2f}"),
            ranged(line["leaked"]),
        ]
        costs = [
            ranged(line["steps"], "{:.0f}"),
            ranged(line["seconds"], "{:.0f}"),
            ranged(line["peak bytes"], "{:.1f}", 1e-9),
        ]
        rows.append([f"`{name}`", f"{line['reached']} of {line['seeds']}", *words, *numbers, *costs])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def back(found: dict | None) -> str:
    """What brings most back, and how much; one of `withstood`."""
    if found is None:
        return "–"
    attack = "unattacked" if found["worst"] == "none" else found["worst"]
    shown = f"{attack} " + f"{found['most']:.2f}".replace("-", "−")
    return shown + f" (of {found['few']})" * (found["few"] > 0)


def under_attack(row: dict) -> str:
    """The worst verdict under any attack; empty where there was none."""
    words = {word for attack, word in row.get("verdicts", {}).items() if attack != "none"}
    return next((word for word in WORDS if word in words), "")


def counted(words: Sequence[str]) -> list[str]:
    """Each word once, with how often it came where there are several."""
    once = dict.fromkeys(words)
    return [word if len(once) == 1 else f"{words.count(word)} {word}" for word in once]


def paths(result: dict, key: str = "kept") -> str:
    """A panel a method: forgetting (to the right) against what was kept, a line a seed; every other method in grey behind."""
    rows = {name: [r for r in found if not r["failed"] and r["curve"]] for name, found in methods(result).items()}
    rows = {name: found for name, found in rows.items() if any(p[key] is not None for r in found for p in r["curve"])}
    if not rows:
        return ""
    each, wide = 118, WIDTH / COLUMNS
    height = each * -(-len(rows) // COLUMNS) + 26

    def track(row: dict) -> list[tuple[float, float]]:
        first = row["curve"][0][key] or 1.0
        scale = first if key == "world" else 1.0
        return [(1 - min(max(p["r"], -0.1), 1.1), p[key] / scale) for p in row["curve"] if p[key] is not None]

    def draw(figure):
        for i, (name, found) in enumerate(rows.items()):
            left, bottom = (i % COLUMNS) * wide + 24, height - (i // COLUMNS + 1) * each + 14
            ax = figure.add_axes((left / WIDTH, bottom / height, (wide - 32) / WIDTH, (each - 36) / height))
            for other in (r for n, group in rows.items() if n != name for r in group):
                ax.plot(*zip(*track(other), strict=True), color=SOFT, alpha=0.35, linewidth=0.6, zorder=1)
            for row in found:
                colour = REACHED if row["reached"] else NOT
                ax.plot(*zip(*track(row), strict=True), color=colour, linewidth=1.2, marker="o", markersize=2, zorder=3)
                ax.plot(*track(row)[-1], color=colour, marker="o", markersize=5, zorder=4)
            ax.axvline(1, color=SOFT, linewidth=0.6, dashes=(3, 3), zorder=0)
            ax.set(xlim=(-0.05, 1.15), ylim=(-0.05, 1.1))
            ax.set_xticks([0, 0.5, 1], ["0", "½", "1"])
            ax.set_yticks([0, 0.5, 1], ["0", "½", "1"] if i % COLUMNS == 0 else [])
            ax.set_title(short(name, 18), fontsize=9, fontweight="bold", loc="left", pad=3, color=INK)
        kept = "retained facts" if key == "kept" else "world questions"
        figure.text(
            0.5, 3 / height, f"right: forgotten, up: {kept} kept", ha="center", va="bottom", color=SOFT, fontsize=9
        )

    return svg(f"paths {key}", f"forgetting against {key}, a panel a method", height, draw)


def ends(result: dict) -> str:
    """A line a method, at the never-taught level: retained facts and world knowledge kept, rise of prose loss, seconds."""
    rows = [line for line in lines(result) if line.get("kept") or line.get("world")]
    if not rows:
        return ""
    step, top, bottom = 17, 24, 36
    height = step * len(rows) + top + bottom
    before = mean(r["world before"] for r in result["rows"] if r.get("world before")) or 1.0
    panels = (
        ("kept", "facts kept", 1.0, (0, 1.1)),
        ("world", "world kept", before, (0, 1.1)),
        ("prose", "prose nats", 1.0, None),
        ("seconds", "seconds", 1.0, None),
    )

    def draw(figure):
        label = 76
        wide = (WIDTH - label) / len(panels)
        for i, (key, title, scale, limits) in enumerate(panels):
            ax = figure.add_axes(
                ((label + i * wide + 4) / WIDTH, bottom / height, (wide - 12) / WIDTH, (height - top - bottom) / height)
            )
            for y, line in enumerate(rows):
                found = line[key]
                if found is None:
                    continue
                colour = REACHED if line["reached"] == line["seeds"] else NOT
                ax.plot([found["low"] / scale, found["high"] / scale], [y, y], color=colour, linewidth=1.4, alpha=0.5)
                ax.plot(found["mean"] / scale, y, marker="o", markersize=5, color=colour, clip_on=False)
            ax.set_ylim(len(rows) - 0.5, -0.5)
            if limits:
                ax.set_xlim(*limits)
            ax.set_yticks(range(len(rows)), [short(r["method"], 14) for r in rows] if i == 0 else [""] * len(rows))
            ax.tick_params(axis="y", length=0, colors=INK)
            ax.grid(color=PALE, linewidth=0.5)
            ax.set_axisbelow(True)
            ax.locator_params(axis="x", nbins=2)
            ax.set_title(title, fontsize=9, loc="left", pad=4, color=SOFT)
        figure.text(
            0.5,
            3 / height,
            "blue: level reached with every seed, red: not",
            ha="center",
            va="bottom",
            color=SOFT,
            fontsize=8,
        )

    return svg("ends", "what each method kept where it had forgotten", height, draw)


def withstood(result: dict) -> list[dict]:
    """Methods by what the worst attack brings back of all facts together, least first.

    Last come those that took the model apart with any seed, and those that were not put to every attack.  Where an attack did
    not apply, the others count.
    """
    found, asked = [], {a for row in result["rows"] for a in row.get("verdicts", ())}
    for line in lines(result):
        back = {a: s["mean"] for a, s in line.get("back", {}).items() if s is not None}
        if back:
            attack = max(back, key=lambda a: back[a])
            gone = "over-forgotten" in line["verdicts"].get("none", ())
            few = len(line["verdicts"].keys() - {"none"}) if line["verdicts"].keys() < asked else 0
            found.append(
                {
                    "method": line["method"],
                    "back": back,
                    "worst": attack,
                    "most": back[attack],
                    "gone": gone,
                    "few": few,
                }
            )
    return sorted(found, key=lambda x: (x["few"] > 0, x["gone"], x["most"], x["method"]))


def robust(result: dict) -> str:
    """What each attack brings back of what each method took: R, a mean over seeds; methods that withstand most come first."""
    rows = withstood(result)
    attacks = sorted({a for row in rows for a in row["back"]}, key=lambda a: (a != "none", a))
    if len(attacks) < 2:
        return ""
    step, label = 18, 96
    wide = min(84, (WIDTH - label - 20) / len(attacks))
    slant = wide < 56  # else the names would run into one another
    top = 52 if slant else 24
    height = step * len(rows) + top + 6

    def draw(figure):
        size = (label / WIDTH, 6 / height, wide * len(attacks) / WIDTH, step * len(rows) / height)
        ax = figure.add_axes(size)
        for y, row in enumerate(rows):
            for x, attack in enumerate(attacks):
                r = row["back"].get(attack)
                depth = 0.0 if r is None else min(max(r, 0.0), 1.0)
                ax.fill_between(
                    [x + 0.03, x + 0.97], y + 0.05, y + 0.95, color=NOT, alpha=0.08 + 0.77 * depth, linewidth=0
                )
                shown = "–" if r is None else f"{r:.2f}".replace("-", "−")
                ax.text(
                    x + 0.5, y + 0.5, shown, ha="center", va="center", fontsize=8, color="white" if depth > 0.6 else INK
                )
        ax.set(xlim=(0, len(attacks)), ylim=(len(rows), 0))
        ax.set_yticks(
            [y + 0.5 for y in range(len(rows))], [short(row["method"], 12) + " †" * row["gone"] for row in rows]
        )
        names = ["unattacked" if a == "none" else short(a, 11) for a in attacks]
        way = {"rotation": 40, "ha": "left", "rotation_mode": "anchor"} if slant else {}
        ax.set_xticks([x + 0.5 for x in range(len(attacks))], names, **way)
        ax.xaxis.tick_top()
        ax.tick_params(length=0, labelsize=8, colors=INK)
        for side in ax.spines.values():
            side.set_visible(False)

    return svg("robust", "what each attack brings back of what each method took", height, draw)


def page(result: dict) -> str:
    """The comparison as one page."""
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as absent:
        raise BadRequest("the page needs jinja2; install unremember[report]") from absent

    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"number": number, "slug": slug, "ranged": ranged, "short": short}
    drawings = {
        "At the never-taught level": (
            ends(result),
            "Each dot is the mean over seeds, each line from lowest to highest.",
        ),
        "Robust forgetting": (
            robust(result),
            "R over all facts, on the score that shows most: 0 as little as the never-taught model under the same attack, 1 as "
            "much as before. Methods that withstand the worst attack best come first, those that were not put to every attack "
            "last; † took more than was asked, so that little can come back.",
        ),
        "Forgetting against retained facts": (
            paths(result),
            "Each line is a seed, each dot a look. Blue lines end at the never-taught level, red ones at their cap.",
        ),
        "Forgetting against world knowledge": (paths(result, "world"), "The same, against general questions."),
    }
    template = files("unremember.report").joinpath("compare.html").read_text("utf-8")
    return env.from_string(template).render(
        result=result,
        lines=lines(result),
        attacks=sorted({a for row in result["rows"] for a in row.get("verdicts", ())}, key=lambda a: (a != "none", a)),
        drawings={title: (Markup(drawn), caption) for title, (drawn, caption) in drawings.items() if drawn},
    )


def ranged(found: dict | None, form: str = "{:.2f}", scale: float = 1.0) -> str:
    """A mean with its lowest and highest, where these differ."""
    if found is None:
        return "–"
    shown = form.format(found["mean"] * scale)
    if found["n"] > 1 and found["low"] != found["high"]:
        shown += f" ({form.format(found['low'] * scale)} to {form.format(found['high'] * scale)})"
    return shown.replace("-", "−")
