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
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.demo import Base, known, pair, taught
from unremember.embedded.dossier import dossier, lessons
from unremember.embedded.prose import prose
from unremember.embedded.teach import Teach
from unremember.embedded.world import world
from unremember.errors import BadInput, BadRequest, UnrememberError, nearest
from unremember.folder import claim, fingerprint, read_json, write_json, write_text
from unremember.forget import METHODS
from unremember.loading import auto_precision
from unremember.machine import peak_memory
from unremember.matched import Watcher, row
from unremember.request import Request, build, changed, read_corpus, request
from unremember.run import Run, execute, lay, texts
from unremember.screen import at_work
from unremember.train import STRICT

SECTIONS = ("compare", "model", "teach", "corpus", "forget", "method", "attack", "rule")


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
    problems += [
        f"{name} is {raw[name]!r}; it must be a table, [{name}]" for name in raw if not isinstance(raw[name], Mapping)
    ]
    raw = {name: table for name, table in raw.items() if isinstance(table, Mapping)}
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
    asked = settings.methods if settings else raw.get("compare", {}).get("methods")
    for name in asked if isinstance(asked, list | tuple) else ():
        if isinstance(name, str) and name not in METHODS:
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
            cost = done(job, f"method {at} of {len(asked)}", bench, title, aside, inside)
            made = {"method": job.method, "seed": seed, "failed": cost.get("failed", "")}
            made |= {} if made["failed"] else row(job.request, cost)
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


def write(result: dict, out: Path) -> Path:
    """compare.csv, compare.md and compare.html beside compare.json; returns the page."""
    from unremember.report.pareto import csv, markdown, page

    write_text(out / "compare.csv", csv(result))
    write_text(out / "compare.md", markdown(result))
    path = out / "compare.html"
    write_text(path, page(result))
    return path
