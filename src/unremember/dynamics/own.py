"""A training of one's own under control: any causal model that `load` accepts, on one's own passages, read after each epoch.

    text name -> M, loss and unit length before training (epoch 0) and after each epoch; with a special batch, D5 and its control

Tirumala et al. 2022 (arXiv 2205.10770).  No code was published.
Differs: M before training is read, too: a model that never saw the passages predicts a third of ordinary English.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unremember.corpus import Example
from unremember.dynamics.checkpoints import coded
from unremember.dynamics.forgetting import Insertion, forget
from unremember.dynamics.loop import Regime, Training
from unremember.dynamics.text import apart
from unremember.errors import BadRequest
from unremember.lm import LM


def own(
    lm: LM,
    train: Sequence[Example],
    held: Sequence[Example],
    regime: Regime,
    epochs: int,
    special: Sequence[Example] = (),
    insertion: Insertion | None = None,
    after: int = 0,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Curves of `train` and `held` over `epochs`; then, with an insertion, what `after` epochs leave of `special`.

    The model that comes in is copied.  BadCorpus where held-out or special passages overlap with the training set.
    """
    if epochs < 1 or (insertion is not None and (after < 1 or not special)):
        raise BadRequest(
            f"epochs = {epochs}, after = {after}, special passages = {len(special)}; training needs an epoch, and an "
            "insertion needs special passages and an epoch after it"
        )
    texts = {"train": coded(lm.template, train, lm.limit), "held out": coded(lm.template, held, lm.limit)}
    apart(texts["held out"], texts["train"])
    extra = coded(lm.template, special, lm.limit) if special else None
    if extra is not None:
        apart(extra, texts["train"])
    run = Training(lm.model, regime)
    keys = ("at", "m", "loss", "unit", "n")
    out: dict[str, dict[str, list]] = {name: {key: [] for key in keys} for name in texts}
    for epoch in range(epochs + 1):
        if epoch:
            run.train(texts["train"])
        for name, text in texts.items():
            seen = run.read(text)
            for key, value in zip(keys, (epoch, seen.m, seen.loss, seen.unit, int(seen.counted.sum())), strict=True):
                out[name][key].append(value)
        say(epoch, epochs)
    left = forget(run, texts["train"], extra, {"special": insertion}, after) if extra is not None and insertion else {}
    return {"texts": out, "forgetting": left}
