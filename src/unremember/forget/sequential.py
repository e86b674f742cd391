"""Forget in portions, one after another, each with a fresh optimiser, and look at all of them again after each.

Jang et al. 2023 (arXiv 2210.01504), "sequential unlearning": 128 sequences as 4 × 32 harmed the model less than all at once.
Differs: any method takes the place of ascent.  The portions follow the order of the forget role.  All stop at one level, that
of the model that came in: after the first portion the holdout is known less, too, and a level that sinks with the damage would
ask for more damage.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
from safetensors.torch import load_model, save_model

from unremember import team
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadRequest
from unremember.folder import read_json, whole, write_json
from unremember.lm import LM
from unremember.sites import Sites
from unremember.stop import known
from unremember.table import read


def portions(examples: tuple[Example, ...], chunks: int) -> list[tuple[Example, ...]]:
    """`chunks` runs of the examples, as equal as can be; BadRequest where there are fewer examples than that."""
    if chunks > len(examples):
        raise BadRequest(f"forget.chunks is {chunks} and there are {len(examples)} forget examples; ask for fewer")
    edges = [round(i * len(examples) / chunks) for i in range(chunks + 1)]
    return [examples[a:b] for a, b in pairwise(edges)]


def portioned(corpus: Corpus, part: tuple[Example, ...]) -> Corpus:
    """The corpus of one portion: of the role `new` it has the answers to its own questions."""
    prompts = {x.prompt for x in part}
    new = [x for x in corpus.of("new") if x.prompt in prompts]
    return corpus.with_roles(forget=part, **({"new": new} if new else {}))


def sequential(
    method: Callable[[LM, Corpus, Sites, Bench], LM], chunks: int, lm: LM, corpus: Corpus, sites: Sites, bench: Bench
) -> LM:
    """The method on each portion in turn; finished portions are kept under bench.folder, and are not done again.

    bench.log gets the steps of all portions, counted on, and after each portion a line `portions` with mean and worst
    probability of the sensitive tokens of every one of them: what was forgotten first must stay forgotten.
    """
    steps, levels = 0, {}
    if bench.folder and team.rank() == 0:
        bench.folder.mkdir(parents=True, exist_ok=True)
    team.wait()
    for at, part in enumerate(portions(corpus["forget"], chunks)):
        place = bench.folder / f"portion-{at}" if bench.folder else None
        log = (bench.folder or bench.log.parent) / f"portion-{at}.jsonl" if bench.log else None
        done = place / "model.safetensors" if place else None
        if done and done.exists():
            result = lm.copy()
            load_model(result.model, done)
            levels |= read_json(done.with_name("levels.json")) or {}
        else:
            work = replace(bench, folder=place / "work" if place else None, log=log, levels=levels)
            result = method(lm, portioned(corpus, part), sites, work)
            if place and team.rank() == 0:
                with whole(place) as fresh:
                    save_model(result.model, str(fresh / "model.safetensors"))
                    write_json(fresh / "levels.json", levels)
            team.wait()
        lm = result
        steps = _join(bench, log, at, steps, _look(lm, corpus, chunks, bench))
        if log and not bench.folder and team.rank() == 0:  # with a folder they go with it, once the model is safe
            log.unlink(missing_ok=True)
    return lm


def _look(lm: LM, corpus: Corpus, chunks: int, bench: Bench) -> list[dict[str, float]]:
    found = []
    for part in portions(corpus["forget"], chunks):
        values = [known(x, "probability") for x in read(lm, lm.template.rows(part, lm.limit), bench)]
        found.append({"mean": float(np.mean(values)), "worst": float(np.max(values))})
    return found


def _join(bench: Bench, log, at: int, steps: int, look: list[dict[str, float]]) -> int:
    """Write a portion's lines behind those of the ones before; returns how many steps there are now."""
    if not bench.log or team.rank() > 0:
        return steps
    lines = [json.loads(x) for x in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    before = bench.log.read_text(encoding="utf-8").splitlines() if bench.log.exists() and at else []
    kept = [x for x in before if json.loads(x)["portion"] < at]
    for line in lines:
        line["step"] += steps
        line["portion"] = at
        if "look" in line:
            line["look"]["step"] += steps
    if lines:
        lines[-1]["portions"] = look
    bench.log.write_text("".join(x + "\n" for x in [*kept, *map(json.dumps, lines)]), encoding="utf-8")
    return steps + len(lines)
