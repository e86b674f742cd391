"""What `make bench` times: each stage once as ours and once as a plain script has it, over the same rows.

A stage is made for one side at a time, so that its peak memory can be read in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pydantic import TypeAdapter

from benchmarks.baselines import audit, speak
from benchmarks.baselines.step import BETA, step
from unremember.audit import AUDITS
from unremember.audit.prefixes import from_prefixes
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.embedded.dossier import dossier
from unremember.embedded.prose import prose
from unremember.embedded.world import world
from unremember.forget import METHODS
from unremember.forget.rmu import RMU
from unremember.lm import LM
from unremember.sites import EVERYWHERE, Sites
from unremember.table import read
from unremember.tokens import Row
from unremember.train import Plan, backward, batch, clipped

ROWS = 16  # to forget, and as many to retain
BUDGET = Bench().budget
LR = 1e-6
PLAN = Plan(steps=1, lr=LR)
RMU_STEP = RMU(PLAN, scale=5.0, alpha=10.0, depth=0.5)
STEPS: dict[str, tuple[str, dict]] = {
    "ascent": ("ascent", {}),
    "npo": ("npo", {"beta": BETA, "retain": 1.0}),
    "npo + KL": ("npo", {"beta": BETA, "retain": 0.0, "kl": 1.0}),
    "rmu": ("rmu", {"scale": RMU_STEP.scale, "alpha": RMU_STEP.alpha, "depth": RMU_STEP.depth}),
}
NEW = 32  # tokens of an answer
FACTS, PASSAGES, LONG, N = 6, 2, 32, 3  # of EL_3: texts of both kinds, tokens of each at most, n


def corpus() -> Corpus:
    people = dossier(0)
    return people.with_roles(prose=prose(), world=world()[:72])


def trained(lm: LM, name: str, given: Corpus) -> Callable[[], float]:
    """A step as `train` takes it -> its loss."""
    kind, settings = STEPS[name]
    method = TypeAdapter(METHODS[kind]).validate_python({"plan": PLAN, **settings})
    few = given.with_roles(forget=given["forget"][:ROWS], retain=given["retain"][:ROWS])
    if name == "ascent":  # as many rows as the others have, or its memory could not be compared with theirs
        few = few.with_roles(forget=few.of("forget", "retain"), retain=())
    pools, objective = method.terms(lm, few)
    sites: Sites = method.sites(lm) if kind == "rmu" else EVERYWHERE
    sites.open(lm.model)
    moving = [w for w in lm.model.parameters() if w.requires_grad]
    optimiser = torch.optim.AdamW(moving, lr=LR, betas=PLAN.betas, weight_decay=0.0, fused=True)

    def take() -> float:
        terms = backward(lm, objective, batch(pools, PLAN, 0, BUDGET), BUDGET)
        clipped(moving, PLAN.clip)
        optimiser.step()
        optimiser.zero_grad()
        return sum(terms.values())

    return take


@dataclass(frozen=True)
class Stage:
    """sides: 'ours' or 'plain' -> makes what is timed, of a model of its own.  texts: tokens of text that it deals with.

    target: how many times faster ours is to be.
    """

    sides: Mapping[str, Callable[[LM], Callable[[], object]]]
    texts: Callable[[LM], int]
    target: float | None
    about: str


def _step(name: str) -> Stage:
    def plain(lm: LM) -> Callable[[], float]:
        rows = {role: lm.template.rows(corpus()[role][:ROWS]) for role in ("forget", "retain")}
        return step(lm, name, rows["forget"], rows["retain"], LR, RMU_STEP)

    def texts(lm: LM) -> int:
        return sum(len(row.ids) for role in ("forget", "retain") for row in lm.template.rows(corpus()[role][:ROWS]))

    return Stage(
        {"ours": lambda lm: trained(lm, name, corpus()), "plain": plain}, texts, 3.0, f"training step of {name}"
    )


def _suite() -> Stage:
    def ours(lm: LM) -> Callable[[], object]:
        given = corpus()
        lm.fingerprint  # noqa: B018  hashed once in the life of a model

        def run() -> object:
            bench = Bench()
            return [AUDITS[name](lm, given, bench) for name in audit.METRICS]

        return run

    def plain(lm: LM) -> Callable[[], object]:
        given = corpus()
        lm.model.set_attn_implementation("sdpa")
        return lambda: [metric(lm, given) for metric in audit.METRICS.values()]

    def texts(lm: LM) -> int:
        examples = corpus().of("forget", "retain", "holdout", "world", "prose")
        return sum(len(row.ids) for row in lm.template.rows(examples))

    return Stage({"ours": ours, "plain": plain}, texts, 5.0, f"{len(audit.METRICS)} audits, a forward pass each")


def _pass() -> Stage:
    def some(lm: LM) -> list[Row]:
        examples = corpus().of("forget", "retain", "holdout")
        texts = [(f"{x.id}/{i}", x.prompt, t) for x in examples for i, t in enumerate((x.answer, *x.distractors))]
        return [lm.template.row(*text) for text in texts]

    def ours(lm: LM) -> Callable[[], object]:
        rows = some(lm)
        return lambda: read(lm, rows)

    def plain(lm: LM) -> Callable[[], object]:
        rows = some(lm)
        lm.model.set_attn_implementation("sdpa")
        return lambda: audit.read(lm, rows)

    about = "answers and distractors, read once"
    return Stage({"ours": ours, "plain": plain}, lambda lm: sum(len(row.ids) for row in some(lm)), None, about)


def _answers() -> Stage:
    def prompts(lm: LM) -> list[tuple[int, ...]]:
        return [lm.template.context(x.prompt) for x in corpus().of("forget", "retain", "holdout", "world")]

    def plain(lm: LM) -> Callable[[], object]:
        lm.model.set_attn_implementation("sdpa")
        asked = prompts(lm)
        return lambda: speak.answers(lm, asked, NEW)

    def ours(lm: LM) -> Callable[[], object]:
        asked = prompts(lm)
        return lambda: lm.generate(asked, NEW)

    return Stage(
        {"ours": ours, "plain": plain}, lambda lm: sum(map(len, prompts(lm))), 3.0, "greedy answers to all prompts"
    )


def _prefixes() -> Stage:
    def some(lm: LM) -> list[tuple[int, ...]]:
        examples = [*corpus()["forget"][:FACTS], *prose()[:PASSAGES]]
        return [lm.template.row(x.id, "", x.answer).ids[:-1][:LONG] for x in examples]

    def ours(lm: LM) -> Callable[[], object]:
        texts = some(lm)
        lm.fingerprint  # noqa: B018
        return lambda: from_prefixes(lm, texts, [range(1, len(ids) - N + 1) for ids in texts], Bench())

    def plain(lm: LM) -> Callable[[], object]:
        lm.model.set_attn_implementation("sdpa")
        texts = some(lm)
        return lambda: speak.from_prefixes(lm, texts, N)

    return Stage({"ours": ours, "plain": plain}, lambda lm: sum(map(len, some(lm))), 20.0, f"EL_{N} over every prefix")


STAGES: dict[str, Stage] = {
    **{name: _step(name) for name in STEPS},
    "audit pass": _pass(),
    "audit suite": _suite(),
    "generation": _answers(),
    "EL": _prefixes(),
}


def made(lm: LM, name: str, side: str) -> Callable[[], object]:
    """One side of a stage, on weights of its own."""
    return STAGES[name].sides[side](lm.copy())
