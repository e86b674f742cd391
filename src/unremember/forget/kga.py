"""Knowledge gap alignment: make the model as strange to the forget text as it is to text that it never saw.

    loss = | g_f − g_n |  +  alpha · mean_tokens KL(p_D ‖ p_θ)(retain)
    g_n  = mean_tokens KL(p_n ‖ p_D)(holdout)          g_f = mean_tokens KL(p_f ‖ p_θ)(forget)

p_D is the LM that came in; p_f and p_n are two helpers that learnt the forget rows and the holdout rows by one recipe.  The
gradient pushes the model away from p_f until its gap is g_n, and pulls it back beyond.
Wang, Chen, Yuan, Zeng, Wong, Yin, ACL 2023 (arXiv 2305.06535).  Reference code: Lingzhi-WANG/KGAUnlearn@703dd79.
Differs: one direction of KL and one weight alpha for all tasks (that code turns the KL round and weighs by 1 − alpha for
classification); means over scored tokens (there sums over padding, divided by the batch, or means over classes too).  g_n is
one number, as all in it is frozen; p_f is kept as float16 numbers; the helpers go before forgetting begins.  The gap counts
as closed on the whole forget set, from the near side: |·| crosses zero, and a batch does so by chance.
A closed gap is not yet erasure: it is a mean, and some tokens may go far while others stay.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass as plain
from dataclasses import field, replace
from functools import cache
from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadInput, BadModel, BadRequest
from unremember.folder import fingerprint
from unremember.forget.reference import BUDGET, distributions, recall
from unremember.forget.retain import Keep, keeping, kl_loss
from unremember.lm import LM
from unremember.loading import check as check_name
from unremember.loading import load
from unremember.sites import EVERYWHERE, Sites
from unremember.stop import Stopper
from unremember.table import read
from unremember.tokens import Row, Tokens, count, pack, packs
from unremember.train import STRICT, Part, Plan, order, train

LEARNT = 0.9  # share of its own tokens that a helper must hit
LEAST = 0.05  # nats a token: a smaller g_n is nothing to align with
NEAR = 0.9  # share of g_n that g_f must have reached where the gap counts as closed


def _loadable(name: str) -> str:
    """A model name as pydantic wants it checked."""
    try:
        check_name(name) if name else None
    except BadInput as error:
        raise ValueError(str(error)) from error
    return name


def _to_the_end(plan: Plan) -> Plan:
    if plan.stop != "never":
        raise ValueError(f"stop is {plan.stop!r}, and a helper takes all its steps; leave stop out")
    return plan


@dataclass(frozen=True, config=STRICT)
class KGA:
    """Knowledge gap alignment.

    helper: how both helpers are trained; all rows a step unless it names a batch.  Its order is drawn by plan.seed, too.
    base: model that the helpers start from, '' = the LM that came in.  The paper starts from what that LM was before it learnt
    the forget rows; a request does not know this model, so it must be named.  Only such a model can tell that the holdout is of
    another domain: where none is named there is no warning of it.
    close: training ends once |g_f − g_n| ≤ close · g_n and g_f ≥ 0.9 g_n on all forget rows; 0 = it does not end so.  Where
    plan.stop names a level, both must be reached; 'never' there leaves it to the gap.
    plan.beside: retain rows a step; the published code takes 2 to 10 batches of them.
    Of the holdout as many rows are learnt as there are to forget; all that the model gets of them is g_n.
    """

    plan: Plan
    helper: Annotated[Plan, AfterValidator(_to_the_end)]
    alpha: Annotated[float, Field(ge=0)]
    close: Annotated[float, Field(ge=0, lt=1)] = 0.0
    base: Annotated[str, AfterValidator(_loadable)] = ""
    part: Part = "answer"

    paper = "Wang et al. 2023, arXiv 2305.06535"
    summary = "makes the forget text as strange as text that was never seen, by two helper models"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("forget", "retain", "holdout") if self.alpha else ("forget", "holdout")

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where a role is missing or has one example, or where the holdout repeats what was taught."""
        corpus.require("kga", self.needs)
        problems = [
            f"kga compares means over the {role} role, and one example makes none; add some"
            for role in ("forget", "holdout")
            if len(corpus[role]) < 2
        ]
        told = {
            (_words(prompt), _words(x.answer))
            for x in corpus.of("forget", "retain", "replay")
            for prompt in (x.prompt, *x.paraphrases)
        }
        if again := [
            x.id
            for x in corpus["holdout"]
            if any((_words(prompt), _words(x.answer)) in told for prompt in (x.prompt, *x.paraphrases))
        ]:
            problems.append(
                f"kga needs a holdout that was never taught, and {', '.join(again[:5])} ({len(again)} in all) repeats examples "
                "of forget, retain or replay; take these out of the holdout"
            )
        if problems:
            raise BadCorpus(problems)

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        self.check(corpus)
        plan = self.plan
        level = Stopper.calibrated(lm, corpus, plan.stop, plan.every, "retain" in self.needs, bench)
        pools, objective = self.terms(lm, corpus, bench)
        stop = _Closed(objective, self.close, plan.every, level, bench) if self.close else level
        return train(lm, objective, pools, plan, sites=sites, stop=stop, bench=bench, stage="forget")

    def terms(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[dict[str, list[Row]], _Alignment]:
        pools, keep = keeping(lm, corpus, 0.0, self.alpha)
        forget, seed = pools["forget"], self.plan.seed
        held = order(len(corpus["holdout"]), min(len(forget), len(corpus["holdout"])), seed, 0, "holdout")
        new = lm.template.rows([corpus["holdout"][i] for i in held], lm.limit)
        recipe = replace(self.helper, seed=self.helper.seed + seed)

        @cache
        def start() -> LM:
            """Loaded only where a helper is still to be trained."""
            if not self.base:
                return lm
            base = _based(self.base, lm)
            _same_kind(base, forget, new, bench)
            return base

        def numbers(role: str, rows: list[Row], keep: Callable[[LM], dict[str, Tensor]]) -> dict[str, Tensor]:
            made_from = fingerprint(
                repr(recipe), self.base, self.part, lm.fingerprint, [(row.key, row.ids) for row in rows]
            )
            return _once(bench, role, made_from, lambda: keep(_helper(start(), role, rows, recipe, self.part, bench)))

        expert = numbers("forget", forget, lambda helper: distributions(helper, forget))
        target = numbers("holdout", new, lambda helper: {"gap": gap(helper, lm, new, self.part)})["gap"].item()
        if target < LEAST:
            raise BadCorpus(
                f"kga: on the holdout the model is {target:.3f} nats a token from one that was taught it, and below {LEAST} "
                "there is no gap to align with; it knows these examples or guesses them, so name some that it was never taught"
            )
        alignment = _Alignment(forget, expert, target, self.part, keep)
        alignment.sign = float(np.sign(alignment.measure(lm, bench) - target))
        return pools, alignment


@plain
class _Alignment:
    """The objective.  |g_f − g_n| is no sum over micro-batches, sign · (g_f − g_n) is one, once `before` has fixed the sign.

    expert: row key -> (T, V) log-probabilities of the forget helper.  target: g_n.  sign: of g_f − g_n over the present step.
    """

    rows: Sequence[Row]
    expert: dict[str, Tensor]
    target: float
    part: Part
    keep: Keep
    sign: float = -1.0

    def share(self, lm: LM, tokens: Tokens) -> Tensor:
        """What this micro-batch adds to its step's g_f. -> ()"""
        apart = kl_loss(recall(self.expert, tokens), F.log_softmax(lm.logits(tokens).float(), -1))
        return tokens.per_row(apart, self.part).sum() / tokens.step_tokens[self.part]

    @torch.no_grad()
    def before(self, lm: LM, micros: Sequence[Tokens], step: int) -> None:
        """Read the step's g_f, on all processes; at g_f = g_n the gradient of |·| is 0."""
        shares = [float(self.share(lm, tokens)) for tokens in micros if tokens.role == "forget"]
        self.sign = float(np.sign(team.total({"gap": sum(shares)})["gap"] - self.target))

    def __call__(self, lm: LM, tokens: Tokens) -> dict[str, Tensor]:
        if tokens.role != "forget":
            return self.keep(lm, tokens)
        here = tokens.mask(self.part).sum() / tokens.step_tokens[self.part]
        return {"gap": self.sign * (self.share(lm, tokens) - self.target * here)}

    @torch.no_grad()
    def measure(self, lm: LM, bench: Bench = BENCH) -> float:
        """g_f over all forget rows."""
        groups = packs(self.rows, bench.budget)
        totals = len(self.rows), count(self.rows)
        turns = -(
            -len(groups) // team.size()
        )  # every process takes as many, or sharded ones would wait for one another
        found = {}
        for at in range(team.rank(), turns * team.size(), team.size()):
            number = min(at, len(groups) - 1)
            found[number] = float(self.share(lm, pack(groups[number], "forget", totals).to(lm.device)))
        return sum(team.merge(found).values())


@plain
class _Closed:
    """Says stop where the gap of the whole forget set is closed, and `level`, where there is one, says so too."""

    alignment: _Alignment
    close: float
    every: int
    level: Stopper | None = None
    bench: Bench = BENCH
    looks: list[dict[str, float]] = field(default_factory=list)

    def __call__(self, lm: LM, step: int) -> bool:
        now, target = self.alignment.measure(lm, self.bench), self.alignment.target
        done = closed(now, target, self.close)
        look = {"step": step, "gap": now, "target": target}
        if self.level:
            done = self.level(lm, step) and done
            look |= self.level.looks[-1]
        elif self.bench.watch:
            look |= self.bench.watch(lm)
        self.looks.append(look)
        return done


def closed(now: float, target: float, close: float) -> bool:
    """Whether a gap of `now` nats is as good as `target`: within `close` of it, as a share, and not far on the near side."""
    return abs(now - target) <= close * target and now >= NEAR * target


@torch.no_grad()
def gap(expert: LM, lm: LM, rows: Sequence[Row], part: Part) -> Tensor:
    """KL(expert ‖ lm), mean over the tokens of `part`. -> () float64"""
    total = torch.zeros((), dtype=torch.float64)
    for group in packs(rows, BUDGET):
        tokens = pack(group).to(lm.device)
        p, q = (F.log_softmax(x.logits(tokens).float(), -1) for x in (expert, lm))
        total += tokens.per_row(kl_loss(p, q), part).sum().double().cpu()
    return total / count(rows)[part]


def _helper(start: LM, role: str, rows: list[Row], recipe: Plan, part: Part, bench: Bench) -> LM:
    """A copy of `start` that was taught `rows`; BadRequest where it has not learnt them."""

    def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
        return {"learn": tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}

    folder = bench.folder / f"learn-{role}" if bench.folder else None
    own = replace(bench, folder=folder, log=None)  # the log is one of forgetting
    helper = train(start, objective, {role: rows}, recipe, bench=own, stage=f"learn {role}")
    seen = read(helper, rows, bench)
    hits = float(np.concatenate([x.hit[x.span] if part == "span" else x.hit for x in seen]).mean())
    if hits <= LEARNT:
        raise BadRequest(
            f"kga: the helper that was to learn the {role} role hits {hits:.2f} of its tokens and must hit more than {LEARNT}, "
            f"or its gap means nothing; raise forget.helper.steps ({recipe.steps}) or forget.helper.lr ({recipe.lr:g})"
        )
    return helper


def _once(bench: Bench, role: str, made_from: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a helper leaves behind, from the checkpoint folder where it is there: a resumed run trains none again.

    `train` removes the folder when forgetting has ended.
    """
    if not bench.folder:
        return make()
    file = bench.folder / f"learnt-{role}.safetensors"
    if file.exists():
        with safe_open(file, "pt") as kept:
            same = kept.metadata()["made from"] == made_from
        if same:
            return load_file(file)
    made = make()
    if team.rank() == 0:
        fresh = file.with_name(f".{file.name}")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(made, fresh, {"made from": made_from})
        fresh.replace(file)
    team.wait()
    return made


def _based(name: str, lm: LM) -> LM:
    """The model that the helpers start from, asked as `lm` is; BadModel where it does not speak the same tokens."""
    base = load(name, template="plain", precision=lm.precision, device=str(lm.device))
    sizes = [x.model.get_output_embeddings().weight.shape[0] for x in (base, lm)]
    if sizes[0] != sizes[1] or base.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
        raise BadModel(
            f"kga: the base {name!r} has another vocabulary ({sizes[0]} entries) than the model ({sizes[1]}), so their "
            "distributions cannot be compared; name the model that this one was trained from"
        )
    return replace(base, template=lm.template)


def _same_kind(base: LM, forget: list[Row], new: list[Row], bench: Bench) -> None:
    """Warn where the holdout looks like another domain to a model that knows neither."""
    inside, outside = ([-x.loglikelihood() for x in read(base, rows, bench)] for rows in (forget, new))
    mean, least, most = float(np.mean(outside)), min(inside), max(inside)
    if not least <= mean <= most:
        warnings.warn(
            f"kga: to the base model the holdout has {mean:.2f} nats a token and the forget examples {least:.2f} to {most:.2f}; "
            "the gap has a meaning only on text of the same kind",
            stacklevel=2,
        )


def _words(text: str) -> str:
    """A text without case, punctuation and spacing."""
    return " ".join(re.findall(r"\w+", text.casefold()))
