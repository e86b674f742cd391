"""F-Learning: the arithmetic of weights by hand, the vector against its gradient, the search, and what it refuses."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from unremember.audit.editing import Conflict, Editing
from unremember.audit.probability import Probability
from unremember.bench import Bench
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.forget.arithmetic import difference, low_rank, subtract
from unremember.forget.ascent import Ascent
from unremember.forget.flearning import FLearning, _added, _finetuning, taken, updates
from unremember.report.build import _curve, _method
from unremember.sites import EVERYWHERE, Sites
from unremember.stop import Stopper, known
from unremember.table import read
from unremember.train import Plan, train

# peft asks for it
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

OLD = Plan(steps=3, lr=3e-3)  # 0.15 s on the toy
GRID = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def weights(lm) -> dict[str, torch.Tensor]:
    return {name: w.detach() for name, w in lm.model.named_parameters()}


def bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit: torch.equal takes 0 and −0 for the same."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def same(a, b) -> bool:
    return all(bits(w, weights(b)[name]) for name, w in weights(a).items())


def accuracy(lm, corpus, role: str = "forget") -> float:
    return float(np.mean([known(x, "accuracy") for x in read(lm, lm.template.rows(corpus[role]))]))


def hits(lm, corpus, role: str) -> float:
    return float(np.mean([x.hit.mean() for x in read(lm, lm.template.rows(corpus[role]))]))


def nll(lm, corpus, role: str) -> float:
    return float(np.mean([-x.loglikelihood() for x in read(lm, lm.template.rows(corpus[role]))]))


def swapped(x, role: str = "new"):
    """The same question with a wrong answer, which is the new one."""
    return replace(x, id=f"{x.id}/{role}", answer=x.distractors[0], spans=(), distractors=(), rewording="")


def vector(lm, corpus, method, sites=EVERYWHERE) -> dict[str, torch.Tensor]:
    return method._vector(lm, lm.template.rows(corpus["forget"]), sites, Bench(), None)


@pytest.fixture(scope="module")
def update(corpus):
    return corpus.with_roles(new=[swapped(x) for x in corpus["forget"]])


@pytest.fixture(scope="module")
def delta(taught, corpus):
    return vector(taught, corpus, FLearning(OLD, GRID))


# ── arithmetic ──


def test_subtraction_by_hand():
    start = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.5])}
    tuned = {"w": torch.tensor([1.5, 1.0]), "b": torch.tensor([0.5])}
    found = difference(start, tuned)
    torch.testing.assert_close(found["w"], torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(subtract(start, found, 2.0)["w"], torch.tensor([0.0, 4.0]))
    torch.testing.assert_close(subtract(start, found, -1.0)["w"], tuned["w"])  # the other sign is the finetuning itself
    assert torch.equal(start["w"], torch.tensor([1.0, 2.0])), "the argument is not touched"


def test_no_strength_and_no_change_leave_every_bit():
    start = {"w": torch.tensor([-0.0, 0.1, 1e-30]), "h": torch.tensor([0.3], dtype=torch.bfloat16)}
    delta = {"w": torch.tensor([5.0, -3.0, 0.0]), "h": torch.tensor([2.0])}
    assert all(bits(subtract(start, delta, 0.0)[name], start[name]) for name in start)
    assert bits(subtract(start, delta, 1.0)["w"][2:], start["w"][2:])
    negative = subtract({"w": torch.tensor([-0.0])}, {"w": torch.tensor([-0.0])}, 1.0)["w"]
    assert bits(negative, torch.tensor([-0.0])), "−0 − (−0) would be 0"


def test_whole_numbers_are_copied_and_not_subtracted():
    """The published baseline skips int64 and uint8 alone; a boolean mask minus another raises, and int8 wraps around."""
    kinds = (torch.int8, torch.uint8, torch.int64, torch.bool)
    start = {str(kind): torch.ones(2, dtype=kind) for kind in kinds} | {"w": torch.ones(1)}
    tuned = {name: torch.zeros_like(w) for name, w in start.items()}
    delta = difference(start, tuned)
    assert set(delta) == {"w"}
    result = subtract(start, delta, 1.0)
    assert all(torch.equal(result[str(kind)], start[str(kind)]) for kind in kinds) and result["w"] == 2
    assert all(result[name].data_ptr() != start[name].data_ptr() for name in start)


def test_shared_weights_move_once_and_stay_shared():
    embedding = torch.ones(2)
    start = {"embed": embedding, "head": embedding}
    delta = difference(start, {"embed": embedding + 1, "head": embedding + 1})
    assert set(delta) == {"embed"}
    result = subtract(start, delta, 1.0)
    assert torch.equal(result["embed"], torch.zeros(2)) and result["head"] is result["embed"]
    apart = difference({"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.zeros(2), "b": torch.zeros(2)})
    assert set(apart) == {"a", "b"}, "equal numbers in two places are no shared weight"


def test_half_precision_is_reckoned_in_float32_and_cast_back():
    start, delta = torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([0.4])
    found = subtract({"w": start}, {"w": delta}, 5.0)["w"]
    assert found.dtype == torch.bfloat16 and found == 254  # in bfloat16 0.4 is another number, and so is its fivefold
    tuned = {"w": torch.tensor([1.0078125], dtype=torch.bfloat16)}
    assert difference({"w": torch.ones(1, dtype=torch.bfloat16)}, tuned)["w"].dtype == torch.float32


def test_weights_that_do_not_belong_together_are_refused():
    start = {"w": torch.ones(2)}
    with pytest.raises(BadModel, match=r"1 names are in one alone \(v\)"):
        difference(start, {"w": torch.ones(2), "v": torch.ones(1)})
    with pytest.raises(BadModel, match=r"'w' has shape \(2,\) .* and \(3,\)"):
        difference(start, {"w": torch.ones(3)})
    with pytest.raises(BadModel, match=r"1 names are in one alone \(v\)"):
        subtract(start, {"v": torch.ones(2)}, 1.0)
    with pytest.raises(BadModel, match=r"'w' holds torch.int8 numbers, .* instead of quantised ones"):
        subtract({"w": torch.ones(2, dtype=torch.int8)}, {"w": torch.ones(2)}, 1.0)


def test_an_adapter_by_hand():
    down, up = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    expected = 8 / 2 * torch.tensor([[1.0, 2.0], [0.0, 3.0], [1.0, 3.0]])
    torch.testing.assert_close(low_rank(down, up, 8), expected)
    for wrong in (low_rank(-2 * down, -2 * up, 8), low_rank(-down, -up, 8)):  # λ² and a sign that cancels
        assert not torch.allclose(wrong, -2 * expected) and not torch.allclose(wrong, -expected)


@pytest.mark.parametrize("rank", [2, 5])
def test_what_an_adapter_adds_is_what_peft_would_merge(tiny, rank):
    """alpha / r counts: at alpha 16 it is 8 and 3.2."""
    torch.manual_seed(0)
    lm = tiny.adapted(rank, 16)
    with torch.no_grad():
        for name, weight in lm.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    found = _added(lm)
    merged = dict(lm.copy().model.merge_and_unload().named_parameters())
    moved = {n for n, w in weights(tiny).items() if not torch.equal(w, merged[n])}
    assert set(found) == moved and moved
    for name, change in found.items():
        torch.testing.assert_close(weights(tiny)[name] + change, merged[name].detach())


# ── the vector ──


@pytest.mark.parametrize("part", ["answer", "span"])
def test_one_step_of_plain_descent_is_the_gradient_of_the_token_mean(taught, corpus, slow_nll, part):
    """The slow way: row by row, one plain forward pass each, mean over all tokens of all rows, the prompt left out."""
    few = corpus.with_roles(forget=corpus["forget"][:3])
    found = vector(taught, few, FLearning(Plan(steps=1, lr=0.5, optimiser="sgd"), (1.0,), part=part))
    lm = taught.copy()
    for weight in lm.model.parameters():
        weight.requires_grad_(True)
    rows = lm.template.rows(few["forget"])
    tokens = [slow_nll(lm, row)[torch.tensor(row.span) if part == "span" else slice(None)] for row in rows]
    torch.cat(tokens).mean().backward()
    for name, weight in lm.model.named_parameters():
        torch.testing.assert_close(found[name], -0.5 * weight.grad, atol=2e-6, rtol=1e-3)


def test_no_strength_gives_the_model_itself(taught, delta):
    assert same(taken(taught, delta, 0.0), taught)


def test_taking_away_by_hand(taught, delta):
    result, name = taken(taught, delta, 0.7), "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(weights(result)[name], weights(taught)[name] - 0.7 * delta[name])
    assert result.model is not taught.model
    embed = result.model.get_input_embeddings().weight
    assert (result.model.get_output_embeddings().weight is embed) == (
        taught.model.get_output_embeddings().weight is taught.model.get_input_embeddings().weight
    )


def test_the_other_sign_teaches(taught, corpus, delta):
    """Section (g) 2: at λ = −1 the forget NLL falls (0.062 from 0.124); at +1 it rises (1.31)."""
    before = nll(taught, corpus, "forget")
    assert nll(taken(taught, delta, -1.0), corpus, "forget") < 0.7 * before
    assert nll(taken(taught, delta, 1.0), corpus, "forget") > 5 * before


def test_more_strength_forgets_more_and_the_rest_stays_a_while(taught, corpus, delta):
    """Section (g) 1, 2.  Value accuracy 0.74, 0.57, 0.32, 0.21, 0.12, 0.10; at 0.75 retained accuracy 0.93, prose −0.03."""
    models = [taken(taught, delta, strength) for strength in GRID]
    found = [accuracy(taught, corpus), *(accuracy(lm, corpus) for lm in models)]
    assert all(a >= b for a, b in pairwise(found)) and found[0] > 0.95
    at = next(i for i, value in enumerate(found[1:]) if value <= 0.4)
    assert nll(models[at], corpus, "prose") - nll(taught, corpus, "prose") <= 0.05
    assert hits(models[at], corpus, "retain") >= 0.75


def test_a_random_vector_of_the_same_size_does_nothing(taught, corpus, delta):
    """The placebo of section (g) 1: value accuracy 0.93 to 0.99 in three draws, where the real one leaves 0.21."""
    for seed in range(3):
        noise = torch.Generator().manual_seed(seed)
        fake = {n: torch.randn(w.shape, generator=noise) for n, w in delta.items()}
        fake = {n: w * delta[n].norm() / w.norm() for n, w in fake.items()}
        assert accuracy(taken(taught, fake, 1.0), corpus) >= 0.9
    assert accuracy(taken(taught, delta, 1.0), corpus) <= 0.3


def test_a_vector_costs_less_than_ascent(taught, corpus, delta):
    """(g) 1: λ = 1 leaves 0.21 of the values, five steps of ascent 0.26.  Prose, which should tell them apart, falls
    under both (4.79 and 4.75 from 4.81); the general questions rise by 0.01 and by 0.12, retained values fall to 0.87
    and to 0.81."""
    ours, theirs = taken(taught, delta, 1.0), Ascent(Plan(steps=5, lr=1e-3))(taught, corpus)
    assert accuracy(ours, corpus) <= accuracy(theirs, corpus) <= 0.4
    cost, price = (nll(lm, corpus, "world") - nll(taught, corpus, "world") for lm in (ours, theirs))
    assert cost <= 0.3 * price
    assert nll(ours, corpus, "prose") - nll(taught, corpus, "prose") <= 0.05
    assert accuracy(ours, corpus, "retain") > accuracy(theirs, corpus, "retain")


def test_an_adapter_costs_more_than_all_weights(taught, corpus, delta):
    """(g) 4 proposes 1.2 x the rise in prose at equal forgetting.  Here all weights have no rise (λ = 0.75 leaves 0.32
    of the values, prose −0.03), and rank 4 has one (λ = 1.5 leaves 0.39, prose +0.07, general questions +0.06 against
    −0.01); six steps instead of three gave +0.15.  A toy of width 64 leaves four directions little room."""
    small = vector(taught, corpus, FLearning(replace(OLD, lr=1e-2), GRID, rank=4))
    full, low = taken(taught, delta, 0.75), taken(taught, small, 1.5)
    assert accuracy(full, corpus) <= accuracy(low, corpus) <= 0.45
    for role in ("prose", "world"):
        start, here, there = (nll(lm, corpus, role) for lm in (taught, full, low))
        assert here < there <= start + 0.15


# ── the search ──


def test_the_smallest_strength_that_is_enough_from_one_finetuning(taught, corpus, delta, tmp_path):
    """Every strength before the one that stays was looked at and was not enough; it is the report's level and curve."""
    said, log = [], tmp_path / "train.jsonl"
    bench = Bench(log=log, say=lambda stage, done, *_: said.append((stage, done)))
    grid = (0.5, 1.0, 2.0, 3.0, 3.5, 4.0)
    result = FLearning(replace(OLD, stop="probability"), grid)(taught, corpus, bench=bench)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    tried = [line["terms"]["strength"] for line in lines if line["stage"] == "forget"]
    assert [line["step"] for line in lines if line["stage"] == "old"] == [1, 2, 3], "one finetuning for all strengths"
    assert tried == list(grid[: len(tried)]) and 2 < len(tried) < len(grid)
    assert [pair for pair in said if pair[0] == "forget"] == [("forget", i + 1) for i in range(len(tried))]
    assert [line["stopped"] for line in lines[3:]] == [False] * (len(tried) - 1) + [True]
    level = Stopper.calibrated(taught, corpus, "probability", 1, holds=False)
    assert [level(taken(taught, delta, s), 0) for s in tried] == [False] * (len(tried) - 1) + [True]
    assert same(result, taken(taught, delta, tried[-1]))
    meta = {"method": {"settings": {}, "name": "flearning", "summary": "", "paper": ""}}
    assert _method(meta, lines)["stop"] == f"level of the never-taught reached at step {len(tried)}"
    plain = {role: [{"id": x.id} for x in corpus[role]] for role in ("forget", "retain", "holdout")}
    curve = _curve(lines, plain, {"original": {"probability": Probability()(taught, corpus, Bench())}})
    assert [point["step"] for point in curve] == [0, *range(1, len(tried) + 1)]
    fall = [point["forget"] for point in curve]
    assert fall == sorted(fall, reverse=True) and fall[0] > 0.8 > 0.3 > fall[-1]
    assert [line["norm"] for line in lines[3:]] == pytest.approx([lines[3]["norm"] * 2 * s for s in tried])


def test_the_end_of_the_grid_is_the_cap(taught, corpus, delta, tmp_path):
    log = tmp_path / "train.jsonl"
    result = FLearning(replace(OLD, stop="probability"), (0.1, 0.2))(taught, corpus, bench=Bench(log=log))
    assert same(result, taken(taught, delta, 0.2))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    meta = {"method": {"settings": {}, "name": "flearning", "summary": "", "paper": ""}}
    assert _method(meta, lines)["stop"].startswith("CAP REACHED: 2 steps")


def test_without_a_level_the_largest_strength_is_taken(taught, corpus, delta, tmp_path):
    log = tmp_path / "train.jsonl"
    result = FLearning(OLD, (0.1, 0.3))(taught, corpus, bench=Bench(log=log))
    assert same(result, taken(taught, delta, 0.3))
    [line] = [json.loads(x) for x in log.read_text().splitlines()][3:]
    assert line["terms"] == {"strength": 0.3} and "look" not in line


def test_paraphrases_are_not_looked_at(taught, corpus):
    """The strength is not chosen on what the audit measures generality with: without paraphrases nothing changes."""
    made = FLearning(replace(OLD, stop="probability"), (1.0, 3.0, 4.0))
    bare = corpus.with_roles(forget=[replace(x, paraphrases=()) for x in corpus["forget"]])
    assert same(made(taught, corpus), made(taught, bare))


# ── learning ──

LEARN = Plan(steps=8, lr=2e-3)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("learn_rank", [0, 4])
def test_four_combinations(taught, update, rank, learn_rank):
    """Whole weights or an adapter, for taking away and for learning: a plain model that took the new answers."""
    old = replace(OLD, lr=1e-2) if rank else OLD
    learn = replace(LEARN, lr=1e-2) if learn_rank else LEARN
    gone = FLearning(old, (1.0,), rank=rank)(taught, update)
    result = FLearning(old, (1.0,), learn=learn, rank=rank, learn_rank=learn_rank)(taught, update)
    assert weights(result).keys() == weights(taught).keys() and not hasattr(result.model, "peft_config")
    values = Conflict()(taught, update, Bench()), Conflict()(result, update, Bench())
    before, after = (np.mean(list(x.per_example.values())) for x in values)
    assert before > 0.95 and after < 0.9, f"{after:.2f}"  # 0.74 to 0.83 where this was calibrated
    assert accuracy(gone, update) < accuracy(taught, update) - 0.1
    moved = {n for n, w in weights(taught).items() if not torch.equal(w, weights(result)[n])}
    matrices = {n for n in weights(taught) if n.endswith("_proj.weight")}
    assert moved == matrices if rank and learn_rank else matrices < moved


def test_learning_starts_from_what_is_left(taught, update, delta):
    """θ* = FT(θ', new), end marks included, and not FT(θ, new): one step of plain descent from θ'."""
    plan = Plan(steps=1, lr=0.1, optimiser="sgd")
    result = FLearning(OLD, (0.5,), learn=plan)(taught, update)
    left = taken(taught, delta, 0.5)
    for weight in left.model.parameters():
        weight.requires_grad_(True)
    rows = left.template.rows(update["new"])
    loss = torch.zeros(())
    for row in rows:
        logp = left.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        loss = loss - sum(logp[place - 1, row.ids[place]] for place in range(row.start, len(row.ids)))
    (loss / sum(len(row.ids) - row.start for row in rows)).backward()
    for name, weight in left.model.named_parameters():
        step = weights(result)[name] - weight.detach()
        torch.testing.assert_close(step, -0.1 * weight.grad, atol=2e-6, rtol=2e-2)


def test_after_learning_it_is_looked_at_again(taught, update, tmp_path):
    """Learning may bring the old answer back: the last line says whether it did, and the report reads the last line."""
    log = tmp_path / "train.jsonl"
    made = FLearning(replace(OLD, stop="probability"), (1.0, 4.0), learn=Plan(steps=2, lr=1e-6))
    made(taught, update, bench=Bench(log=log))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["old"] * 3 + ["forget"] * 2 + ["learn"] * 2
    assert lines[-1]["stopped"] and "look" not in lines[-2] and lines[-1]["look"]["step"] == 4
    log.unlink()
    back = update.with_roles(
        new=[
            replace(x, id=f"{x.id}/new", answer=f"{x.answer} So it was.", spans=(), distractors=())
            for x in update["forget"]
        ]
    )
    replace(made, learn=Plan(steps=12, lr=3e-3))(taught, back, bench=Bench(log=log))
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["stage"] == "learn" and last["stopped"] is False


def test_nothing_to_take_away_goes_straight_to_learning(never, update, tmp_path):
    """A model that knows no more of these people than of the never-taught: no vector, which would teach the old answers."""
    easy = update.with_roles(forget=update["holdout"][:6], holdout=(*update["forget"], *update["holdout"][6:]))
    easy = easy.with_roles(new=[swapped(x) for x in easy["forget"]])
    level = Stopper.calibrated(never, easy, "probability", 1, holds=False)
    if not level(never, 0):  # the best known of the six against the best known of the others: order them by that
        people = (*easy["forget"], *easy["holdout"])
        seen = [known(x, "probability") for x in read(never, never.template.rows(people))]
        order = [people[i] for i in np.argsort(seen)]
        easy = easy.with_roles(forget=order[:6], holdout=order[6:], new=[swapped(x) for x in order[:6]])
    log = tmp_path / "train.jsonl"
    FLearning(replace(OLD, stop="probability"), GRID, learn=Plan(steps=1, lr=1e-5))(never, easy, bench=Bench(log=log))
    assert {json.loads(line)["stage"] for line in log.read_text().splitlines()} == {"learn"}


# ── sites and adapters ──


@pytest.mark.parametrize("rank", [0, 4])
def test_only_the_sites_move(taught, update, rank):
    sites = Sites.named(taught.model, ["model.layers.1.mlp.*_proj.weight"])
    made = FLearning(OLD, (1.0,), learn=Plan(steps=2, lr=1e-3), rank=rank, learn_rank=rank)
    result = made(taught, update, sites=sites)
    assert {n for n, w in weights(taught).items() if not bits(w, weights(result)[n])} == set(sites.masks)


def test_outside_a_mask_every_bit_stays(taught, corpus):
    name = "model.layers.0.mlp.down_proj.weight"
    mask = torch.rand(weights(taught)[name].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    result = FLearning(OLD, (3.0,))(taught, corpus, sites=Sites({name: mask}))
    before, after = weights(taught)[name], weights(result)[name]
    assert bits(before[~mask], after[~mask]) and (before[mask] != after[mask]).float().mean() > 0.9
    assert {n for n, w in weights(taught).items() if not bits(w, weights(result)[n])} == {name}


def test_in_the_adapter_of_a_request_the_product_is_taken_away(taught, corpus):
    """A stays, B becomes −λ·B: the product is λ times the trained one, where moving both would give terms in λ²."""
    torch.manual_seed(0)
    lm = taught.adapted(4, 8)
    sites = Sites.named(lm.model, ["*lora_*"])
    plan = replace(OLD, lr=1e-2, steps=6)
    one, two = (FLearning(plan, (strength,))(lm, corpus, sites=sites) for strength in (1.0, 2.0))
    assert hasattr(one.model, "peft_config")
    moved = {n for n, w in weights(lm).items() if not bits(w, weights(one)[n])}
    assert moved and all("lora_B" in n for n in moved)
    for name, change in _added(one).items():
        torch.testing.assert_close(_added(two)[name], 2 * change)
    assert accuracy(two, corpus) < accuracy(taught, corpus) - 0.2
    everywhere = FLearning(plan, (1.0,))(lm, corpus)
    assert same(everywhere, one), "everywhere in an adapter is the adapter"


def test_adapters_that_exclude_one_another_are_refused(taught, corpus):
    lm = taught.adapted(2, 4)
    with pytest.raises(BadRequest, match=r"forget\.lora trains an adapter already, and forget\.rank = 4"):
        FLearning(OLD, (1.0,), rank=4)(lm, corpus)
    down = Sites.named(lm.model, ["*lora_A*"])
    with pytest.raises(BadRequest, match="open no 'lora_B' weight"):
        FLearning(OLD, (1.0,))(lm, corpus, sites=down)
    name = "model.layers.0.mlp.down_proj.weight"
    part = Sites({name: torch.ones_like(weights(taught)[name], dtype=torch.bool)})
    with pytest.raises(BadRequest, match=f"open a part of '{name}'"):
        FLearning(OLD, (1.0,), rank=2)(taught, corpus, sites=part)
    norm = Sites.named(taught.model, ["model.norm.weight"])
    with pytest.raises(BadRequest, match=r"open 'model\.norm\.weight' \(1 such\), which no adapter can move"):
        FLearning(OLD, (1.0,), rank=2)(taught, corpus, sites=norm)


# ── resuming ──


@pytest.mark.parametrize(("stage", "at"), [("old", 2), ("forget", 1), ("forget", 2), ("learn", 2)])
@pytest.mark.parametrize("rank", [0, 2])
def test_resuming_in_any_stage_equals_no_interruption(taught, update, tmp_path, rank, stage, at):
    made = FLearning(
        replace(OLD, batch=5, stop="probability"),
        (0.1, 0.2, 0.3),
        learn=Plan(steps=3, lr=1e-3, batch=5),
        rank=rank,
        learn_rank=rank,
    )
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    expected = made(taught, update, bench=Bench(log=whole))

    def halt(now, done, total, terms):
        if (now, done) == (stage, at):
            raise KeyboardInterrupt

    folder = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        made(taught, update, bench=Bench(folder=folder, every=0, log=broken, say=halt))
    done = []
    bench = Bench(folder=folder, every=0, log=broken, say=lambda now, step, *_: done.append((now, step)))
    assert same(made(taught, update, bench=bench), expected)
    assert broken.read_text() == whole.read_text(), "nothing twice, and in order"
    later = ("old", "forget", "learn")
    assert not any(now in later[: later.index(stage)] for now, _ in done), "what was finished is not done again"
    assert not folder.exists()


def test_the_vector_of_another_start_is_never_taken_up(taught, delta, corpus, tmp_path):
    def halt(stage, *_):
        if stage == "forget":
            raise KeyboardInterrupt

    made, folder = FLearning(OLD, (0.5,)), tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        made(taught, corpus, bench=Bench(folder=folder, say=halt))
    assert list(folder.glob("*/vector.safetensors"))
    other = taken(taught, delta, 0.1)
    assert same(made(other, corpus, bench=Bench(folder=folder)), made(other, corpus))


# ── refusals ──


def test_facts_that_the_model_does_not_know_are_refused(never, corpus):
    with pytest.raises(
        BadCorpus, match=r"gets 15% of the tokens of these old answers right \(at least 50% are needed\)"
    ):
        FLearning(OLD, GRID)(never, corpus)


def test_a_few_facts_that_it_does_not_know_are_named(taught, corpus):
    """Finetuning teaches these, and taking that away takes what was never there."""
    mixed = corpus.with_roles(forget=(*corpus["forget"][:8], *corpus["holdout"][:4]), holdout=corpus["holdout"][4:])
    names = ", ".join(x.id for x in corpus["holdout"][:4])
    with pytest.warns(UserWarning, match=rf"does not know {names} \(4 of 12\)"):
        FLearning(replace(OLD, steps=1), (0.5,), part="span")(taught, mixed)


def test_weight_decay_is_refused_with_the_reason(taught, corpus):
    """Decay is a part of δ: the pitfall of section (h), shown, and then refused."""
    plan = Plan(steps=1, lr=1e-3, weight_decay=0.5)
    name = "model.layers.0.mlp.down_proj.weight"
    pools = {"old": taught.template.rows(corpus["forget"])}
    plain, decayed = (
        weights(train(taught, _finetuning("answer"), pools, replace(plan, weight_decay=w)))[name] for w in (0.0, 0.5)
    )
    torch.testing.assert_close(decayed - plain, -1e-3 * 0.5 * weights(taught)[name], atol=1e-7, rtol=1e-3)
    with pytest.raises(BadRequest, match=r"weight_decay is 0\.5; .* blow up every weight .* set it to 0"):
        FLearning(plan, GRID)(taught, corpus)
    FLearning(OLD, GRID, learn=plan).check(corpus.with_roles(new=[swapped(x) for x in corpus["forget"]]))


def test_settings_that_make_no_sense_together(update):
    with pytest.raises(BadRequest, match=r"forget\.learn\.stop is 'probability'") as raised:
        FLearning(replace(OLD, weight_decay=0.1), GRID, learn=replace(LEARN, stop="probability")).check(update)
    assert len(raised.value.problems) == 2, "all problems together"
    with pytest.raises(BadRequest, match="learn_rank is 4 and nothing is learnt"):
        FLearning(OLD, GRID, learn_rank=4).check(update)


@pytest.mark.parametrize("grid", [(), (1.0, 0.5), (1.0, 1.0), (0.0, 1.0), (-1.0,)])
def test_a_grid_that_does_not_rise_from_above_nothing_is_refused(grid):
    with pytest.raises(ValidationError) as raised:
        FLearning(plan=OLD, strength=grid)
    assert {error["loc"][0] for error in raised.value.errors()} == {"strength"}


def test_roles_that_are_needed(corpus, update):
    assert FLearning(OLD, GRID).needs == ("forget",)
    with pytest.raises(BadCorpus, match="needs examples in the role 'new'"):
        FLearning(OLD, GRID, learn=LEARN).check(corpus)
    with pytest.raises(BadCorpus, match="needs examples in the role 'forget'"):
        FLearning(OLD, GRID).check(corpus.with_roles(forget=()))
    FLearning(OLD, GRID, learn=LEARN).check(update)


def test_old_and_new_answers_that_do_not_belong_together(update):
    first, *rest = update["new"]
    made = FLearning(OLD, GRID, learn=LEARN)
    old = next(x for x in update["forget"] if x.prompt == first.prompt)

    def problems(**roles):
        with pytest.raises(BadCorpus) as raised:
            made.check(update.with_roles(**roles))
        return raised.value.problems

    [equal] = problems(new=[replace(first, answer=f" {old.answer.upper()}"), *rest])
    assert "is the old one" in equal and first.id in equal
    [short] = problems(new=rest)
    assert short.startswith("forget: ") and "has no counterpart in new" in short
    assert len(problems(new=[replace(first, prompt="Who else?"), *rest])) == 2
    [twice] = problems(new=[first, replace(first, id="other"), *rest])
    assert twice.startswith("new: ") and "is asked 2 times" in twice
    bare = problems(new=[replace(first, prompt=""), *rest])
    assert any("has no prompt" in problem for problem in bare)


def test_a_question_with_two_current_answers_is_refused_also_without_learning(corpus):
    other = replace(corpus["forget"][0], id="other", answer="Somewhere else.", spans=(), distractors=())
    [problem] = updates(corpus.with_roles(forget=(*corpus["forget"], other)), learn=False)
    assert "is asked 2 times; a question has one answer now" in problem
    assert not updates(corpus, learn=False)


def test_the_new_answers_are_taken(taught, update):
    """Reliability rises; the same number of steps alone, from the model as it came, is the comparison to beat."""
    result = FLearning(OLD, (0.5,), learn=replace(LEARN, steps=30, lr=3e-3))(taught, update)
    said = Editing("reliability", said=True)
    before, after = (np.mean(list(said(lm, update, Bench()).per_example.values())) for lm in (taught, result))
    assert before == 0 and after >= 0.9


def test_what_was_taken_away_first_is_in_conflict_less(taught, corpus):
    """(g) 3, twelve steps of the same learning: residual conflict 0.034 after subtracting, 0.106 without, generality
    0.32 and 0.29.  In the proposed band of generality, 50 to 80 %, there is no conflict left to compare (0.001 for both
    after twenty steps), and after four steps of learning it is the other way round (0.75 and 0.71): subtracting pushes
    both answers down."""

    def marked(x):
        [(start, end)], new = x.spans, swapped(x)
        return replace(new, spans=((start, len(new.answer) - len(x.answer) + end),))

    both = corpus.with_roles(new=[marked(x) for x in corpus["forget"]])
    learn = replace(LEARN, steps=12)
    direct = train(taught, _finetuning("train"), {"new": taught.template.rows(both["new"])}, learn)
    ours = FLearning(OLD, (0.5,), learn=learn)(taught, both)
    conflicts, general = (
        [float(np.mean([*audit(lm, both, Bench()).per_example.values()])) for lm in (ours, direct)]
        for audit in (Conflict(), Editing("generality"))
    )
    assert 0.1 < general[1] < 0.9, "else the comparison is void"
    assert conflicts[0] <= 0.7 * conflicts[1] and general[0] >= general[1] - 0.05
