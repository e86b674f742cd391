"""The same curves from checkpoints of somebody else's training: a list of folders, the text they saw, and text they did not.

    folder -> M, loss, memory unit length on each text; T(τ) between the folders, as an interval

Tirumala et al. 2022 (arXiv 2205.10770).  Folders are read as `loading.load` reads them: safetensors only, no remote code.
Differs: T is known to lie between two checkpoints, and that is what is said; nothing is interpolated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unremember.corpus import Example
from unremember.dynamics.curves import Time, time
from unremember.dynamics.loop import Kind, Regime, read
from unremember.dynamics.text import Sequences, sequences
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.lm import LM
from unremember.loading import check, load
from unremember.tokens import Template

BATCH = 4  # sequences read together: a vocabulary of fifty thousand makes wide logits


def coded(template: Template, examples: Sequence[Example], limit: int = 0) -> Sequences:
    """Passages (prompt and answer as one text) in the tokens of a model; what the tokenizer puts in front is no context."""
    rows, problems = [], []
    for x in examples:
        try:
            row = template.row(x.id, "", f"{x.prompt} {x.answer}".strip(), limit=limit)
            if row.stop - len(template.context("")) < 2:
                raise BadCorpus(f"example {x.id!r} has one token; a context needs two: lengthen or remove it")
            rows.append(row.ids[: row.stop])
        except BadCorpus as wrong:
            problems += wrong.problems
    if problems:
        raise BadCorpus([*problems[:20], *([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])])
    return replace(sequences(rows), lead=len(template.context("")))


def place(folder: Path, number: int) -> int:
    """The step that a folder's name ends in ('checkpoint-500', 'step_1000'), else its number in the list."""
    found = re.search(r"(\d+)$", folder.name)
    return int(found.group(1)) if found else number


def masked(folder: Path) -> tuple[Any, Template]:
    """A masked language model and its tokenizer; BadModel where it cannot be loaded, or has no mask."""
    from safetensors import SafetensorError
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    if check(str(folder)) != "folder":
        raise BadModel(f"model {str(folder)!r} is no checkpoint folder; masked models are read from folders")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        load_weights: Any = AutoModelForMaskedLM.from_pretrained
        model, found = load_weights(folder, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadModel(f"model {str(folder)!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if found["missing_keys"]:
        raise BadModel(f"model {str(folder)!r} lacks weights ({', '.join(sorted(found['missing_keys'])[:3])} …)")
    if tokenizer.mask_token_id is None:
        raise BadModel(f"model {str(folder)!r} has no mask token; read it with kind = 'causal'")
    model.config.mask_token_id = tokenizer.mask_token_id
    return model.float().eval(), Template(tokenizer, chat=False)


def follow(
    folders: Sequence[Path],
    texts: Mapping[str, Sequence[Example]],
    kind: Kind = "causal",
    seed: int = 0,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Text name -> {"at", "m", "loss", "unit", "n"}, one value a folder, in the order of their steps.

    BadRequest for no folder or two of one step; every folder is looked at before the first is loaded.
    """
    found = sorted(((place(folder, i), folder) for i, folder in enumerate(folders, 1)), key=lambda pair: pair[0])
    steps = [step for step, _ in found]
    problems = [] if folders else ["no checkpoint is named; give one folder at least"]
    problems += [
        f"two checkpoints are of step {s}; name each once" for s in sorted({s for s in steps if steps.count(s) > 1})
    ]
    for _, folder in found:
        try:
            check(str(folder))
        except BadModel as wrong:
            problems += wrong.problems
    if problems:
        raise BadRequest(problems)
    out: dict[str, dict] = {name: {"at": steps, "m": [], "loss": [], "unit": [], "n": []} for name in texts}
    regime = Regime(lr=1e-3, batch=BATCH, kind=kind, seed=seed)
    for done, (_, folder) in enumerate(found, 1):
        model, template, limit = _opened(folder, kind)
        for name, examples in texts.items():
            try:
                seen = read(
                    model, coded(template, examples, limit), regime, getattr(model.config, "mask_token_id", None)
                )
            except ValueError as broken:
                raise BadModel(f"model {str(folder)!r}: {broken}") from broken
            for key, value in (("m", seen.m), ("loss", seen.loss), ("unit", seen.unit), ("n", int(seen.counted.sum()))):
                out[name][key].append(value)
        say(done, len(found))
    return out


def times(curve: dict, thresholds: Sequence[float]) -> dict[float, Time]:
    """T(τ) of one text's curve, each between two checkpoints."""
    return {tau: time(curve["at"], curve["m"], tau) for tau in thresholds}


def _opened(folder: Path, kind: Kind) -> tuple[Any, Template, int]:
    if kind == "masked":
        model, template = masked(folder)
        return model, template, int(getattr(model.config, "max_position_embeddings", 0) or 0)
    lm: LM = load(str(folder), template="plain", precision="fp32")
    return lm.model, lm.template, lm.limit
