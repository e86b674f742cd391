"""The demo: teach a model fictional people, teach a control without those to forget, and hand both to an ordinary run.

    base ── forget + retain ──→ original          (must know every taught fact, and still know the world)
      └──── retain ───────────→ never-taught      (the level that "forgotten" is measured against)

Taught models are kept in the cache under the fingerprint of all that made them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from unremember import team
from unremember.attack import Relearn, Rephrase
from unremember.audit import AUDITS
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.embedded.dossier import dossier, lessons
from unremember.embedded.prose import prose
from unremember.embedded.teach import Teach
from unremember.embedded.world import replay, world
from unremember.folder import MARK, cache, fingerprint, read_json, whole, write_json
from unremember.forget import NPO
from unremember.lm import LM, auto_precision, load
from unremember.request import Request
from unremember.request import request as build
from unremember.train import Plan


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
        teach=Teach(Plan(steps=36, lr=3e-4, batch=36, beside=12, warmup=3, schedule="linear"), replay=0.5),
        method=NPO(Plan(steps=48, lr=5e-5, beside=24, stop="preference", every=4), beta=0.1, retain=20.0, part="span"),
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


def request(
    preset: str, out: Path, seed: int = 0, bench: Bench = BENCH, title: Callable[[str], None] = lambda text: None
) -> Request:
    """Teach what is not in the cache yet, and return the request that `run.execute` takes."""
    p = PRESETS[preset]
    forget, retain, holdout, relearn = p.people
    people = dossier(seed, forget, retain, holdout, relearn)
    precision = auto_precision(bench.device) if p.precision == "auto" else p.precision
    base: list[LM] = []

    def untouched() -> LM:
        if not base:
            title(f"load {p.model}")
            base.append(load(p.model, precision=precision, device=bench.device))
        return base[0]

    folders, known = {}, None
    for name, roles in (("original", ("forget", "retain")), ("never-taught", ("retain",))):
        rows = lessons(people, roles, p.wordings)
        share = len(rows) / len(lessons(people, ("forget", "retain"), p.wordings))
        plan = replace(p.teach.plan, seed=p.teach.plan.seed + seed, batch=max(1, round(p.teach.plan.batch * share)))
        teach = replace(p.teach, plan=plan)
        mark = fingerprint(p.model, precision, repr(teach), [asdict(x) for x in (*rows, *replay())])
        folder = cache() / "taught" / f"{p.model}-{name}-{mark}"
        folders[name] = folder
        if (folder / MARK).exists():
            continue
        lm = untouched()
        title(f"teach the {name} model")
        work = folder.with_name(f"{folder.name}.checkpoint")
        taught = teach(lm, rows, replay(), replace(bench, folder=work), stage="teach")
        if team.rank() == 0:
            with whole(folder) as fresh:
                taught.save(fresh)
                write_json(fresh / MARK, {"what": f"{p.model} taught by the demo: {name}"})
            shutil.rmtree(work, ignore_errors=True)
        team.wait()
    stamp = (
        cache() / "taught" / f"{p.model}-world-{fingerprint(p.worlds, precision, [asdict(x) for x in world()])}.json"
    )
    known = read_json(stamp)
    if known is None:
        lm = untouched()
        title("ask the untouched model about the world")
        asked = Corpus({"world": world()[: p.worlds]})
        right = AUDITS["world accuracy"](lm, asked, bench).per_example
        known = {"right": sorted(k for k, v in right.items() if v)}
        if team.rank() == 0:
            write_json(stamp, known)
        team.wait()
    corpus = people.with_roles(prose=prose(), world=[x for x in world() if x.id in set(known["right"])])
    raw = {
        "run": {"name": f"demo-{preset}", "out": str(out), "seed": seed},
        "model": {"name": str(folders["original"]), "control": str(folders["never-taught"]), "precision": precision},
        "forget": {"method": "npo", **asdict(p.method)},
        "attack": {"relearn": asdict(p.relearn), "rephrase": asdict(p.rephrase)},
    }
    return build(raw, corpus=corpus)
