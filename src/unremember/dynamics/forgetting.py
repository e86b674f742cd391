"""What is left of a batch that was seen once: insert it, train on as before, and read it after each epoch.

    from one checkpoint, two arms:    inserted = insertion, then epochs on the training set
                                      control  = the same epochs of the same training set, and nothing else

Tirumala et al. 2022 (arXiv 2205.10770), section 5.  No code was published.
Differs: the control arm is ours.  Both begin with the same weights and the same Adam moments, and order and masks depend on
the seed alone, so that without an insertion they are equal bit for bit.  The paper inserts by one update of its large batch;
here an insertion is up to `updates` updates on the special batch, until M(special) reaches `until`.
"""

from __future__ import annotations

from dataclasses import dataclass as plain
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember.dynamics.curves import baseline, excess, half_life, settled
from unremember.dynamics.loop import Training
from unremember.dynamics.text import Sequences, apart
from unremember.train import STRICT


@dataclass(frozen=True, config=STRICT)
class Insertion:
    """updates: the most updates on the special batch; 0 inserts nothing.  until: M(special) at which it ends, above 1 = never.
    gap: epochs between two updates (spaced repetition); 0 = all of them at once.
    moments: 'kept', Adam goes on with what the insertion left in it, or 'restored' to what they were before.
    """

    updates: Annotated[int, Field(ge=0)]
    until: Annotated[float, Field(gt=0)] = 2.0
    gap: Annotated[int, Field(ge=0)] = 0
    moments: Literal["kept", "restored"] = "kept"


NOTHING = Insertion(0)


@plain(frozen=True)
class Arm:
    """M and loss of the special batch: [0] right behind the last insertion, then after each epoch.

    before: M when the arm began.  offset: epochs that a spaced insertion took.  updates: how many it had.  rate: their
    learning rate (of the last).  train: M of the training set at the end.
    """

    before: float
    m: tuple[float, ...]
    loss: tuple[float, ...]
    offset: int
    updates: int
    rate: float
    train: float


def arm(training: Training, text: Sequences, special: Sequences, insertion: Insertion, epochs: int) -> Arm:
    """Go on from `training`, which stays where it is, through the insertion and `epochs` epochs."""
    run = training.fork()
    before, offset, done = run.read(special).m or 0.0, 0, 0
    rate = run.regime.rate(run.update)
    for block in range(insertion.updates if insertion.gap else 1):
        if block:
            for _ in range(insertion.gap):
                run.train(text)
            offset += insertion.gap
        kept, rate = run.moments(), run.regime.rate(run.update)
        for _ in range(1 if insertion.gap else insertion.updates):
            if insertion.until <= 1 and (run.read(special).m or 0.0) >= insertion.until:
                break
            run.insert(special)
            done += 1
        if insertion.moments == "restored":
            run.optimiser.load_state_dict(kept)
    seen = [run.read(special)]
    for _ in range(epochs):
        run.train(text)
        seen.append(run.read(special))
    m, loss = tuple(r.m or 0.0 for r in seen), tuple(r.loss or 0.0 for r in seen)
    return Arm(before, m, loss, offset, done, rate, run.read(text).m or 0.0)


def forget(
    training: Training, text: Sequences, special: Sequences, insertions: dict[str, Insertion], epochs: int
) -> dict[str, dict]:
    """Name -> what became of that insertion, beside its never-seen control.  BadCorpus where special and text overlap.

    One control serves all: it inserts nothing, and runs as long as the longest of them.
    """
    apart(special, text)
    arms = {name: arm(training, text, special, insertion, epochs) for name, insertion in insertions.items()}
    most = max((a.offset for a in arms.values()), default=0)
    control = arm(training, text, special, NOTHING, most + epochs)
    return {name: compared(a, control) for name, a in arms.items()}


def compared(inserted: Arm, control: Arm) -> dict:
    """The numbers of two arms: baselines, excess, half-life; plain values, fit for JSON."""
    span = slice(inserted.offset, inserted.offset + len(inserted.m))
    m, loss = control.m[span], control.loss[span]
    over, low, never = excess(inserted.m, m), baseline(inserted.m), baseline(m)
    half = half_life(over)
    return {
        "before": inserted.before,
        "updates": inserted.updates,
        "rate": inserted.rate,
        "inserted": list(inserted.m),
        "control": list(m),
        "inserted loss": list(inserted.loss),
        "control loss": list(loss),
        "excess": over,
        "baseline": low,
        "control baseline": never,
        "excess baseline": None if low is None or never is None else low - never,
        "half-life": None if half is None else {"after": half.after, "at": half.at},
        "settled": settled(inserted.m),
        "train": inserted.train,
    }
