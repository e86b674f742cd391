"""A study of memorisation as one page: its claims, and the figures of the paper in miniature as SVG.

Everything is a pure function of the dictionary in dynamics.json.  The page needs nothing else: no network, no script.
Every figure says over how many seeds it is; where there are several, a line is their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from unremember.dynamics.claims import TAUS, epochs, forms, judge, rates, rows
from unremember.dynamics.curves import Time, before_overfitting, over_seeds, rolling, time
from unremember.errors import BadRequest
from unremember.report.plots import PALE, axes, svg

BLUES = ("#9ecae1", "#4292c6", "#08519c", "#08306b")  # small to large
OTHERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8b6d00", "#56b4e9")
HEIGHT = 210
Line = tuple[str, Sequence[float], Sequence[float], str, str]  # label, x, y, colour, dashes


def lines(
    key: str,
    label: str,
    found: Sequence[Line],
    x: str,
    y: str,
    log: bool = False,
    marks: bool = False,
    unit: bool = True,
) -> str:
    """A line a series, labelled above; "" where there is nothing to draw."""
    found = [line for line in found if len(line[1])]
    if not found:
        return ""
    named = list(dict.fromkeys(line[0] for line in found if line[0]))
    rows_ = -(-len(named) // 3)

    def draw(figure):
        ax = axes(figure, HEIGHT, left=40, bottom=36, top=10 + 14 * rows_, right=10)
        told: set[str] = set()
        for name, xs, ys, colour, dash in found:
            mark = {"marker": "o", "markersize": 3.5} if marks else {}
            shown = name if name and name not in told else "_"
            told.add(name)
            ax.plot(xs, ys, color=colour, linestyle=dash, linewidth=1.4, label=shown, clip_on=not unit, **mark)
        if log:
            ax.set_xscale("log")
            ax.minorticks_off()
            places = sorted({v for line in found for v in line[1]})
            ax.set_xticks(places, [f"{v:g}" for v in places])
        if unit:
            ax.set_ylim(0, 1)
        else:
            ax.set_ylim(bottom=0)
        ax.grid(color=PALE, linewidth=0.5)
        ax.set_axisbelow(True)
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=3, handlelength=1.4, columnspacing=1.0, fontsize=8.5)

    return svg(key, label, HEIGHT, draw)


def averaged(series: Sequence[Sequence[float | None]]) -> list[float]:
    """Mean over seeds, place by place, as far as the shortest goes; a value that is missing in one is left out."""
    found = []
    for values in zip(*series, strict=False):
        there = [v for v in values if v is not None]
        found.append(float(np.mean(there)) if there else float("nan"))
    return found


def _counted(values: Sequence[float]) -> range:
    return range(1, len(values) + 1)


def _tint(number: int) -> str:
    return BLUES[min(number, len(BLUES) - 1)]


def over_epochs(result: dict, kind: str) -> str:
    """M on the training set, full, and on held-out text, dashed, for each width."""
    found: list[Line] = []
    for i, w in enumerate(result["study"]["widths" if kind == "causal" else "encoders"]):
        group = rows(result, "size", kind=kind, width=w)
        for key, dash in (("m", "-"), ("held", ":")):
            ys = averaged([r[key] for r in group])
            found.append((f"width {w}" if key == "m" else "", _counted(ys), ys, _tint(i), dash))
    return lines(f"epochs {kind}", f"M over epochs, {kind}", found, "epoch  (dotted: held out)", "M")


def thresholds(result: dict, kind: str) -> str:
    """T(N, τ) against width; a threshold that some seed never reached has no point."""
    widths = result["study"]["widths" if kind == "causal" else "encoders"]
    found: list[Line] = []
    for i, tau in enumerate(t for t in TAUS if t in (0.5, 0.65, 0.8, 0.9)):
        xs, ys = [], []
        for w in widths:
            at = [epochs(r, tau).at for r in rows(result, "size", kind=kind, width=w)]
            if at and None not in at:
                xs.append(w)
                ys.append(float(np.mean([a for a in at if a is not None])))
        found.append((f"τ = {tau:g}", xs, ys, OTHERS[i], "-"))
    return lines(f"thresholds {kind}", f"T(N, τ), {kind}", found, "width", "epochs to τ", True, True, False)


def fitting(result: dict) -> str:
    """M at the last epoch before the held-out loss rises."""
    found: list[Line] = []
    for i, (kind, key) in enumerate((("causal", "widths"), ("masked", "encoders"))):
        xs, ys = [], []
        for w in result["study"][key]:
            fits = [before_overfitting(r["m"], r["held loss"]) for r in rows(result, "size", kind=kind, width=w)]
            if there := [f[1] for f in fits if f is not None]:
                xs.append(w)
                ys.append(float(np.mean(there)))
        found.append((kind, xs, ys, OTHERS[i], "-"))
    return lines("fitting", "M before over-fitting", found, "width", "M", True, True)


def units(result: dict) -> str:
    """Mean memory unit length over epochs."""
    found: list[Line] = []
    for i, w in enumerate(result["study"]["widths"]):
        ys = averaged([r["unit"] for r in rows(result, "size", kind="causal", width=w)])
        found.append((f"width {w}", _counted(ys), ys, _tint(i), "-"))
    return lines("units", "memory unit length", found, "epoch", "tokens", unit=False)


def data(result: dict) -> str:
    """M_update, rolling mean of five, for each size of the training set."""
    study = result["study"]
    found: list[Line] = []
    sizes = sorted({*study["sizes"], study["sequences"]})
    for i, n in enumerate(sizes):
        group = (
            rows(result, "size", kind="causal", width=study["middle"])
            if n == study["sequences"]
            else rows(result, "data", sequences=n)
        )
        ys = rolling(averaged([r["updates"] for r in group]))
        found.append((f"{n} sequences", _counted(ys), ys, _tint(i), "-"))
    return lines("data", "M_update by size of the training set", found, "update", "M of the update's batch")


def rating(result: dict) -> str:
    """T(N, 0.9) against the learning rate."""
    found: list[Line] = []
    for i, w in enumerate(result["study"]["rated"]):
        xs, ys = [], []
        for lr, group in rates(result, w).items():
            at = [epochs(r, 0.9).at for r in group]
            if at and None not in at:
                xs.append(lr)
                ys.append(float(np.mean([a for a in at if a is not None])))
        found.append((f"width {w}", xs, ys, _tint(i), "-"))
    return lines(
        "rate", "T(N, 0.9) against the learning rate", found, "learning rate", "epochs to 0.9", True, True, False
    )


def forgetting(result: dict, random: bool = False) -> str:
    """M on the special batch behind its insertion, full, and never inserted, dashed."""
    found: list[Line] = []
    for i, w in enumerate(result["study"]["random" if random else "widths"]):
        group = rows(result, "forget", width=w, random=random)
        for key, dash in (("inserted", "-"), ("control", "--")):
            ys = averaged([r[key] for r in group])
            found.append((f"width {w}" if key == "inserted" else "", range(len(ys)), ys, _tint(i), dash))
    title = "forgetting random sequences" if random else "forgetting"
    return lines(title, title, found, "epochs since the insertion  (dashed: never inserted)", "M of the special batch")


def losses(result: dict) -> str:
    """Loss on the special batch behind its insertion, and never inserted."""
    found: list[Line] = []
    for i, w in enumerate(result["study"]["widths"]):
        group = rows(result, "forget", width=w, random=False)
        for key, dash in (("inserted", "-"), ("control", "--")):
            ys = averaged([r[f"{key} loss"] for r in group])
            found.append((f"width {w}" if key == "inserted" else "", range(len(ys)), ys, _tint(i), dash))
    return lines(
        "losses",
        "loss of the special batch",
        found,
        "epochs since the insertion  (dashed: never inserted)",
        "nats",
        unit=False,
    )


def repeats(result: dict) -> str:
    """Excess over the never-seen control, for each way to insert."""
    group = rows(result, "repeat", at=result["study"]["insert"])
    found: list[Line] = []
    for i, name in enumerate(group[0]["ways"] if group else ()):
        ys = averaged([r["ways"][name]["excess"] for r in group])
        found.append((name.replace("until 0.95, moments", "moments"), range(len(ys)), ys, OTHERS[i % 6], "-"))
    return lines(
        "repeats", "excess by way of insertion", found, "epochs since the last insertion", "excess over control"
    )


def order(result: dict) -> str:
    """The same insertion at several epochs."""
    study = result["study"]
    found: list[Line] = []
    for i, at in enumerate(e for e in (study["early"], study["insert"], study["late"]) if e):
        group = rows(result, "repeat", at=at)
        for key, dash in (("inserted", "-"), ("control", "--")):
            ys = averaged([r["ways"]["until 0.95"][key] for r in group])
            found.append((f"at epoch {at}" if key == "inserted" else "", range(len(ys)), ys, OTHERS[i], dash))
    return lines(
        "order", "order", found, "epochs since the insertion  (dashed: never inserted)", "M of the special batch"
    )


def identifiers(result: dict) -> str:
    """M on original positions: as it is, with unused vocabulary, with identifiers."""
    found: list[Line] = []
    for i, (form, group) in enumerate(forms(result).items()):
        ys = averaged([r["m"] for r in group])
        found.append((form, _counted(ys), ys, OTHERS[i], "-"))
    return lines("identifiers", "identifiers", found, "epoch", "M on original positions")


def digits(result: dict) -> str:
    """Planted digit strings: memorised, and on held-out text."""
    group = rows(result, "planted")
    found: list[Line] = []
    for i, (name, key) in enumerate(
        (("digits", "digits"), ("other tokens", "words"), ("held-out digits", "held digits"))
    ):
        ys = averaged([r[key] for r in group])
        found.append((name, _counted(ys), ys, OTHERS[i], "-"))
    return lines("digits", "planted digits", found, "epoch", "share predicted exactly")


def speech(result: dict, part: str) -> str:
    """R (part 'kind') or R_mem ('exact') of each class on the training set, full, and on held-out text, dotted."""
    group = rows(result, "speech")
    found: list[Line] = []
    for i, name in enumerate(group[0]["train"][0] if group else ()):
        for key, dash in (("train", "-"), ("control", ":")):
            ys = averaged([[x[name][part] for x in r[key]] for r in group])
            found.append((name if key == "train" else "", group[0]["at"], ys, OTHERS[i], dash))
    word = "R" if part == "kind" else "R_mem"
    return lines(f"speech {part}", f"{word} by part of speech", found, "epoch  (dotted: held out)", word)


FIGURES: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    ("Size, causal", "Share of next tokens memorised. The held-out share says how much of it needs no memory.",
     lambda r: over_epochs(r, "causal")),
    ("Epochs to a share, causal", "T(N, τ), read after every epoch. No point where a seed never got there.",
     lambda r: thresholds(r, "causal")),
    ("Size, masked", "The same for masked models. This text is guessed well from both sides, so most of M is no memory.",
     lambda r: over_epochs(r, "masked")),
    ("Epochs to a share, masked", "T(N, τ), masks being the same at every reading.", lambda r: thresholds(r, "masked")),
    ("Before over-fitting", "M at the last epoch before the held-out loss first rises, even if by chance and early.", fitting),
    ("Size of the training set", "M on the batch of each update, rolling mean of five.", data),
    ("Learning rate", "Epochs to M = 0.9. No point where a seed never got there.", rating),
    ("Forgetting", "A special batch is taught until M = 0.95, once. Then training goes on as if nothing had been.", forgetting),
    ("Forgetting, the loss", "The loss rises on while M has settled: it is no measure of what is remembered.", losses),
    ("Forgetting random sequences", "A never-seen control knows nothing here, so all that is left is memory.",
     lambda r: forgetting(r, True)),
    ("Repetition", "Excess over the never-seen control after 1, 10, 100 updates, ten spaced ones, and until M = 0.95.", repeats),
    ("Order", "The same insertion, earlier and later in training.", order),
    ("Identifiers", "A token of its own in front of each sequence, beside a vocabulary as large, never used.", identifiers),
    ("Planted digits", "Digit strings that nothing predicts are memorised; on held-out text they stay at chance.", digits),
    ("Part of speech, exact token", "Whole words of English sentences. The gap to held-out text is memory.",
     lambda r: speech(r, "exact")),
    ("Part of speech, class", "Whether the predicted word is of the right class.", lambda r: speech(r, "kind")),
    ("Memory unit", "Mean length of a run of memorised tokens.", units),
)  # fmt: skip


def page(result: dict) -> str:
    """The study as one page."""
    drawn = [(title, caption, made) for title, caption, draw in FIGURES if (made := draw(result))]
    return _filled("page.html", drawn, {"result": result, "claims": judge(result), "table": table(result)})


def follow_page(title: str, texts: dict[str, dict], left: dict[str, dict], machine: str) -> str:
    """Curves of one training as a page. texts: name -> {"at", "m", "loss", "n"}; left: forgetting.compared by name."""
    colours = dict(zip(texts, OTHERS, strict=False))
    drawn = []
    for key, word, unit in (("m", "M", True), ("loss", "nats", False)):
        found: list[Line] = [(n, c["at"], c[key], colours[n], "-") for n, c in texts.items()]
        drawn.append(
            (f"{word} at each reading.", lines(f"follow {key}", word, found, "step", word, marks=True, unit=unit))
        )
    for name, row in left.items():
        pair = zip(("inserted", "control"), OTHERS, ("-", "--"), strict=False)
        found = [(key, range(len(row[key])), row[key], colour, dash) for key, colour, dash in pair]
        label = f"what is left of {name}"
        words = f"{row['updates']} updates at {row['rate']:g}; excess baseline {row['excess baseline']:.3f}."
        drawn.append((words, lines(label, label, found, "epochs since the insertion", f"M of {name}")))
    rows_ = [{"name": n, "n": c["n"][0], "times": [str(reached(c, tau)) for tau in TAUS]} for n, c in texts.items()]
    return _filled("curves.html", drawn, {"title": title, "taus": TAUS, "rows": rows_, "machine": machine})


def reached(curve: dict, tau: float) -> Time | str:
    """T(τ) of a followed curve; "before" where the first reading, of a model not yet trained, is there already."""
    if curve["at"] and curve["at"][0] == 0:
        if curve["m"][0] >= tau:
            return "before"
        return time(curve["at"][1:], curve["m"][1:], tau)
    return time(curve["at"], curve["m"], tau)


def _filled(name: str, drawn: Sequence[tuple], values: dict[str, Any]) -> str:
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as absent:
        raise BadRequest("the page needs jinja2; install unremember[report]") from absent

    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files("unremember.dynamics").joinpath(name).read_text("utf-8")
    return env.from_string(template).render(figures=[(*words, Markup(svg_)) for *words, svg_ in drawn], **values)


def table(result: dict) -> list[dict[str, Any]]:
    """T(N, τ) of every width and kind, seed by seed."""
    found = []
    for kind, key in (("causal", "widths"), ("masked", "encoders")):
        for w in result["study"][key]:
            if group := rows(result, "size", kind=kind, width=w):
                times = {tau: " ".join(str(epochs(r, tau)) for r in group) for tau in TAUS}
                held = over_seeds([r["held"][-1] for r in group]).value
                found.append({"kind": kind, "width": w, "weights": group[0]["weights"], "times": times, "held": held})
    return found
