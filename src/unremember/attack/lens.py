"""Lens: likelihoods read from the middle of the model, through its own norm and head.  What a late block hides is there.

    p_l(v) = softmax( W_U · norm(h_l) ),      l* = argmax over ⌈L/2⌉ ≤ l < L of mean_retained P_l(value)^(1/T)

nostalgebraist 2020; as an attack on unlearning: Łucki et al. 2024 (arXiv 2409.18025), §4.3; Patil, Hase, Bansal 2023 (arXiv
2309.17410); tuned: Belrose et al. 2023 (arXiv 2303.08112).  Code: ethz-spylab/unlearning-vs-safety@75dade5, src/logit_lens.
The attacked model is a plain LM: the blocks above l* are cut off, so that norm and head, and every audit, follow block l*.
Never the last level, which is the model itself: it would say that a lens found what anybody reads.  Never the lower half, where
the stream is still about words and the best of many levels is best by luck.
Differs: one level, chosen on retained answers of the model under attack, where the paper reports the best of all levels on the
questions that it scores; so no level is good by luck, and no null for a maximum is needed.  The residual stream behind blocks
alone, not the outputs of attention and MLP.  An edited head reads every level, so it stays closed: see `graft` and `probe`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadModel
from unremember.folder import fingerprint
from unremember.lm import LM
from unremember.locate.lens import Trail, trails
from unremember.locate.tuned import Tune
from unremember.score import Score
from unremember.train import STRICT


def candidates(blocks: int) -> range:
    """Levels that may be read: the upper half of the blocks, without the last.  Level l lies behind l blocks."""
    return range((blocks + 1) // 2, blocks)


def known(trails: Sequence[Trail]) -> list[float]:
    """Mean of the rows' P(value)^(1/T) at every level."""
    return [float(np.mean([np.exp(t.logp[level].mean()) for t in trails])) for level in range(len(trails[0].logp))]


def clearest(known: Sequence[float], levels: Sequence[int]) -> int:
    """Which of the levels knows most; a tie goes to the lower, which is further from the end."""
    return max(levels, key=lambda level: known[level])


def cut(lm: LM, level: int, turn: Tensor | None = None, shift: Tensor | None = None) -> LM:
    """A copy that ends behind `level` blocks.  turn: (H, H) and shift: (H,), a tuned lens's map: h ← h + turn · h + shift."""
    out = lm.copy()
    kept = team.blocks(out.model)[:level]
    for parent in out.model.modules():
        if isinstance(parent, nn.ModuleList) and kept[0] in list(parent):
            del parent[level:]
    config = out.model.config
    config.num_hidden_layers = level
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:level]
    if turn is not None and shift is not None:
        # buffers, so that the copy has a fingerprint of its own
        kept[-1].register_buffer("lens_turn", turn.detach().clone())
        kept[-1].register_buffer("lens_shift", shift.detach().clone())
        kept[-1].register_forward_hook(_turned)
    assert len(team.blocks(out.model)) == level < len(team.blocks(lm.model)), "nothing was cut off"
    return out


def _turned(block: Any, _: Any, output: Any) -> Any:
    hidden = output[0] if isinstance(output, tuple) else output
    with torch.autocast(hidden.device.type, enabled=False):
        moved = (hidden.float() + hidden.float() @ block.lens_turn.T + block.lens_shift).to(hidden.dtype)
    return (moved, *output[1:]) if isinstance(output, tuple) else moved


@dataclass(frozen=True, config=STRICT)
class Lens:
    """tune: how a tuned lens is made, on the role prose and anew for every model; None = the logit lens."""

    tune: Tune | None = None

    needs = ("forget", "retain")
    paper = "nostalgebraist 2020; Łucki et al. 2024, arXiv 2409.18025"
    summary = "likelihoods read at a middle layer, chosen on retained answers"
    alone = True
    reads = ("value probability", "choice")  # likelihoods; what the model says aloud it says at its end

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where there is nothing to ask, to choose the level by, or to tune on."""
        corpus.require("lens", (*(("prose",) if self.tune else ()), *self.needs))

    def level(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[int, Tensor | None, Tensor | None]:
        """Which level this model is read at, and the map there (H, H), (H,) of a tuned lens.  Found once for a bench.

        Notes say what every level makes of the retained values, 0 being the embeddings and the last one the model itself.
        Raises BadModel where there is no level between the middle and the end.
        """
        self.check(corpus)
        levels = candidates(count := len(team.blocks(lm.model)))
        if not levels:
            raise BadModel(
                f"{lm.name or 'the model'} has {count} block{'s' * (count != 1)}, and a lens reads between the middle and the "
                "last; it needs 2 or more, leave out [attack.lens]"
            )
        rows = lm.template.rows(corpus["retain"], lm.limit)
        prose = sorted((x.id, x.answer) for x in corpus["prose"]) if self.tune else ()
        found = bench.memory.setdefault(f"{lm.fingerprint}/level", {})
        key = fingerprint([(row.ids, row.start, row.stop, row.span) for row in rows], self.tune, prose)
        if key not in found:
            lens = self.tune(lm, corpus["prose"], bench) if self.tune else None
            every = known(trails(lm, rows, lens, bench))
            best = clearest(every, levels)
            found[key] = every, (best, lens.delta[best], lens.bias[best]) if lens else (best, None, None)
        every, chosen = found[key]
        bench.notes.update(
            {"read at level": chosen[0]} | {f"retained values at level {at:02}": p for at, p in enumerate(every)}
        )
        return chosen

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        return cut(lm, *self.level(lm, corpus, bench)), corpus

    def read(self, audit: Callable[[LM, Corpus, Bench], Score], lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        """What the audit finds at the chosen level, example by example."""
        return audit(cut(lm, *self.level(lm, corpus, bench)), corpus, bench)
