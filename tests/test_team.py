"""Two processes equal one: the same loss, the same weights; a checkpoint of either is taken up by the other.

One torchrun does all that needs two processes, and the tests below look at what it left.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from unremember import team
from unremember.bench import Bench
from unremember.forget.npo import NPO
from unremember.lm import LM
from unremember.loading import load
from unremember.sites import EVERYWHERE, Sites
from unremember.stop import Stopper
from unremember.table import read
from unremember.tokens import packs
from unremember.train import Plan, train

PLAN = Plan(steps=6, lr=1e-3, batch=5, beside=3, clip=1.0)  # rows that two processes cannot share out evenly
BUDGET = 120  # makes the stopper read an odd number of batches: one process has one less than the other
MASKED = "model.layers.0.mlp.down_proj.weight"


def objective(lm, tokens):
    nll = tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]
    return {tokens.role: nll if tokens.role == "lessons" else 0.5 * nll}


class Watched:
    """The objective, and in which precision weights and residual stream meet it."""

    def __init__(self):
        self.dtypes: list[str] = []

    def __call__(self, lm, tokens):
        if self.dtypes:
            return objective(lm, tokens)
        block, head = team.blocks(lm.model)[1], lm.model.get_output_embeddings()

        def note(_, inputs):
            self.dtypes.append(str(inputs[0].dtype))

        def look(*_):
            self.dtypes += [str(block.mlp.down_proj.weight.dtype), str(head.weight.dtype)]

        handles = [block.register_forward_pre_hook(note), head.register_forward_pre_hook(look)]
        handles.append(block.mlp.register_forward_pre_hook(look))
        terms = objective(lm, tokens)
        for handle in handles:
            handle.remove()
        return terms


class Counted:
    """The objective, with what its step does: passes, gradients sent, and what stays whole behind a pass."""

    def __init__(self):
        self.passes, self.sent, self.whole = 0, 0, []

    def __call__(self, lm, tokens):
        if not self.whole:
            lm.model.register_forward_hook(self.count)
        terms = objective(lm, tokens)
        self.whole.append([not isinstance(x.mlp.down_proj.weight, DTensor) for x in team.blocks(lm.model)])
        return terms

    def count(self, *_):
        self.passes += 1

    def step(self, lm, rows, recompute=False, sites=EVERYWHERE):
        """-> passes, gradients sent, and of each block whether it is whole behind the first pass."""
        send = team.dist.all_to_all_single

        def counted(*given, **named):
            self.sent += 1
            return send(*given, **named)

        team.dist.all_to_all_single = counted
        train(lm, self, rows, replace(PLAN, steps=1), sites=sites, bench=Bench(recompute=recompute))
        team.dist.all_to_all_single = send
        return self.passes, self.sent, self.whole[0]


class Curious:
    """The objective, with a look at the model between the last backward pass and the optimiser."""

    def __call__(self, lm, tokens):
        return objective(lm, tokens)

    @torch.no_grad()
    def after(self, lm, micros):
        lm.logp(micros[0])


def people():
    """Few of each, for two processes on a busy machine wait for one another a lot."""
    from unremember.embedded.dossier import dossier
    from unremember.embedded.world import replay

    whole = dossier(0, forget=2, retain=3, holdout=4, relearn=1)
    return whole.with_roles(forget=whole["forget"][:7], retain=whole["retain"][:5], replay=replay()[:3])


def pools(lm: LM, corpus):
    return {"lessons": lm.template.rows(corpus["forget"]), "replay": lm.template.rows(corpus["replay"])}


def sites(lm: LM) -> Sites:
    shape = lm.model.get_parameter(MASKED).shape
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return Sites({MASKED: mask, "model.layers.1.self_attn.q_proj.weight": None})


def numbers(lm: LM) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in lm.model.named_parameters()}


def apart() -> list[float]:
    """Largest difference between gradients' sums, and their means, as they travel here and as they are."""
    sent = [torch.randn(64, generator=torch.Generator().manual_seed(rank)).bfloat16().float() for rank in range(2)]
    ours, found = torch.empty(32), []
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
        team._Lower(torch.bfloat16)(ours, sent[team.rank()], dist.group.WORLD, op)
        whole = (sent[0] + sent[1]) / (2 if op == dist.ReduceOp.AVG else 1)
        found.append((ours - whole[32 * team.rank() :][:32]).abs().max().item())
    return found


def halts(step: int):
    def say(stage, done, total, terms):
        if stage == "train" and done == step:
            raise KeyboardInterrupt

    return say


def child(model: str, out: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    team.join()
    lm, corpus = load(model, precision="fp32"), people()
    rows = pools(lm, corpus)
    bench = Bench(
        budget=40, log=out / "train.jsonl"
    )  # about a row a time: not as many for both processes in every step
    results = {"plain": train(lm, objective, rows, PLAN, bench=bench)}
    results["masked"] = train(lm, objective, rows, replace(PLAN, weight_decay=0.1), sites=sites(lm))
    plan = Plan(steps=2, lr=1e-3, stop="probability")
    results["npo"] = NPO(plan, beta=0.1, retain=1.0, kl=1.0)(lm, corpus, bench=Bench(budget=BUDGET))
    results["curious"] = train(lm, Curious(), rows, PLAN)
    results["lower"] = train(replace(lm, precision="bf16"), watched := Watched(), rows, PLAN)
    results["continued"] = train(lm, objective, rows, PLAN, bench=Bench(folder=out / "one"))
    with suppress(KeyboardInterrupt):
        train(lm, objective, rows, PLAN, bench=Bench(folder=out / "two", every=0, say=halts(4)))
    level = [x.likelihood() for x in read(lm, lm.template.rows(corpus["holdout"][:5]))]
    said = {
        "level": level,
        "merged": team.merge({team.rank(): team.rank()}),
        "total": team.total({"a": 1.0 + team.rank()}),
        "most": team.most([(1, 5 - team.rank()), (2 + team.rank(), 1)]),
        "apart": apart(),
        "step": Counted().step(replace(lm, precision="bf16"), rows),
        "recomputed": Counted().step(replace(lm, precision="bf16"), rows, recompute=True),
        "upper": Counted().step(
            replace(lm, precision="bf16"), rows, sites=Sites.named(lm.model, ["*layers.1.mlp.down_proj*"])
        ),
        "gathered": watched.dtypes,
    }
    (out / f"rank{team.rank()}.json").write_text(json.dumps(said))
    if team.rank() == 0:
        for name, result in results.items():
            save_file(numbers(result), out / f"{name}.safetensors")
    team.wait()  # a process that leaves early may take the others' connections with it
    team.leave()


@pytest.fixture(scope="module")
def model(taught, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    taught.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def out(taught, model, tmp_path_factory) -> Path:
    """The folder that two processes left behind."""
    out = tmp_path_factory.mktemp("team")
    with pytest.raises(KeyboardInterrupt):
        train(taught, objective, pools(taught, people()), PLAN, bench=Bench(folder=out / "one", every=0, say=halts(3)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        __file__,
        model,
        str(out),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return out


@pytest.fixture(scope="module")
def alone(taught) -> dict[str, torch.Tensor]:
    return numbers(train(taught, objective, pools(taught, people()), PLAN))


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> None:
    """Equal up to rounding, measured against how far training went: Adam makes whole steps of gradients near zero."""
    assert set(found) == set(expected)
    for name, w in expected.items():
        assert (found[name] - w).norm() / (w - start[name]).norm() <= 2e-3, name


def test_two_processes_train_as_one_does(taught, out, alone):
    assert any(not torch.equal(w, numbers(taught)[name]) for name, w in alone.items())
    assert_close(load_file(out / "plain.safetensors"), alone, numbers(taught))


def test_a_look_before_the_optimiser_leaves_no_old_weights_behind(taught, out, alone):
    """What a look gathers must not serve the next step."""
    assert_close(load_file(out / "curious.safetensors"), alone, numbers(taught))


def test_two_processes_log_the_terms_of_the_whole_step(taught, out, tmp_path):
    train(taught, objective, pools(taught, people()), PLAN, bench=Bench(log=tmp_path / "train.jsonl"))
    two, one = ([json.loads(x) for x in (at / "train.jsonl").read_text().splitlines()] for at in (out, tmp_path))
    assert len(two) == len(one) == 6
    for a, b in zip(two, one, strict=True):
        assert a["terms"] == pytest.approx(b["terms"], rel=1e-4) and a["norm"] == pytest.approx(b["norm"], rel=1e-3)


def test_two_processes_keep_to_the_sites(taught, out):
    start, found = numbers(taught), load_file(out / "masked.safetensors")
    chosen = sites(taught)
    moved = {name for name, w in start.items() if not torch.equal(w, found[name])}
    assert moved == set(chosen.masks)
    assert not ((start[MASKED] != found[MASKED]) & ~chosen.masks[MASKED]).any()
    plan = replace(PLAN, weight_decay=0.1)
    expected = numbers(train(taught, objective, pools(taught, people()), plan, sites=chosen))
    assert_close(*({name: part[name] for name in moved} for part in (found, expected, start)))


def test_a_method_on_two_processes_equals_one(taught, out):
    plan = Plan(steps=2, lr=1e-3, stop="probability")
    expected = numbers(NPO(plan, beta=0.1, retain=1.0, kl=1.0)(taught, people()))
    assert_close(load_file(out / "npo.safetensors"), expected, numbers(taught))


def test_blocks_are_gathered_in_half_the_bytes(taught, out):
    """bf16 weights inside the blocks; residual stream, head and what the optimiser moves stay in float32."""
    stream, block, head, *_ = json.loads((out / "rank0.json").read_text())["gathered"]
    assert (stream, block, head) == ("torch.float32", "torch.bfloat16", "torch.float32")
    found = load_file(out / "lower.safetensors")
    expected = numbers(train(replace(taught, precision="bf16"), objective, pools(taught, people()), PLAN))
    start = numbers(taught)
    way = {name: ((found[name] - w).norm() / (w - start[name]).norm()).item() for name, w in expected.items()}
    assert max(way.values()) < 0.2, way  # measured: 0.006 to 0.078


def test_a_step_gathers_and_sends_no_more_than_it_must(out):
    """Two roles in one pass; a block's gradients once, in bf16; blocks stay whole for the way back where there is one."""
    found = json.loads((out / "rank0.json").read_text())
    assert found["step"] == [1, 2, [True, True]]
    assert found["recomputed"] == [1, 2, [False, False]]
    assert found["upper"] == [1, 1, [False, True]]


def test_gradients_that_are_bf16_add_up_exactly_though_they_travel_so(out):
    for rank in (0, 1):
        assert json.loads((out / f"rank{rank}.json").read_text())["apart"] == [0.0, 0.0]


def test_a_checkpoint_of_one_process_is_taken_up_by_two(taught, out, alone):
    assert_close(load_file(out / "continued.safetensors"), alone, numbers(taught))
    assert not (out / "one").exists()


def test_a_checkpoint_of_two_processes_is_taken_up_by_one(taught, out, alone):
    assert [p.name for p in (out / "two").iterdir()] == ["step-3"]
    steps = []
    bench = Bench(folder=out / "two", say=lambda stage, done, *_: steps.append(done))
    found = numbers(train(taught, objective, pools(taught, people()), PLAN, bench=bench))
    assert steps == [4, 5, 6]
    assert_close(found, alone, numbers(taught))


def test_all_processes_know_the_same(taught, out):
    first, second = (json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first["merged"] == {"0": 0, "1": 1} and first["total"] == {"a": 3.0}
    assert first["most"] == [[1, 5], [3, 1]]
    expected = [x.likelihood() for x in read(taught, taught.template.rows(people()["holdout"][:5]))]
    np.testing.assert_allclose(first["level"], expected, rtol=1e-3)


def test_the_set_up_leaves_one_process_with_less_to_do(taught):
    stop = Stopper.calibrated(taught, people(), "probability", 1, holds=True)
    assert len(packs([*stop.rows, *stop.watch], BUDGET)) % 2 == 1


def test_alone_everything_is_the_obvious_thing(tiny):
    assert (team.rank(), team.size()) == (0, 1)
    assert team.merge({"a": 1}) == {"a": 1} and team.total({"a": 1.0}) == {"a": 1.0}
    assert team.shard(tiny.model) is tiny.model and len(team.blocks(tiny.model)) == 2


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2]))
