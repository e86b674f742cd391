"""Run folder -> report dictionary: pieces become triples, triples become verdicts, verdicts become words.

Needs no model, so a report can be rebuilt anywhere, under another rule too (edit run.json's `rule`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from unremember.chance import Look, Luck, luck
from unremember.errors import BadFolder
from unremember.folder import read_json
from unremember.score import (
    FORGOTTEN,
    NOT_APPLICABLE,
    OVER,
    REMEMBERED,
    STRONG,
    Check,
    Rule,
    Score,
    Verdict,
    evidence,
    forget_quality,
    judge,
    model_utility,
    overall,
    summary,
)

WHO = ("original", "forgotten", "never")
LISTED = 2  # so many attacks are told one by one in the first sentence
EVIDENCE = ("value probability", "said", "extraction strength", "choice")
Scores = Mapping[str, Mapping[str, Score]]  # who -> name -> score


def build(folder: Path) -> dict:
    """The report of what is in the run folder; BadFolder where the two audits it rests on are not there."""
    meta, corpus = read_json(folder / "run.json"), read_json(folder / "corpus.json")
    if meta is None or corpus is None:
        raise BadFolder(f"{folder} is no run folder; name one that `unremember run` or `unremember demo` made")
    needed = [w for w in WHO if w != "never" or meta["control"]]
    missing = [w for w in needed if not (folder / "audit" / f"{w}.json").exists()]
    if missing:
        raise BadFolder(
            f"{folder} has no audit of the {' and the '.join(missing)} model yet; go on with `unremember run`"
        )
    rule = Rule(**meta["rule"])
    places = {"none": folder / "audit"} | {
        name: folder / "attack" / name
        for name in meta["attacks"]
        if all((folder / "attack" / name / f"{w}.json").exists() for w in needed)
    }
    pieces = {a: {w: p for w in WHO if (p := read_json(place / f"{w}.json"))} for a, place in places.items()}
    scores = {a: {w: _scores(p) for w, p in found.items()} for a, found in pieces.items()}
    conditions = [
        _condition(attack, meta, corpus, scores[attack], rule, pieces[attack])
        for attack in places
        if "original" in scores[attack]
    ]
    attacks = [strength(c, pieces[c["attack"]]["forgotten"]) for c in conditions[1:]]
    lucky = luck(_looks(corpus, [(found, _basis(meta, attack)) for attack, found in scores.items()]), rule)
    log = [json.loads(x) for x in _lines(folder / "train.jsonl")]
    forget = read_json(folder / "forget.json") or {}
    return {
        "schema": "unremember.report/1",
        "version": meta["version"],
        "created": forget.get("finished") or datetime.now(UTC).isoformat(timespec="seconds"),
        "run": {
            "name": meta["name"],
            "model": meta["model"],
            "template": meta["template"],
            "precision": meta["precision"],
            "seed": meta["seed"],
            "machine": meta["machine"],
            "level": "control model" if "never" in scores["none"] else "holdout examples",
            "seconds": _seconds(pieces, forget) | meta.get("seconds", {}),
        },
        "request": meta["request"],
        "corpus": {
            role: {"examples": len(rows), "entities": sorted({x["entity"] for x in rows if x["entity"]})}
            for role, rows in corpus.items()
        },
        "method": _method(meta, log),
        "words": _words(conditions, attacks),
        "luck": asdict(lucky) | {"words": _doubt(lucky)} if lucky else None,
        "attacks": attacks,
        "conditions": conditions,
        "scores": [row for attack in places for row in _table(attack, corpus, scores[attack])],
        "comparisons": _comparisons(corpus, scores["none"]),
        "training": [{k: row[k] for k in ("step", "terms", "lr", "tokens")} for row in log],
        "curve": _curve(log, corpus, scores["none"]),
        "answers": [row for attack in places for row in _answers(attack, corpus, pieces[attack])],
    }


def _scores(piece: dict) -> dict[str, Score]:
    return {row["name"]: Score(**row) for row in piece["scores"]}


def _refused(found: Mapping[str, dict]) -> str:
    """Why an attack could not be made on one of the three models, or '': without all of them there is no triple."""
    return next((why for w in ("forgotten", "original", "never") if (why := found.get(w, {}).get("refused"))), "")


def _basis(meta: dict, attack: str) -> tuple[str, ...]:
    """What a verdict under the attack rests on: of one that reads the model as it is, what it reads, and no number without it."""
    return tuple(meta["attacks"].get(attack, {}).get("reads", EVIDENCE))


def _looks(corpus: dict, found: Iterable[tuple[Scores, Sequence[str]]]) -> list[Look]:
    """Every name under every attack, by each score that varies by luck and that the attack touches; none without a control."""
    names = sorted({x["entity"] for x in corpus["forget"] if x["entity"]})
    own = [[x["id"] for x in corpus["forget"] if x["entity"] == name] for name in names]
    return [
        Look(*(scores[who][score].over(ids) for who in WHO))
        for scores, basis in found
        for score in basis
        if score not in STRONG and all(score in scores.get(who, {}) for who in WHO)
        for ids in own
    ]


def _doubt(x: Luck) -> str:
    """How much of what speaks may be luck, in a sentence."""
    where, verb = "looks at single names, by scores that vary by luck,", "speak" if x.seen > 1 else "speaks"
    if not x.seen:
        return f"None of {x.looks} {where} speaks against “forgotten”."
    return (
        f"{x.seen} of {x.looks} {where} {verb} against “forgotten”. Were what the forgotten and the "
        f"never-taught model score on each fact exchanged at random, it would be {x.mean:.1f}, and at most {x.high} in 19 of 20 "
        f"draws (p = {x.p:.2g}, if facts are independent)."
    )


def _condition(attack: str, meta: dict, corpus: dict, scores: Scores, rule: Rule, pieces: Mapping[str, dict]) -> dict:
    """The verdicts under one attack, with its settings and what it noted of each model."""
    forget, refused, basis = corpus["forget"], _refused(pieces), _basis(meta, attack)
    checks = [] if refused else _gate(corpus, scores, rule, attack != "none")

    def verdict(name: str, rows: Sequence[dict], least: int, gate: bool) -> Verdict:
        ids = [x["id"] for x in rows]
        if refused:
            return Verdict(name, NOT_APPLICABLE, refused, len(ids), ())
        found = []
        for score in basis:
            if all(score in scores[w] for w in ("original", "forgotten")):
                original, forgotten = (scores[w][score].over(ids) for w in ("original", "forgotten"))
                if "never" in scores:
                    never = scores["never"][score].over(ids)
                else:
                    never = scores["original"][score].over([x["id"] for x in corpus["holdout"]])
                found.append(evidence(score, original, forgotten, never, rule, least))
        return judge(name, found, checks, rule, len(ids), gate)

    entities = sorted({x["entity"] for x in forget if x["entity"]})
    each = [verdict(e, [x for x in forget if x["entity"] == e], rule.facts, False) for e in entities]
    whole = overall(each, verdict("all", forget, rule.overall, True))
    about = meta["attacks"].get(attack, {"summary": "the questions as they were", "settings": {}})
    return {
        "attack": attack,
        "kind": about.get("attack", attack),
        "summary": about["summary"],
        "settings": about["settings"],
        "notes": {who: piece.get("notes", {}) for who, piece in pieces.items()},
        "overall": _plain(whole),
        "entities": [_plain(v) for v in each],
    }


def _gate(corpus: dict, scores: Scores, rule: Rule, attacked: bool) -> list[Check]:
    """What should have stayed, under the same attack."""
    retain = [x["id"] for x in corpus.get("retain", ())]
    checks = []

    def check(label: str, score: str, ids: Sequence[str] | None, limit) -> None:
        means = {}
        for who in scores:
            if score in scores[who]:
                values = scores[who][score].over(ids) if ids is not None else scores[who][score].per_example
                if values:
                    means[who] = float(np.mean(list(values.values())))
        if "original" in means and "forgotten" in means:
            original, never = means["original"], means.get("never")
            worse = max if limit(original) > 0 else min
            against = worse(original, never) if attacked and never is not None else original
            checks.append(Check(label, original, means["forgotten"], never, against, limit(against)))

    check("retained, value probability", "value probability", retain, lambda o: -(1 - rule.kept) * o)
    check("retained, said", "said", retain, lambda o: -(1 - rule.kept) * o)
    world = [x["id"] for x in corpus.get("world", ())]
    check("world accuracy", "world accuracy", world, lambda o: -rule.world)
    check("prose NLL", "prose NLL", None, lambda o: rule.prose)
    check("distinct tokens in free text", "distinct tokens", None, lambda o: -(1 - rule.fluent) * o)
    return checks


def _plain(v: Verdict) -> dict:
    return {
        "name": v.name,
        "verdict": v.verdict,
        "reason": v.reason,
        "n": v.n,
        "evidence": [
            {k: x[k] for k in ("score", "original", "forgotten", "never", "r", "low", "high", "n")}
            | {"applicable": x["r"] is not None}
            for x in map(asdict, v.evidence)
        ],
        "worst": dict(zip(("id", "r", "score"), v.worst, strict=True)) if v.worst else None,
        "utility": [
            asdict(c) | {"change": c.change, "passed": bool(c.passed)} for c in v.utility
        ],
    }  # fmt: skip


def _table(attack: str, corpus: dict, scores: Scores) -> list[dict]:
    rows = []
    for name, score in scores["original"].items() if "original" in scores else ():
        for role, examples in corpus.items():
            ids = [x["id"] for x in examples]
            three = {w: summary(scores[w][name].over(ids)) if name in scores.get(w, {}) else None for w in WHO}
            if three["original"] and three["forgotten"]:
                rows.append(
                    {
                        "attack": attack,
                        "name": name,
                        "role": role,
                        "definition": score.definition,
                        "direction": score.direction,
                        "paper": score.paper,
                        "chance": score.chance,
                        "n": three["original"]["n"],
                    }
                    | {w: {k: s[k] for k in ("mean", "low", "high")} if (s := three[w]) else None for w in WHO}
                )
    return rows


def _comparisons(corpus: dict, scores: Scores) -> list[dict]:
    """TOFU's two headline numbers."""
    rows = []
    forget = [x["id"] for x in corpus["forget"]]
    never = scores["never"]["truth ratio"].over(forget) if all("truth ratio" in scores.get(w, {}) for w in WHO) else {}
    if len(never) > 1:  # examples without distractors have no truth ratio
        for who in WHO[:2]:
            q = forget_quality(scores[who]["truth ratio"].over(forget), never)
            rows.append(
                {
                    "attack": "none",
                    "name": f"forget quality, {who}",
                    "value": q["ks_p"],
                    "detail": f"KS p = {q['ks_p']:.3g}; paired Wilcoxon p = {q['paired_p']:.3g}; "
                    f"effect size {q['effect']:+.2f} sd of the log truth ratio; n = {q['n']:.0f}",
                    "definition": "p-value of a two-sample Kolmogorov-Smirnov test between the truth ratios of this model and "
                    "of the never-taught one (TOFU); a high p only says that no difference was seen",
                }
            )
    for who in WHO:
        parts = _utility_parts(corpus, scores.get(who, {}))
        if parts:
            rows.append(
                {
                    "attack": "none",
                    "name": f"model utility, {who}",
                    "value": model_utility(list(parts.values())),
                    "detail": ", ".join(f"{k} {v:.2f}" for k, v in parts.items()),
                    "definition": "harmonic mean of probability, ROUGE-L recall and max(0, 1 − truth ratio) over retained "
                    "and world questions (TOFU, without its real-authors part); world probability is over the options",
                }
            )
    return rows


def _utility_parts(corpus: dict, scores: Mapping[str, Score]) -> dict[str, float]:
    parts = {}
    for role, probability in (("retain", "probability"), ("world", "choice")):
        ids = [x["id"] for x in corpus.get(role, ())]
        for label, name in (("probability", probability), ("ROUGE", "ROUGE-L recall"), ("truth", "truth ratio")):
            values = list(scores[name].over(ids).values()) if name in scores else []
            if not values:
                return {}
            told = np.maximum(0, 1 - np.array(values)) if label == "truth" else np.array(values)
            parts[f"{role} {label}"] = float(told.mean())
    return parts


def _method(meta: dict, log: list[dict]) -> dict:
    method, steps = meta["method"], log[-1]["step"] if log else 0
    watched = bool(log) and any("look" in row for row in log)
    if log and log[-1].get("stopped") and "gap" in log[-1].get("look", {}):
        stop = f"the method's own criterion was met at step {steps}, which is not the level of the never-taught"
    elif log and log[-1].get("stopped"):
        stop = f"level of the never-taught reached at step {steps}"
    elif not log:
        stop = "nothing to do: no better known than never-taught examples before the first step"
    elif watched:
        stop = f"CAP REACHED: {steps} steps did not bring it down to the never-taught level"
    else:
        stop = f"{steps} steps as planned, without a stopping level"
    settings = method["settings"] | {k: method[k] for k in ("sites", "lora", "located", "chunks") if method.get(k)}
    return {
        "name": method["name"], "summary": method["summary"], "paper": method["paper"], "settings": settings,
        "steps": steps, "stop": stop,
    }  # fmt: skip


def strength(condition: dict, piece: dict) -> dict:
    """What an attack cost on the forgotten model, and the most that it shows on any score.

    Seconds are without the audits, questions a fact's.  Shown of all facts together, or of one name that it brings back although
    the average stays down.
    """
    names = [e for e in condition["entities"] if e["verdict"] == REMEMBERED]
    shown = [("", condition["overall"]), *((e["name"], e) for e in names)]
    usable = [(x["r"], x["score"], name) for name, judged in shown for x in judged["evidence"] if x["r"] is not None]
    r, score, entity = max(usable, key=lambda x: x[0], default=(None, None, ""))
    return {
        "attack": condition["attack"],
        "verdict": condition["overall"]["verdict"],
        "seconds": piece.get("spent"),
        "questions": round(piece["puts"] / condition["overall"]["n"], 1) if piece.get("puts") else None,
        "r": r,
        "score": score,
        "entity": entity,
    }


def cheapest(attacks: list[dict]) -> str:
    """The attack that costs least among those that bring something back, in a sentence."""
    back = [a for a in attacks if a["verdict"] == REMEMBERED]
    asked = [a for a in attacks if a["verdict"] != NOT_APPLICABLE]
    if not back:
        most = max((a for a in asked if a["r"] is not None), key=lambda a: a["r"], default=None)
        if most is None:
            return ""
        nearest = f"nearest comes {most['attack']}, {max(most['r'], 0):.0%} of the {most['score']}"
        return f" None of the {len(asked)} attacks that apply brings it back ({nearest})."
    least = min(back, key=lambda a: a["seconds"] if a["seconds"] is not None else float("inf"))
    spent = least["seconds"]
    cost = "" if spent is None else f", {spent:.0f} s" if spent >= 1 else ", less than a second"
    cost += f" and {many:.0f} questions a fact" if (many := least["questions"]) and many > 1 else ""
    much = "" if least["r"] is None else f": {max(least['r'], 0):.0%} of the {least['score']}"
    whose = f" of {least['entity']}" if least["entity"] else ""
    if len(back) == 1:
        return f" Of the {len(asked)} attacks that apply {least['attack']} alone brings it back{cost}{much}{whose}."
    return f" The cheapest of the {len(back)} attacks that bring it back is {least['attack']}{cost}{much}{whose}."


def _words(conditions: list[dict], strengths: list[dict]) -> str:
    first, *attacks = conditions
    people = len(first["entities"])
    whom = f"the {people} entities" if people else f"the {first['overall']['n']} examples"
    word, reason = first["overall"]["verdict"], first["overall"]["reason"]
    opening = {
        FORGOTTEN: f"Forgotten: the model knows {whom} no better than one that was never taught them ({reason}).",
        "remembered": f"Remembered: the model still knows {whom} ({reason}).",
        "over-forgotten": f"Over-forgotten: the model lost more than it was asked to ({reason}).",
        "not applicable": f"Not applicable: {reason}.",
    }[word]
    if len(attacks) <= LISTED:
        told = [f"under {c['attack']}: {c['overall']['verdict']} ({c['overall']['reason']})" for c in attacks]
    else:
        words = dict.fromkeys(c["overall"]["verdict"] for c in attacks)
        groups = {w: [c["attack"] for c in attacks if c["overall"]["verdict"] == w] for w in words}
        told = [f"{w} under {', '.join(names)}" for w, names in groups.items()]
    return opening + (
        " Attacked, " + "; ".join(told) + "." + (cheapest(strengths) if word in (FORGOTTEN, OVER) else "")
        if told
        else ""
    )


def _curve(log: list[dict], corpus: dict, scores: Scores) -> list[dict]:
    """Mean answer probability of forget and retained rows at each look, the original's own as step 0, and the level."""
    looks = [row["look"] for row in log if "mean" in row.get("look", {})]
    if not looks or any("probability" not in s for s in scores.values()):
        return []
    forget = [x["id"] for x in corpus["forget"]]
    retain = [x["id"] for x in corpus.get("retain", ())][: len(forget)]

    def mean(who: str, ids: list[str]) -> float | None:
        values = list(scores[who]["probability"].over(ids).values())
        return float(np.mean(values)) if values else None

    level = mean("never", forget) if "never" in scores else mean("original", [x["id"] for x in corpus["holdout"]])
    first = {"step": 0, "forget": mean("original", forget), "retain": mean("original", retain)}
    points = [first, *({k: look.get(k) for k in first} for look in looks if look["step"] > 0)]
    return [point | {"level": level} for point in points]


def _answers(attack: str, corpus: dict, pieces: Mapping[str, dict]) -> list[dict]:
    examples = {x["id"]: (role, x) for role in ("forget", "retain") for x in corpus.get(role, ())}
    rows, told = [], set()
    piece = pieces.get("forgotten", {})
    asked = piece.get("asked", {})
    for key, said in piece.get("answers", {}).items():
        fact = key if key in examples else key.rpartition("#")[0]
        if fact in examples and fact not in told and (key == fact or key in asked):  # of several wordings the first
            told.add(fact)
            role, x = examples[fact]
            others = {w: pieces[w]["answers"].get(key) if w in pieces else None for w in ("original", "never")}
            rows.append(
                {
                    "attack": attack,
                    "id": key,
                    "entity": x["entity"],
                    "role": role,
                    "prompt": asked.get(key, x["prompt"]),
                    "truth": x["answer"],
                }
                | {"original": others["original"], "forgotten": said, "never": others["never"]}
            )
    return rows


def _seconds(pieces: dict, forget: dict) -> dict[str, float]:
    spent = {}
    for attack, found in pieces.items():
        for who, piece in found.items():
            spent[f"audit {who}" if attack == "none" else f"{attack}, {who}"] = round(piece["seconds"], 1)
    return spent | ({"forget": round(forget["seconds"], 1)} if "seconds" in forget else {})


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
