"""F-Learning: finetune on what must go, take the change that this made, and subtract it; then learn what is true now.

    δ = FT(θ, old) − θ          θ' = θ − λ · δ          θ* = FT(θ', new)          FT: mean_tokens nll of the answers

Ni, Chen, Li, Hu, Xu, Yang 2024 (arXiv 2311.08011), Eqs. 1–3.  No official code was at hand; the arithmetic is in arithmetic.py.
With `rank`, δ is what a LoRA adapter adds, (alpha / r) · B A, taken from the dense weights; with `learn_rank` the new answers are
learnt by one as well, and merged.
Differs: λ is the smallest of a declared grid at which the stopper says gone; one finetuning serves them all, and the forget
questions themselves are looked at, never their paraphrases, which stay unseen for the audit.  The level of the never-taught is
the target, and no cap on prose NLL.  Facts that the model does not know are refused: δ would teach them.  No weight decay while
δ is made: it would become a part of δ, and subtracting would inflate every weight.  Where the request itself trains an adapter,
only its B moves while δ is made, because the adapter's product is linear in B and not in A and B together.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass as plain
from dataclasses import field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadRequest
from unremember.folder import fingerprint, read_json, write_json
from unremember.forget.arithmetic import difference, low_rank, subtract
from unremember.lm import LM
from unremember.sites import EVERYWHERE, Sites
from unremember.stop import Stopper, known
from unremember.table import read
from unremember.tokens import Row, Tokens
from unremember.train import STRICT, Objective, Part, Plan, rewind, train

KNOWN = 0.5  # share of the old value tokens that the model must get right before they can be taken away


def _rising(grid: tuple[float, ...]) -> tuple[float, ...]:
    if any(a >= b for a, b in pairwise(grid)):
        raise ValueError("write the strengths from the smallest to the largest, each once")
    return grid


Grid = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1), AfterValidator(_rising)]


@dataclass(frozen=True, config=STRICT)
class FLearning:
    """plan: how δ is made; its level is what the search stops at.  With the level 'never' the largest strength is taken.

    strength: the λ that are tried, from the smallest on; where the level is not reached the largest stays (the report's CAP).
    learn: how the role `new` is learnt afterwards, None = not at all; its seed is added to that of `plan`.
    rank, learn_rank: 0 = whole weights, else the rank of an adapter whose product counts.  alpha: of both adapters.
    part: the tokens of an old answer that δ is made of.
    """

    plan: Plan
    strength: Grid
    learn: Plan | None = None
    rank: Annotated[int, Field(ge=0)] = 0
    learn_rank: Annotated[int, Field(ge=0)] = 0
    alpha: Annotated[int, Field(ge=1)] = 16
    part: Part = "answer"

    paper = "Ni et al. 2024, arXiv 2311.08011"
    summary = "subtracts what finetuning on the old answers adds, then learns the new ones, if there are any"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("forget", "new") if self.learn else ("forget",)

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        self.check(corpus)
        self._fits(lm, sites)
        old = lm.template.rows(corpus["forget"], lm.limit)
        new = lm.template.rows(corpus["new"], lm.limit) if self.learn else []
        stop = Stopper.calibrated(lm, corpus, self.plan.stop, 1, False, bench)
        work = self._work(lm, corpus, sites, bench)
        if not (stop and stop(lm, 0)):
            _must_know(lm, old, bench)
            lm = self._search(lm, self._vector(lm, old, sites, bench, work), stop, bench, work)
        if self.learn:
            lm = self._learnt(lm, new, self.learn, sites, stop, bench, work)
        if bench.folder and team.rank() == 0:
            shutil.rmtree(bench.folder, ignore_errors=True)
        team.wait()
        return lm

    def check(self, corpus: Corpus) -> None:
        """BadRequest for plans that make no sense here, BadCorpus where old and new answers do not belong together."""
        corpus.require("flearning", self.needs)
        wrong = []
        if self.plan.weight_decay:
            wrong.append(
                f"forget.plan.weight_decay is {self.plan.weight_decay:g}; flearning subtracts all that this stage changes, "
                "and would blow up every weight by what decayed: set it to 0"
            )
        if self.learn and self.learn.stop != "never":
            wrong.append(
                f'forget.learn.stop is {self.learn.stop!r}; learning takes all its steps: set it to "never" '
                "(forget.plan.stop is the level for the strength)"
            )
        if self.learn_rank and not self.learn:
            wrong.append(
                f"forget.learn_rank is {self.learn_rank} and nothing is learnt; give forget.learn, or set it to 0"
            )
        if wrong:
            raise BadRequest(wrong)
        if problems := updates(corpus, bool(self.learn)):
            raise BadCorpus(problems)

    def _fits(self, lm: LM, sites: Sites) -> None:
        """BadRequest where adapters of our own and the request's adapter or sites exclude one another."""
        if not (self.rank or self.learn_rank):
            return
        if hasattr(lm.model, "peft_config"):
            raise BadRequest(
                f"forget.lora trains an adapter already, and forget.rank = {self.rank}, learn_rank = {self.learn_rank} ask for "
                "others of their own; leave forget.lora out, or set both ranks to 0"
            )
        if partial := [name for name, mask in sites.masks.items() if mask is not None]:
            raise BadRequest(
                f"sites open a part of {partial[0]!r}, and what an adapter adds fills its whole matrix; "
                "name whole parameters, or set forget.rank and forget.learn_rank to 0"
            )

    def _work(self, lm: LM, corpus: Corpus, sites: Sites, bench: Bench) -> Path | None:
        """Where this very start, corpus and setting keep their pieces: δ of another model is never taken up."""
        if bench.folder is None:
            return None
        opened = [(name, -1 if mask is None else int(mask.sum())) for name, mask in sorted(sites.masks.items())]
        return bench.folder / fingerprint(lm.fingerprint, repr(self), corpus.fingerprint(), opened, sites.everywhere)

    def _vector(self, lm: LM, rows: list[Row], sites: Sites, bench: Bench, work: Path | None) -> dict[str, Tensor]:
        """δ, by parameter name: what finetuning on the old answers changes."""
        kept = work / "vector.safetensors" if work else None
        if kept and kept.exists():
            return load_file(kept)
        pools, objective = {"old": rows}, _finetuning(self.part)
        inner = replace(bench, folder=work / "old" if work else None)
        if self.rank:
            delta = _added(self._adapted(lm, self.rank, objective, pools, self.plan, sites, None, inner, "old"))
        else:
            tuned = train(lm, objective, pools, self.plan, sites=_linear(lm, sites), bench=inner, stage="old")
            whole = difference(dict(lm.model.named_parameters()), dict(tuned.model.named_parameters()))
            delta = {name: change for name, change in whole.items() if change.any()}
        if kept and team.rank() == 0:
            kept.parent.mkdir(parents=True, exist_ok=True)
            fresh = kept.with_name(f".{kept.name}")
            save_file({name: change.contiguous() for name, change in delta.items()}, fresh)
            fresh.rename(kept)
        team.wait()
        return delta

    def _search(self, lm: LM, delta: dict[str, Tensor], stop: Stopper | None, bench: Bench, work: Path | None) -> LM:
        """θ − λ·δ at the smallest strength whose look says gone, or at the largest."""
        state = work / "search.json" if work else None
        past = (read_json(state) if state else None) or {"tried": 0, "gone": False}
        first = past["tried"]
        if past["gone"] or first == len(self.strength):
            return taken(lm, delta, self.strength[first - 1])
        if bench.log and team.rank() == 0:
            rewind(bench.log, "forget", first)
        tries = tuple(enumerate(self.strength, 1)) if stop else ((len(self.strength), self.strength[-1]),)
        norm = math.sqrt(sum(float(delta[name].square().sum()) for name in sorted(delta)))
        for step, strength in tries[first if stop else 0 :]:
            found = taken(lm, delta, strength)
            gone = stop is not None and stop(found, step)
            terms = {"strength": strength}
            line = {"stage": "forget", "step": step, "terms": terms, "norm": strength * norm, "lr": 0.0}
            line |= {"places": 0, "tokens": 0}
            if bench.log and team.rank() == 0:
                look = {"look": stop.looks[-1], "stopped": gone} if stop else {}
                with bench.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line | look) + "\n")
            bench.say("forget", step, len(self.strength), terms)
            if state and team.rank() == 0:
                write_json(state, {"tried": step, "gone": gone})
            if gone:
                break
        return found

    def _learnt(
        self, lm: LM, rows: list[Row], plan: Plan, sites: Sites, stop: Stopper | None, bench: Bench, work: Path | None
    ) -> LM:
        """The new answers on top, end marks included; the last step is looked at again."""
        plan = replace(plan, seed=plan.seed + self.plan.seed)
        pools, objective = {"new": rows}, _finetuning("train")
        inner = replace(bench, folder=work / "learn" if work else None)
        watch = _AtTheEnd(stop, plan.steps, len(self.strength)) if stop else None
        if not self.learn_rank:
            return train(lm, objective, pools, plan, sites=sites, stop=watch, bench=inner, stage="learn")
        tuned = self._adapted(lm, self.learn_rank, objective, pools, plan, sites, watch, inner, "learn")
        return taken(lm, _added(tuned), -1.0)

    def _adapted(
        self,
        lm: LM,
        rank: int,
        objective: Objective,
        pools: dict[str, list[Row]],
        plan: Plan,
        sites: Sites,
        watch: _AtTheEnd | None,
        bench: Bench,
        stage: str,
    ) -> LM:
        """An adapter of this rank, trained on `pools` over frozen weights; only over the sites."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)  # peft draws A
            fresh = lm.adapted(rank, self.alpha, "all-linear" if sites.everywhere else _targets(lm.model, sites))
        return train(fresh, objective, pools, plan, stop=watch, bench=bench, stage=stage)


def updates(corpus: Corpus, learn: bool) -> list[str]:
    """What is wrong with `forget` as old answers and, where they are learnt, with `new` as the answers in their place."""
    problems = []
    for role in ("forget", *(("new",) if learn else ())):
        for prompt, count in Counter(x.prompt for x in corpus[role] if x.prompt).items():
            if count > 1:
                problems.append(
                    f"{role}: {prompt[:60]!r} is asked {count} times; a question has one answer now, keep that one"
                )
    if not learn:
        return problems
    problems += [
        f"{role}: {x.id!r} has no prompt, so nothing says which answer takes its place; ask a question"
        for role in ("forget", "new")
        for x in corpus[role]
        if not x.prompt
    ]
    old, new = ({x.prompt: x for x in corpus[role] if x.prompt} for role in ("forget", "new"))
    for prompt in [*(p for p in old if p not in new), *(p for p in new if p not in old)]:
        here, there = ("forget", "new") if prompt in old else ("new", "forget")
        problems.append(f"{here}: {prompt[:60]!r} has no counterpart in {there}; add it there, or remove it here")
    for prompt, x in new.items():
        if prompt in old and _normal(x.answer) == _normal(old[prompt].answer):
            problems.append(
                f"new: the answer of {x.id!r} is the old one, {x.answer[:60]!r}; there is nothing to update"
            )
    return problems


def taken(lm: LM, delta: dict[str, Tensor], strength: float) -> LM:
    """A copy of `lm` with weights θ − strength · δ."""
    result = lm.copy()
    with torch.no_grad():
        moved = subtract({name: w for name, w in lm.model.named_parameters() if name in delta}, delta, strength)
        for name, weight in result.model.named_parameters():
            if name in moved:
                weight.copy_(moved[name])
    return result


def _normal(answer: str) -> str:
    return " ".join(answer.split()).casefold().rstrip(".")


def _finetuning(part: str) -> Objective:
    """Cross-entropy, mean over the tokens of `part` in the whole step."""

    def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
        return {tokens.role: tokens.per_row(-lm.logp(tokens), part).sum() / tokens.step_tokens[part]}

    return objective


def _must_know(lm: LM, rows: Sequence[Row], bench: Bench) -> None:
    """BadCorpus where the model does not know what is to be taken from it; a warning where it does not know some of it."""
    right = {row.key: known(x, "accuracy") for row, x in zip(rows, read(lm, rows, bench), strict=True)}
    mean = sum(right.values()) / len(right)
    strange = [key for key, share in right.items() if share < KNOWN]
    if mean < KNOWN:
        raise BadCorpus(
            f"flearning takes away what the model knows, and it gets {mean:.0%} of the tokens of these old answers right (at "
            f"least {KNOWN:.0%} are needed): what it never knew would be taught, not taken; remove {', '.join(strange[:5])} "
            f"({len(strange)} in all)"
        )
    if strange:
        warnings.warn(
            f"flearning takes away what the model knows, and it does not know {', '.join(strange[:5])} ({len(strange)} of "
            f"{len(right)}); what finetuning teaches of these is subtracted, too: remove them",
            stacklevel=2,
        )


def _linear(lm: LM, sites: Sites) -> Sites:
    """The sites themselves; in an adapter their B alone, in which what it adds is linear."""
    if not hasattr(lm.model, "peft_config"):
        return sites
    names = [n for n, _ in lm.model.named_parameters()] if sites.everywhere else list(sites.masks)
    masks = {n: sites.masks.get(n) for n in names if "lora_B" in n}
    if not masks:
        raise BadRequest("sites open no 'lora_B' weight, in which what an adapter adds is linear; open those, too")
    return Sites(masks)


def _targets(model: nn.Module, sites: Sites) -> str:
    """A pattern of the linear modules whose weights the sites open; BadRequest for sites that an adapter cannot move."""
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if strange := [name for name in sites.masks if name not in names]:
        raise BadRequest(
            f"sites open {strange[0]!r} ({len(strange)} such), which no adapter can move; name weights of linear layers, or "
            "set forget.rank and forget.learn_rank to 0"
        )
    return "|".join(re.escape(name.removesuffix(".weight")) for name in sites.masks)


def _added(lm: LM) -> dict[str, Tensor]:
    """What an adapter adds to each dense weight, by the name that the weight has without it."""
    delta = {}
    for name, module in lm.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            change = low_rank(down, up, module.lora_alpha["default"])
            turned = (
                change.T if module.fan_in_fan_out else change
            )  # GPT-2's layers hold their matrix the other way round
            delta[f"{name.removeprefix('base_model.model.')}.weight"] = turned
    return delta


@plain
class _AtTheEnd:
    """Looks once, after the last step of learning, whether the old answers are still gone; ends nothing before that."""

    stop: Stopper
    every: int
    before: int  # steps of the search, after which these are counted
    looks: list[dict[str, float]] = field(default_factory=list)

    def __call__(self, lm: LM, step: int) -> bool:
        if step < self.every:
            return False
        gone = self.stop(lm, self.before + step)
        self.looks.append(self.stop.looks[-1])
        return gone
