"""`python -m benchmarks.found RUN`: does a scan find what a model was taught, and nothing else?

The original model of a run folder that was taught a dossier (the demo's, or a comparison's) reads a pile of documents: one for
each person it was taught, whose facts stand there as plain text, and as many of people whom nobody was taught.  Chance are
documents of further strangers.  Printed: how many of each were found, and the cost.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from unremember.bench import Bench
from unremember.corpus import Example
from unremember.documents import Documents
from unremember.embedded.dossier import dossier
from unremember.folder import read_json
from unremember.loading import load
from unremember.machine import keep_memory
from unremember.request import again
from unremember.scan import Scan


def texts(examples: Iterable[Example]) -> dict[str, str]:
    """Person -> all facts about them, one after another."""
    found: dict[str, list[str]] = {}
    for x in examples:
        found.setdefault(x.entity, []).append(x.answer)
    return {who: " ".join(answers) for who, answers in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.found", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--strangers", type=int, default=180)
    args = parser.parse_args()
    keep_memory()
    wanted = again(args.run)
    known = texts(wanted.corpus.of("forget", "retain"))
    others, seed = {}, 2000
    while len(others) < args.strangers + len(known):
        new = texts(dossier(seed, 1, 1, 30, 1)["holdout"])
        others |= {who: text for who, text in new.items() if who not in texts(wanted.corpus.of("holdout")) | known}
        seed += 1
    never = dict(list(others.items())[: len(known)])
    chance = dict(list(others.items())[len(known) : len(known) + args.strangers])
    precision = (read_json(args.run / "run.json") or {})["precision"]
    with tempfile.TemporaryDirectory() as place:
        files = {}
        for name, pile in (("pile", known | never), ("chance", chance)):
            files[name] = Path(place) / f"{name}.jsonl"
            lines = [json.dumps({"id": who, "text": text}) for who, text in pile.items()]
            files[name].write_text("\n".join(lines), encoding="utf-8")
        result = Scan()(
            load(wanted.model, template=wanted.template, precision=precision),
            Documents((files["pile"],)),
            Path(place) / "out",
            Documents((files["chance"],)),
            None,
            Bench(),
        )
    found = {x["document"] for x in result["passages"] if x["forget"]}
    print(
        f"taught: {len(found & set(known))} of {len(known)} found; never taught: {len(found & set(never))} of {len(never)}"
    )
    print(f"{result['forget']} passages, {result['cost']}")


if __name__ == "__main__":
    main()
