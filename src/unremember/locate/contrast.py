"""Contrast: the rows or columns of the weights that an answer and its decoy pull in opposite directions.

Both are asked for after the same prompt, so that what any continuation shares cancels out and what tells them apart remains.

    score(p) = −cos( ∇_p Σ v(y⁺), ∇_p Σ v(y⁻) )         p a row or a column of a matrix, or a whole vector

y⁺ = where the answer differs from one of its distractors, y⁻ = where that differs from the answer; v = log-probability summed
over those tokens ('logp'), or the raw logit of the first of them ('logit', the published form).  Yu, Jeoung, Kasi, Yu, Ji 2023
(Findings of ACL 2023, 6032-6048), their partition of the gradient.  Reference code: CharlesYu2000/PCGU-UnlearningBias@eeae24e.
Differs: a unit that one of the two does not reach scores −inf (there its cosine is 0, lower than any likeness, and unused
vocabulary rows fill the budget); the token table and the head take part only when asked for; dropout is off.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadModel
from unremember.lm import LM
from unremember.locate.ranking import Ranking
from unremember.tokens import Row, Tokens, lanes, pack, packs
from unremember.train import STRICT

WIDTH = 256  # places a lane
SHOWN = 20
Line = Literal["row", "column"]
Value = Literal["logp", "logit"]


def opposition(adv: Mapping[str, Tensor], dis: Mapping[str, Tensor], unit: Line, floor: float) -> dict[str, Tensor]:
    """Two gradients, parameter name -> tensor of its shape, to name -> (units,) minus cosine, in float32.

    A unit where either is shorter than `floor` times its own longest scores −inf.  Raises BadModel for parameters that are
    neither vectors nor matrices.
    """
    if odd := [name for name, g in adv.items() if g.dim() not in (1, 2)]:
        raise BadModel(
            f"contrast cuts matrices and takes vectors whole, and {name!r} has {adv[name].dim()} dimensions; leave it out "
            "with forget.sites"
            for name in odd
        )
    adv, dis = ({name: _cut(side[name], unit) / _top(side) for name in adv} for side in (adv, dis))  # (units, length)
    long, other = ({name: g.norm(dim=1) for name, g in side.items()} for side in (adv, dis))
    most, least = ([max((float(n.max()) for n in side.values()), default=0.0) for side in (long, other)], {})
    for name in adv:
        reached = (long[name] > floor * most[0]) & (other[name] > floor * most[1])
        cosine = (adv[name] * dis[name]).sum(1) / (long[name] * other[name])
        least[name] = torch.where(reached, -cosine, torch.full_like(cosine, -torch.inf))
    return least


def _cut(gradient: Tensor, unit: Line) -> Tensor:
    """-> (units, length) float32"""
    if gradient.dim() == 1:
        return gradient.float()[None]
    return gradient.float() if unit == "row" else gradient.float().T


def _top(gradients: Mapping[str, Tensor]) -> float:
    """The largest entry: dividing by it keeps the squares of small gradients from vanishing."""
    return max((float(g.abs().max()) for g in gradients.values()), default=0.0) or 1.0


def difference(a: Sequence[int], b: Sequence[int]) -> tuple[int, int, int] | None:
    """(start, stop in a, stop in b) of what differs once common ends are taken away; None where one begins the other."""
    shortest = min(len(a), len(b))
    start = next((i for i in range(shortest) if a[i] != b[i]), shortest)
    if start == shortest:
        return None
    alike = 0
    while alike < shortest - start - 1 and a[-1 - alike] == b[-1 - alike]:
        alike += 1
    return start, len(a) - alike, len(b) - alike


@plain(frozen=True)
class Pairs:
    """answers: a row an example.  decoys: key -> the row of its decoy.  The `span` of a row is what differs in it."""

    answers: tuple[Row, ...]
    decoys: Mapping[str, Row]

    @staticmethod
    def of(lm: LM, examples: Sequence[Example], seed: int) -> Pairs:
        """Every example with one of its distractors, always the same one for a seed.

        Raises BadCorpus where the two have the same tokens, one begins the other, what differs holds an unknown token, or
        nothing stands in front of it that could predict it.
        """
        problems: list[str] = []
        answers: list[Row] = []
        decoys: dict[str, Row] = {}
        for x in examples:
            wrong = x.distractors[zlib.crc32(f"{seed} {x.id}".encode()) % len(x.distractors)]
            a = lm.template.row(x.id, x.prompt, x.answer, limit=lm.limit)
            b = lm.template.row(x.id, x.prompt, wrong, limit=lm.limit)
            where = difference(a.ids[: a.stop], b.ids[: b.stop])
            about = f"example {x.id!r}: the answer {x.answer!r} and the distractor {wrong!r}"
            if where is None:
                problems.append(f"{about} have the same tokens, or one begins the other; give it another distractor")
                continue
            start, end, stop = where
            if start < a.start:
                problems.append(f"{about} differ in the first token of all, which nothing predicts; give it a prompt")
            if lm.tokenizer.unk_token_id in (*a.ids[start:end], *b.ids[start:stop]):
                problems.append(f"{about} differ in a token that the tokenizer does not know; use other words")
            answers.append(_marked(a, start, end))
            decoys[x.id] = _marked(b, start, stop)
        if problems:
            more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise BadCorpus(problems[:SHOWN] + more)
        return Pairs(tuple(answers), decoys)

    def side(self, lm: LM, tokens: Tokens, value: Value, decoy: bool) -> Tensor:
        """v of each row of a micro-batch, of the answer or of its decoy; a silent one gives zeros. -> (rows,)"""
        if not decoy:
            return valued(lm, tokens, value)
        said = pack(lanes([self.decoys[key] for key in tokens.keys], WIDTH)).to(tokens.ids.device)
        found = dict(zip(said.keys, valued(lm, said, value), strict=True))
        spoken = (tokens.lengths("span") > 0).float()
        return spoken * torch.stack([found[key] for key in tokens.keys])


def _marked(row: Row, start: int, stop: int) -> Row:
    return replace(row, span=tuple(start <= place < stop for place in range(row.start, row.stop)))


def valued(lm: LM, tokens: Tokens, value: Value) -> Tensor:
    """v of what the span marks in each row. -> (rows,) float32"""
    if value == "logp":
        return tokens.per_row(lm.logp(tokens), "span")
    wanted = lm.logits(tokens).float().gather(1, tokens.target[:, None])[:, 0]  # (N,)
    follows = torch.zeros_like(tokens.span)
    follows[1:] = tokens.span[:-1] & (tokens.row[1:] == tokens.row[:-1])
    return tokens.per_row(torch.where(follows, torch.zeros_like(wanted), wanted), "span")


def gradient(lm: LM, micros: Sequence[Tokens], value: Callable[[LM, Tokens], Tensor]) -> dict[str, Tensor]:
    """∇ of the sum of `value` over the micro-batches of all processes, up to a common factor; whole tensors, sharded or not.

    `.grad` is left as it was; parameters that nothing reaches are absent.  Raises BadModel where dropout is on.
    """
    if lm.model.training:
        raise BadModel(f"{lm.name or 'the model'} is in training mode, where dropout blurs cosines; call model.eval()")
    weights = {name: w for name, w in lm.model.named_parameters() if w.requires_grad}  # a tied tensor comes once
    held = {name: w.grad for name, w in weights.items()}
    found: dict[str, Tensor] = {}
    try:
        for w in weights.values():
            w.grad = None
        for tokens in micros:
            value(lm, tokens).sum().backward()
        for name, w in weights.items():
            if w.grad is not None:
                found[name] = _whole(w.grad)
    finally:
        for name, w in weights.items():
            w.grad = held[name]
    return found


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def tables(model: Any) -> set[str]:
    """Names of the parameters of the token table and of the head."""
    ends = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    theirs = {id(w) for end in ends for w in end.parameters()}
    return {name for name, w in model.named_parameters() if id(w) in theirs}


@dataclass(frozen=True, config=STRICT)
class Contrast:
    """unit: 'row' (the paper's input aggregation) or 'column' (its output aggregation).

    embeddings: whether token table and head take part (as published); a row there is a word, wherever it stands.
    floor: the shortest gradient a unit may have, as a share of the longest.  seed: which distractor is the decoy.
    """

    unit: Line = "row"
    value: Value = "logp"
    embeddings: bool = False
    floor: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    seed: int = 0

    needs = ("forget",)
    paper = "Yu et al. 2023, Findings of ACL"
    summary = "rows or columns that an answer and its decoy pull in opposite directions"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Ranking:
        self.check(corpus)
        return self.ranking(lm.model, *self.gradients(lm, corpus["forget"], bench))

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where there is nothing to forget, or an example has no distractor."""
        corpus.require("contrast", self.needs)
        if bare := [x.id for x in corpus["forget"] if not x.distractors]:
            raise BadCorpus(
                f"contrast sets every answer against a distractor, and {len(bare)} forget examples have none "
                f"({', '.join(bare[:3])}); add some of the same kind"
            )

    def gradients(
        self, lm: LM, examples: Sequence[Example], bench: Bench
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """∇ of the answers and ∇ of their decoys; of a LoRA model those of its adapter."""
        pairs = Pairs.of(lm, examples, self.seed)
        adapter = hasattr(lm.model, "peft_config")
        micros = [pack(group).to(lm.device) for group in packs(pairs.answers, bench.budget)]
        sides = [
            gradient(lm, micros, lambda lm, tokens, d=decoy: pairs.side(lm, tokens, self.value, d))
            for decoy in (False, True)
        ]
        adv, dis = ({n: g for n, g in side.items() if not adapter or "lora_" in n} for side in sides)
        return adv, dis

    def ranking(self, model: nn.Module, adv: Mapping[str, Tensor], dis: Mapping[str, Tensor]) -> Ranking:
        """The scores of those parameters that take part."""
        left_out = set() if self.embeddings else tables(model)
        names = [name for name in adv if name in dis and name not in left_out]
        return Ranking(
            opposition({n: adv[n] for n in names}, {n: dis[n] for n in names}, self.unit, self.floor), self.unit
        )
