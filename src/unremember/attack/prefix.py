"""Enhanced universal prefix: tokens in front of every question that bring a model's insides back to those of the original.

    loss(p) = mean_questions [ mean_t max(−log p_θ(y_t | p, x, y_<t), −log 0.6)
                               + match · mean over blocks and places of ‖h_θ − h_orig‖ / ‖h_orig‖ ]

y: what the original says to the plain question, its first `forced` tokens; h: behind the blocks at `depths`, from the prefix to
the end of `matched` more of its tokens, both models reading the same attacked text.  The search keeps a buffer of prefixes,
expands its best by swaps, insertions and deletions, drops it, and keeps the best of what is left and the children.
Łucki et al. 2024 (arXiv 2409.18025); ethz-spylab/unlearning-vs-safety@75dade5 `src/enhanced_gcg`.
Differs: distances are shares of the original's own length, because a fixed unit means something else in every model; h_orig is a
constant for the gradient (children are scored exactly); two prefixes, each found on one half of the facts and asked about the
other, so that nothing shown is scored (there a handful of test questions); no value stands in a prefix; questions to retain stay
as they are.  Left out: the static term on clean inputs, the prefix's own likelihood, the penalty on repetition, the growing least
length, the cap of 24 hours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from functools import cached_property
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember.attack.gcg import (
    ATTEMPTS,
    Behaviour,
    Entry,
    Found,
    Ids,
    Pair,
    Pass,
    Victim,
    behaviour,
    decoded,
    pools,
    started,
    survives,
    tells,
)
from unremember.attack.suffix import ATTACKED, bar, folds, groups, noted, once, refuse
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.displace import block_name, share_of
from unremember.errors import BadCorpus, BadInput, BadModel, BadRequest, NotApplicable
from unremember.folder import fingerprint
from unremember.lm import LM
from unremember.train import STRICT

FLOOR = -float(np.log(0.6))  # nats: a forced token that is this likely is forced enough
ENOUGH = FLOOR + 0.01  # nats: from here on nothing is left to look for, as with the original itself
CHANCES = {"gradient": 0.7, "expected": 0.1, "insert": 0.1, "delete": 0.1}  # two swaps, then two that change the length
Kind = str


def edited(ids: Ids, kind: Kind, place: int, token: int = -1) -> Ids:
    """`token` put in front of `place` ('insert'), in its stead (a swap), or nothing in its stead ('delete')."""
    return ids[:place] + (() if kind == "delete" else (token,)) + ids[place + (kind != "insert") :]


def kinds(length: int, least: int, most: int) -> dict[Kind, float]:
    """Chance of each kind of edit that keeps the length within [least, most], or brings it nearer."""
    open_ = {
        kind: chance
        for kind, chance in CHANCES.items()
        if not (kind == "delete" and length <= least) and not (kind == "insert" and length >= most)
    }
    return {kind: chance / sum(open_.values()) for kind, chance in open_.items()}


def bred(held: Sequence[Entry], children: Sequence[Entry], size: int) -> tuple[Entry, ...]:
    """The buffer after a step, best first: its best, whose children these are, goes; the `size` best of the others stay."""
    return tuple(sorted((*held[1:], *children), key=lambda entry: entry.loss)[:size])


def forced(nll: Tensor) -> Tensor:
    """Mean nll a token, each no lower than the floor. (R, F) -> (R,)"""
    return nll.clamp(min=FLOOR).mean(-1)


def distance(hidden: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean over blocks and places of ‖h − h'‖ / ‖h'‖. both: blocks times (R, S, H) -> (R,)"""
    shares = [
        (h.float() - w.float()).norm(dim=-1) / w.float().norm(dim=-1) for h, w in zip(hidden, wanted, strict=True)
    ]
    return torch.stack(shares).mean((0, 2))


@plain(frozen=True)
class Aim:
    """The attacked model, the original on the same inputs, and how much their likeness weighs."""

    victim: Victim
    original: Victim
    match: float

    @cached_property
    def count(self) -> int:
        return len(self.victim.behaviours)

    def row_losses(self, seen: Pass, pairs: Sequence[Pair]) -> Tensor:
        """(R,)"""
        loss = forced(seen.nll)
        if not self.match:
            return loss
        with torch.no_grad():
            wanted = self.original.run(pairs).hidden
        return loss + self.match * distance(seen.hidden, wanted)

    @torch.no_grad()
    def losses(self, strings: Sequence[Ids]) -> list[Entry]:
        """Mean over the questions, for each string.  BadModel where one is not finite."""
        total, solved = dict.fromkeys(strings, 0.0), dict.fromkeys(strings, True)

        def work(pairs: list[Pair]) -> tuple[list[float], list[bool]]:
            seen = self.victim.run(pairs)
            return self.row_losses(seen, pairs).tolist(), seen.solved.tolist()

        for pairs, (losses, hits) in self.victim.over(list(total), self.count, work):
            for (ids, _), loss, hit in zip(pairs, losses, hits, strict=True):
                total[ids] += loss / self.count
                solved[ids] &= hit
        if not np.isfinite(list(total.values())).all():
            raise BadModel(
                f"{self.victim.lm.name or 'the model'} gives losses that are not finite in {self.victim.lm.precision}; "
                'load it with precision = "fp32", or its weights are broken'
            )
        return [Entry(total[ids], ids, solved[ids]) for ids in total]

    def slope(self, ids: Ids) -> Tensor:
        """∂loss/∂onehot(prefix). -> (n, V)"""
        return torch.stack(self.victim.gradients(ids, self.count, self.row_losses)).mean(0)

    @torch.no_grad()
    def expected(self, ids: Ids) -> Tensor:
        """What the attacked model itself would say at each place of the prefix and behind it. -> (n + 1, V) probabilities"""
        lm, first = self.victim.lm, self.victim.behaviours[0].before
        lead = first or (ids[0],)  # nothing is expected where nothing stands before
        with lm.headed(lambda hidden: hidden[:, len(lead) - 1 :]):
            logits = lm.model(input_ids=torch.tensor([lead + ids], device=lm.device), use_cache=False).logits[0]
        return logits.float().softmax(-1)


@dataclass(frozen=True, config=STRICT)
class Prefix:
    """steps, children, buffer: of the search.  least, most: tokens of the prefix.  pool: best tokens a place by gradient.
    questions: the most that a prefix is looked for on.  forced, matched: how much of the original's answers is to be said, and
    how much more of them is read for the likeness.  match: weight of the likeness, 0 = forcing alone.  depths: where it is taken,
    as shares of all blocks.
    """

    steps: Annotated[int, Field(ge=1)]
    least: Annotated[int, Field(ge=1)] = 8
    most: Annotated[int, Field(ge=1)] = 24
    children: Annotated[int, Field(ge=1)] = 16
    buffer: Annotated[int, Field(ge=1)] = 16
    pool: Annotated[int, Field(ge=1)] = 64
    questions: Annotated[int, Field(ge=1)] = 6
    forced: Annotated[int, Field(ge=1)] = 10
    matched: Annotated[int, Field(ge=0)] = 35
    match: Annotated[float, Field(ge=0)] = 1.0
    depths: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (0.25,)
    start: Annotated[str, Field(min_length=1)] = " !"
    seed: Annotated[int, Field(ge=0)] = 0

    needs = ("forget",)
    paper = "Łucki et al. 2024, arXiv 2409.18025"
    summary = "a universal prefix that brings the original's answers and hidden states back"

    def __post_init__(self):
        if self.least > self.most:
            raise ValueError(f"least = {self.least} is more than most = {self.most}; allowed: least <= most")

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where there are no two questions, one to look on and one to ask."""
        refuse("prefix", self.needs, corpus, "other", "answer", lambda _: "")

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        self.check(corpus)
        mask, values = bar(lm, corpus)
        asked: dict[str, Example] = {}
        found: list[tuple[str, Found]] = []
        for role, rows in groups(corpus, lambda _: ""):
            for fold in folds(rows, "other"):
                shown = fold.shown[: self.questions]
                best = self._found(lm, original, shown, fold.asked, mask, values, bench)
                assert not tells(best.text, values), "the prefix tells an answer"
                found.append((role, best))
                asked |= {x.id: replace(x, prompt=f"{best.text} {x.prompt}") for x in fold.asked}
        if not any(f.loss < f.first or f.first < ENOUGH for _, f in found):
            raise BadRequest(
                f"no prefix of {self.steps} step(s) does better than {self.start!r} repeated, so nothing was attacked; "
                "take more steps or children"
            )
        noted(bench, "prefix", "nats a token and unlikeness" if self.match else "nats a token", found)
        seen = {role: tuple(asked.get(x.id, x) for x in corpus.of(role)) for role in ATTACKED if corpus.of(role)}
        return lm, Corpus({**corpus, **seen})

    def _found(
        self,
        lm: LM,
        original: LM,
        shown: Sequence[Example],
        asked: Sequence[Example],
        mask: Tensor,
        values: tuple[str, ...],
        bench: Bench,
    ) -> Found:
        template, start = lm.template, started(lm.template, self.start, self.least)
        aims = targets(lm, original, shown, start, self.forced + self.matched)
        places = (*aims, *framed(lm, asked, start, {x.id: start for x in asked}))

        def keep(ids: Ids) -> bool:
            return not tells(decoded(template, ids), values) and survives(template, places, ids)

        names, heard = (
            tuple(block_name(one, share_of(one, depth)) for depth in self.depths) if self.match else ()
            for one in (lm, original)
        )
        aim = Aim(
            Victim(lm, once(aims), bench.budget, 0.0, self.forced, names),
            Victim(original, once(aims), bench.budget, 0.0, 1, heard),
            self.match,
        )
        known = bench.memory.setdefault(f"{lm.fingerprint}/prefix", {})
        allowed = mask.nonzero()[:, 0].tolist()
        key = fingerprint(repr(self), original.fingerprint, [repr(b) for b in places], values, allowed)
        if key not in known:
            with lm.lowered(), original.lowered():
                known[key] = breed(self, aim, start, mask, keep, bench)
        return known[key]


def breed(how: Prefix, aim: Aim, start: Ids, mask: Tensor, keep: Callable[[Ids], bool], bench: Bench = BENCH) -> Found:
    """The best prefix of all steps; the buffer forgets its best each time, so that is kept apart."""
    held = tuple(aim.losses([start]))
    best, curve, tokens = held[0], [held[0].loss], aim.victim.cost(len(start), aim.count)
    for step in range(how.steps):
        parent = held[0].ids
        slope, expected = aim.slope(parent), aim.expected(parent)
        children = _children(how, parent, pools(slope, mask.to(slope.device), how.pool), expected, mask, step, keep)
        held = bred(held, aim.losses(children), how.buffer)
        tokens += 3 * aim.victim.cost(len(parent), aim.count)
        tokens += sum(aim.victim.cost(len(child), aim.count) for child in children)
        best = min(best, held[0], key=lambda entry: entry.loss)
        curve.append(held[0].loss)
        bench.say("prefix", step + 1, how.steps, {"loss": held[0].loss})
    text = decoded(aim.victim.lm.template, best.ids)
    return Found(best.ids, text, best.loss, best.solved, tuple(curve), tokens, curve[0])


def _children(
    how: Prefix, parent: Ids, pool: Tensor, expected: Tensor, mask: Tensor, step: int, keep: Callable[[Ids], bool]
) -> list[Ids]:
    """The edits of one step that may be used, none twice."""
    table, chances = pool.tolist(), kinds(len(parent), how.least, how.most)
    likely = torch.where(mask.to(expected.device), expected, torch.zeros_like(expected)).double().cpu().numpy()
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([how.seed, step, attempt])
        out: dict[Ids, None] = {}
        for _ in range(how.children):
            kind = str(rng.choice(list(chances), p=list(chances.values())))
            place = int(rng.integers(len(parent) + (kind == "insert")))
            token = -1
            if kind == "gradient":
                token = table[place][rng.integers(len(table[place]))]
            elif kind != "delete":
                token = int(rng.choice(len(likely[place]), p=likely[place] / likely[place].sum()))
            out[edited(parent, kind, place, token)] = None
        out.pop(parent, None)
        kept = [child for child in out if keep(child)]
        if kept:
            return kept
    raise BadRequest(
        f"none of {ATTEMPTS} x {how.children} prefixes of step {step + 1} comes back from its text as the same tokens; "
        f"choose another start than {how.start!r} or more children"
    )


def targets(lm: LM, original: LM, shown: Sequence[Example], start: Ids, new: int) -> tuple[Behaviour, ...]:
    """Each question with what the original says to it unattacked, at most `new` tokens; NotApplicable where it says nothing.

    What is equally long goes through the models together; silent questions are left out.
    """
    contexts = [original.template.context(x.prompt) for x in shown]
    if any(lm.template.context(x.prompt) != c for x, c in zip(shown, contexts, strict=True)):
        raise BadModel(
            "the original reads questions as other tokens than the attacked model; both must share a tokenizer"
        )
    said = original.generate(contexts, new)
    spoken = {x.id: ids for x, ids in zip(shown, said, strict=True) if ids}
    if not spoken:
        raise NotApplicable("the original answers none of the questions, so there is nothing to bring back; ask others")
    return framed(lm, [x for x in shown if x.id in spoken], start, spoken)


def framed(lm: LM, examples: Sequence[Example], start: Ids, target: dict[str, Ids]) -> tuple[Behaviour, ...]:
    """The questions with a slot in front; BadCorpus with all that have none."""
    out, problems = [], []
    for x in examples:
        try:
            out.append(behaviour(lm.template, x.id, "", f" {x.prompt}", target[x.id], start, lm.limit))
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadCorpus(problems)
    return tuple(out)
