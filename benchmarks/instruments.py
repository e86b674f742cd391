"""`python -m benchmarks.instruments RUN`: exposure, LiRA, a tuned lens and a sparse autoencoder on the models of a run on people.

exposure    the telephone numbers of all people as canaries, among 2,000 random ones; three models
LiRA        eight shadows, each taught the retained people and half of the forget and holdout facts; three models.  Shadows are
            kept in RUN-shadows, so that a run that was stopped goes on
tuned lens  tuned on two thirds of the prose; nats from what the model says to what the lens shows, on the last third
autoencoder on what leaves the middle block, learnt on the world questions' and prose's tokens, read on the people's

Printed as JSON: means of exposure with intervals over people, LiRA's AUC with one over whole people, the others as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from unremember import team
from unremember.audit.exposure import Exposure, mean_exposure, null_level
from unremember.audit.separation import separation
from unremember.audit.shadows import Shadows
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.embedded.prose import prose
from unremember.embedded.world import world
from unremember.folder import read_json
from unremember.lm import LM
from unremember.loading import load
from unremember.locate.lens import LogitLens
from unremember.locate.sparse import Fit, activations, place, quality, recovered
from unremember.locate.tuned import Tune, divergence
from unremember.locate.tuned import read as streams
from unremember.machine import keep_memory
from unremember.request import again
from unremember.train import Plan

PHONE = "0##-####"


def exposed(models: dict[str, LM], corpus: Corpus, bench: Bench) -> dict:
    """Mean exposure of the telephone numbers, forgotten people's and those of strangers."""
    phones = Corpus({role: tuple(x for x in corpus[role] if x.id.endswith("/phone")) for role in ("forget", "holdout")})
    audit, found = Exposure(how="sampled", pattern=PHONE), {}
    for who, lm in models.items():
        values = audit(lm, phones, bench).per_example
        found[who] = {role: asdict(mean_exposure(values, [x.id for x in phones[role]])) for role in phones}
    return found | {"unseen": null_level(len(phones["forget"])), "cap": float(np.log2(audit.sample + 1))}


def shadowed(models: dict[str, LM], corpus: Corpus, base: LM, folder: Path, steps: int, bench: Bench) -> dict:
    """AUC of offline LiRA, forget against holdout, whole people in and out of the intervals together."""
    both = Corpus({role: corpus[role] for role in ("forget", "holdout", "retain")})
    plan = Plan(steps=steps, lr=3e-4, batch=24, warmup=2, schedule="linear")
    audit = Shadows(base, plan, count=8, always=("retain",), folder=folder)
    units, found = {x.id: x.entity for x in both.of("forget", "holdout")}, {}
    for who, lm in models.items():
        score = audit(lm, both, bench)
        sides = [[x.id for x in both[role]] for role in ("forget", "holdout")]
        auc = separation(score, *sides, units=units)["AUC"]
        found[who] = {"AUC": auc.value, "interval": (auc.low, auc.high), "by chance": auc.null, "people": auc.units}
        found[who] |= {
            f"mean z, {role}": float(np.mean([score.per_example[i] for i in ids]))
            for role, ids in zip(("forget", "holdout"), sides, strict=True)
        }
    return found


def lensed(lm: LM, bench: Bench) -> dict:
    """Nats from the model's own distribution, logit lens and tuned lens, at a few levels."""
    texts = prose()
    seen, unseen = texts[: 2 * len(texts) // 3], texts[2 * len(texts) // 3 :]
    lens, hidden = Tune(steps=80, batch=48)(lm, seen, bench), streams(lm, unseen, bench)  # each step is 31 heads
    plain, tuned = divergence(LogitLens.of(lm.model), hidden), divergence(lens, hidden)
    levels = range(0, len(plain), max(1, len(plain) // 6))
    return {
        "tokens": hidden.shape[1],
        "nearer at": f"{int((tuned[:-1] < plain[:-1]).sum())} of {len(plain) - 1} levels",
        "nats, logit and tuned": {level: (float(plain[level]), float(tuned[level])) for level in levels},
    }


def sparse(lm: LM, corpus: Corpus, bench: Bench) -> dict:
    """A dictionary of the middle block's output: what it explains of unseen text, and what is left of the loss with it."""
    site = place(lm.model, f"blocks.{(len(team.blocks(lm.model)) - 1) // 2}.hook_resid_post")
    learnt = activations(lm, (*prose(), *world()), site, bench)
    sae = Fit(features=1024, steps=1500, k=16)(learnt, site[0])
    unseen = corpus["holdout"]
    left = recovered(lm, unseen, site, sae, bench=bench)
    return {
        "site": site[0],
        "tokens": len(learnt),
        "on them": asdict(quality(sae, learnt)),
        "on unseen people": asdict(quality(sae, activations(lm, unseen, site, bench))),
        "loss recovered": asdict(left),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.instruments", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--base", default="smollm2-135m", help="what the run's models were taught from")
    parser.add_argument("--steps", type=int, default=16, help="of teaching, each shadow")
    parser.add_argument("--only", default="", help="parts whose name holds this text")
    args = parser.parse_args()
    keep_memory()
    wanted = again(args.run)
    precision, bench = (read_json(args.run / "run.json") or {})["precision"], Bench()
    names = {"original": wanted.model, "forgotten": str(args.run / "model"), "never taught": wanted.control}
    models = {who: load(name, template=wanted.template, precision=precision) for who, name in names.items() if name}
    base = replace(load(args.base, precision=precision), template=models["original"].template)
    parts = {
        "exposure": lambda: exposed(models, wanted.corpus, bench),
        "tuned lens": lambda: lensed(models["original"], bench),
        "autoencoder": lambda: sparse(models["original"], wanted.corpus, bench),
        "LiRA": lambda: shadowed(
            models, wanted.corpus, base, args.run.with_name(f"{args.run.name}-shadows"), args.steps, bench
        ),
    }
    for name, part in parts.items():
        if args.only not in name:
            continue
        began = time.perf_counter()
        found = part()
        print(
            json.dumps({name: found, "seconds": round(time.perf_counter() - began)}, indent=1, default=float),
            flush=True,
        )


if __name__ == "__main__":
    main()
