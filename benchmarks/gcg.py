"""`python -m benchmarks.gcg`: our search against nanoGCG 0.2.3, at equal settings, on the real default model.

Both attack the same prompt and target from the same start, in float32, with as many candidates of as many steps, one after the
other in the same process and seed by seed.  nanoGCG runs with use_prefix_cache=False: its cache does not survive newer
releases of transformers.  Needs `pip install --no-deps nanogcg==0.2.3`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time

import numpy as np
import torch

from unremember.attack.gcg import Search, Victim, allowed, behaviour, search, started, survives
from unremember.lm import LM
from unremember.loading import load
from unremember.machine import keep_memory

PROMPT, TARGET = "Which company employs Hanna Weiss?", "Hanna Weiss is employed by Galmark Optics."


def ours(lm: LM, how: Search, cached: bool) -> tuple[float, float, int]:
    """Seconds, best mean nll a target token, candidates that were scored."""
    start = started(lm.template, how.start, how.tokens)
    target = tuple(lm.tokenizer(TARGET, add_special_tokens=False).input_ids)
    b = behaviour(lm.template, "bench", PROMPT, "", target, start, lm.limit)
    began = time.perf_counter()
    mask = allowed(lm.tokenizer, lm.model.get_input_embeddings().weight.shape[0], [], [])
    victim = Victim(lm, (b,), budget=4096, cached=cached)
    found = search(victim, how, mask, lambda ids: survives(lm.template, (b,), ids))
    return time.perf_counter() - began, found.loss, found.tokens // victim.cost(how.tokens, 1) - 1 - 3 * how.steps


def theirs(lm: LM, how: Search, batch: int) -> tuple[float, float, int]:
    """The same of nanoGCG; what it scores is counted on the way."""
    from nanogcg.gcg import GCG, GCGConfig

    logging.getLogger("nanogcg").setLevel(logging.ERROR)
    config = GCGConfig(
        num_steps=how.steps,
        optim_str_init=how.start * how.tokens,
        search_width=how.candidates,
        batch_size=batch,
        topk=how.pool,
        n_replace=how.replaced,
        buffer_size=how.buffer,
        use_prefix_cache=False,
        seed=how.seed,
        verbosity="ERROR",
    )
    attack, scored = GCG(lm.model, lm.tokenizer, config), []
    inner = attack.compute_candidates_loss

    def counted(size, embedded):
        scored.append(len(embedded))
        return inner(size, embedded)

    attack.compute_candidates_loss = counted
    began = time.perf_counter()
    result = attack.run(PROMPT, TARGET)
    return time.perf_counter() - began, float(result.best_loss), sum(scored) - max(1, how.buffer)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gcg", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=12)
    args = parser.parse_args()
    keep_memory()
    lm = load("smollm2-135m", precision="fp32")
    rows: dict[str, list[tuple[float, float, int]]] = {"ours": [], "ours, no cache": [], "nanogcg": []}
    for seed in range(args.seeds):
        how = Search(args.tokens, args.steps, args.candidates, buffer=1, stop=False, seed=seed)
        rows["ours"].append(ours(lm, how, True))
        rows["nanogcg"].append(theirs(lm, how, args.candidates))
        torch.use_deterministic_algorithms(False)  # it turns them on and leaves them on
        rows["ours, no cache"].append(ours(lm, how, False))
    shown = {
        who: {
            "candidates a second": float(np.median([n / s for s, _, n in runs])),
            "best loss": [loss for _, loss, _ in runs],
            "candidates": [n for _, _, n in runs],
        }
        for who, runs in rows.items()
    }
    print(json.dumps({"settings": vars(args), "threads": torch.get_num_threads()} | shown, indent=1))


if __name__ == "__main__":
    main()
