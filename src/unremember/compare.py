"""Many methods on one corpus, at matched forgetting: what does it cost to know the forget set no better than a stranger?

For each seed a model is taught (or taken as it is), and every method starts from it in a process of its own, until the stopper
finds the never-taught level, or its cap.  What is compared is what is left there of what should have stayed, and where on the
way a method lost it; never two methods after equally many steps.

    OUT/compare.json  compare.csv  compare.md (the table for a README)  compare.html
    OUT/seed-N/original/ (audits shared by all)  seed-N/METHOD/ (an ordinary run folder)

Every METHOD folder is made once: an interrupted comparison goes on where it stopped, and a changed setting redoes what
depends on it.  compare.json grows row by row.  A row there stands for its folder where that is gone, so that weights may be
deleted, methods and seeds be done in several calls, and a comparison be carried on from its one small file on another machine.
"""

from __future__ import annotations

import json
import multiprocessing
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property
from hashlib import file_digest
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from unremember.audit import AUDITS
from unremember.bench import BENCH, Bench
from unremember.corpus import ROLES, Corpus
from unremember.demo import Base, known, pair, taught
from unremember.embedded.dossier import dossier, lessons
from unremember.embedded.prose import prose
from unremember.embedded.teach import Teach
from unremember.embedded.world import world
from unremember.errors import BadInput, BadRequest, UnrememberError, nearest
from unremember.folder import claim, fingerprint, read_json, write_json, write_text
from unremember.forget import METHODS
from unremember.lm import LM, auto_precision
from unremember.machine import peak_memory
from unremember.report.build import build as report_of
from unremember.request import Request, build, changed, read_corpus, request
from unremember.run import Run, execute, lay, texts
from unremember.screen import at_work
from unremember.train import STRICT

SECTIONS = ("compare", "model", "teach", "corpus", "forget", "method", "attack", "rule")
WATCHED = 40  # world questions at each look; the final audit asks all of them
PROSE = 12  # passages at each look
VALUE = "value probability"  # what the stopper looks at, and so what matched forgetting means


@dataclass(frozen=True)
class Settings:
    """The [compare] table.

    worlds: how many world questions the untouched model is asked; those it knows are kept.  watch: measure general ability
    at every look, too, for the drawings; a search for settings has no use for it.
    """

    __pydantic_config__ = STRICT
    out: str
    name: str = "compare"
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    worlds: Annotated[int, Field(ge=1)] = 72
    watch: bool = True


@dataclass(frozen=True)
class People:
    """A dossier instead of corpus files: how many people in each role; every seed has others."""

    __pydantic_config__ = STRICT
    forget: Annotated[int, Field(ge=1)] = 4
    retain: Annotated[int, Field(ge=1)] = 8
    holdout: Annotated[int, Field(ge=1)] = 4
    relearn: Annotated[int, Field(ge=0)] = 2


@dataclass(frozen=True)
class Comparison:
    """A checked comparison.  files: the corpus for every seed, None where each seed has a dossier of its own."""

    settings: Settings
    people: People | None
    files: Corpus | None
    teach: Teach | None
    raw: Mapping[str, Any]

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    def corpus(self, seed: int) -> Corpus:
        if self.files is not None:
            return self.files
        p = self.people or People()
        return dossier(seed, p.forget, p.retain, p.holdout, p.relearn).with_roles(prose=prose())

    def place(self, method: str, seed: int) -> Path:
        """The run folder of one method and seed."""
        return self.out / f"seed-{seed}" / method

    @cached_property
    def keys(self) -> dict[tuple[str, int], dict]:
        """Those that were worked out already."""
        return {}

    def key(self, method: str, seed: int) -> dict:
        """What a row depends on, said without the places of the corpus and of weights, so that it is the same elsewhere.

        key: of all but the attacks.  attacks: name -> of each, so that a row can be put to more of them.
        """
        if (method, seed) not in self.keys:
            corpus, model = self.corpus(seed), self.raw["model"]
            some = corpus.with_roles(world=corpus.of("world") or world()[:1])
            r = self.request(method, seed, some, model["name"], model.get("control", ""), "auto")
            how = (r.method, r.locator, r.budget, r.lora, r.sites, r.chunks, r.rule)
            files = texts(r.method)
            weights = [contents(name) for name in (model["name"], model.get("control", ""))]
            on = (
                model.get("template"),
                model.get("precision"),
                self.teach,
                self.settings.worlds,
                self.settings.watch,
                seed,
            )
            self.keys[method, seed] = {
                "key": fingerprint(repr(how), repr(on), files, weights, corpus.fingerprint()),
                "attacks": {name: fingerprint(repr(attack), *texts(attack)) for name, attack in r.attacks.items()},
            }
        return self.keys[method, seed]

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of an earlier call is one that this comparison would make, or a part of it: fewer attacks, or more."""
        if row["failed"] or row["method"] not in METHODS:
            return False
        try:
            mine = self.key(row["method"], row["seed"])
        except BadInput:  # a method that these settings do not allow
            return False
        theirs = row.get("attacks", {})
        return row.get("key") == mine["key"] and all(theirs[a] == mine["attacks"].get(a, theirs[a]) for a in theirs)

    def complete(self, row: Mapping[str, Any]) -> bool:
        """Whether a row that fits has been put to every attack."""
        return set(self.key(row["method"], row["seed"])["attacks"]) <= set(row["attacks"])

    def request(self, method: str, seed: int, corpus: Corpus, model: str, control: str, precision: str) -> Request:
        """The ordinary request of one method and seed."""
        own = dict(self.raw.get("method", {}).get(method, {}))
        where = own.pop("locate", None)
        common = {k: v for k, v in self.raw.get("forget", {}).items() if _takes(method, k)}
        plan = {**common.pop("plan", {}), **own.pop("plan", {})} if _takes(method, "plan") else {}
        raw = {
            "run": {"name": f"{method}, seed {seed}", "out": str(self.place(method, seed)), "seed": seed},
            "model": {**self.raw.get("model", {}), "name": model, "precision": precision}
            | ({"control": control} if control else {}),
            "forget": {"method": method, **common, **own} | ({"plan": plan} if plan else {}),
            "audit": {"audits": ["probability"]},
            "attack": self.raw.get("attack", {}),
            "rule": self.raw.get("rule", {}),
        } | ({"locate": where} if where else {})
        return request(raw, corpus=corpus)


@cache
def contents(name: str) -> list[str]:
    """What tells a model's weights from others': hashes of its files, or the name of what is no folder or file."""
    path = Path(name)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if name and path.is_file() else []
    found = []
    for file in files:
        with file.open("rb") as opened:
            found.append(file_digest(opened, "sha256").hexdigest())
    return found or [name]


def _takes(method: str, key: str) -> bool:
    return key in getattr(METHODS[method], "__dataclass_fields__", {}) or key in ("sites", "lora", "chunks")


def parse(file: Path, changes: Iterable[str] = ()) -> Comparison:
    """Read and check a comparison, every method's settings included; BadRequest with all problems, before a weight is loaded."""
    try:
        raw = changed(tomllib.loads(file.read_text(encoding="utf-8")), changes)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{file} cannot be read as TOML: {error}") from error
    return checked(raw, file.parent)


def checked(raw: Mapping[str, Any], where: Path = Path()) -> Comparison:
    """The comparison of plain values; where: folder that relative corpus paths start from."""
    problems = [f"unknown table [{name}]; {nearest(name, SECTIONS)}" for name in raw if name not in SECTIONS]
    settings = build(Settings, raw.get("compare", {}), "compare", problems)
    tables = dict(raw.get("corpus", {}))
    people = build(People, tables.pop("dossier"), "corpus.dossier", problems) if "dossier" in tables else None
    teach = build(Teach, raw["teach"], "teach", problems) if "teach" in raw else None
    files = read_corpus(tables, where, problems) if people is None else None
    if people is not None and tables:
        problems.append(f"corpus.dossier makes its own people; take out {', '.join(map(repr, tables))}, or the dossier")
    model = raw.get("model", {}).get("name", "")
    if not model:
        problems.append("model.name is missing; name the model to start from, such as smollm2-135m")
    for name in settings.methods if settings else ():
        if name not in METHODS:
            problems.append(f"compare.methods: unknown method {name!r}; {nearest(name, METHODS)}")
    for name in raw.get("method", {}):
        if name not in METHODS:
            problems.append(f"[method.{name}]: unknown method; {nearest(name, METHODS)}")
    if problems or settings is None:
        raise BadRequest(dict.fromkeys(problems))
    whole = Comparison(settings, people, files, teach, raw)
    wrong: dict[str, list[str]] = {}  # problem -> the methods that have it
    for seed in settings.seeds[:1] if files else settings.seeds:
        corpus = whole.corpus(seed)
        if not corpus.of("world"):
            corpus = corpus.with_roles(world=world()[:1])
        for name in settings.methods:
            try:
                made = whole.request(name, seed, corpus, model, raw.get("model", {}).get("control", ""), "auto").method
                if (level := getattr(made, "plan", made).stop) not in ("probability", "preference"):
                    wrong.setdefault(
                        f"stop is {level!r}; methods are compared where value probability has come down to the never-taught "
                        'level: set it to "probability" or "preference"',
                        [],
                    ).append(name)
            except BadInput as error:
                for problem in error.problems:
                    wrong.setdefault(problem, []).append(name)
    if wrong:
        raise BadRequest(f"{', '.join(dict.fromkeys(names))}: {problem}" for problem, names in wrong.items())
    return whole


@dataclass(frozen=True)
class Job:
    """One method and seed on its way."""

    method: str
    seed: int
    request: Request
    watch: bool = True

    @property
    def mark(self) -> str:
        r = self.request
        attacks = repr(r.attacks), [texts(attack) for attack in r.attacks.values()]
        return fingerprint(Run(r).made_from, attacks, r.audits, r.corpus.fingerprint(), repr(r.rule), self.watch)


def compare(
    whole: Comparison,
    bench: Bench = BENCH,
    title: Callable[[str], None] = lambda text: None,
    aside: Callable[[], AbstractContextManager] = nullcontext,
    inside: bool = False,
) -> dict:
    """Do what is left and return the comparison; BadFolder where its folder is not ours.

    A method that fails (diverges, refuses the model, dies) is a row that says so, and the others go on.  aside: entered while
    another process has the screen.  inside: run in this process instead of one each, for tests; peak memory is then that of
    everything so far.
    """
    claim(whole.out)
    path = whole.out / "compare.json"
    asked = [(method, seed) for seed in whole.settings.seeds for method in whole.settings.methods]
    fit, _ = shelf(whole, path)
    rows = {one: row for one, row in fit.items() if whole.complete(row)}
    result = {
        "schema": "unremember.compare/1",
        "name": whole.settings.name,
        "request": json.loads(json.dumps(dict(whole.raw), default=str)),
        "roles": (read_json(path) or {}).get("roles", {}),
    }
    for seed in whole.settings.seeds:
        todo = [m for m, s in asked if s == seed and ((m, s) not in rows or (whole.place(m, s) / "cost.json").exists())]
        for job in prepared(whole, todo, seed, bench, title) if todo else ():
            at = asked.index((job.method, seed)) + 1
            made = row(job, done(job, f"method {at} of {len(asked)}", bench, title, aside, inside))
            rows[job.method, seed] = made | whole.key(job.method, seed)
            result["roles"] = {role: len(examples) for role, examples in job.request.corpus.items()}
            # read again: another process may have written to it
            there, past = shelf(whole, path, rows[job.method, seed])
            write_json(path, result | {"rows": list(there.values()), "past": past})
    return result | {"rows": [rows[one] for one in asked]}


def shelf(whole: Comparison, path: Path, *fresh: dict) -> tuple[dict[tuple[str, int], dict], list[dict]]:
    """The rows of compare.json and fresh ones that fit, by method and seed, and all others that say something of their own.

    Of several that fit the last complete one stands, or else the one with most attacks; what it does not cover is kept, too.
    A fresh row that failed stands only where no other does.
    """
    known = read_json(path) or {}
    rows = [r for r in (*known.get("past", ()), *known.get("rows", ())) if not r["failed"]]
    good = [*rows, *(r for r in fresh if not r["failed"])]
    fit = {(r["method"], r["seed"]): r for r in fresh}
    for r in sorted(filter(whole.fits, good), key=lambda r: (whole.complete(r), len(r["attacks"]))):
        fit[r["method"], r["seed"]] = r

    def covered(r: dict) -> bool:
        best = fit[r["method"], r["seed"]]
        return not best["failed"] and r["attacks"].items() <= best["attacks"].items()

    past = {
        (r["method"], r["seed"], r.get("key"), repr(r.get("attacks"))): r
        for r in good
        if not (whole.fits(r) and covered(r))
    }
    return fit, list(past.values())


def done(
    job: Job,
    at: str,
    bench: Bench,
    title: Callable[[str], None],
    aside: Callable[[], AbstractContextManager],
    inside: bool,
) -> dict:
    """What a job cost, once it has been done."""
    path = job.request.out / "cost.json"
    cost = read_json(path)
    if cost is not None and cost["fingerprint"] == job.mark:
        return cost
    title(f"{at}: {job.method}, seed {job.seed}")
    if inside:
        work(job, bench.device)
    else:
        # a process of its own: its peak memory is the method's, and nothing is left behind for the next
        process = multiprocessing.get_context("spawn").Process(target=work, args=(job, bench.device))
        with aside():
            process.start()
            process.join()
        if process.exitcode:  # not written down: the same command again tries it again
            return {"failed": f"ended with exit code {process.exitcode} (negative: a signal; out of memory?)"}
    return read_json(path) or {}


def prepared(
    whole: Comparison, methods: Sequence[str], seed: int, bench: Bench, title: Callable[[str], None]
) -> list[Job]:
    """Teach the models of one seed, audit and attack them once, and lay these pieces into every method's folder."""
    given = whole.raw.get("model", {})
    precision = given.get("precision", "auto")
    precision = auto_precision(bench.device) if precision == "auto" else precision
    base, corpus = Base(given["name"], precision, bench, title), whole.corpus(seed)
    if not corpus.of("world") or whole.people is not None:
        corpus = corpus.with_roles(world=known(base, whole.settings.worlds))
    model, control = given["name"], given.get("control", "")
    if whole.teach:
        folders = {}
        for name, roles, share in pair(corpus):
            rows = lessons(corpus, roles, 1) if whole.people is not None else corpus.of(*roles)
            folders[name] = str(taught(base, name, rows, share, whole.teach, seed))
        model, control = folders["original"], folders["never-taught"]
    del base
    jobs = [
        Job(m, seed, whole.request(m, seed, corpus, model, control, precision), whole.settings.watch) for m in methods
    ]
    shared = Run(replace(jobs[0].request, out=whole.out / f"seed-{seed}" / "original"), bench, title)
    shared.open()
    for who in (w for w in shared.models if w != "forgotten"):
        shared.audit(who)
        for attack in shared.request.attacks:
            shared.attack(attack, who)
    for job in jobs:
        claim(job.request.out)
        lay(shared.out, job.request.out)
    return jobs


def work(job: Job, device: str) -> None:
    """Forget, audit, attack: one job from beginning to end, with what it cost."""
    began = time.monotonic()
    failed = ""
    with at_work(device) as here:
        watch = Watcher(job.request.corpus) if job.watch else None
        try:
            stages = ("locate", "forget", "attack") if job.request.attacks else ("locate", "forget")
            execute(job.request, replace(here.bench, watch=watch), here.title, stages)
        except UnrememberError as error:
            failed = str(error)
    forget = read_json(job.request.out / "forget.json") or {}
    cost = {
        "fingerprint": job.mark,
        "seconds": forget.get("seconds"),
        "all seconds": time.monotonic() - began,
        "peak bytes": forget.get("peak bytes") or peak_memory(),
        "failed": failed,
    }
    write_json(job.request.out / "cost.json", cost)


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


def row(job: Job, cost: Mapping[str, Any]) -> dict:
    """What the table and the drawings show of one job."""
    empty = {"method": job.method, "seed": job.seed, "failed": cost.get("failed", "")}
    if cost.get("failed"):
        return empty
    report, corpus = report_of(job.request.out), job.request.corpus
    write_json(job.request.out / "report.json", report)
    ids = {role: [x.id for x in corpus.of(role)] for role in ROLES}
    pieces = {w: read_json(job.request.out / "audit" / f"{w}.json") or {} for w in ("original", "forgotten", "never")}
    scores = {who: {s["name"]: s["per_example"] for s in piece.get("scores", ())} for who, piece in pieces.items()}

    def mean(who: str, score: str, over: Sequence[str]) -> float | None:
        values = [v for k, v in scores[who].get(score, {}).items() if k in set(over)]
        return float(np.mean(values)) if values else None

    kept, before = (mean(who, VALUE, ids["retain"]) for who in ("forgotten", "original"))
    prose, former = (mean(who, "prose NLL", ids["prose"]) for who in ("forgotten", "original"))
    log = [json.loads(line) for line in _lines(job.request.out / "train.jsonl")]
    curve = path(
        [x["look"] for x in log if "mean" in x.get("look", {})],
        known=mean("original", VALUE, ids["forget"]),
        level=mean("never", VALUE, ids["forget"]) if scores["never"] else mean("original", VALUE, ids["holdout"]),
        kept=mean("original", VALUE, ids["retain"][: len(ids["forget"])]),
        world=mean("original", "world accuracy", ids["world"][:WATCHED]),
        prose=mean("original", "prose NLL", ids["prose"][:PROSE]),
    )
    conditions = {c["attack"]: c["overall"] for c in report["conditions"]}
    return empty | {
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


def write(result: dict, out: Path) -> Path:
    """compare.csv, compare.md and compare.html beside compare.json; returns the page."""
    from unremember.report.pareto import csv, markdown, page

    write_text(out / "compare.csv", csv(result))
    write_text(out / "compare.md", markdown(result))
    path = out / "compare.html"
    write_text(path, page(result))
    return path
