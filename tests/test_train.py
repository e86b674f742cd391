"""The loop: it touches nothing it was not given, counts exactly, and goes on from a kill as if there had been none."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.distributed.checkpoint import FileSystemReader

from unremember.bench import Bench
from unremember.errors import BadModel, BadRequest, Diverged
from unremember.sites import EVERYWHERE, Sites
from unremember.train import Plan, batch, order, pause, train

PLAN = Plan(steps=6, lr=3e-3, batch=4, beside=3, warmup=2, schedule="linear", weight_decay=0.1, clip=1.0)


def objective(lm, tokens):
    """Cross-entropy on both roles, the second at half weight."""
    nll = tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]
    return {tokens.role: nll if tokens.role == "lessons" else 0.5 * nll}


@pytest.fixture(scope="module")
def pools(tiny, corpus):
    return {"lessons": tiny.template.rows(corpus["forget"][:6]), "replay": tiny.template.rows(corpus["replay"][:5])}


@pytest.fixture(scope="module")
def trained(tiny, pools):
    """What an uninterrupted run gives."""
    return train(tiny, objective, pools, PLAN)


def weights(lm) -> dict[str, torch.Tensor]:
    return {name: w.detach() for name, w in lm.model.named_parameters()}


def same(a, b) -> bool:
    return all(torch.equal(w, weights(b)[name]) for name, w in weights(a).items())


# ── hooks and plain descent ──


class Hooked:
    """`objective` with a record of when its hooks were called, and an edit of the gradients."""

    def __init__(self, edit=lambda lm: None):
        self.seen, self.edit = [], edit

    def before(self, lm, micros, step):
        assert step == 1 + sum(name == "before" for name, _ in self.seen)
        assert not any(w.grad is not None and w.grad.any() for w in lm.model.parameters())
        self.seen.append(("before", tuple(m.role for m in micros)))

    def __call__(self, lm, tokens):
        self.seen.append(("term", tokens.role))
        return objective(lm, tokens)

    def after(self, lm, micros):
        self.seen.append(("after", tuple(m.role for m in micros)))
        self.edit(lm)


def test_hooks_are_called_around_every_step(tiny, pools, trained):
    hooked = Hooked()
    assert same(train(tiny, hooked, pools, PLAN), trained), "hooks that do nothing change nothing"
    one = [("before", ("lessons", "replay")), ("term", "lessons"), ("term", "replay"), ("after", ("lessons", "replay"))]
    assert hooked.seen == one * PLAN.steps


def test_plain_descent_is_theta_minus_lr_times_gradient(tiny, pools):
    plan = Plan(steps=1, lr=0.5, optimiser="sgd")
    lm = tiny.copy()
    for tokens in batch(pools, plan, 0, 2048):
        sum(objective(lm, tokens).values()).backward()
    result = train(tiny, objective, pools, plan)
    for name, w in weights(lm).items():
        gradient = dict(lm.model.named_parameters())[name].grad
        torch.testing.assert_close(weights(result)[name], w - 0.5 * gradient, rtol=1e-5, atol=1e-7)


def test_a_gradient_that_a_hook_takes_away_moves_nothing(tiny, pools):
    def edit(lm):
        for name, w in lm.model.named_parameters():
            if "mlp" not in name:
                w.grad = torch.zeros_like(w)

    result = train(tiny, Hooked(edit), pools, Plan(steps=3, lr=0.1, optimiser="sgd"))
    still = {n: torch.equal(w, weights(tiny)[n]) for n, w in weights(result).items()}
    assert all(kept == ("mlp" not in name) for name, kept in still.items())


def test_plain_descent_resumes_as_well(tiny, pools, tmp_path):
    plan = Plan(steps=5, lr=0.1, optimiser="sgd")

    def halt(stage, done, *_):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny, objective, pools, plan, bench=Bench(folder=tmp_path / "c", every=0, say=halt))
    resumed = train(tiny, objective, pools, plan, bench=Bench(folder=tmp_path / "c"))
    assert same(resumed, train(tiny, objective, pools, plan))


# ── what goes in and what comes out ──


def test_the_argument_is_untouched(tiny, pools, trained):
    lm = tiny.copy()
    before = {name: w.clone() for name, w in weights(lm).items()}
    asked = {name: w.requires_grad for name, w in lm.model.named_parameters()}
    result = train(lm, objective, pools, PLAN, sites=Sites.named(lm.model, ["*norm*"]))
    assert all(torch.equal(w, before[name]) for name, w in weights(lm).items())
    assert {name: w.requires_grad for name, w in lm.model.named_parameters()} == asked
    assert all(w.grad is None for w in lm.model.parameters()) and not lm.model.training
    assert not same(result, lm)


def test_dropout_is_refused(tiny, pools):
    lm = tiny.copy()
    lm.model.train()
    with pytest.raises(BadModel, match=r"in training mode, .* call model\.eval\(\)"):
        train(lm, objective, pools, PLAN)


def places(lm) -> dict[str, int]:
    return {name: w.data_ptr() for name, w in lm.model.named_parameters()}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
@pytest.mark.parametrize("adapter", [False, True])
def test_what_stays_is_shared_while_training_lasts_and_no_longer(tiny, pools, adapter):
    """One copy less of all that a method does not move: of an adapter's base, of all but RMU's three matrices."""
    lm = tiny.adapted(2, 4) if adapter else tiny
    sites = EVERYWHERE if adapter else Sites.named(tiny.model, ["*down_proj*"])
    during: dict[str, int] = {}

    def watched(live, tokens):
        during.update(places(live))
        return objective(live, tokens)

    result = train(lm, watched, pools, PLAN, sites=sites)
    own = {name for name, at in places(lm).items() if during[name] != at}
    assert own == sites.moving(lm.model) and own == {n for n in own if ("lora_" if adapter else "down_proj") in n}
    assert not set(places(result).values()) & (set(places(lm).values()) | set(places(tiny).values()))
    assert all(w.requires_grad for w in tiny.model.parameters())
    if adapter:
        assert set(places(tiny).values()) < set(places(lm).values()), "the base is the model's own"


def test_the_result_is_ready_for_use(trained):
    assert not trained.model.training
    assert all(w.requires_grad and w.grad is None for w in trained.model.parameters())


def test_the_same_seed_gives_the_same_weights(tiny, pools, trained):
    torch.manual_seed(123)  # nothing may depend on the global generator
    assert same(train(tiny, objective, pools, PLAN), trained)
    assert not same(train(tiny, objective, pools, replace(PLAN, seed=1)), trained)


def test_it_learns(tiny, pools):
    said = []
    bench = Bench(say=lambda stage, done, total, terms: said.append((stage, done, total, terms)))
    train(tiny, objective, pools, Plan(steps=8, lr=3e-3), bench=bench, stage="lesson")
    assert [(stage, done, total) for stage, done, total, _ in said] == [("lesson", i + 1, 8) for i in range(8)]
    assert set(said[0][3]) == {"lessons", "replay"} and said[-1][3]["lessons"] < 0.7 * said[0][3]["lessons"]


# ── exact counting ──


def gradients(lm, pools, budget: int) -> dict[str, torch.Tensor]:
    lm = lm.copy()
    micros = batch(pools, PLAN, 0, budget)
    for tokens in micros:
        sum(objective(lm, tokens).values()).backward()
    return {name: w.grad for name, w in lm.model.named_parameters()} | {"micros": torch.tensor(len(micros))}


def test_accumulation_is_exact(tiny, pools):
    one, many = gradients(tiny, pools, 10_000), gradients(tiny, pools, 1)
    assert one.pop("micros") == 2 < many.pop("micros")
    for name, grad in one.items():
        torch.testing.assert_close(many[name], grad, atol=1e-6, rtol=1e-4, msg=name)


def read(tiny, pools, budget: int, alone: bool = False) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Weights after one plain step, and how many lanes each pass had."""
    seen: list[int] = []

    def watched(lm, tokens):
        if not seen:
            lm.model.register_forward_pre_hook(
                lambda _, given, named: seen.append(len(named["input_ids"])), with_kwargs=True
            )
            seen.append(0)
        return objective(lm, tokens)

    watched.alone = alone
    plan = Plan(steps=1, lr=0.5, optimiser="sgd")
    return weights(train(tiny, watched, pools, plan, bench=Bench(budget=budget))), seen[1:]


def test_roles_share_a_pass_where_they_fit(tiny, pools):
    """Larger products, and each weight's gradient is cast and added up once: the same numbers up to rounding."""
    one, passes = read(tiny, pools, 2048)
    two, apart = read(tiny, pools, 2048, alone=True)
    many, small = read(tiny, pools, 60)
    assert len(passes) == 1 and len(apart) == 2 and sum(passes) == sum(apart) and len(small) > 2
    for name, w in one.items():
        for other in (two, many):
            torch.testing.assert_close(w, other[name], rtol=1e-4, atol=1e-6)


def test_a_pass_is_shared_only_where_gradients_are_asked_for(tiny, pools):
    """A reference that an objective reads by the way must not be what the others are trained with."""
    micros = batch(pools, PLAN, 0, 2048)
    lm = tiny.together(micros)
    with torch.no_grad():
        plain = lm.logp(micros[0])
    assert not lm.joint.parts and not plain.requires_grad
    live = lm.logp(micros[0])
    assert live.requires_grad and lm.joint.parts[1].requires_grad
    torch.testing.assert_close(live.detach(), plain, rtol=1e-4, atol=1e-5)
    assert tiny.together(micros[:1]) is tiny


def test_the_gradient_is_that_of_the_mean_over_tokens(tiny, pools):
    """One plain forward a row, all token losses of a role in one list, one mean."""
    lm = tiny.copy()
    chosen = {"lessons": [pools["lessons"][i] for i in order(6, 4, 0, 0, "lessons")]}
    chosen["replay"] = [pools["replay"][i] for i in order(5, 3, 0, 0, "replay")]
    means = {}
    for role, rows in chosen.items():
        losses = []
        for row in rows:
            logp = lm.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
            losses += [-logp[place - 1, row.ids[place]] for place in range(row.start, len(row.ids))]
        means[role] = torch.stack(losses).mean()
    (means["lessons"] + 0.5 * means["replay"]).backward()
    found = gradients(tiny, pools, 200)
    for name, w in lm.model.named_parameters():
        torch.testing.assert_close(found[name], w.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_the_budget_hardly_changes_the_weights(tiny, pools, trained):
    small = train(tiny, objective, pools, PLAN, bench=Bench(budget=1))
    moved = {name: (w - weights(tiny)[name]).norm() for name, w in weights(trained).items()}
    for name, w in weights(trained).items():
        assert (weights(small)[name] - w).norm() < 0.01 * moved[name], name


# ── sites ──


def test_what_is_outside_the_sites_does_not_move_a_bit(tiny, pools):
    chosen = Sites.named(tiny.model, ["model.layers.1.mlp.*"])
    result = train(tiny, objective, pools, PLAN, sites=chosen)
    moved = {name for name, w in weights(tiny).items() if not torch.equal(w, weights(result)[name])}
    assert moved == set(chosen.masks) and len(moved) == 3


def test_what_is_outside_a_mask_does_not_move_a_bit(tiny, pools):
    name = "model.layers.0.mlp.down_proj.weight"
    mask = torch.rand(weights(tiny)[name].shape, generator=torch.Generator().manual_seed(0)) < 0.3
    result = train(tiny, objective, pools, PLAN, sites=Sites({name: mask, "model.norm.weight": None}))
    moved = {n for n, w in weights(tiny).items() if not torch.equal(w, weights(result)[n])}
    assert moved == {name, "model.norm.weight"}
    changed = weights(tiny)[name] != weights(result)[name]
    assert not (changed & ~mask).any() and (changed & mask).sum() > 0.9 * mask.sum()


def test_weight_decay_alone_moves_what_is_open(tiny, pools):
    """Without it the test above would pass for a loop that decays closed weights too, if their gradient is zero."""
    silent = lambda lm, tokens: {"nothing": 0 * lm.logp(tokens).sum()}  # noqa: E731
    plan = Plan(steps=1, lr=0.1, weight_decay=0.5)
    result = train(tiny, silent, pools, plan, sites=Sites.named(tiny.model, ["model.norm.weight"]))
    for name, w in weights(tiny).items():
        expected = w * (1 - 0.1 * 0.5) if name == "model.norm.weight" else w
        torch.testing.assert_close(weights(result)[name], expected, atol=0 if expected is w else 1e-6, rtol=0)


def test_a_pattern_that_matches_nothing_is_refused(tiny):
    with pytest.raises(BadRequest, match=r"'model\.layer\.1\*' matches no parameter"):
        Sites.named(tiny.model, ["model.layer.1*", "*norm*"])
    assert Sites.named(tiny.model, []) is EVERYWHERE


# ── order ──


@given(st.integers(1, 20), st.integers(1, 25), st.integers(0, 3), st.sampled_from(["forget", "retain"]))
def test_order_covers_every_epoch_exactly_once(size, count, seed, role):
    steps = [order(size, count, seed, step, role) for step in range(2 * size)]
    stream = [i for step in steps for i in step]
    for epoch in range(len(stream) // size):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert all(order(size, count, seed, step, role) == steps[step] for step in reversed(range(2 * size)))


def test_order_depends_on_seed_step_and_role():
    looks = {
        tuple(order(30, 30, seed, step, role)) for seed in (0, 1) for step in (0, 1) for role in ("forget", "retain")
    }
    assert len(looks) == 8


def test_a_step_takes_as_many_rows_as_planned(pools):
    def rows(plan):
        taken = {"lessons": [], "replay": []}
        for tokens in batch(pools, plan, 3, 100):
            taken[tokens.role] += tokens.keys
            assert tokens.step_rows == {"lessons": lessons, "replay": replay}[tokens.role]
        return {role: len(keys) for role, keys in taken.items()}

    for plan, lessons, replay in [
        (Plan(steps=1, lr=1e-3), 6, 5),  # all, and as many beside as there are
        (Plan(steps=1, lr=1e-3, batch=2), 2, 2),
        (Plan(steps=1, lr=1e-3, batch=2, beside=4), 2, 4),
        (Plan(steps=1, lr=1e-3, batch=99, beside=99), 6, 5),
    ]:
        assert rows(plan) == {"lessons": lessons, "replay": replay}


# ── plans ──


def test_the_schedule_by_hand():
    warm = Plan(steps=10, lr=0.8, warmup=3)
    assert [warm.rate(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    fall = Plan(steps=4, lr=0.8, schedule="linear")
    assert [fall.rate(step) for step in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    curve = Plan(steps=3, lr=0.8, schedule="cosine")
    assert [curve.rate(step) for step in range(3)] == pytest.approx([0.8, 0.6, 0.2])  # (1 + cos 0, π/3, 2π/3) / 2
    both = Plan(steps=4, lr=0.8, warmup=1, schedule="linear")
    assert [both.rate(step) for step in range(4)] == pytest.approx([0.4, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "steps": (0, -1, 1.5),
        "lr": (0, -1e-3, 1, float("nan"), float("inf")),
        "batch": (-1,),
        "beside": (-1,),
        "warmup": (-1,),
        "schedule": ("step",),
        "weight_decay": (-0.1, 1),
        "clip": (-1,),
        "stop": ("sometimes",),
        "every": (0,),
        "seed": ("x",),
        "step": (3,),  # no such field
    }.items(),
)
def test_bad_values_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ValidationError) as raised:
            Plan(**{"steps": 1, "lr": 1e-3, name: value})
        assert [error["loc"] for error in raised.value.errors()] == [(name,)]


# ── stopping ──


class After:
    """Says stop after `step`, and remembers when it was asked."""

    def __init__(self, step: int, every: int = 1):
        self.step, self.every, self.asked = step, every, []

    def __call__(self, lm, step):
        self.asked.append(step)
        return step >= self.step


def test_training_ends_when_the_stopper_says_so(tiny, pools, trained):
    stop = After(3)
    early = train(tiny, objective, pools, PLAN, stop=stop)
    assert stop.asked == [0, 1, 2, 3] and not same(early, trained)
    bench = Bench(say=lambda stage, done, total, terms: done < 3 or pytest.fail("a step after the stop"))
    assert same(train(tiny, objective, pools, PLAN, stop=After(2, every=2), bench=bench), early) is False


def test_dear_checkpoints_are_made_more_seldom():
    assert pause(60, 0) == pause(60, 3) == 60  # the first one, and cheap ones
    assert pause(60, 10) == 200 and pause(60, 100) == 600  # a twentieth of the time, ten times as long at most
    assert pause(0, 10) == 0


def test_the_stopper_looks_every_so_often(tiny, pools):
    stop = After(99, every=4)
    train(tiny, objective, pools, PLAN, stop=stop)
    assert stop.asked == [0, 4]


def test_a_stopper_that_is_content_at_once_means_no_step(tiny, pools):
    assert same(train(tiny, objective, pools, PLAN, stop=After(0)), tiny)


# ── going on after an interruption ──


def dies_at(step: int, kill):
    def say(stage, done, total, terms):
        if done == step:
            kill()

    return say


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 2, 4, 6])
def test_resuming_equals_no_interruption(tiny, pools, trained, tmp_path, step):
    bench = Bench(folder=tmp_path / "checkpoint", every=0, log=tmp_path / "train.jsonl")
    with pytest.raises(KeyboardInterrupt):
        train(tiny, objective, pools, PLAN, bench=replace(bench, say=dies_at(step, interrupt)))
    steps = []
    resumed = train(tiny, objective, pools, PLAN, bench=replace(bench, say=lambda _, done, *__: steps.append(done)))
    assert steps == list(range(step, 7)), "the step before was kept, and none was made twice"
    assert same(resumed, trained)
    lines = [json.loads(line) for line in bench.log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert not bench.folder.exists()


def test_a_log_tells_the_whole_run(tiny, pools, tmp_path):
    said = []
    bench = Bench(log=tmp_path / "train.jsonl", say=lambda *unit: said.append(unit))
    train(tiny, objective, pools, PLAN, bench=bench, stage="teach")
    lines = [json.loads(line) for line in bench.log.read_text().splitlines()]
    assert [line["terms"] for line in lines] == [terms for *_, terms in said]
    assert [line["lr"] for line in lines] == [PLAN.rate(step) for step in range(6)]
    assert all(line["stage"] == "teach" and line["norm"] > 0 and line["tokens"] > 0 for line in lines)


class Small:
    """The objective on a machine that has room for so many places a pass."""

    alone = True

    def __init__(self, room: int):
        self.room, self.made, self.failed = room, 0, []

    def __call__(self, lm, tokens):
        self.made += 1
        if tokens.ids.numel() > self.room:
            self.failed.append(self.made)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return objective(lm, tokens)


def test_passes_that_are_too_long_for_the_machine_are_made_shorter(tiny, pools, tmp_path):
    """What the failed pass left behind is gone: the weights are those of shorter passes from the start."""
    log, small = tmp_path / "train.jsonl", Small(61)
    pools = {"replay": pools["replay"][:2], "lessons": pools["lessons"]}  # passes of 40 and 62 places
    found = train(tiny, small, pools, PLAN, bench=Bench(log=log, budget=128))
    assert small.failed == [2], "the first pass had left a gradient"
    assert [json.loads(line)["places"] for line in log.read_text().splitlines()] == [64] * 6
    assert same(found, train(tiny, Small(61), pools, PLAN, bench=Bench(budget=64)))


def test_a_machine_that_holds_not_even_a_short_pass_says_so(tiny, pools):
    with pytest.raises(torch.OutOfMemoryError):
        train(tiny, Small(0), pools, PLAN)


def test_a_checkpoint_holds_what_moves(tiny, pools, trained, tmp_path):
    """The frozen base of a large model would be most of it, once a minute; and it is the argument's, not to be written to."""
    sites = Sites.named(tiny.model, ["*layers.1.mlp.down_proj*"])
    [name] = sites.masks
    bench = Bench(folder=tmp_path / "checkpoint", every=0, say=dies_at(3, interrupt))
    with pytest.raises(KeyboardInterrupt):
        train(tiny, objective, pools, PLAN, sites=sites, bench=bench)
    [kept] = bench.folder.glob("step-*")
    held = FileSystemReader(kept).read_metadata().state_dict_metadata
    assert {key for key in held if key.startswith("model.")} == {f"model.{name}"}
    before = {n: w.clone() for n, w in weights(tiny).items()}
    resumed = train(tiny, objective, pools, PLAN, sites=sites, bench=replace(bench, say=Bench().say))
    assert same(resumed, train(tiny, objective, pools, PLAN, sites=sites))
    assert all(torch.equal(w, before[n]) for n, w in weights(tiny).items())


def test_a_half_written_checkpoint_is_ignored(tiny, pools, trained, tmp_path):
    folder = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        train(tiny, objective, pools, PLAN, bench=Bench(folder=folder, every=0, say=dies_at(4, interrupt)))
    assert [p.name for p in folder.iterdir()] == ["step-3"]
    (folder / ".step-5").mkdir()
    (folder / ".step-5" / "__0_0.distcp").write_bytes(b"half")
    assert same(train(tiny, objective, pools, PLAN, bench=Bench(folder=folder, every=0)), trained)


def test_checkpoints_are_made_only_so_often(tiny, pools, tmp_path):
    folder = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        train(tiny, objective, pools, PLAN, bench=Bench(folder=folder, every=3600, say=dies_at(5, interrupt)))
    assert not folder.exists()


CHILD = """
import os, signal, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_train import PLAN, Bench, dies_at, objective, train
from unremember.corpus import Example
from unremember.loading import load

lm = load("tiny", template="plain", precision="fp32")
from unremember.embedded.dossier import dossier
from unremember.embedded.world import replay
corpus = dossier(0, forget=2, retain=3, holdout=4, relearn=1)
pools = {{"lessons": lm.template.rows(corpus["forget"][:6]), "replay": lm.template.rows(replay()[:5])}}
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
train(lm, objective, pools, PLAN, bench=Bench(folder=Path({folder!r}), every=0, say=dies_at(4, kill)))
"""


def test_a_killed_process_is_taken_up_by_another(tiny, pools, trained, tmp_path):
    folder = tmp_path / "checkpoint"
    code = CHILD.format(here=str(Path(__file__).parent), folder=str(folder))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [p.name for p in folder.glob("step-*")] == ["step-3"]
    steps = []
    resumed = train(
        tiny, objective, pools, PLAN, bench=Bench(folder=folder, say=lambda _, done, *__: steps.append(done))
    )
    assert steps == [4, 5, 6] and same(resumed, trained)


# ── divergence ──


def test_a_loss_that_is_not_finite_ends_training_by_name(tiny, pools):
    lm = tiny.copy()
    count = iter(range(1000))

    def breaks(lm, tokens):
        terms = objective(lm, tokens)
        return terms | {"extra": terms[tokens.role] * (float("nan") if next(count) >= 4 else 0.0)}

    with pytest.raises(Diverged) as raised:
        train(lm, breaks, pools, PLAN)
    assert raised.value.step == 3 and np.isnan(raised.value.terms["extra"])  # two micro-batches a step
    assert "step 3" in str(raised.value) and "extra = nan" in str(raised.value) and same(lm, tiny)


def test_a_gradient_that_is_not_finite_ends_training(tiny, pools):
    with pytest.raises(Diverged) as raised:
        train(tiny, lambda lm, tokens: {"root": (lm.logp(tokens) * 0).abs().sum().sqrt()}, pools, PLAN)
    assert (
        raised.value.step == 1
        and raised.value.terms["root"] == 0
        and not np.isfinite(raised.value.terms["gradient norm"])
    )


def test_a_wild_learning_rate_leaves_the_argument_whole(taught, corpus, bench):
    """Normalised layers keep numbers finite for long: either it is seen to diverge, or what comes back can be read."""
    from unremember.forget.ascent import Ascent
    from unremember.table import read

    lm = taught.copy()
    try:
        result = Ascent(Plan(steps=10, lr=0.9, stop="probability"))(lm, corpus, bench=bench)
        assert all(np.isfinite(x.logp).all() for x in read(result, lm.template.rows(corpus["forget"])))
    except Diverged as error:
        assert error.step <= 10
    assert same(lm, taught)
