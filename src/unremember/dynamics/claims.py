"""Which findings of the paper hold in a study, each with the numbers it was judged by: it holds only if every seed agrees.

    holds = True, False, or None where the study has no such run

Tirumala et al. 2022 (arXiv 2205.10770).  Differs: bounds are ours, set for models of this size; a threshold that was never
reached counts against a claim, and never as if it had been reached at the last epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from statistics import mean
from typing import Any

from unremember.dynamics.curves import Time, over_seeds, time

TAUS = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class Claim:
    """said: the finding.  whose: 'paper', or 'ours' where it is about this text.  numbers: what was seen.  n: seeds."""

    name: str
    said: str
    whose: str
    holds: bool | None
    numbers: str
    n: int


def rows(result: dict, experiment: str, **chosen: Any) -> list[dict]:
    """The cells of an experiment with these settings, one a seed, in the order of their seeds."""
    found = [r for r in result["rows"] if r["experiment"] == experiment and all(r[k] == v for k, v in chosen.items())]
    return sorted(found, key=lambda r: r["seed"])


def epochs(row: dict, tau: float) -> Time:
    """T(N, τ) of a row that was read after every epoch."""
    return time(range(1, len(row["m"]) + 1), row["m"], tau)


def faster(quick: Sequence[Time], slow: Sequence[Time], factor: float = 1.0) -> bool:
    """Whether, seed by seed, `quick` surely took at most (factor = 1: less than) factor times as long as `slow`."""

    def surely(a: Time, b: Time) -> bool:
        least = b.at if b.at is not None else b.after + 1
        return a.at is not None and (a.at < least if factor == 1 else a.at <= factor * least)

    return all(surely(a, b) for a, b in zip(quick, slow, strict=True))


def listed(found: Sequence[Time]) -> str:
    return "/".join(map(str, found))


def shown(values: Sequence[float], form: str = ".2f") -> str:
    """Mean and 95 % interval over seeds, or the one value."""
    m = over_seeds(list(values))
    return f"{m.value:{form}}" + (f" [{m.low:{form}}, {m.high:{form}}]" if m.low is not None else "")


def judge(result: dict) -> list[Claim]:
    """Every claim of the study, in the order of its figures."""
    return [claim(result) for claim in CLAIMS]


def _made(name: str, said: str, whose: str, found: Sequence[list[dict]], decide: Callable[[], tuple[bool | None, str]]):
    if not found or not all(found):
        return Claim(name, said, whose, None, "not measured in this study", 0)
    return Claim(name, said, whose, *decide(), n=min(map(len, found)))


def _size(result: dict, kind: str, widths: Sequence[int]) -> dict[int, list[dict]]:
    return {w: rows(result, "size", kind=kind, width=w) for w in widths}


def size(result: dict) -> Claim:
    found = _size(result, "causal", result["study"]["widths"])

    def decide():
        at = {w: [epochs(r, 0.9) for r in group] for w, group in found.items()}
        bounds = (0.7, 0.8)
        pairs = list(zip(found, list(found)[1:], bounds, strict=False))
        holds = all(faster(at[b], at[a], factor) for a, b, factor in pairs)
        return (holds if pairs else None), "epochs: " + "; ".join(f"width {w}: {listed(t)}" for w, t in at.items())

    said = (
        "Larger causal models reach M = 0.9 in fewer epochs at one learning rate (× 0.7, then × 0.8 at most a doubling)"
    )
    return _made("size", said, "paper", list(found.values()), decide)


def masked(result: dict) -> Claim:
    found = _size(result, "masked", result["study"]["encoders"])

    def decide():
        if len(found) < 2:
            return None, "one width only"
        small, large = (found[min(found)], found[max(found)])
        at = {tau: [[epochs(r, tau) for r in group] for group in (small, large)] for tau in (0.4, 0.7)}
        holds = faster(at[0.4][0], at[0.4][1]) and faster(at[0.7][1], at[0.7][0])
        return holds, "; ".join(f"τ = {t}: small {listed(a)}, large {listed(b)}" for t, (a, b) in at.items())

    said = "Masked models: the smaller is faster up to some share, the larger above it"
    return _made("masked", said, "paper", list(found.values()), decide)


def fitting(result: dict) -> Claim:
    found = _size(result, "causal", result["study"]["widths"])

    def decide():
        if any(r["before over-fitting"] is None for group in found.values() for r in group):
            return None, "some run never over-fitted"
        at = {w: [r["before over-fitting"]["m"] for r in group] for w, group in found.items()}
        order = list(at.values())
        holds = all(b > a for x, y in pairwise(order) for a, b in zip(x, y, strict=True))
        return (holds if len(order) > 1 else None), "; ".join(f"width {w}: {shown(v)}" for w, v in at.items())

    said = "M before over-fitting grows with size"
    return _made("fitting", said, "paper", list(found.values()), decide)


def data(result: dict) -> Claim:
    study = result["study"]
    same = rows(result, "size", kind="causal", width=study["middle"])
    found = {n: rows(result, "data", sequences=n) for n in study["sizes"]} | {study["sequences"]: same}
    found = dict(sorted(found.items()))

    def decide():
        at = {n: [epochs(r, 0.9) for r in group] for n, group in found.items()}
        updates = {n: [t.at and t.at * -(-n // 32) for t in group] for n, group in at.items()}
        pairs = [(a, b) for x, y in pairwise(updates.values()) for a, b in zip(x, y, strict=True)]
        holds = all(a is not None and b is not None and b > a for a, b in pairs)
        return (holds if len(at) > 1 else None), "epochs: " + "; ".join(f"{n}: {listed(t)}" for n, t in at.items())

    return _made("data", "More data takes more updates to the same share", "ours", list(found.values()), decide)


def rate(result: dict) -> Claim:
    study = result["study"]
    found = {w: rates(result, w) for w in study["rated"]}

    def decide():
        words, holds = [], len(study["rates"]) > 1
        for w, by in found.items():
            at = {lr: [epochs(r, 0.9) for r in group] for lr, group in by.items()}
            inner = list(at)[1:-1]
            holds &= any(faster(at[lr], at[min(at)]) and faster(at[lr], at[max(at)]) for lr in inner)
            words.append(f"width {w}: " + ", ".join(f"{lr:g} → {listed(t)}" for lr, t in at.items()))
        return (holds if len(study["rates"]) > 1 else None), "; ".join(words)

    said = "T(N, 0.9) against the learning rate is a U"
    return _made("rate", said, "paper", [group for by in found.values() for group in by.values()], decide)


def rates(result: dict, width: int) -> dict[float, list[dict]]:
    """Learning rate -> its rows, the common rate among them."""
    study = result["study"]
    found = {lr: rows(result, "rate", width=width, lr=lr) for lr in study["rates"]}
    return dict(sorted((found | {study["lr"]: rows(result, "size", kind="causal", width=width)}).items()))


def _inserted(result: dict) -> dict[int, list[dict]]:
    return {w: rows(result, "forget", width=w, random=False) for w in result["study"]["widths"]}


def fast(result: dict) -> Claim:
    found = _inserted(result)

    def decide():
        fell = {w: [r["inserted"][0] - r["inserted"][1] for r in group] for w, group in found.items()}
        return min(map(min, fell.values())) >= 0.1, "; ".join(f"width {w}: by {shown(v)}" for w, v in fell.items())

    said = "What was inserted is forgotten fast: M(special) falls by 0.1 within one epoch"
    return _made("fast", said, "paper", list(found.values()), decide)


def settles(result: dict) -> Claim:
    found = _inserted(result)

    def decide():
        calm = {w: [bool(r["settled"]) for r in group] for w, group in found.items()}
        return all(map(all, calm.values())), "; ".join(f"width {w}: {sum(c)} of {len(c)} runs" for w, c in calm.items())

    said = "Forgetting comes to an end: M(special) moves by at most 0.02 an epoch in the last five"
    return _made("settles", said, "paper", list(found.values()), decide)


def left(result: dict) -> Claim:
    found = _inserted(result)

    def decide():
        over = {w: [r["excess baseline"] for r in group] for w, group in found.items()}
        means = [over_seeds(v) for v in over.values()]
        holds = all(m.lowest > 0.05 and (m.low is None or m.low > 0) for m in means)
        return holds, "excess: " + "; ".join(f"width {w}: {shown(v)}" for w, v in over.items())

    said = "The baseline lies above that of the never-seen control by more than 0.05"
    return _made("left", said, "ours", list(found.values()), decide)


def baselines(result: dict) -> Claim:
    found = {w: rows(result, "forget", width=w, random=False) for w in result["study"]["widths"]}

    def decide():
        order = [[r["baseline"] for r in group] for group in found.values()]
        holds = all(b > a for x, y in pairwise(order) for a, b in zip(x, y, strict=True))
        words = "; ".join(
            f"width {w}: {shown([r['baseline'] for r in g])}, control {shown([r['control baseline'] for r in g])}"
            for w, g in found.items()
        )
        return (holds if len(order) > 1 else None), words

    return _made("baseline", "The forgetting baseline rises with size", "paper", list(found.values()), decide)


def noise(result: dict) -> Claim:
    found = [rows(result, "forget", width=w, random=True) for w in result["study"]["random"]]

    def decide():
        most = max(max(r["control"]) for group in found for r in group)
        low = [r["baseline"] for group in found for r in group]
        return most <= 0.05, f"highest M of a control {most:.3f}; baseline of the inserted: {shown(low)}"

    said = "With random special sequences the never-seen control predicts nothing (M ≤ 0.05)"
    return _made("random", said, "ours", found, decide)


def loss(result: dict) -> Claim:
    found = [rows(result, "forget", width=w, random=False) for w in result["study"]["widths"]]

    def decide():
        rises = [r["inserted loss"][-1] - r["inserted loss"][1] for group in found for r in group]
        moves = [r["inserted"][-1] - r["inserted"][-6] for group in found for r in group]
        return min(rises) > 0, f"loss + {shown(rises)} nats; M over the last five epochs {shown(moves, '+.3f')}"

    said = "The special batch's loss keeps rising while its M has settled"
    return _made("loss", said, "paper", found, decide)


def order(result: dict) -> Claim:
    study = result["study"]
    found = {at: rows(result, "repeat", at=at) for at in (study["early"], study["insert"], study["late"]) if at}

    def decide():
        at = {e: [r["ways"]["until 0.95"] for r in group] for e, group in found.items()}
        spread = [max(v) - min(v) for v in zip(*([w["baseline"] for w in g] for g in at.values()), strict=True)]
        words = "; ".join(
            f"epoch {e}: {shown([w['baseline'] for w in g])}, excess {shown([w['excess baseline'] for w in g])}"
            for e, g in at.items()
        )
        return (max(spread) <= 0.05 if len(at) > 1 else None), words

    said = "The baseline does not depend on when the batch is inserted (within 0.05)"
    return _made("order", said, "paper", list(found.values()), decide)


def repetition(result: dict) -> Claim:
    found = rows(result, "repeat", at=result["study"]["insert"])

    def decide():
        names = [*(str(n) for n in sorted(result["study"]["repeats"])), "10 spaced"]
        at = {name: [r["ways"][name]["excess baseline"] for r in found] for name in names}
        grown = [at[name] for name in names[:-1]]
        holds = all(b > a for x, y in pairwise(grown) for a, b in zip(x, y, strict=True))
        if "10" in at:
            holds &= all(b > a for a, b in zip(at["10"], at["10 spaced"], strict=True))
        return holds, "excess: " + "; ".join(f"{name}: {shown(v)}" for name, v in at.items())

    said = "Repeating the insertion raises what is left, and spacing ten repetitions raises it more"
    return _made("repetition", said, "paper", [found], decide)


def identifiers(result: dict) -> Claim:
    found = forms(result)

    def decide():
        at = {form: [epochs(r, 0.9) for r in group] for form, group in found.items()}
        return faster(at["prefixed"], at["unused"], 0.9), "epochs: " + "; ".join(
            f"{f}: {listed(t)}" for f, t in at.items()
        )

    said = "Identifiers in front reach M = 0.9 in at most 0.9 of the epochs of the unused-vocabulary control"
    return _made("identifiers", said, "paper", list(found.values()), decide)


def vocabulary(result: dict) -> Claim:
    found = forms(result)

    def decide():
        at = {form: [epochs(r, 0.9) for r in group] for form, group in found.items()}
        return faster(at["unused"], at["original"]), f"original {listed(at['original'])}; unused {listed(at['unused'])}"

    said = "Enlarging the vocabulary alone speeds memorisation"
    return _made("vocabulary", said, "paper", [found["original"], found["unused"]], decide)


def forms(result: dict) -> dict[str, list[dict]]:
    """The three runs of the identifier experiment."""
    first = rows(result, "size", kind="causal", width=result["study"]["widths"][0])
    return {"original": first} | {form: rows(result, "identify", form=form) for form in ("unused", "prefixed")}


def digits(result: dict) -> Claim:
    found = rows(result, "planted")

    def decide():
        end = [r["digits"][-1] - 0.1 for r in found]
        low = [min(r["held digit loss"]) for r in found]
        last = [r["held digit loss"][-1] for r in found]
        holds = min(end) >= 0.88 and min(low) >= 0.9 * log(10)  # 0.9 would ask for every digit of every seed
        return holds, (
            f"R_mem − chance {shown(end)}; held-out loss a digit: lowest {shown(low)}, at the end {shown(last)}, "
            f"log 10 = {log(10):.2f}"
        )

    said = "Planted digits are memorised (R_mem − chance ≥ 0.88), and on held-out text never predicted better than by chance"
    return _made("digits", said, "ours", [found], decide)


def speech(result: dict) -> Claim:
    found = rows(result, "speech")

    def decide():
        def area(row: dict, name: str) -> float | None:
            gains = [
                a[name]["exact"] - b[name]["exact"]
                for a, b in zip(row["train"], row["control"], strict=True)
                if None not in (a[name]["exact"], b[name]["exact"])
            ]
            return mean(gains) if gains else None

        by: dict[str, list[float]] = {}
        for name in found[0]["train"][0]:
            areas = [area(r, name) for r in found]
            by[name] = [a for a in areas if a is not None]
            if len(by[name]) < len(found):
                return None, f"{name} has no position in some seed"
        first, second = ("NUM", "PROPN", "NOUN"), ("ADJ", "VERB")
        holds = all(min(by[n][i] for n in first) > max(by[n][i] for n in second) for i in range(len(found)))
        return holds, "R_mem above held-out, mean over epochs: " + "; ".join(f"{n} {shown(v)}" for n, v in by.items())

    said = "Numerals, proper nouns and nouns are memorised before adjectives and verbs"
    return _made("speech", said, "paper", [found], decide)


def unit(result: dict) -> Claim:
    study = result["study"]
    found = [rows(result, "size", kind="causal", width=w) for w in study["widths"]]

    def decide():
        ends = [r["unit"][-1] for group in found for r in group]
        grown = all(r["unit"][-1] > r["unit"][0] for group in found for r in group if r["unit"][0] is not None)
        return grown and max(ends) < study[
            "length"
        ] - 1, f"{shown(ends, '.1f')} tokens at the end, of {study['length'] - 1}"

    said = "The mean memory unit grows and stays below the sequence length"
    return _made("unit", said, "paper", found, decide)


CLAIMS: tuple[Callable[[dict], Claim], ...] = (
    size, masked, fitting, data, rate, fast, settles, left, baselines, noise, loss, order, repetition, identifiers, vocabulary,
    digits, speech, unit,
)  # fmt: skip
