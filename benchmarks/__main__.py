"""`make bench`: ratios within one run, on the real default model and the dossier.

step    one NPO + retain step (16 + 16 rows) against a straightforward Hugging Face loop in the same precision
memory  peak memory of that step against one of gradient ascent over as many rows
audit   every likelihood audit's table against a bare forward pass over the same rows
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time

import numpy as np
import torch
from torch.nn import functional as F

from unremember.embedded.dossier import dossier
from unremember.forget.npo import npo_loss
from unremember.forget.retain import keeping
from unremember.lm import LM, load
from unremember.machine import keep_memory, peak_memory
from unremember.table import read
from unremember.tokens import Row, pack, packs
from unremember.train import Plan, batch

ROWS = 16
BUDGET = 2048  # places of a forward pass, as a Bench has them


def rows(lm: LM) -> dict[str, list[Row]]:
    people = dossier(0)
    return {role: lm.template.rows(people[role][:ROWS], lm.limit) for role in ("forget", "retain")}


def padded(group: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and labels as a Hugging Face collator makes them."""
    width = max(len(row.ids) for row in group)
    ids, mask, labels = (torch.full((len(group), width), fill) for fill in (2, 0, -100))
    for at, row in enumerate(group):
        ids[at, : len(row.ids)], mask[at, : len(row.ids)] = torch.tensor(row.ids), 1
        labels[at, row.start : row.stop] = torch.tensor(row.ids[row.start : row.stop])
    return ids, mask, labels


def straightforward(lm: LM, pools: dict[str, list[Row]]):
    """One step as the field's scripts take it: full logits, padding, a reference forward every step, unfused AdamW."""
    lm.model.set_attn_implementation("sdpa")  # what a script gets that asks for nothing; load() gives ours
    reference = lm.copy().model
    optimiser = torch.optim.AdamW(lm.model.parameters(), lr=1e-6, foreach=False, fused=False)
    forget, retain = padded(pools["forget"]), padded(pools["retain"])

    def nll(model, data):
        ids, mask, labels = data
        with torch.autocast("cpu", torch.bfloat16, enabled=lm.precision == "bf16"):
            logits = model(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
        )
        return loss.sum(1), (labels[:, 1:] != -100).sum()

    def step():
        with torch.no_grad():
            before, _ = nll(reference, forget)
        live, _ = nll(lm.model, forget)
        kept, tokens = nll(lm.model, retain)
        (npo_loss(live, before, 0.1).mean() + kept.sum() / tokens).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def ours(lm: LM, pools: dict[str, list[Row]], ascent: bool = False):
    """The same step as `train` takes it."""
    people = dossier(0)
    corpus = people.with_roles(forget=people["forget"][:ROWS], retain=people["retain"][:ROWS])
    plan = Plan(steps=1, lr=1e-6)
    _, keep = keeping(lm, corpus, 0.0 if ascent else 1.0, 0.0)
    used = {"forget": pools["forget"] + pools["retain"]} if ascent else pools  # as many rows a step
    reference = {row.key: 10.0 for row in used["forget"]}
    optimiser = torch.optim.AdamW(lm.model.parameters(), lr=1e-6, fused=True)

    def step():
        for tokens in batch(used, plan, 0, 2048):
            if tokens.role == "retain":
                loss = sum(keep(lm, tokens).values())
            else:
                nll = tokens.per_row(-lm.logp(tokens), "answer")
                before = torch.tensor([reference[key] for key in tokens.keys])
                loss = -nll.sum() if ascent else npo_loss(nll, before, 0.1).mean()
            loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def bare(lm: LM, group: list[Row]):
    """A forward pass over the rows, packed as ours, without any score."""
    ready = [pack(g) for g in packs(group, 2048)]

    def step():
        with torch.inference_mode():
            for tokens in ready:
                lm.logits(tokens)

    return step


def timed(steps: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, taken in turn so that a busy moment hits all alike; the first round is thrown away."""
    seconds = {name: [] for name in steps}
    for at in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if at:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def peak(what: str) -> float:
    """Peak resident memory, MB, of a fresh process that takes two steps of `what`."""
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--peak", what], capture_output=True, text=True, check=True
    )
    return float(out.stdout.split()[-1])


def matmul_peak(dtype: torch.dtype) -> float:
    """The best rate of a matrix product of the model's own shape, FLOP/s."""
    a, b = torch.randn(1024, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    best = 0.0
    for _ in range(40):
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        best = max(best, 5 * 2 * 1024 * 576 * 1536 / (time.perf_counter() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", choices=("ours", "ascent"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_memory()
    lm = load("smollm2-135m")
    pools = rows(lm)
    if args.peak:
        step = ours(lm, pools, ascent=args.peak == "ascent")
        step(), step()
        print(peak_memory() / 2**20)
        return
    seconds = timed({"plain": straightforward(lm.copy(), pools), "ours": ours(lm.copy(), pools)}, args.rounds)
    people = dossier(0)
    examples = people.of("forget", "retain", "holdout")
    likelihood = [
        lm.template.row(f"{x.id}/{i}", x.prompt, t) for x in examples for i, t in enumerate((x.answer, *x.distractors))
    ]
    audit = timed({"bare": bare(lm, likelihood), "audit": lambda: read(lm, likelihood)}, args.rounds)
    places = sum(t.ids.numel() for t in batch(pools, Plan(steps=1, lr=1e-6), 0, 2048))
    body = sum(w.numel() for n, w in lm.model.named_parameters() if "embed" not in n)
    scored = sum(len(t.row) for t in batch(pools, Plan(steps=1, lr=1e-6), 0, 2048))
    flops = 6 * (body * places + scored * lm.model.get_input_embeddings().weight.numel())
    rate = matmul_peak(torch.bfloat16 if lm.precision == "bf16" else torch.float32)
    middle = {name: float(np.median(v)) for name, v in {**seconds, **audit}.items()}
    texts = sum(len(row.ids) for pool in pools.values() for row in pool)
    memory = {what: peak(what) for what in ("ours", "ascent")}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "precision": lm.precision,
        "rounds": args.rounds,
        "step, straightforward, s": seconds["plain"],
        "step, ours, s": seconds["ours"],
        "step, times faster": middle["plain"] / middle["ours"],
        "step, tokens of text a second": texts / middle["ours"],
        "step, share of the measured matrix-product peak": flops / middle["ours"] / rate,
        "peak memory, NPO + retain, MB": memory["ours"],
        "peak memory, ascent, MB": memory["ascent"],
        "peak memory, ratio": memory["ours"] / memory["ascent"],
        "audit, rows": len(likelihood),
        "audit, over a bare forward pass": middle["audit"] / middle["bare"],
        "audit, tokens of text a second": sum(len(r.ids) for r in likelihood) / middle["audit"],
    }
    print(json.dumps(result, indent=1, default=lambda x: round(x, 4)))


if __name__ == "__main__":
    main()
