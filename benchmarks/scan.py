"""`python -m benchmarks.scan`: what a scan costs, against a bare forward pass over the same windows, on the default model.

Both take turns in one process, so that a busy moment hits both; the first round is thrown away.  Then half the documents against
all of them: a scan is linear in tokens when the second ratio is that of the tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import timed
from unremember.documents import Documents
from unremember.embedded.prose import prose
from unremember.lm import LM
from unremember.loading import load
from unremember.machine import keep_memory
from unremember.scan import Scan, coded, cuts, shuffled
from unremember.tokens import Row, pack, packs


def pile(folder: Path, copies: int) -> Documents:
    """The prose that comes along, so many times over, each copy in another order of words but the first."""
    texts = [x.answer if i == 0 else shuffled(x.answer, f"{i}/{x.id}") for i in range(copies) for x in prose()]
    file = folder / f"pile-{copies}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Documents((file,))


def bare(lm: LM, documents: Documents, scan: Scan):
    """A forward pass over the windows, packed as the scan packs them, without any score."""
    rows = []
    for document in documents:
        ids, _ = coded(lm, document.text)
        for a, b in cuts(len(ids), scan.window, scan.window // 2 if scan.stride == "half" else scan.window):
            rows.append(Row(str(len(rows)), tuple(ids[a:b]), 1, b - a, (True,) * (b - a)))
    ready = [pack(group) for group in packs(rows, 2048, max(len(row.ids) for row in rows))]

    def step():
        with lm.lowered(), torch.no_grad():
            for tokens in ready:
                lm.logits(tokens)

    return step, sum(len(row.ids) for row in rows), len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.scan", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=2, help="of the prose, about 2,500 tokens each")
    args = parser.parse_args()
    keep_memory()
    lm, scan = load("smollm2-135m"), Scan()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, half = pile(folder, args.copies), pile(folder, args.copies // 2)
        forward, tokens, windows = bare(lm, whole, scan)
        _, fewer, _ = bare(lm, half, scan)

        def collect(documents: Documents):
            def step():
                with tempfile.TemporaryDirectory() as fresh:
                    scan.collect(lm, documents, Path(fresh))

            return step

        seconds = timed({"bare": forward, "scan": collect(whole), "half": collect(half)}, args.rounds)
    middle = {what: float(np.median(x)) for what, x in seconds.items()}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "precision": lm.precision,
        "rounds": args.rounds,
        "windows": windows,
        "tokens read": tokens,
        "seconds, bare": seconds["bare"],
        "seconds, scan": seconds["scan"],
        "tokens a second, scan": tokens / middle["scan"],
        "scan over a bare forward pass": middle["scan"] / middle["bare"],
        "all documents over half of them, tokens": tokens / fewer,
        "all documents over half of them, seconds": middle["scan"] / middle["half"],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
