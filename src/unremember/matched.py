"""What is left where forgetting has come down to the never-taught level: one run as a row of a comparison.

A row has the verdicts under every attack, what was kept of what should have stayed, and the way there as a curve, whose points
are the stopper's looks: with it, methods can be compared at any share of forgetting, and never after equally many steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import ROLES, Corpus
from unremember.folder import read_json, write_json
from unremember.lm import LM
from unremember.report.build import build as report_of
from unremember.request import Request

WATCHED = 40  # world questions at each look; the final audit asks all of them
PROSE = 12  # passages at each look
VALUE = "value probability"  # what the stopper looks at, and so what matched forgetting means


@dataclass(frozen=True)
class Watcher:
    """General ability at a look: `world` accuracy and `prose` nll on a part of what the final audit asks."""

    corpus: Corpus

    def __call__(self, lm: LM) -> dict[str, float]:
        asked = Corpus({"world": self.corpus.of("world")[:WATCHED], "prose": self.corpus.of("prose")[:PROSE]})
        fresh, found = replace(lm), {}  # a value of its own: its fingerprint is that of the weights as they are now
        for key, audit in (("world", "world accuracy"), ("prose", "prose NLL")):
            values = (
                AUDITS[audit](fresh, asked, Bench(device=str(lm.device))).per_example.values() if asked.of(key) else ()
            )
            found |= {key: float(np.mean(list(values)))} if values else {}
        return found


def row(request: Request, cost: Mapping[str, Any]) -> dict:
    """What the table and the drawings show of a finished run, and what it cost."""
    out, corpus = request.out, request.corpus
    report = report_of(out)
    write_json(out / "report.json", report)
    ids = {role: [x.id for x in corpus.of(role)] for role in ROLES}
    pieces = {w: read_json(out / "audit" / f"{w}.json") or {} for w in ("original", "forgotten", "never")}
    scores = {who: {s["name"]: s["per_example"] for s in piece.get("scores", ())} for who, piece in pieces.items()}

    def mean(who: str, score: str, over: Sequence[str]) -> float | None:
        values = [v for k, v in scores[who].get(score, {}).items() if k in set(over)]
        return float(np.mean(values)) if values else None

    kept, before = (mean(who, VALUE, ids["retain"]) for who in ("forgotten", "original"))
    prose, former = (mean(who, "prose NLL", ids["prose"]) for who in ("forgotten", "original"))
    log = [json.loads(line) for line in _lines(out / "train.jsonl")]
    curve = path(
        [x["look"] for x in log if "mean" in x.get("look", {})],
        known=mean("original", VALUE, ids["forget"]),
        level=mean("never", VALUE, ids["forget"]) if scores["never"] else mean("original", VALUE, ids["holdout"]),
        kept=mean("original", VALUE, ids["retain"][: len(ids["forget"])]),
        world=mean("original", "world accuracy", ids["world"][:WATCHED]),
        prose=mean("original", "prose NLL", ids["prose"][:PROSE]),
    )
    conditions = {c["attack"]: c["overall"] for c in report["conditions"]}
    return {
        "verdicts": {attack: c["verdict"] for attack, c in conditions.items()},
        "reasons": {attack: c["reason"] for attack, c in conditions.items()},
        "reached": bool(log and log[-1].get("stopped")) or not log,
        "stop": report["method"]["stop"],
        "steps": log[-1]["step"] if log else 0,
        "r": {
            attack: max((e["r"] for e in c["evidence"] if e["r"] is not None), default=None)
            for attack, c in conditions.items()
        },
        "kept": kept / before if kept is not None and before else None,
        "said": mean("forgotten", "said", ids["retain"]),
        "leaked": mean("forgotten", "said", ids["forget"]),
        "world": mean("forgotten", "world accuracy", ids["world"]),
        "world before": mean("original", "world accuracy", ids["world"]),
        "prose": prose - former if prose is not None and former is not None else None,
        "at": {f"{r:g}": at(curve, r) for r in (0.5, 0.25, 0.1)},
        "seconds": cost.get("seconds"),
        "peak bytes": cost.get("peak bytes"),
        "settings": report["method"]["settings"],
        "curve": curve,
    }


def path(
    looks: Sequence[Mapping[str, float]],
    known: float | None,
    level: float | None,
    kept: float | None,
    world: float | None,
    prose: float | None,
) -> list[dict]:
    """The looks of a run as points: r = share of the forget set's knowledge left, kept = of the watched retained rows'.

    known, kept, world, prose: what the original has of the same rows, the first point.  level: the never-taught one.
    """
    points: list[dict] = [{"step": 0, "r": 1.0, "kept": 1.0, "world": world, "prose": prose}]
    for x in looks:
        if x["step"] > 0 and known is not None and level is not None:
            r = (x["mean"] - level) / max(known - level, 1e-9)
            share = x["kept"] / kept if "kept" in x and kept else None
            points.append({"step": x["step"], "r": r, "kept": share, "world": x.get("world"), "prose": x.get("prose")})
    return points


def at(curve: list[dict], r: float) -> dict[str, float | None] | None:
    """What was kept where forgetting first came down to `r`, between the two looks on either side; None where it never did."""
    for before, after in pairwise(curve):
        if after["r"] <= r < before["r"]:
            weight = (before["r"] - r) / max(before["r"] - after["r"], 1e-9)
            both = {k: (before.get(k), after.get(k)) for k in ("kept", "world", "prose")}
            return {k: None if a is None or b is None else a + weight * (b - a) for k, (a, b) in both.items()}
    return None


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
