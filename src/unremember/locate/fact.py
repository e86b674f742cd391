"""One fact in one model: where putting a clean state back brings the answer back, what each layer would say, who writes it.

    effect(l, word) = (d(corrupt; state of l at the word ← clean) − d(corrupt)) / (d(clean) − d(corrupt)),   means over draws

corrupt = noise of `noise` standard deviations of the model's embeddings on the subject's.  States: the residual stream behind a
block; the outputs of a window of MLPs, or of attentions, around it; or the stream with what later MLPs, or attentions, add there
held as it was in the corrupt run (severed): what is then missing went through them.
Meng, Bau, Andonian, Belinkov 2022 (ROME, arXiv 2202.05262), Sec. 2 and Fig. 1; the lens is lens.py's, the parts attribution.py's.
Differs: a column is a word, its tokens put back together, since a rare name is many tokens; d is a log-odds (subject.py), because
what is known by heart has a probability of one whatever is done to it; ROME's probability is one setting away.  Columns begin
with the subject: what stands before it is the same in both runs.  Copies of a text share what stands before the subject.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Example
from unremember.errors import BadModel
from unremember.lm import LM
from unremember.locate.anatomy import Site, components, edited, embedding, watched
from unremember.locate.attribution import attribute
from unremember.locate.lens import Lens, levels, trails
from unremember.locate.subject import FLOOR, Fact, facts, known, laid, noised, required, sigma
from unremember.tokens import Tokens
from unremember.train import STRICT

Kind = Literal["residual", "mlp", "attention", "residual, mlp severed", "residual, attention severed"]
Grid = tuple[tuple[float, ...], ...]
Edit = Callable[[Tensor], Tensor]
WIDTH = 512  # places of one pass: attention is quadratic in them
ROME = 10 / 48  # share of the blocks in a window
LEAST = 0.01  # of probability that the subject must be worth


@plain(frozen=True)
class FactMap:
    """Everything about one fact in one model, as plain numbers.

    words: the columns, text from the subject on; subject: which are its name; asked: how many stand before the
    answer; tokens: the secret ones, as text.
    clean, corrupt: d (or probability) with the subject, and without it on average.  measure: which of the two.
    effects: kind -> (blocks, words) share that comes back, 1 = all of it.  window: blocks put back together, MLPs and attentions.
    rank, probability: (levels, tokens), level 0 the embeddings.
    attention, mlp: (blocks, tokens) added to a token's logit less the mean of all tokens'; embedding: (tokens,); logit: the sum.
    """

    model: str
    question: str
    answer: str
    words: tuple[str, ...]
    subject: tuple[bool, ...]
    asked: int
    tokens: tuple[str, ...]
    measure: str
    clean: float
    corrupt: float
    window: int
    draws: int
    effects: Mapping[str, Grid]
    rank: tuple[tuple[int, ...], ...]
    probability: Grid
    attention: Grid
    mlp: Grid
    embedding: tuple[float, ...]
    logit: tuple[float, ...]


@plain(frozen=True)
class Restoring:
    """One run of the corrupt text.  back: site -> places of the row that are as in the clean run; held: as in the corrupt one."""

    back: Mapping[Site, tuple[int, ...]]
    held: Mapping[Site, tuple[int, ...]]


def words(lm: LM, fact: Fact) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """The row from the subject on, as words and the places of their tokens, to the last place that predicts the value.

    The name's words are apart from what stands around them; the template's marks between question and answer are one word.
    """
    row, special = fact.row, set(lm.tokenizer.all_special_ids)
    last = row.start + max(i for i, hit in enumerate(row.span) if hit) - 1
    groups: list[list[int]] = []
    before, framed = "", False
    for place in range(min(fact.subject), last + 1):
        text = lm.tokenizer.decode([row.ids[place]])
        mark = not framed and place < row.start and row.ids[place] in special
        framed = (framed or mark) and place < row.start
        begins = text[:1].isspace() or before[-1:].isspace() or place == row.start
        if (place in fact.subject) != (place - 1 in fact.subject):
            begins = True
        elif not text.strip():
            begins = False
        if not groups or mark or (begins and not framed):
            groups.append([])
        groups[-1].append(place)
        before = text
    names = [lm.tokenizer.decode([row.ids[p] for p in g], skip_special_tokens=True).strip() for g in groups]
    return tuple(name or "↵" for name in names), tuple(map(tuple, groups))


def copies(fact: Fact, count: int) -> tuple[Tensor, Tokens]:
    """One lane: what stands before the subject once, then `count` copies of the rest, none of which sees another.

    -> (count, row's places): where in the lane each copy has each place of the row; and tokens that score every copy's value.
    """
    row = fact.row
    hits = [row.start + i for i, hit in enumerate(row.span) if hit]
    first, stop = min(fact.subject), max(hits)
    wide, copy = stop - first, torch.arange(count)[:, None]
    at = torch.arange(stop).repeat(count, 1)
    at[:, first:] += wide * copy
    lane = first + wide * count
    ids, positions = torch.zeros(1, lane, dtype=torch.long), torch.zeros(1, lane, dtype=torch.long)
    ids[0, at] = torch.tensor(row.ids[:stop]).expand(count, -1)
    positions[0, at] = torch.arange(stop).expand(count, -1)
    visible = torch.eye(lane, dtype=torch.bool)
    earlier = torch.ones(stop, stop, dtype=torch.bool).tril()
    for places in at:
        visible[places[:, None], places] |= earlier
    source = at[:, [hit - 1 for hit in hits]].flatten()
    target = torch.tensor([row.ids[hit] for hit in hits]).repeat(count)
    owner = torch.arange(count).repeat_interleave(len(hits))
    yes = torch.ones(len(target), dtype=torch.bool)
    totals = {"answer": len(target), "span": len(target), "train": len(target)}
    return at, Tokens(
        "", ids, positions, visible[None, None], owner, source, target, yes, yes, ~yes,
        tuple(f"{row.key}#{i}" for i in range(count)), count, totals,
    )  # fmt: skip


@dataclass(frozen=True, config=STRICT)
class Trace:
    """kinds: which states are put back; none = no map, the lens and the parts alone.

    window: blocks around the one named, for MLPs and attentions; 0 = ROME's share.
    draws: corruptions.  noise: in standard deviations of the embeddings.  measure: 'odds', or 'probability' as ROME has it.
    """

    kinds: tuple[Kind, ...] = ("residual", "mlp", "attention")
    window: Annotated[int, Field(ge=0)] = 0
    draws: Annotated[int, Field(ge=1)] = 10
    noise: Annotated[float, Field(gt=0)] = 3.0
    measure: Literal["odds", "probability"] = "odds"
    seed: int = 0

    def __call__(self, lm: LM, example: Example, lens: Lens | None = None, bench: Bench = BENCH) -> FactMap:
        """lens: the logit lens if None.  BadCorpus where the question lacks the entity's name; BadModel where it is not known."""
        lm = replace(lm, precision="fp32")
        [fact] = facts(lm, [example])
        columns, places = words(lm, fact)
        blocks = len(team.blocks(lm.model))
        runs = {
            kind: [self.run(lm, kind, block, at) for block in range(blocks) for at in places] for kind in self.kinds
        }
        clean, low, found = self.restored(lm, fact, [run for kind in runs.values() for run in kind], bench)
        corrupt = sum(low) / len(low)
        if self.kinds and self.measure == "odds":
            required(clean - corrupt, 1)
        elif self.kinds and clean - corrupt < LEAST:
            raise BadModel(
                f"taking out the subject changes the probability of {example.answer!r} by {clean - corrupt:.3g}, and shares of "
                f'less than {LEAST:g} are noise: the model does not know it, or take measure = "odds"'
            )
        share = (found.mean(0) - corrupt) / (clean - corrupt)
        effects: dict[str, Grid] = {}
        for i, kind in enumerate(runs):
            part = share[i * blocks * len(places) : (i + 1) * blocks * len(places)]
            effects[kind] = _grid(part.view(blocks, len(places)))
        [trail] = trails(lm, [fact.row], lens, bench)
        parts = attribute(lm, fact.row, against="mean")
        by = {
            kind: _grid(torch.stack([x for c, x in parts.parts.items() if c.kind == kind]))
            for kind in ("attention", "mlp")
        }
        secret = [fact.row.ids[fact.row.start + i] for i, hit in enumerate(fact.row.span) if hit]
        return FactMap(
            lm.name, example.prompt, example.answer, columns,
            tuple(at[0] in fact.subject for at in places), sum(at[-1] < fact.row.start for at in places),
            tuple(lm.tokenizer.decode([i]) for i in secret),
            self.measure, clean, corrupt, self.wide(blocks), self.draws, effects,
            tuple(tuple(map(int, line)) for line in trail.rank), _grid(torch.from_numpy(trail.logp).double().exp()),
            by["attention"], by["mlp"], _grid(parts.embedding[None])[0], _grid(parts.logit[None])[0],
        )  # fmt: skip

    def left(self, lm: LM, example: Example, lens: Lens | None = None, bench: Bench = BENCH) -> FactMap:
        """The same of a model that may have forgotten: without a map where the subject is worth too little to share."""
        bare = replace(self, kinds=())(lm, example, lens, bench)
        worth = bare.clean - bare.corrupt
        return self(lm, example, lens, bench) if worth >= (FLOOR if self.measure == "odds" else LEAST) else bare

    def wide(self, blocks: int) -> int:
        """Blocks in a window."""
        return self.window or max(1, round(ROME * blocks))

    def run(self, lm: LM, kind: Kind, block: int, places: tuple[int, ...]) -> Restoring:
        """What is put back, and held, for one cell of the map."""
        stream, parts = levels(lm.model), components(lm.model)
        name, _, severed = kind.partition(", ")
        if name == "residual":
            cut = severed.partition(" ")[0]
            held = {x.output: places for x in parts if x.kind == cut and x.block > block}
            return Restoring({stream[block + 1]: places}, held)
        wide, blocks = self.wide(len(stream) - 1), len(stream) - 1
        first = max(0, block - wide // 2)
        chosen = range(first, min(blocks, block - wide // 2 + wide))
        return Restoring({x.output: places for x in parts if x.kind == name and x.block in chosen}, {})

    @torch.no_grad()
    def restored(
        self, lm: LM, fact: Fact, runs: Sequence[Restoring], bench: Bench = BENCH
    ) -> tuple[float, list[float], Tensor]:
        """d or probability of the clean text, of each corrupt draw, and of each draw and run: (draws, runs)."""
        sites = {site for run in runs for site in (*run.back, *run.held)}
        with watched(lm.model, sites) as seen:
            whole = float(self._value(lm, laid(lm, [fact.row])))
        clean = {site: seen[site][0] for site in sites}  # (T, H)
        scale, embed = self.noise * sigma(lm, [fact]), embedding(lm.model)
        width = lm.model.get_input_embeddings().weight.shape[1]
        rest = max(fact.row.start + i for i, hit in enumerate(fact.row.span) if hit) - min(fact.subject)
        size = max(1, (WIDTH - min(fact.subject)) // rest)
        low, found, done, steps = [], torch.zeros(self.draws, len(runs)), 0, self.draws * -(-len(runs) // size)
        for draw in range(self.draws):
            noise = noised([fact], scale, self.seed, draw)(torch.zeros(1, len(fact.row.ids), width))[0].to(lm.device)
            at, tokens = copies(fact, 1)
            with edited(lm.model, {embed: _noise(at, noise)}), watched(lm.model, sites) as seen:
                low.append(float(self._value(lm, tokens.to(lm.device))))
            corrupt = {site: seen[site][0, at[0].to(lm.device)] for site in sites}
            for begin in range(0, len(runs), size):
                group = runs[begin : begin + size]
                at, tokens = copies(fact, len(group))
                edits = {embed: _noise(at, noise)}
                for site in sites:
                    put = [
                        (int(at[i, p]), values[site][p])
                        for i, run in enumerate(group)
                        for where, values in ((run.held, corrupt), (run.back, clean))
                        for p in where.get(site, ())
                    ]
                    if put:
                        edits[site] = _put(edits.get(site), put)
                with edited(lm.model, edits):
                    found[draw, begin : begin + len(group)] = self._value(lm, tokens.to(lm.device)).cpu()
                done += 1
                bench.say("trace", done, steps, {})
        return whole, low, found

    def _value(self, lm: LM, tokens: Tokens) -> Tensor:
        """(rows,)"""
        return known(lm, tokens) if self.measure == "odds" else tokens.per_row(lm.logp(tokens), "span").exp()


def _noise(at: Tensor, noise: Tensor) -> Edit:
    """The row's noise at every copy's places."""

    def edit(value: Tensor) -> Tensor:  # (1, lane, H)
        moved = value.clone()
        moved[0, at.to(value.device)] = value[0, at.to(value.device)] + noise[: at.shape[1]].to(value)
        return moved

    return edit


def _put(before: Edit | None, put: list[tuple[int, Tensor]]) -> Edit:
    """Places of the lane that hold what they are given, after what was done there `before`."""
    where, values = torch.tensor([place for place, _ in put]), torch.stack([value for _, value in put])

    def edit(value: Tensor) -> Tensor:  # (1, lane, H)
        moved = (before(value) if before else value).clone()
        moved[0, where.to(value.device)] = values.to(value)
        return moved

    return edit


def _grid(values: Tensor) -> Grid:
    return tuple(tuple(float(v) for v in line) for line in values.cpu())
