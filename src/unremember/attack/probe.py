"""Probe: a bilinear map, learnt on retained facts, picks the true answer of forgotten ones from what stands in the middle.

    s(q, o) = h̃_qᵀ (W + c·√H·I) ẽ_o,   share = softmax over q's options,   minimise mean −log share(truth) + λ/2 · ‖W‖²

h_q: stream behind one block where the value is about to be read; e_o: mean of the option's rows in the model's own token table,
less what all options share.  λ by retained people left out.  c: what a head that is the token table would see.
h̃ is centred over the questions in the same words about other people, ẽ over the options of a question: a value that was taught
stands out from one that never was, whoever is asked about, and without that the probe picks it by another person's stream just as
well (toy, two people: 0.80 by their own, 0.81 by the other's; with it 0.40 and 0.16, and after ten retained people 0.84 and
0.10).  A question in words of its own is a guess.
Selectivity = accuracy on people left out − that of the same probe on the control task, where a random option counts as right.
Where it is not above 0, the probe reads nothing and each share is a guess, 1 / options.
Alain & Bengio 2016 (arXiv 1610.01644); control tasks: Hewitt & Liang 2019 (arXiv 1909.03368).
Differs: forgotten values are classes that no retained fact has, so the probe is a map into the token table and not a plane a
class; random labels are per fact and people are left out, so the control shows what sizes and options give away.
A value can be read there; that the model would use it, this does not say.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import nll_loss

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.lm import LM
from unremember.score import Score
from unremember.tokens import pack, packs
from unremember.train import STRICT

STEPS = 100  # of L-BFGS, at most
LEAST = 1e-3  # weight on c², so that c stays finite where it alone tells all apart
FOLDS = 5  # parts that retained people fall into, at most


@plain(frozen=True)
class Options:
    """Questions for a probe. x: (n, H) stream; e: (n, K, H) options, the true one first; there: (n, K) bool, False = none."""

    x: Tensor
    e: Tensor
    there: Tensor

    def centred(self, group: Tensor) -> Options:
        """x less its mean over the questions of the same group (n,), e less its mean over a question's options."""
        same = (group[:, None] == group).to(self.x.dtype)  # (n, n)
        mean = self.e.sum(1, keepdim=True) / self.there.sum(1)[:, None, None]  # what is no option is 0
        x = self.x - same @ self.x / same.sum(1, keepdim=True)
        alone = same.sum(1, keepdim=True) == 1  # 0 but for rounding
        return replace(self, x=x.masked_fill(alone, 0), e=(self.e - mean) * self.there[..., None])


@plain(frozen=True)
class Seen:
    """The same in the span of what is learnt from. x: (n, r); e: (n, K, s); direct: (n, K) √H · xᵀe; there: (n, K) bool."""

    x: Tensor
    e: Tensor
    direct: Tensor
    there: Tensor

    def __getitem__(self, rows: Tensor) -> Seen:
        return Seen(self.x[rows], self.e[rows], self.direct[rows], self.there[rows])


@plain(frozen=True)
class Found:
    """shares: id -> share of the truth; accuracy, control: of retained people left out; l2: the λ chosen; n: retained rows."""

    shares: dict[str, float]
    accuracy: float
    control: float
    l2: float
    n: int

    @property
    def selectivity(self) -> float:
        return self.accuracy - self.control


@plain(frozen=True)
class Bilinear:
    """weight: (r, s), W; tied: (), c."""

    weight: Tensor
    tied: Tensor

    def logshares(self, q: Seen) -> Tensor:
        """log softmax of xᵀ W e + c · direct over the options of each question. -> (n, K)"""
        score = torch.einsum("nr,rs,nks->nk", q.x, self.weight, q.e) + self.tied * q.direct
        return score.masked_fill(~q.there, -torch.inf).log_softmax(1)


def solve(q: Seen, label: Tensor, l2: float) -> Bilinear:
    """The W and c that minimise mean −log share(label) + l2/2 · ‖W‖². label: (n,)"""
    weight = q.x.new_zeros(q.x.shape[1], q.e.shape[2]).requires_grad_()
    tied = q.x.new_zeros(()).requires_grad_()
    probe = Bilinear(weight, tied)
    solver = torch.optim.LBFGS([weight, tied], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = nll_loss(probe.logshares(q), label) + l2 / 2 * weight.square().sum() + LEAST / 2 * tied.square()
        value.backward()
        return value

    with torch.enable_grad():
        before = float(solver.step(loss).detach())
        assert float(loss().detach()) <= before, "the probe learnt nothing"
    return Bilinear(weight.detach(), tied.detach())


def bare(options: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Token ids of options without the beginning and the end that they all share; each keeps at least one token."""
    least = min(map(len, options))
    front = next((i for i in range(least) if len({o[i] for o in options}) > 1), least - 1)
    front = min(front, least - 1)
    most = least - 1 - front
    back = next((i for i in range(most) if len({o[-1 - i] for o in options}) > 1), most)
    return [tuple(o[front : len(o) - back]) for o in options]


@torch.no_grad()
def options(lm: LM, examples: Sequence[Example], block: int, bench: Bench = BENCH) -> Options:
    """What a probe sees of each example: the stream behind `block` where its first sensitive token is read, and its options."""
    rows = lm.template.rows(examples, lm.limit)
    found: dict[str, Tensor] = {}
    for group in packs(rows, bench.budget):
        tokens = pack(group).to(lm.device)
        hidden = lm.hidden(tokens, block)
        for at, key in enumerate(tokens.keys):
            found[key] = hidden[(tokens.row == at) & tokens.span][0].double()
    x = torch.stack([found[row.key] for row in rows])
    most = 1 + max(len(example.distractors) for example in examples)
    table = lm.model.get_input_embeddings()
    e = x.new_zeros(len(rows), most, table.weight.shape[1])
    there = torch.zeros(len(rows), most, dtype=torch.bool, device=lm.device)
    for at, example in enumerate(examples):
        texts = (example.answer, *example.distractors)
        coded = [lm.template.row(example.id, example.prompt, text, limit=lm.limit) for text in texts]
        for place, ids in enumerate(bare([row.ids[row.start : row.stop] for row in coded])):
            e[at, place] = table(torch.tensor(ids, device=lm.device)).double().mean(0)
            there[at, place] = True
    if not (x.isfinite().all() and e.isfinite().all()):
        raise BadModel(
            f"{lm.name or 'the model'}: the stream behind block {block} or the token table holds numbers that are not finite; "
            "its weights are broken, load them again"
        )
    return Options(x, e, there)


def people(examples: Sequence[Example]) -> list[str]:
    """Whose fact it is; a fact that names nobody is somebody of its own."""
    return [x.entity or x.id for x in examples]


def wording(example: Example) -> str:
    """The question without whom it asks about; its kind, where questions are made from templates."""
    return example.prompt.replace(example.entity, "…") if example.entity else example.prompt


def groups(examples: Sequence[Example]) -> Tensor:
    """A number for each wording. -> (n,)"""
    known = sorted({wording(x) for x in examples})
    return torch.tensor([known.index(wording(x)) for x in examples])


def random_label(example: Example, seed: int) -> int:
    """The control task's right option: one a fact, whatever its wording and its place among the rows."""
    return zlib.crc32(repr((seed, example.entity, example.answer)).encode()) % (1 + len(example.distractors))


@dataclass(frozen=True, config=STRICT)
class Probe:
    """block: whose output is read, from 0; None = the middle one.  l2: the λ to choose from.  seed: of folds and control task."""

    block: Annotated[int, Field(ge=0)] | None = None
    l2: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
    seed: Annotated[int, Field(ge=0)] = 0

    needs = ("forget", "retain")
    paper = "Alain & Bengio 2016; Hewitt & Liang 2019, arXiv 1909.03368"
    summary = "true answers picked by a probe of a middle layer, learnt on retained facts"
    alone = True
    reads = ("choice",)

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where there is too little to choose from or to learn on, or a retained fact tells a forgotten one."""
        corpus.require("probe", self.needs)
        # of the retained ones as many as of the forgotten: a run hands over no more
        few = corpus["retain"][: len(corpus["forget"])]
        forget, retain = (compared(chosen(rows)) for rows in (corpus["forget"], few))
        problems = []
        if not forget:
            some = len(chosen(corpus["forget"]))
            problems.append(
                f"probe chooses among distractors and compares questions in the same words about other people; {some} of "
                f"{len(corpus['forget'])} forget examples have distractors, and no two of these that wording with another entity "
                "in it; add such, or leave out [attack.probe]"
            )
        if len(set(people(retain))) < 2:
            problems.append(
                f"probe learns from retained people and leaves some out to check, and the first {len(few)} retained examples "
                "hold no two people who are asked about in the same words, with distractors; put such in front, or leave out "
                "[attack.probe]"
            )
        told = {(x.entity, v.strip().casefold()) for x in corpus["retain"] if x.entity for v in x.values()}
        if twice := [
            x.id for x in corpus["forget"] if any((x.entity, v.strip().casefold()) in told for v in x.values())
        ]:
            problems.append(
                f"the retain role tells the forgotten value of {', '.join(twice[:5])}; a probe that has learnt the answer proves "
                "nothing, take those examples out"
            )
        if problems:
            raise BadCorpus(problems)

    def probed(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Found:
        """A probe for this model, and what it reads of the forget and holdout roles.  BadRequest for a block it does not have."""
        self.check(corpus)
        count = len(team.blocks(lm.model))
        block = (count - 1) // 2 if self.block is None else self.block
        if block >= count:
            raise BadRequest(f"probe.block is {block} and the model's blocks go from 0 to {count - 1}")
        # in an order of their own, so that rows in another order give the same probe
        retain = sorted(compared(chosen(corpus["retain"])), key=lambda x: x.id)
        learnt = self.seen(lm, retain, block, bench)
        wide, long = (part.square().sum(-1).mean().sqrt() for part in (learnt.x, learnt.e[learnt.there]))
        if not (wide > 0 and long > 0):
            raise BadModel(
                f"{lm.name or 'the model'} has the same stream behind block {block} for all retained questions, or the same "
                "tokens for all options; nothing can be told apart there"
            )
        # The best W lies in the span of what it learns from, which is far smaller than (H, H).
        inward, outward = basis(learnt.x), basis(learnt.e[learnt.there])

        def small(q: Options) -> Seen:
            direct = torch.einsum("nh,nkh->nk", q.x, q.e) * q.x.shape[1] ** 0.5
            return Seen(q.x @ inward.T / wide, q.e @ outward.T / long, direct / (wide * long), q.there)

        seen, parts = small(learnt), self.parts(retain)
        truth = torch.zeros(len(retain), dtype=torch.long, device=lm.device)
        control = torch.tensor([random_label(x, self.seed) for x in retain], device=lm.device)
        accuracy, l2 = self.left_out(seen, truth, parts)
        blind, _ = self.left_out(seen, control, parts)
        probe, shares = solve(seen, truth, l2), {}
        for role in ("forget", "holdout"):
            if asked := chosen(corpus.of(role)):
                read = probe.logshares(small(self.seen(lm, asked, block, bench)))[:, 0].exp()
                shares |= {x.id: float(share) for x, share in zip(asked, read, strict=True)}
        bench.say("probe", 1, 1, {"accuracy": accuracy, "control": blind})
        found = Found(shares, accuracy, blind, l2, len(retain))
        right = {"accuracy on people left out": accuracy, "accuracy on the control task": blind}
        bench.notes.update({"block": block} | right | {"selectivity": found.selectivity})
        return found

    def seen(self, lm: LM, examples: Sequence[Example], block: int, bench: Bench) -> Options:
        return options(lm, examples, block, bench).centred(groups(examples).to(lm.device))

    def parts(self, examples: Sequence[Example]) -> Tensor:
        """A part for each example, one for all of a person's. -> (n,)"""
        names = sorted(set(people(examples)))
        order = np.random.default_rng(self.seed).permutation(len(names))
        part = {name: int(at) % min(FOLDS, len(names)) for name, at in zip(names, order, strict=True)}
        return torch.tensor([part[name] for name in people(examples)])

    def left_out(self, q: Seen, label: Tensor, parts: Tensor) -> tuple[float, float]:
        """Accuracy on people left out, ties as wrong, at the λ whose mean −log share of theirs is lowest, and that λ."""
        best = (torch.inf, 0.0, 0.0)
        for l2 in sorted(self.l2, reverse=True):  # a tie goes to the larger
            logp = q.x.new_zeros(q.there.shape)
            for part in parts.unique():
                out = parts == part
                logp[out] = solve(q[~out], label[~out], l2).logshares(q[out])
            own = logp.gather(1, label[:, None])
            right = (logp >= own).sum(1) == 1
            best = min(best, (-float(own.mean()), float(right.double().mean()), l2), key=lambda x: x[0])
        return best[1], best[2]

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        """The model as it is: a probe stands beside it, and shows what it reads through `read`."""
        self.check(corpus)
        return lm, corpus

    def read(self, audit: Callable[[LM, Corpus, Bench], Score], lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        """The audit's score with the probe's shares.  Retained facts, which the probe was shown, are not scored."""
        found = self.probed(lm, corpus, bench)
        asked = Corpus({role: rows for role in ("forget", "holdout") if (rows := chosen(corpus.of(role)))})
        guess = {x.id: 1 / (1 + len(x.distractors)) for rows in asked.values() for x in rows}
        said = audit(lm, asked, bench)
        return replace(
            said,
            definition="share of the true answer among its options that a linear probe of a middle layer gives, learnt on "
            "retained facts; 1 / options where the probe does no better on people left out than on its control task",
            per_example=found.shares if found.selectivity > 0 else guess,
            paper=self.paper,
        )


def chosen(examples: Sequence[Example]) -> tuple[Example, ...]:
    """Those with something to choose from."""
    return tuple(x for x in examples if x.distractors)


def compared(examples: Sequence[Example]) -> tuple[Example, ...]:
    """Those whose wording asks about somebody else, too."""
    asked: dict[str, set[str]] = {}
    for x, who in zip(examples, people(examples), strict=True):
        asked.setdefault(wording(x), set()).add(who)
    return tuple(x for x in examples if len(asked[wording(x)]) > 1)


def basis(rows: Tensor) -> Tensor:
    """An orthonormal basis of the span of the rows. (n, H) -> (r, H)"""
    _, size, lines = torch.linalg.svd(rows, full_matrices=False)
    return lines[size > 1e-9 * size[0]]
