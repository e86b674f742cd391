"""The paper in miniature: every experiment as cells, each a pure function of (settings, seed), and one command that runs them.

    size      M a epoch for each width, causal and masked           data      the same for each number of sequences
    rate      … for each learning rate                              forget    insertion against the never-seen control
    repeat    insertion 1, 10, 100 times, spaced, early and late    identify  a token of its own in front of each sequence
    planted   digit strings that nothing predicts                   speech    by part of speech, on English sentences

Tirumala et al. 2022 (arXiv 2205.10770), sections 3 to 6.  No code was published.
Differs: models of 30 to 440 thousand weights on generated text with a known ceiling; every curve has its held-out or
never-seen control beside it.  What such models can and cannot show is said by `claims`, claim by claim.
"""

from __future__ import annotations

import platform
import time as clock
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember.dynamics import models, tags, text
from unremember.dynamics.curves import before_overfitting
from unremember.dynamics.forgetting import Insertion, forget
from unremember.dynamics.loop import Kind, Regime, Training
from unremember.dynamics.memorise import recall, share
from unremember.errors import BadRequest, nearest
from unremember.folder import claim, fingerprint, read_json, write_json
from unremember.train import STRICT

SCHEMA = "unremember.dynamics/1"
Widths = Annotated[tuple[int, ...], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=STRICT)
class Study:
    """What is trained.  widths: of the causal models, small to large; the first also carries identifiers.
    encoders: widths of the masked ones.  seeds: runs of everything.  sequences, length: the training set.
    held, special: sequences of the held-out set and of the special batch.  lr, masked_lr: learning rates.
    epochs, masked_epochs: caps; a run ends when it has memorised `enough`.
    middle: the width that data, rates and repetitions use.  sizes: training sets.  rates: learning rates, for rated widths.
    insert: epoch of the insertion.  after: epochs behind it.  early, late: further epochs of insertion (0 = left out).
    repeats: updates of repeated insertions.  gap: epochs between two of the spaced one.  random: widths with random special
    sequences.  digits: length of the planted strings.  speech: epochs on English, 0 = left out.
    """

    widths: Widths = (32, 64, 128)
    encoders: tuple[int, ...] = (32, 64, 128)
    seeds: Count = 3
    sequences: Annotated[int, Field(ge=2)] = 256
    length: Annotated[int, Field(ge=2)] = 32
    held: Count = 64
    special: Count = 32
    lr: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    masked_lr: Annotated[float, Field(gt=0, lt=1)] = 3e-3
    epochs: Count = 100
    masked_epochs: Count = 50
    enough: Annotated[float, Field(gt=0, le=1)] = 0.95
    middle: int = 64
    sizes: tuple[int, ...] = (64, 128, 512)
    rates: tuple[float, ...] = (3e-4, 3e-3, 1e-2)
    rated: tuple[int, ...] = (32, 64)
    insert: Count = 10
    after: Count = 30
    early: Annotated[int, Field(ge=0)] = 5
    late: Annotated[int, Field(ge=0)] = 20
    repeats: tuple[int, ...] = (1, 10, 100)
    gap: Count = 2
    random: tuple[int, ...] = (32,)
    digits: Count = 8
    planted: Annotated[int, Field(ge=0)] = 60
    speech: Annotated[int, Field(ge=0)] = 24


PRESETS: dict[str, Study] = {
    "miniature": Study(),
    "quick": Study(
        widths=(32, 64),
        encoders=(64,),
        seeds=1,
        sequences=64,
        special=16,
        epochs=80,
        masked_epochs=150,
        sizes=(32,),
        rates=(3e-3,),
        rated=(64,),
        insert=15,
        after=20,
        early=0,
        late=0,
        repeats=(1, 10),
        random=(32,),
        planted=60,
        speech=8,
    ),
}

Cell = tuple[str, dict[str, Any]]  # the experiment's name, and what it is called with besides the study


def cells(study: Study) -> Iterator[Cell]:
    """Every run of a study; those of the largest models first, so that two processes end together."""
    found: list[Cell] = []
    for seed in range(study.seeds):
        found += [("size", {"kind": "causal", "width": w, "seed": seed}) for w in study.widths]
        found += [("size", {"kind": "masked", "width": w, "seed": seed}) for w in study.encoders]
        found += [("data", {"sequences": n, "seed": seed}) for n in study.sizes]
        found += [("rate", {"width": w, "lr": lr, "seed": seed}) for w in study.rated for lr in study.rates]
        found += [("forget", {"width": w, "seed": seed, "random": False}) for w in study.widths]
        found += [("forget", {"width": w, "seed": seed, "random": True}) for w in study.random]
        found += [("repeat", {"seed": seed, "at": at}) for at in (study.early, study.insert, study.late) if at]
        found += [("identify", {"form": form, "seed": seed}) for form in ("unused", "prefixed")]
        found += [("planted", {"seed": seed})] * bool(study.planted)
        found += [("speech", {"seed": seed})] * bool(study.speech)
    yield from sorted(found, key=lambda cell: -cell[1].get("width", study.middle))


def problems(study: Study) -> Iterator[str]:
    """What no run could be made of, before any is begun."""
    for width in {*study.widths, *study.encoders, *study.rated, *study.random, study.middle}:
        try:
            models.check(width)
        except BadRequest as wrong:
            yield from wrong.problems
    if study.digits + 2 > study.length:
        yield f"digits = {study.digits} leave no room in sequences of {study.length}; use at most {study.length - 2}"


def measure(study: Study, cell: Cell) -> dict:
    """Run one cell on one thread; plain values."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: two threads were seen to be sixty times slower on a busy machine
    try:
        name, chosen = cell
        began = clock.monotonic()
        found = EXPERIMENTS[name](study, **chosen)
        return {"experiment": name, **chosen, **found, "seconds": round(clock.monotonic() - began, 2)}
    finally:
        torch.set_num_threads(threads)


def curve(training: Training, train: text.Sequences, held: text.Sequences, epochs: int, enough: float) -> dict:
    """M, held-out M, losses and unit length after each epoch, M_update after each update, until `enough` or the cap."""
    out: dict[str, list] = {"m": [], "held": [], "loss": [], "held loss": [], "unit": [], "updates": []}
    while len(out["m"]) < epochs and (not out["m"] or out["m"][-1] < enough):
        out["updates"] += training.train(train)
        seen, other = training.read(train), training.read(held)
        values = (seen.m, other.m, seen.loss, other.loss, seen.unit)
        for key, value in zip(("m", "held", "loss", "held loss", "unit"), values, strict=True):
            out[key].append(value)
    fit = before_overfitting(out["m"], out["held loss"])
    return {**out, "before over-fitting": None if fit is None else {"epoch": fit[0], "m": fit[1]}}


def _markov(study: Study, seed: int, count: int = 0) -> tuple[text.Sequences, text.Sequences]:
    train = text.markov(count or study.sequences, study.length, seed)
    return train, text.markov(study.held, study.length, seed, "held")


def _decoder(study: Study, width: int, seed: int, vocabulary: int = text.VOCABULARY) -> Any:
    return models.decoder(vocabulary, width, study.length + 1, seed)


def _size(study: Study, kind: Kind, width: int, seed: int) -> dict:
    make = models.decoder if kind == "causal" else models.encoder
    model = make(text.VOCABULARY, width, study.length + 1, seed)
    lr, epochs = (study.lr, study.epochs) if kind == "causal" else (study.masked_lr, study.masked_epochs)
    training = Training(model, Regime(lr, kind=kind, seed=seed))
    return {"weights": models.parameters(model), **curve(training, *_markov(study, seed), epochs, study.enough)}


def _data(study: Study, sequences: int, seed: int) -> dict:
    training = Training(_decoder(study, study.middle, seed), Regime(study.lr, seed=seed))
    return curve(training, *_markov(study, seed, sequences), study.epochs, study.enough)


def _rate(study: Study, width: int, lr: float, seed: int) -> dict:
    training = Training(_decoder(study, width, seed), Regime(lr, seed=seed))
    return curve(training, *_markov(study, seed), study.epochs, study.enough)


def _begun(study: Study, width: int, seed: int, epochs: int) -> tuple[Training, text.Sequences]:
    train, _ = _markov(study, seed)
    training = Training(_decoder(study, width, seed), Regime(study.lr, seed=seed))
    for _ in range(epochs):
        training.train(train)
    return training, train


def _forget(study: Study, width: int, seed: int, random: bool) -> dict:
    training, train = _begun(study, width, seed, study.insert)
    if random:
        special = text.noise(study.special, study.length, seed)
    else:
        special = text.markov(study.special, study.length, seed, "special")
    insertion = Insertion(200, until=0.95)
    return forget(training, train, special, {"once": insertion}, study.after)["once"]


def _repeat(study: Study, seed: int, at: int) -> dict:
    """At the usual epoch every way to insert; at the others, for the order test, the (g) insertion alone."""
    training, train = _begun(study, study.middle, seed, at)
    special = text.markov(study.special, study.length, seed, "special")
    ways = {"until 0.95": Insertion(200, until=0.95)}
    if at == study.insert:
        ways |= {f"{n}": Insertion(n) for n in study.repeats}
        ways["10 spaced"] = Insertion(10, gap=study.gap)
        ways["until 0.95, moments restored"] = Insertion(200, until=0.95, moments="restored")
    return {"ways": forget(training, train, special, ways, study.after)}


def _identify(study: Study, form: str, seed: int) -> dict:
    """form: 'unused' or 'prefixed'; the original of both is the smallest causal model of `size`."""
    train, held = _markov(study, seed)
    vocabulary = text.VOCABULARY + len(train) + len(held)
    training = Training(_decoder(study, study.widths[0], seed, vocabulary), Regime(study.lr, seed=seed))
    if form == "prefixed":
        train = text.identified(train, text.VOCABULARY)
        held = text.identified(held, text.VOCABULARY + len(train))
    return curve(training, train, held, study.epochs, study.enough)


def _planted(study: Study, seed: int) -> dict:
    train, where = text.planted(study.sequences, study.length, study.digits, seed)
    held, held_where = text.planted(study.held, study.length, study.digits, seed, "held")
    model = _decoder(study, study.middle, seed, text.VOCABULARY + text.DIGITS)
    training = Training(model, Regime(study.lr, seed=seed))
    out: dict[str, list] = {"digits": [], "words": [], "held digits": [], "held digit loss": []}
    for _ in range(study.planted):
        training.train(train)
        seen, other = training.read(train), training.read(held)
        out["digits"].append(share(seen.hit, where.numpy()))
        out["words"].append(share(seen.hit, seen.counted & ~where.numpy()))
        out["held digits"].append(share(other.hit, held_where.numpy()))
        out["held digit loss"].append(float(other.nll[held_where.numpy()].mean()))
    return out


def _speech(study: Study, seed: int) -> dict:
    """English sentences of the package, whole words as tokens; read by part of speech at ever wider steps."""
    tagger = tags.perceptron()
    train, held = sentences(seed)
    words = dict.fromkeys(w for s in (*train, *held) for w in _cut(s))
    ids = {word: i for i, word in enumerate(words)}
    names = list(words)
    coded = {k: text.sequences([[ids[w] for w in _cut(s)] for s in part]) for k, part in (("m", train), ("held", held))}
    model = _decoder(replace(study, length=coded["m"].ids.shape[1]), study.middle, seed, len(ids))
    training = Training(model, Regime(study.lr * 2, seed=seed))
    out: dict[str, Any] = {"at": [], "m": [], "held": [], "train": [], "control": [], "vocabulary": len(ids)}
    known: dict[tuple, str] = {}
    for epoch in range(1, study.speech + 1):
        training.train(coded["m"])
        if epoch in (1, 2, 3, 4) or epoch % 4 == 0 or epoch == study.speech:
            out["at"].append(epoch)
            for key, part, into in (("m", train, "train"), ("held", held, "control")):
                seen = training.read(coded[key])
                out[key].append(seen.m)
                out[into].append(_by_class(part, seen, names, tagger, known))
    return out


def _by_class(part: list[str], seen: Any, names: list[str], tagger: tags.Tagger, known: dict) -> dict:
    true, said, hit = [], [], []
    for s, sentence in enumerate(part):
        where = tags.spans(sentence)
        told = tags.inherited(sentence, where, tagger)
        for t in np.flatnonzero(seen.counted[s]):
            word = names[seen.predicted[s, t]]
            key = (sentence, int(t), word)
            if key not in known:
                known[key] = (
                    told[t] if word == sentence[slice(*where[t])] else tags.instead(sentence, where[t], word, tagger)
                )
            true.append(told[t])
            said.append(known[key])
            hit.append(bool(seen.hit[s, t]))
    return {name: asdict(r) for name, r in recall(true, said, hit, tags.CLASSES).items()}


def _cut(sentence: str) -> list[str]:
    return [sentence[a:b] for a, b in tags.spans(sentence)]


def sentences(seed: int) -> tuple[list[str], list[str]]:
    """The package's own prose and general knowledge as sentences of 2 to 40 words; a fifth, drawn by seed, is held out."""
    import re

    from unremember.embedded.prose import prose
    from unremember.embedded.world import replay, world

    found = (
        s for x in (*prose(), *world(), *replay()) for s in re.split(r"(?<=[.!?]) ", f"{x.prompt} {x.answer}".strip())
    )
    kept = [s for s in dict.fromkeys(found) if 2 <= len(tags.spans(s)) <= 40]
    order = np.random.default_rng([seed, 5]).permutation(len(kept))
    cut = len(kept) // 5
    return [kept[i] for i in order[cut:]], [kept[i] for i in order[:cut]]


EXPERIMENTS: dict[str, Callable[..., dict]] = {
    "data": _data,
    "forget": _forget,
    "identify": _identify,
    "planted": _planted,
    "rate": _rate,
    "repeat": _repeat,
    "size": _size,
    "speech": _speech,
}


def run(
    preset: str,
    folder: Path,
    workers: int = 1,
    say: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict:
    """Run what is not in `folder` yet, cell by cell, and return the whole result (also dynamics.json).

    workers: processes of one thread each.  An interrupted study goes on where it stopped.
    """
    if preset not in PRESETS:
        raise BadRequest(f"unknown preset {preset!r}; {nearest(preset, PRESETS)}")
    study = PRESETS[preset]
    if wrong := list(problems(study)):
        raise BadRequest(wrong)
    claim(folder)
    wanted = list(cells(study))
    if any(name == "speech" for name, _ in wanted):
        tags.perceptron()  # refused now, not after ten minutes
    files = {i: folder / "cells" / f"{fingerprint(SCHEMA, asdict(study), cell)}.json" for i, cell in enumerate(wanted)}
    found = {i: kept for i, file in files.items() if (kept := read_json(file)) is not None}
    left = [i for i in files if i not in found]
    for i, row in _worked(study, wanted, left, workers):
        found[i] = row
        write_json(files[i], row)
        say(" ".join(str(v) for v in (row["experiment"], *wanted[i][1].values())), len(found), len(wanted))
    rows = [found[i] for i in files]
    result = {
        "schema": SCHEMA,
        "preset": preset,
        "study": asdict(study),
        "machine": machine(),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "rows": rows,
    }
    write_json(folder / "dynamics.json", result)
    return result


def _worked(study: Study, wanted: list[Cell], left: list[int], workers: int) -> Iterator[tuple[int, dict]]:
    if workers == 1 or len(left) < 2:
        yield from ((i, measure(study, wanted[i])) for i in left)
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(measure, study, wanted[i]): i for i in left}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def machine() -> str:
    """Where the seconds were measured, as far as the interpreter knows."""
    import os

    import torch

    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, torch {torch.__version__}"
