"""The only place that steps: order, micro-batches, accumulation, clipping, stopping, checkpoints.

Which rows a step sees is a pure function of (seed, step), so that resuming needs no sampler state and one process sees
what many see.  Every term is divided by the totals of its whole step before accumulation, so cutting a step into
micro-batches, or over processes, changes nothing but rounding.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember import team
from unremember.bench import BENCH, LEAST, Bench
from unremember.errors import BadModel, Diverged
from unremember.lm import LM
from unremember.recompute import recomputed
from unremember.sites import EVERYWHERE, Sites
from unremember.tokens import Row, Tokens, count, fitting, pack, packs, shares

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Part = Literal[
    "answer", "span"
]  # which tokens of a forget row a method works on: all of its answer, or the sensitive ones


class Objective(Protocol):
    """One packed micro-batch of one role -> named terms to add up.

    An objective may also have `before(lm, micros, step)`, called when a step (counted from 1) begins, for what must be known of
    the whole step (KGA's sign), and `after(lm, micros)`, called between the last backward pass and the optimiser, where it may
    edit gradients (PCGU's rows).  micros: this process's micro-batches of the step.  `alone = True`: it reads what it
    is given under hooks, in another precision or in passes of its own (Perturbed), so that micro-batches must not share one.
    """

    def __call__(self, lm: LM, tokens: Tokens, /) -> Mapping[str, Tensor]: ...


class Stop(Protocol):
    """Looks at the model after a step; True ends training.  every: steps between two looks; looks: what each one saw."""

    every: int
    looks: list[dict[str, float]]

    def __call__(self, lm: LM, step: int) -> bool: ...


@dataclass(frozen=True, config=STRICT)
class Plan:
    """How long and how hard to train.

    steps: the most that are taken.  lr: peak learning rate.  batch: rows of the first role a step, 0 = all of them.
    beside: rows of every other role a step, 0 = as many as of the first.
    warmup: steps of linear rise.  schedule: what follows.  clip: largest gradient norm, 0 = none.
    optimiser: 'adamw', or 'sgd' = plain gradient descent (betas are not used).
    stop: which level of the never-taught examples ends training early: 'probability' or 'accuracy' of the sensitive tokens
    (mean and worst example), 'preference' = probability, and the true answers no more preferred to their distractors, or
    'never'.  every: steps between two looks.
    """

    steps: Annotated[int, Field(ge=1)]
    lr: Annotated[float, Field(gt=0, lt=1)]
    batch: Annotated[int, Field(ge=0)] = 0
    beside: Annotated[int, Field(ge=0)] = 0
    warmup: Annotated[int, Field(ge=0)] = 0
    schedule: Annotated[str, Field(pattern="^(constant|cosine|linear)$")] = "constant"
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip: Annotated[float, Field(ge=0)] = 0.0
    optimiser: Annotated[str, Field(pattern="^(adamw|sgd)$")] = "adamw"
    seed: int = 0
    stop: Annotated[str, Field(pattern="^(probability|accuracy|preference|never)$")] = "never"
    every: Annotated[int, Field(ge=1)] = 1

    def rate(self, step: int) -> float:
        """Learning rate of 0-based `step`."""
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        done = step / self.steps
        fall = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}[self.schedule]
        return self.lr * rise * fall


def order(size: int, count: int, seed: int, step: int, role: str) -> list[int]:
    """`count` indices below `size` for 0-based `step`: epochs of fresh permutations, one after another, cut into steps."""
    chosen = []
    for position in range(step * count, (step + 1) * count):
        epoch, at = divmod(position, size)
        shuffled = np.random.default_rng([seed, epoch, zlib.crc32(role.encode())]).permutation(size)
        chosen.append(int(shuffled[at]))
    return chosen


def batch(pools: Mapping[str, Sequence[Row]], plan: Plan, step: int, budget: int) -> list[Tokens]:
    """The micro-batches of one step for this process; silent ones fill up so that all processes have as many."""
    first = next(iter(pools))
    lead = min(plan.batch or len(pools[first]), len(pools[first]))
    micros: list[Tokens] = []
    for role, pool in pools.items():
        width = lead if role == first else min(plan.beside or lead, len(pool))
        rows = [pool[i] for i in order(len(pool), width, plan.seed, step, role)]
        totals = len(rows), count(rows)
        many = team.size() > 1  # where a lane is half empty in one of them, all wait
        each = [packs(share, budget, even=many) for share in shares(rows, team.size())]
        mine, most = each[team.rank()], max(map(len, each))
        micros += [pack(group, role, totals) for group in mine]
        if len(mine) < most:
            short = min(rows, key=lambda row: len(row.ids))
            micros += [pack([[short]], role, totals).silent()] * (most - len(mine))
    return micros


def train(
    lm: LM,
    objective: Objective,
    pools: Mapping[str, Sequence[Row]],
    plan: Plan,
    *,
    sites: Sites = EVERYWHERE,
    stop: Stop | None = None,
    bench: Bench = BENCH,
    stage: str = "train",
) -> LM:
    """Minimise the sum of the objective's terms over rows drawn from `pools` (role -> rows); returns a new LM.

    With bench.folder, a checkpoint is kept there while training goes on, and a killed run continues from it with the
    same weights that an uninterrupted one would have (bit for bit in fp32 on one process).
    Where one process's GPU is too small for passes of bench.budget places, they become half as long until they fit, while
    LEAST are left.
    Raises Diverged where a loss or a gradient is not finite, BadModel for one in training mode; the argument is never touched.
    """
    if lm.model.training:
        raise BadModel(
            f"{lm.name or 'the model'} is in training mode, where dropout blurs what is held; call model.eval()"
        )
    # what stays is shared with the argument while we train; sharding is not known to leave it alone
    moving = sites.moving(lm.model)
    source, lm = lm, lm.copy(None if team.size() > 1 else moving)
    kept = sites.open(lm.model)
    lm = replace(lm, model=team.shard(lm.model, lm.precision, again=bench.recompute))
    weights = [w for w in lm.model.parameters() if w.requires_grad]
    optimiser: torch.optim.Optimizer = (
        torch.optim.SGD(weights, lr=plan.lr, weight_decay=plan.weight_decay)
        if plan.optimiser == "sgd"
        else torch.optim.AdamW(weights, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay, fused=True)
    )
    first = team.restore(bench.folder, lm.model, optimiser) if bench.folder else 0
    if bench.log and team.rank() == 0:
        rewind(bench.log, stage, first)
    before, after = (getattr(objective, name, _idle) for name in ("before", "after"))
    saved, took, places = time.monotonic(), 0.0, bench.budget
    stopped = stop is not None and _looks(stop, first) and stop(lm, first)
    for step in range(first, plan.steps):
        if stopped:
            break
        for group in optimiser.param_groups:
            group["lr"] = plan.rate(step)
        micros: list[Tokens] = []
        sums = None
        while sums is None:
            micros = [tokens.to(lm.device) for tokens in batch(pools, plan, step, places)]
            try:
                before(lm, micros, step + 1)
                with recomputed(lm.model, bench.recompute):
                    sums = team.total(backward(lm, objective, micros, places))
            except torch.OutOfMemoryError:
                if places < 2 * LEAST or team.size() > 1:  # the others would wait
                    raise
                micros, places = [], places // 2
                optimiser.zero_grad()
        after(lm, micros)
        norm = clipped(weights, plan.clip)
        if not np.isfinite([norm, *sums.values()]).all():
            raise Diverged(step + 1, sums | {"gradient norm": norm})
        team.scatter(lm.model)
        optimiser.step()
        optimiser.zero_grad()
        sites.hold(lm.model, kept)
        done = step + 1
        stopped = stop is not None and _looks(stop, done) and stop(lm, done)
        if bench.log and team.rank() == 0:
            line = {
                "stage": stage,
                "step": done,
                "terms": sums,
                "norm": norm,
                "lr": plan.rate(step),
                "places": places,
                "tokens": sum({t.role: t.step_tokens["train"] for t in micros}.values()),
            }
            look = {"look": stop.looks[-1], "stopped": stopped} if stop is not None and _looks(stop, done) else {}
            with bench.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | look) + "\n")
        bench.say(stage, done, plan.steps, sums)
        began = time.monotonic()
        late = began - saved > pause(bench.every, took)
        if bench.folder and team.size() > 1:
            late = bool(team.total({"late": float(late)})["late"])  # all or none
        if bench.folder and late and done < plan.steps and not stopped:
            team.save(bench.folder, lm.model, optimiser, done)
            saved = time.monotonic()
            took = saved - began
    if team.size() > 1:
        team.scatter(lm.model)
        result = source.copy()
        result.model.load_state_dict(team.whole_state(lm.model))
    else:
        del optimiser, weights  # and their moments, before the result gets all weights for itself
        result = lm
        for name, weight in lm.model.named_parameters():
            if name not in moving:
                weight.data = weight.detach().clone()
    for weight in result.model.parameters():
        weight.requires_grad_(True)
        weight.grad = None
    if bench.folder and team.rank() == 0:
        shutil.rmtree(bench.folder, ignore_errors=True)
    team.wait()
    return replace(source, model=result.model.eval())


def backward(lm: LM, objective: Objective, micros: Sequence[Tokens], budget: int) -> dict[str, float]:
    """Add the gradients of a step's terms to what the weights have; returns the terms.

    Micro-batches share a pass where they fit into one of `budget` places, in every process; but not for an objective that makes
    its own.
    """
    shapes = team.most([tuple(tokens.ids.shape) for tokens in micros])
    alone = getattr(objective, "alone", False)
    sums: dict[str, float] = {}
    with lm.casts():
        for places in [[at] for at in range(len(micros))] if alone else fitting(shapes, budget):
            group = [micros[at] for at in places]
            shared, losses = lm.together(group), []
            for tokens in group:
                for name, value in objective(shared, tokens).items():
                    losses.append(value)
                    sums[name] = sums.get(name, 0.0) + float(value.detach())
            # FSDP2 averages over processes, and our terms must add up
            (torch.stack(losses).sum() * team.size()).backward()
    return sums


def clipped(weights: Sequence[Tensor], most: float) -> float:
    """Scale the gradients down to a norm of `most`, 0 = none; returns the norm that they had."""
    reached: Any = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
    if most:
        torch.nn.utils.clip_grads_with_norm_(weights, most, reached)
    return float(reached.full_tensor() if hasattr(reached, "full_tensor") else reached)


def pause(every: float, took: float) -> float:
    """Seconds to the next checkpoint, where the last one took `took`: a twentieth of the time, but ten times `every` at most."""
    return max(every, min(20 * took, 10 * every))


def _idle(*_: object) -> None:
    """What most objectives do before and after a step."""


def _looks(stop: Stop, step: int) -> bool:
    return step % stop.every == 0


def rewind(log: Path, stage: str, step: int) -> None:
    """Drop from the log what this stage will do again."""
    if log.exists():
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if (row := json.loads(line))["stage"] != stage or row["step"] <= step]
        log.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
