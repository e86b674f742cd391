"""`python -m benchmarks.extraction`: EL_3 over every prefix, against one generation a prefix, in the same run.

The default model, facts of the dossier and a passage of prose, cut to `--tokens` tokens.  Both sides use the same weights, in the
precision of the machine, already lowered; the slow side decodes one prefix after the other, as the paper's code does.  Printed:
the ratio of the seconds, and how far the two sides' EL_3 lie apart (near ties in bfloat16 alone; none in float32).
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

from unremember.audit.likelihood import overlap
from unremember.audit.prefixes import Ids, from_prefixes
from unremember.bench import Bench
from unremember.embedded.dossier import dossier
from unremember.embedded.prose import prose
from unremember.lm import LM
from unremember.loading import auto_precision, load
from unremember.machine import keep_memory

N = 3


def one_by_one(lm: LM, texts: list[Ids]) -> list[dict[int, Ids]]:
    return [{cut: lm.generate([ids[:cut]], len(ids) - cut)[0] for cut in range(1, len(ids) - N + 1)} for ids in texts]


def el(texts: list[Ids], said: list[dict[int, Ids]]) -> np.ndarray:
    return np.array(
        [
            np.mean([overlap(tail, ids[cut:], N) for cut, tail in tails.items()])
            for ids, tails in zip(texts, said, strict=True)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.extraction", description=__doc__)
    parser.add_argument("--facts", type=int, default=6)
    parser.add_argument("--passages", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--precision", default=auto_precision())
    args = parser.parse_args()
    keep_memory()
    lm = load("smollm2-135m", precision=args.precision)
    examples = [*dossier(0)["forget"][: args.facts], *prose()[: args.passages]]
    texts = [lm.template.row(x.id, "", x.answer).ids[:-1][: args.tokens] for x in examples]
    cuts = [range(1, len(ids) - N + 1) for ids in texts]
    with lm.lowered(), torch.inference_mode():
        one_by_one(lm, [texts[0][:6]]), from_prefixes(lm, [texts[0][:6]], [[1]], Bench())  # warm
        began = time.perf_counter()
        fast = from_prefixes(lm, texts, cuts, Bench())
        middle = time.perf_counter()
        slow = one_by_one(lm, texts)
        ended = time.perf_counter()
    gap = np.abs(el(texts, fast) - el(texts, slow))
    same = [a[cut] == b[cut] for a, b in zip(fast, slow, strict=True) for cut in b]
    result = {
        "precision": lm.precision,
        "threads": torch.get_num_threads(),
        "texts": len(texts),
        "prefixes": len(same),
        "tokens said": sum(len(tail) for tails in slow for tail in tails.values()),
        "one generation a prefix, s": ended - middle,
        "all prefixes together, s": middle - began,
        "times faster": (ended - middle) / (middle - began),
        "continuations that are the same": float(np.mean(same)),
        "EL_3, mean": float(el(texts, slow).mean()),
        "EL_3, largest difference": float(gap.max()),
    }
    print(json.dumps(result, indent=1, default=float))


if __name__ == "__main__":
    main()
