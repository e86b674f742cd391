"""The rooms in order: audit, forget, audit, attack, audit, report.  Every piece is kept on disk and made once.

    OUT/run.json  corpus.json  audit/WHO.json  sites.safetensors  locate.json  train.jsonl  model/  forget.json
    attack/NAME/WHO.json  memory/WHO.json  report.json  report.html

WHO is original, forgotten or never.  A piece carries the fingerprint of all it was made from; one that is there with the
same fingerprint is kept, so an interrupted run goes on where it stopped, and a changed setting redoes what depends on it.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from unremember import __version__, report, team
from unremember.attack import ATTACKS
from unremember.audit import AUDITS, EVIDENCE, UTILITY
from unremember.audit.answers import spoken
from unremember.audit.editing import pinned
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadFolder, BadModel, BadRequest, Diverged, NotApplicable
from unremember.folder import claim, fingerprint, read_json, whole, write_json, write_text
from unremember.forget.sequential import sequential
from unremember.lm import LM
from unremember.loading import auto_precision, check, load
from unremember.locate.ranking import Ranking, select
from unremember.machine import peak_memory
from unremember.request import Request, handed
from unremember.score import Score, together
from unremember.sites import EVERYWHERE, Sites
from unremember.table import recalled, saved

STAGES = ("audit", "locate", "forget", "attack", "report")
SHOWN = 20  # best units that locate.json names
Title = Callable[[str], None]


def execute(
    request: Request,
    bench: Bench = BENCH,
    title: Title = lambda text: None,
    stages: Sequence[str] = STAGES,
    later: Collection[str] = (),
) -> dict:
    """Do what is left of the stages and return the report (an empty one if 'report' is not among them).

    later: attacks of the request that are not made now; the report has them where they were made before.
    Raises BadFolder where request.out is not ours or too small, and whatever the rooms raise.
    """
    here = replace(bench, budget=request.places or bench.budget, recompute=request.recompute or bench.recompute)
    run = Run(request, here, title)
    run.open()
    if "attack" in stages and "forget" not in stages and not run.forgotten():
        raise BadFolder(f"{request.out} has no forgotten model yet; run `unremember forget` first")
    if "audit" in stages:
        for who in run.models:
            if who != "forgotten" or run.forgotten():
                run.only(who)
                run.audit(who)
    if "locate" in stages or "forget" in stages:
        run.locate()
    if "forget" in stages:
        run.forget()
        run.only("forgotten")
        run.audit("forgotten")
    if "attack" in stages:
        now = {name: attack for name, attack in request.attacks.items() if name not in later}
        for who in run.models:
            run.only(who)
            for name in sorted(now, key=lambda name: not alone(now[name])):  # those that need the original come last
                run.attack(name, who)
    if "report" not in stages:
        return {}
    title("report")
    if team.rank() == 0:
        report.write(report.build(request.out), request.out)
        report.write_card(request.out)
    team.wait()
    return report.read(request.out)


@dataclass
class Run:
    """A request on its way through the rooms."""

    request: Request
    bench: Bench = BENCH
    title: Title = lambda text: None
    loaded: dict[str, LM] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.request.out

    @property
    def models(self) -> tuple[str, ...]:
        return ("original", "forgotten", *(("never",) if self.request.control else ()))

    @cached_property
    def precision(self) -> str:
        given = self.request.precision
        return auto_precision(self.bench.device) if given == "auto" else given

    @cached_property
    def made_from(self) -> dict[str, str]:
        """Who -> fingerprint of everything that its weights depend on."""
        r = self.request
        original = fingerprint(identity(r.model), r.template, self.precision)
        where = [r.sites, repr(r.lora), repr(r.locator), repr(r.budget), r.chunks]
        method = fingerprint(original, repr(r.method), texts(r.method), where, r.corpus.fingerprint(), r.seed)
        never = fingerprint(identity(r.control), r.template, self.precision) if r.control else ""
        return {"original": original, "forgotten": method, "never": never}

    def open(self) -> None:
        """Claim the folder and write what the report must know of the request."""
        r = self.request
        if team.rank() == 0:
            claim(self.out, 3 * weight_bytes(r.model))
            describe = {"settings": asdict(r.method), "name": r.method_name, "summary": r.method.summary}
            write_json(
                self.out / "run.json",
                {
                    "version": __version__,
                    "name": r.name,
                    "model": r.model,
                    "control": r.control,
                    "template": r.template,
                    "precision": self.precision,
                    "seed": r.seed,
                    "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, "
                    f"{team.size()} process(es), torch {torch.__version__}",
                    "method": describe | {"paper": r.method.paper, "sites": list(r.sites)}
                    | ({"lora": asdict(r.lora)} if r.lora else {})
                    | ({"chunks": r.chunks} if r.chunks > 1 else {})
                    | ({"located": {"locator": r.locator_name, "settings": asdict(r.locator),
                        "budget": {k: v for k, v in asdict(r.budget).items() if v}}} if r.locator else {}),
                    "attacks": {n: {"attack": kind(a), "summary": a.summary, "settings": asdict(a)}
                        | ({"reads": list(a.reads)} if hasattr(a, "reads") else {}) for n, a in r.attacks.items()},
                    "rule": asdict(r.rule),
                    "request": json.loads(json.dumps(dict(r.echo), default=str)),
                },
            )  # fmt: skip
            write_json(self.out / "corpus.json", {role: [asdict(x) for x in rows] for role, rows in r.corpus.items()})
            self.sweep()
        team.wait()

    def sweep(self) -> None:
        """Remove the pieces that another request left here: a report must not mix them with those of this one."""
        wanted = [self.audited(who) for who in self.models]
        wanted += [self.attacked(name, who) for name in self.request.attacks for who in self.models]
        wanted += [self.memory(who) for who in self.models]
        good = {path for path, made_from in wanted if self.kept(path, made_from)}
        places = (self.out / "audit", self.out / "memory", *(self.out / "attack" / x for x in self.request.attacks))
        for folder in places:
            for path in folder.glob("*.json"):
                if path not in good:
                    path.unlink()

    def lm(self, who: str) -> LM:
        if who not in self.loaded:
            r = self.request
            name = {"original": r.model, "forgotten": str(self.out / "model"), "never": r.control}[who]
            self.loaded[who] = load(name, template=r.template, precision=self.precision, device=self.bench.device)
            path, made_from = self.memory(who)
            known = read_json(path)
            if known and known["fingerprint"] == made_from:
                recalled(self.loaded[who], known, self.bench)
        return self.loaded[who]

    def only(self, *names: str) -> None:
        """Let go of all models but these: an attack is handed one or two, and may work on a copy of one of them."""
        self.loaded = {who: lm for who, lm in self.loaded.items() if who in names}

    def memory(self, who: str) -> tuple[Path, str]:
        """Where a model's readings and answers are kept, since an attack that leaves its weights alone asks much of it again.

        They go with their corpus, and with the version and the device that made them.
        """
        parts = (self.made_from[who], self.request.corpus.fingerprint(), self.bench.device, __version__)
        return self.out / "memory" / f"{who}.json", fingerprint(*parts)

    def kept(self, path: Path, made_from: str) -> bool:
        piece = read_json(path)
        return piece is not None and piece.get("fingerprint") == made_from

    def audited(self, who: str) -> tuple[Path, str]:
        """Where the audit of a model is kept, and the fingerprint of what it depends on."""
        r = self.request
        return self.out / "audit" / f"{who}.json", fingerprint(self.made_from[who], r.corpus.fingerprint(), r.audits)

    def attacked(self, name: str, who: str) -> tuple[Path, str]:
        """The same for a model under attack."""
        r = self.request
        attack = r.attacks[name]
        parts = (self.made_from[who], r.corpus.fingerprint(), repr(attack), r.seed, bool(r.control), *texts(attack))
        return self.out / "attack" / name / f"{who}.json", fingerprint(*parts)

    @cached_property
    def measured(self) -> Corpus:
        """What is measured of each model: all but the holdout where a control model takes its place."""
        out = ("holdout",) if self.request.control else ()
        corpus = Corpus({role: rows for role, rows in self.request.corpus.items() if role not in out})
        # what must not change is what the original says to the neighbours, whatever their file says
        return pinned(self.lm("original"), corpus, self.bench) if corpus.of("neighbour") else corpus

    def audit(self, who: str) -> None:
        """Every audit of the request on one model, unless it is there."""
        path, made_from = self.audited(who)
        if self.kept(path, made_from):
            return
        self.title(f"audit the {who} model" if who != "never" else "audit the never-taught model")
        began = time.monotonic()
        scores, answers, _ = self.measure(self.lm(who), self.measured, self.request.audits)
        self.store(path, made_from, time.monotonic() - began, scores, {"answers": answers})

    def measure(
        self, lm: LM, corpus: Corpus, names: tuple[str, ...], by: Any = None, bench: Bench | None = None
    ) -> tuple[list[Score], dict[str, str], float]:
        """Scores and answers of one model.  by: an attack that reads some scores itself; it took so many seconds."""
        scores, spent, bench = [], 0.0, bench or self.bench
        for at, name in enumerate(names):
            if not corpus.of(*AUDITS[name].roles):
                continue
            self.bench.say(name, at, len(names), {})
            ways = by.read if name in getattr(by, "reads", ()) else lambda audit, *given: audit(*given)
            since = time.monotonic()
            score = ways(AUDITS[name], lm, corpus, bench)
            spent += (time.monotonic() - since) * (name in getattr(by, "reads", ()))
            scores.append(score)
        shown = corpus.with_roles(retain=corpus.of("retain")[: len(corpus["forget"])])
        answers = spoken(lm, shown, ("forget", "retain"), self.bench)
        self.bench.say("", len(names), len(names), {})
        if team.rank() == 0:
            for who, own in self.loaded.items():
                if own.fingerprint == lm.fingerprint:
                    place, from_what = self.memory(who)
                    known = {"fingerprint": from_what} | saved(own, self.bench)
                    write_text(place, json.dumps(known, separators=(",", ":")))
        return scores, answers, spent

    def store(self, path: Path, made_from: str, seconds: float, scores: list[Score], more: dict[str, Any]) -> None:
        """Write a piece."""
        if team.rank() == 0:
            piece = {"fingerprint": made_from, "seconds": seconds, "scores": [asdict(score) for score in scores]}
            write_json(path, piece | more)
        team.wait()

    def locate(self) -> None:
        """Rank what the locator looks at, unless that is there; nothing where the request has no locator."""
        r, stamp = self.request, self.out / "locate.json"
        if not r.locator:
            return
        made_from = fingerprint(self.made_from["original"], repr(r.locator), r.corpus.fingerprint(), r.seed)
        if not self.kept(stamp, made_from):
            self.title(f"locate with {r.locator_name}")
            began, ranking = time.monotonic(), seeded(r.locator, r.seed)(self.lm("original"), r.corpus, self.bench)
            if team.rank() == 0:
                ranking.save(self.out / "sites.safetensors")
                best = [[name, index, float(ranking.scores[name][index])] for name, index in ranking.best(SHOWN)]
                piece = {
                    "fingerprint": made_from,
                    "seconds": time.monotonic() - began,
                    "unit": ranking.unit,
                    "best": best,
                }
                write_json(stamp, piece)
            team.wait()

    def forgotten(self) -> bool:
        return self.kept(self.out / "forget.json", self.made_from["forgotten"]) and (self.out / "model").is_dir()

    def forget(self) -> None:
        """Run the method and save its model, unless it is there."""
        if self.forgotten():
            return
        r, began = self.request, time.monotonic()
        self.title(f"forget with {r.method_name}")
        lm = self.lm("original")
        if r.lora:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(r.seed)  # peft draws the adapter's first weights
                lm = lm.adapted(r.lora.rank, r.lora.alpha, r.lora.targets)
            sites = Sites.named(lm.model, r.sites)  # none = everywhere, which in a LoRA model is its adapter
        elif r.locator:
            sites = select(Ranking.load(self.out / "sites.safetensors"), lm.model, r.budget)
        else:
            sites = Sites.named(lm.model, r.sites) if r.sites else EVERYWHERE
        work, stamp = self.out / "checkpoint", self.out / "checkpoint.json"
        log = self.out / "train.jsonl"
        if team.rank() == 0 and not self.kept(stamp, self.made_from["forgotten"]):
            shutil.rmtree(work, ignore_errors=True)
            log.unlink(missing_ok=True)
            write_json(stamp, {"fingerprint": self.made_from["forgotten"]})
        team.wait()
        method, bench = seeded(r.method, r.seed), replace(self.bench, folder=work, log=log)
        if r.chunks > 1:
            result = sequential(method, r.chunks, lm, r.corpus, sites, bench)
        else:
            result = method(lm, r.corpus, sites, bench)
        if team.rank() == 0:
            (self.out / "forget.json").unlink(missing_ok=True)  # it speaks of the model that goes now
            with whole(self.out / "model") as fresh:
                result.save(fresh)
            write_json(
                self.out / "forget.json",
                {
                    "fingerprint": self.made_from["forgotten"],
                    "seconds": time.monotonic() - began,
                    "peak bytes": peak_memory(),
                    "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                },
            )
            shutil.rmtree(work, ignore_errors=True)
        team.wait()
        self.loaded.pop("forgotten", None)

    def attack(self, name: str, who: str) -> None:
        """One attack on one model, and the audits that the verdict under it needs, unless they are there."""
        attack = self.request.attacks[name]
        path, made_from = self.attacked(name, who)
        if self.kept(path, made_from):
            return
        self.title(f"attack the {who} model: {name}" if who != "never" else f"attack the never-taught model: {name}")
        fewer = handed(self.measured, bool(self.request.control))
        names = tuple(n for n in AUDITS if n in (*EVIDENCE, *UTILITY))
        target = self.lm(who)
        original = target if alone(attack) else self.lm("original")
        plain = {x.id: x.prompt for x in fewer.of("forget", "retain")}
        began, spent, parts, puts = time.monotonic(), 0.0, [], 0
        bench = replace(self.bench, notes={})
        answers: dict[str, str] = {}
        asked: dict[str, str] = {}  # what the attack made of the questions
        try:
            for turn in getattr(attack, "turns", (attack,)):
                since = time.monotonic()
                # one that reads is an adversary who asks the model as it is, again and again
                lm, seen = (target, fewer) if hasattr(turn, "reads") else turn(target, fewer, original, bench)
                spent += time.monotonic() - since
                scores, said, reading = self.measure(lm, seen, names, turn, bench)
                puts += len(seen.of("forget")) * getattr(turn, "each", 1)
                spent += reading
                parts.append(scores)
                answers = said | answers
                prompts = {x.id: x.prompt for x in seen.of("forget", "retain") if x.id in said}
                asked |= {key: prompt for key, prompt in prompts.items() if plain.get(key) != prompt}
                del lm, seen  # before the next turn makes a copy of its own
        # no verdict under it, and the others go on: it finds nothing, cannot work here, did nothing as it is set, or broke
        except (NotApplicable, BadCorpus, BadModel, BadRequest, Diverged) as why:
            self.store(path, made_from, time.monotonic() - began, [], {"answers": {}, "refused": str(why)})
        else:
            found = {"answers": answers, "asked": asked, "spent": spent, "puts": puts, "notes": bench.notes}
            self.store(path, made_from, time.monotonic() - began, together(parts), found)


def lay(source: Path, target: Path) -> None:
    """Copy the pieces of the original and the never-taught model from one run folder into another.

    Where they fit, which their fingerprints tell, they are not made again there; elsewhere they are replaced.
    """
    for place in ("audit", "attack/*", "memory"):
        for who in ("original", "never"):
            for path in source.glob(f"{place}/{who}.json"):
                copy = target / path.relative_to(source)
                if not copy.exists() or copy.read_bytes() != path.read_bytes():
                    write_text(copy, path.read_text(encoding="utf-8"))


def kind(attack: Any) -> str:
    """Which attack it is, whatever a request calls it."""
    return next((name for name, made in ATTACKS.items() if type(attack) is made), type(attack).__name__)


def alone(attack: Any) -> bool:
    """Whether an attack never looks at the original, which then need not be in memory beside the attacked model."""
    return getattr(attack, "alone", False)


def texts(part: Any) -> list[str]:
    """What stands in the files of a method or an attack."""
    return [Path(file).read_text(encoding="utf-8") for file in getattr(part, "files", ())]


def seeded(part: Any, seed: int) -> Any:
    """A method or locator with the run's seed added to its own."""
    if hasattr(part, "plan"):
        return replace(part, plan=replace(part.plan, seed=part.plan.seed + seed))
    return replace(part, seed=part.seed + seed) if hasattr(part, "seed") else part


def weight_bytes(name: str) -> int:
    """Size of a local model's weights; 0 for what is not a folder or a file here."""
    path = Path(name)
    files = path.glob("*.safetensors") if path.is_dir() else [path] if path.is_file() else []
    return sum(file.stat().st_size for file in files)


def identity(name: str) -> Any:
    """What tells one model from another without reading its weights: its name, and names, sizes and times of its files."""
    path = Path(name)
    if check(name) in ("alias", "hub"):
        return name
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [name, *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())]
