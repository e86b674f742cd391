"""The demo: teach a model fictional people, teach a control without those to forget, and hand both to an ordinary run.

    base ── forget + retain ──→ original          (must know every taught fact, and still know the world)
      └──── retain ───────────→ never-taught      (the level that "forgotten" is measured against)

Taught models are kept in the cache under the fingerprint of all that made them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from unremember import team
from unremember.attack import Relearn, Rephrase
from unremember.audit import AUDITS
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.embedded.dossier import dossier, lessons
from unremember.embedded.prose import prose
from unremember.embedded.teach import Teach
from unremember.embedded.world import replay, world
from unremember.folder import MARK, cache, claim, fingerprint, read_json, whole, write_json
from unremember.forget import NPO
from unremember.lm import LM
from unremember.loading import auto_precision, load
from unremember.request import Request
from unremember.request import request as build
from unremember.run import execute, lay
from unremember.train import Plan

MEASURED = (  # a short demo
    "EL_3",
    "ROUGE-L F1",
    "ROUGE-L recall",
    "exact match",
    "memorisation accuracy",
    "preference gap",
    "probability",
    "truth ratio",
)


@dataclass(frozen=True)
class Preset:
    """Everything that the demo on one base model is made of."""

    model: str
    people: tuple[int, int, int, int]  # forget, retain, holdout, relearn
    teach: Teach
    method: NPO
    relearn: Relearn
    rephrase: Rephrase
    worlds: int
    wordings: int = 1
    precision: str = "auto"


PRESETS = {
    "smollm2": Preset(
        model="smollm2-135m",
        people=(4, 8, 4, 2),
        teach=Teach(Plan(steps=34, lr=3e-4, batch=36, beside=12, warmup=3, schedule="linear"), replay=0.5),
        method=NPO(Plan(steps=48, lr=5e-5, beside=24, stop="preference", every=6), beta=0.1, retain=20.0, part="span"),
        relearn=Relearn(Plan(steps=10, lr=2e-5)),
        rephrase=Rephrase(wordings=2),
        worlds=72,
    ),
    "tiny": Preset(
        model="tiny",
        people=(2, 3, 4, 1),
        teach=Teach(Plan(steps=150, lr=3e-3, batch=32, beside=16, warmup=5, schedule="linear"), replay=1.0),
        method=NPO(Plan(steps=80, lr=3e-4, beside=36, stop="probability", every=2), beta=0.1, retain=5.0, part="span"),
        relearn=Relearn(Plan(steps=10, lr=2e-4)),
        rephrase=Rephrase(wordings=2),
        worlds=48,
        precision="fp32",  # bit for bit the same after an interruption, and no slower at this size
    ),
}


def demo(
    preset: str, out: Path, seed: int = 0, bench: Bench = BENCH, title: Callable[[str], None] = lambda text: None
) -> dict:
    """The whole demo; what it measured of the taught models is kept in the cache with them, for the next one."""
    wanted = request(preset, out, seed, bench, title)
    mark = fingerprint(wanted.model, wanted.control, wanted.corpus.fingerprint(), repr(wanted.attacks))
    pieces = cache() / "taught" / f"pieces-{mark}"
    if team.rank() == 0:
        claim(out)
        lay(pieces, out)
    team.wait()
    result = execute(wanted, bench, title)
    if team.rank() == 0:
        lay(out, pieces)
    return result


def request(
    preset: str, out: Path, seed: int = 0, bench: Bench = BENCH, title: Callable[[str], None] = lambda text: None
) -> Request:
    """Teach what is not in the cache yet, and return the request that `run.execute` takes."""
    p = PRESETS[preset]
    people = dossier(seed, *p.people)
    precision = auto_precision(bench.device) if p.precision == "auto" else p.precision
    base = Base(p.model, precision, bench, title)
    folders = {
        name: taught(base, name, lessons(people, roles, p.wordings), share, p.teach, seed)
        for name, roles, share in pair(people)
    }
    corpus = people.with_roles(prose=prose(), world=known(base, p.worlds))
    raw = {
        "run": {"name": f"demo-{preset}", "out": str(out), "seed": seed},
        "model": {"name": str(folders["original"]), "control": str(folders["never-taught"]), "precision": precision},
        "forget": {"method": "npo", **asdict(p.method)},
        "audit": {"audits": list(MEASURED)},
        "attack": {"relearn": asdict(p.relearn), "rephrase": asdict(p.rephrase)},
    }
    return build(raw, corpus=corpus)


@dataclass
class Base:
    """The untouched model, loaded when somebody first needs it."""

    model: str
    precision: str
    bench: Bench
    title: Callable[[str], None]

    @cached_property
    def lm(self) -> LM:
        self.title(f"load {self.model}")
        return load(self.model, precision=self.precision, device=self.bench.device)


def pair(corpus: Corpus) -> tuple[tuple[str, tuple[str, ...], float], ...]:
    """Name, taught roles and share of all lessons, of the original and of its never-taught twin."""
    share = len(corpus["retain"]) / len(corpus.of("forget", "retain"))
    return ("original", ("forget", "retain"), 1.0), ("never-taught", ("retain",), share)


def taught(base: Base, name: str, rows: Sequence[Example], share: float, teach: Teach, seed: int) -> Path:
    """The folder of `base` taught these lessons, from the cache where it is there.

    share: of all lessons; the batch shrinks with it, so that every lesson is seen as often in both models.
    """
    plan = replace(teach.plan, seed=teach.plan.seed + seed, batch=max(1, round(teach.plan.batch * share)))
    teach = replace(teach, plan=plan)
    mark = fingerprint(base.model, base.precision, repr(teach), [asdict(x) for x in (*rows, *replay())])
    folder = cache() / "taught" / f"{Path(base.model).name}-{name}-{mark}"
    if (folder / MARK).exists():
        return folder
    lm = base.lm
    base.title(f"teach the {name} model")
    work = folder.with_name(f"{folder.name}.checkpoint")
    result = teach(lm, rows, replay(), replace(base.bench, folder=work), stage="teach")
    if team.rank() == 0:
        if not (folder / MARK).exists():  # a process that was quicker may be at work with its own, which is the same
            with whole(folder) as fresh:
                result.save(fresh)
                write_json(fresh / MARK, {"what": f"{base.model} taught: {name}"})
        shutil.rmtree(work, ignore_errors=True)
    team.wait()
    return folder


def known(base: Base, worlds: int) -> tuple[Example, ...]:
    """Those of the first `worlds` world questions that the untouched model answers rightly; asked once, and cached."""
    mark = fingerprint(worlds, base.precision, [asdict(x) for x in world()])
    stamp = cache() / "taught" / f"{Path(base.model).name}-world-{mark}.json"
    found = read_json(stamp)
    if found is None:
        lm = base.lm
        base.title("ask the untouched model about the world")
        right = AUDITS["world accuracy"](lm, Corpus({"world": world()[:worlds]}), base.bench).per_example
        found = {"right": sorted(k for k, v in right.items() if v)}
        if team.rank() == 0:
            write_json(stamp, found)
        team.wait()
    return tuple(x for x in world() if x.id in set(found["right"]))
