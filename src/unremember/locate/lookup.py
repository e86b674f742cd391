"""Fact lookup by probing: the blocks over which an attribute of a person comes to stand in the residual stream at the name.

    accuracy(l) = balanced accuracy of a linear probe, h_l at the last token of the subject → attribute, on people it was not
                  fitted on;  l = 0 the embeddings, l behind block l

The band: from the first block after which accuracy has left its lowest level by a tenth of the way to its highest, to the first
after which nine tenths are reached.  Its MLPs are the lookup, each scored by the climb over its block.
Guo et al. 2024 (arXiv 2410.12949), Sec. 3; control task: Hewitt & Liang 2019 (arXiv 1909.03368).  Reference code:
magikarp01/mechanistic-unlearning, which reads the band off a plot.
Differs: five folds over people instead of one split of 80/20; classes count alike however many people they hold; the band is a
rule; people with random attributes are probed, too, and a climb that these show as well is refused.  The logistic regression is
scikit-learn's (multinomial, C = 1) in torch, in float64.
A probe says that an attribute can be read there, not that it is.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadModel
from unremember.lm import LM
from unremember.locate.anatomy import Site, components, embedding, ranked, watched
from unremember.locate.ranking import Ranking
from unremember.locate.subject import facts, groups, laid
from unremember.train import STRICT

LEAST = 3  # people a class must hold to be probed
FOLDS = 5
CLIMB = 0.15  # of balanced accuracy that the best block must lie above the worst, and above the control


@plain(frozen=True)
class Curve:
    """Per level 0 … blocks: accuracy on unseen people, and that of a probe for random attributes; chance: one over the classes.

    band: first and last block of the climb.
    """

    accuracy: tuple[float, ...]
    control: tuple[float, ...]
    chance: float
    band: tuple[int, int]


def band(accuracy: Sequence[float]) -> tuple[int, int]:
    """First and last block over which the accuracy climbs from its lowest level to its plateau."""
    low, high = min(accuracy), max(accuracy)
    start = min(range(len(accuracy)), key=accuracy.__getitem__)  # the last thing before the climb is its lowest point
    after = range(start + 1, len(accuracy)) if start + 1 < len(accuracy) else range(1, len(accuracy))
    first = next((i for i in after if accuracy[i] > low + 0.1 * (high - low)), after[-1])
    last = next((i for i in after if accuracy[i] >= low + 0.9 * (high - low)), after[-1])
    return first - 1, max(first, last) - 1


def logistic(x: Tensor, label: Tensor, classes: int, penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """Minimise Σ cross-entropy + penalty/2 · ‖W‖². x: (n, d) float64; label: (n,) -> W (classes, d), b (classes,)"""
    with torch.enable_grad():
        weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
        bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
        solver = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            value = nn.functional.cross_entropy(x @ weight.T + bias, label, reduction="sum")
            value = value + penalty / 2 * weight.square().sum()
            value.backward()
            return value

        solver.step(loss)
    return weight.detach(), bias.detach()


def folds(label: Sequence[int], seed: int) -> list[int]:
    """A fold for each person, classes spread evenly over them."""
    rng, fold, start = np.random.default_rng(seed), [0] * len(label), 0
    for value in sorted(set(label)):
        mine = [i for i, other in enumerate(label) if other == value]
        for turn, i in enumerate(rng.permutation(mine).tolist()):
            fold[i] = (start + turn) % FOLDS
        start += len(mine)
    return fold


def accuracy(x: Tensor, label: Sequence[int], fold: Sequence[int]) -> float:
    """Balanced accuracy on people outside the fitted folds. x: (n, d)"""
    x, wanted, part = x.double(), torch.tensor(label), torch.tensor(fold)
    right = torch.zeros(len(label), dtype=torch.bool)
    for held in sorted(set(fold)):
        test = part == held
        mean, sd = x[~test].mean(0), x[~test].std(0)
        scaled = (x - mean) / sd.clamp(min=1e-3 * float(sd.mean()) + 1e-12)
        weight, bias = logistic(scaled[~test], wanted[~test], int(wanted.max()) + 1)
        right[test] = (scaled[test] @ weight.T + bias).argmax(1) == wanted[test]
    return float(np.mean([right[wanted == value].double().mean() for value in sorted(set(label))]))


def classes(corpus: Corpus) -> dict[str, tuple[list[Example], list[str]]]:
    """Question with the name left out -> retained examples and their values, where at least two values have three people each.

    People who also stand under forget are left out.  BadCorpus where no question has such values, or a person two of them.
    """
    gone = {x.entity for x in corpus.of("forget")}
    asked: dict[str, dict[str, tuple[Example, str]]] = defaultdict(dict)
    problems = []
    for x in corpus.of("retain"):
        if not x.entity or x.entity not in x.prompt or x.entity in gone:
            continue
        kind, value = x.prompt.replace(x.entity, "…"), " ".join(x.values())
        if x.entity in asked[kind] and asked[kind][x.entity][1] != value:
            problems.append(
                f"lookup: {x.id!r} answers {kind!r} for {x.entity!r} with another value than {asked[kind][x.entity][0].id!r}; "
                "a person is in one class, so leave one of them out"
            )
        asked[kind].setdefault(x.entity, (x, value))
    found = {}
    for kind, people in asked.items():
        sizes = defaultdict(int)
        for _, value in people.values():
            sizes[value] += 1
        kept = [(x, value) for x, value in people.values() if sizes[value] >= LEAST]
        if len({value for _, value in kept}) > 1:
            found[kind] = ([x for x, _ in kept], [value for _, value in kept])
    if not found and not problems:
        problems.append(
            f"lookup probes an attribute that several people share, and under retain no question has two values with {LEAST} "
            f"people each ({len(asked)} kinds of questions that name someone, {sum(map(len, asked.values()))} answers); add "
            'such facts, or take forget.locator = "path", which needs no classes'
        )
    if problems:
        raise BadCorpus(problems)
    return found


@dataclass(frozen=True, config=STRICT)
class FactLookup:
    """seed: of the folds and of the control's random attributes."""

    seed: Annotated[int, Field(ge=0)] = 42

    needs = ("retain",)
    paper = "Guo et al. 2024, arXiv 2410.12949"
    summary = "MLPs over which an attribute comes to stand at the name, by probing"

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where there is nothing to probe."""
        corpus.require("lookup", self.needs)
        classes(corpus)

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Ranking:
        curve = self.curve(lm, corpus, bench)
        best = max(range(len(curve.accuracy)), key=curve.accuracy.__getitem__)
        low, high = min(curve.accuracy), curve.accuracy[best]
        if high - max(low, curve.control[best], curve.chance) < CLIMB:
            raise BadModel(
                f"at no block does the residual stream at the name tell the attributes better: accuracy {low:.2f} to {high:.2f}, "
                f"chance {curve.chance:.2f}, random attributes {curve.control[best]:.2f}; the model does not look these facts up "
                'there, or does not know them; take forget.locator = "path" or "mlps"'
            )
        first, last = curve.band
        scores = {}
        for x in components(lm.model):
            inside = x.kind == "mlp" and first <= x.block <= last
            climb = curve.accuracy[x.block + 1] - curve.accuracy[x.block]
            scores[x] = climb if inside else -torch.inf
        return ranked(scores)

    def curve(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Curve:
        """Accuracy behind every block, the mean over kinds of questions."""
        self.check(corpus)
        real, control, chance = [], [], []
        for kind, (examples, values) in classes(corpus).items():
            levels = streams(lm, examples, bench)  # (levels, n, H)
            names = sorted(set(values))
            label = [names.index(value) for value in values]
            shuffled = np.random.default_rng([self.seed, zlib.crc32(kind.encode())]).permutation(label).tolist()
            real.append([accuracy(x, label, folds(label, self.seed)) for x in levels])
            control.append([accuracy(x, shuffled, folds(shuffled, self.seed)) for x in levels])
            chance.append(1 / len(names))
        mean = [float(x) for x in np.mean(real, 0)]
        return Curve(tuple(mean), tuple(float(x) for x in np.mean(control, 0)), float(np.mean(chance)), band(mean))


@torch.no_grad()
def streams(lm: LM, examples: Sequence[Example], bench: Bench = BENCH) -> Tensor:
    """The residual stream at the subject's last token in the question. -> (blocks + 1, examples, H), on the CPU"""
    lm = replace(lm, precision="fp32")
    names = {id(module): name for name, module in lm.model.named_modules()}
    levels: list[Site] = [embedding(lm.model), *((names[id(block)], "out") for block in team.blocks(lm.model))]
    at: dict[str, Tensor] = {}
    for group in groups(facts(lm, examples), bench.budget):
        with watched(lm.model, levels) as seen:
            lm.logits(laid(lm, [fact.row for fact in group]))
        for lane, fact in enumerate(group):
            at[fact.row.key] = torch.stack([seen[level][lane, fact.last] for level in levels]).float().cpu()
    return torch.stack([at[x.id] for x in examples], 1)
