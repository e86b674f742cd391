"""The latent adversary: its arithmetic by hand, against a slow loop, where it may reach, and what it must leave alone."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from unremember import team
from unremember.displace import block_name, leaving, lengths, movable, share_of, stride
from unremember.errors import BadModel
from unremember.forget.ascent import Ascent
from unremember.forget.dpo import DPO
from unremember.forget.npo import NPO
from unremember.forget.perturbed import (
    Perturbed,
    bounded,
    displaced,
    displacement,
    starts,
)
from unremember.tokens import lanes, pack
from unremember.train import Plan

PLAN = Plan(steps=3, lr=1e-3)
BLOCK = "model.layers.0"


def apart(rows, role="forget"):
    return pack([[row] for row in rows], role)


def uneven(lm, corpus):
    """Three rows of different lengths, so that two of their lanes are filled up."""
    rows = sorted(lm.template.rows(corpus["forget"]), key=lambda row: len(row.ids))
    rows = [rows[0], rows[len(rows) // 2], rows[-1]]
    assert len({len(row.ids) for row in rows}) == 3
    return rows


def loss(lm, tokens, delta=None):
    """Mean nll of each row's answer."""
    with torch.no_grad(), displaced(lm, tokens, BLOCK, torch.zeros(()) if delta is None else delta):
        return tokens.per_row(-lm.logp(tokens), "answer") / tokens.lengths("answer")


# ── arithmetic ──


def test_a_stride_by_hand():
    gradient = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])  # the second has nothing to gain: no 0 / 0
    moved = stride(torch.ones(2, 1, 2), gradient, torch.tensor([[[5.0]], [[5.0]]]))
    torch.testing.assert_close(moved, torch.tensor([[[-2.0, -3.0]], [[1.0, 1.0]]]))
    assert lengths(gradient).flatten().tolist() == [5.0, 0.0]


def test_the_bounds_by_hand():
    inside = torch.tensor([[[False], [True], [True]]]).repeat(2, 1, 1)
    # The first place must not widen the extremes, and neither may the other example.
    hidden = torch.tensor([[[-100.0, 100.0], [0.0, 1.0], [2.0, 3.0]], [[-9.0, 9.0], [4.0, 5.0], [6.0, 7.0]]])
    delta = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, -3.0], [-4.0, 0.0]]])
    # Both have length 5.  At most 2.5: halved to 1.5 and 2, then 3 + 2 is brought down to the largest entry, 3.
    # At most 10: stays; 5 - 3 and 6 - 4 are brought up to the smallest entry, 4.
    found = bounded(delta, torch.tensor([[[2.5]], [[10.0]]]), hidden, inside)
    wanted = torch.tensor([[[0.0, 0.0], [1.5, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, -1.0], [-2.0, 0.0]]])
    torch.testing.assert_close(found, wanted)
    assert not bounded(delta, torch.zeros(2, 1, 1), hidden, inside).any()
    nowhere = bounded(delta, torch.full((2, 1, 1), 2.5), hidden, torch.zeros_like(inside))
    assert not nowhere.any() and nowhere.isfinite().all()


def test_starting_points_depend_on_seed_step_and_example_alone():
    inside = torch.ones(2, 5, 1, dtype=torch.bool)
    inside[:, 0] = inside[1, 4] = False
    found = starts(("a", "b"), inside, 64, seed=0, step=3)
    assert torch.equal(found, starts(("a", "b"), inside, 64, 0, 3)) and not found[~inside[:, :, 0]].any()
    longer = torch.cat([inside, torch.zeros(2, 2, 1, dtype=torch.bool)], 1)
    torch.manual_seed(5)
    assert torch.equal(found[1, :4], starts(("b",), longer[1:], 64, 0, 3)[0, :4]), "whatever stands beside it"
    for other in (starts(("a", "b"), inside, 64, 1, 3), starts(("a", "b"), inside, 64, 0, 4)):
        assert (other != found).any(2)[inside[:, :, 0]].all()
    norms = torch.cat([lengths(starts(("a", "b"), inside, 64, 0, step)).flatten() for step in range(200)])
    assert norms.max() <= 1 and abs(norms.mean() - 0.5) < 0.05 and abs(norms.std() - 12**-0.5) < 0.05  # U(0, 1)


# ── the inner loop ──


def slowly(lm, row, radius, steps, seed, step):
    """By the book: one plain sequence at a time, every formula spelt out."""
    ids = torch.tensor([row.ids[:-1]])
    clean = []

    def run(change):
        handle = lm.model.model.layers[0].register_forward_hook(
            lambda _, __, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
        )
        logp = lm.model(input_ids=ids).logits[0].log_softmax(-1)
        handle.remove()
        return torch.stack([-logp[p - 1, row.ids[p]] for p in range(row.start, row.stop)]).mean()

    with torch.no_grad():
        run(lambda out: clean.append(out) or out)
    h = clean[0][:, 1:]  # without the first place
    eps = radius * h.square().sum().sqrt()
    inside = torch.ones(1, len(row.ids) - 1, 1, dtype=torch.bool)
    inside[:, 0] = False
    delta = eps * starts((row.key,), inside, h.shape[-1], seed, step)[:, 1:]

    def limited(delta):
        if delta.norm() > eps:
            delta = delta * eps / delta.norm()
        return (h + delta).clamp(h.min(), h.max()) - h

    delta = limited(delta)
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        whole = nn.functional.pad(delta, (0, 0, 1, 0))
        run(lambda out, whole=whole: out + whole).backward()
        delta = limited(delta.detach() - eps / steps * delta.grad / (delta.grad.norm() + 1e-6))
    lm.model.zero_grad()
    return delta[0]


@pytest.mark.parametrize("steps", [0, 3])
def test_it_finds_what_a_slow_loop_finds_row_by_row(moved, corpus, steps):
    """Pins padding, too: in published code it is displaced, takes a part of ε, and its entries count as extremes.

    The first place must take no part of the gradient's norm either: a mask on δ alone is up to 0.5 % off.
    """
    rows = uneven(moved, corpus)
    found = displacement(moved, apart(rows), BLOCK, 0.2, steps, seed=4, step=2)
    for lane, row in zip(found, rows, strict=True):
        expected = slowly(moved, row, 0.2, steps, 4, 2)
        torch.testing.assert_close(lane[1 : len(row.ids) - 1], expected, rtol=1e-3, atol=3e-5)  # 3e-6 of its norm off
        assert not lane[0].any() and not lane[len(row.ids) - 1 :].any()
    if not steps:
        assert found.any(), "no step is a random displacement"


def test_a_neighbour_changes_nothing(moved, corpus):
    short, _, long = uneven(moved, corpus)
    alone, beside = (displacement(moved, apart(rows), BLOCK, 0.2, 3)[0] for rows in ([short], [short, long]))
    torch.testing.assert_close(beside[: len(alone)], alone, rtol=1e-3, atol=1e-4)
    assert not beside[len(alone) :].any()


def test_it_keeps_within_the_radius_and_the_extremes(moved, corpus):
    tokens = apart(uneven(moved, corpus))
    hidden, inside = leaving(moved, tokens, BLOCK), movable(tokens)
    for radius in (0.05, 0.5):
        delta = displacement(moved, tokens, BLOCK, radius, 4)
        assert (lengths(delta) <= radius * lengths(hidden * inside) * (1 + 1e-5)).all() and delta.any()
        for h, d, where in zip(hidden, delta, inside[:, :, 0], strict=True):
            assert h[where].min() - 1e-5 <= (h + d)[where].min() and (h + d)[where].max() <= h[where].max() + 1e-5


def test_it_brings_answers_nearer_and_more_with_more_steps(moved, corpus):
    rows = moved.template.rows(corpus["forget"])
    tokens = apart(rows)
    none = loss(moved, tokens).mean()
    drawn, three, ten = (loss(moved, tokens, displacement(moved, tokens, BLOCK, 0.1, s)).mean() for s in (0, 3, 10))
    assert ten < three < 0.9 * none and abs(drawn - none) < 0.1 * (none - three)


def test_the_adversary_works_on_the_part_that_it_is_told(moved, corpus):
    [row] = [row for row in moved.template.rows(corpus["forget"][:1])]
    assert 0 < sum(row.span) < len(row.span)
    tokens = apart([row])
    whole, span = (displacement(moved, tokens, BLOCK, 0.1, 3, part) for part in ("answer", "span"))
    with torch.no_grad():
        lost = []
        for delta in (whole, span):
            with displaced(moved, tokens, BLOCK, delta):
                lost.append(tokens.per_row(-moved.logp(tokens), "span").item())
    assert lost[1] < 0.5 * lost[0]  # measured: 0.024 against 0.114


def test_weights_and_their_gradients_are_not_touched(moved, corpus):
    """In published code the inner loop calls zero_grad: what earlier micro-batches have accumulated is gone."""
    lm = moved.copy()
    for weight in lm.model.parameters():
        weight.grad = torch.ones_like(weight)
    displacement(lm, apart(uneven(lm, corpus)), BLOCK, 0.1, 2)
    assert all(weight.grad is not None and (weight.grad == 1).all() for weight in lm.model.parameters())
    assert all(torch.equal(w, v) for w, v in zip(lm.model.parameters(), moved.model.parameters(), strict=True))
    assert not lm.model.training


# ── where the displacement is ──


def test_it_is_there_in_passes_over_these_tokens_only_and_comes_off(tiny, corpus):
    rows = tiny.template.rows(corpus["forget"][:4])
    tokens = apart(rows[:2])
    other = replace(tokens, ids=tokens.ids.clone().index_fill(1, torch.tensor([2]), 5))  # of the same shape
    delta = torch.ones(*tokens.ids.shape, 64) * movable(tokens)
    with torch.no_grad():
        plain, elsewhere = tiny.logp(tokens), tiny.logp(other)
        with displaced(tiny, tokens, BLOCK, delta):
            assert not torch.equal(tiny.logp(tokens), plain) and torch.equal(tiny.logp(other), elsewhere)
        with pytest.raises(KeyError), displaced(tiny, tokens, BLOCK, delta):
            raise KeyError
        assert torch.equal(tiny.logp(tokens), plain)
    assert not tiny.model._forward_pre_hooks and not tiny.model.get_submodule(BLOCK)._forward_hooks


def test_it_is_added_out_of_place(tiny, corpus):
    """Published code changes hidden states in place, which also changes what was saved for backward."""
    tokens, seen = apart(tiny.template.rows(corpus["forget"][:2])), []
    delta = torch.ones(*tokens.ids.shape, 64)

    def keep(hidden):
        seen.append(hidden)
        return hidden

    clean = leaving(tiny, tokens, BLOCK)
    with torch.no_grad(), tiny.at(BLOCK, keep), displaced(tiny, tokens, BLOCK, delta):
        tiny.logits(tokens)
    assert torch.equal(seen[0], clean)


def test_a_module_that_returns_a_tuple_is_displaced_like_any(tiny, corpus):
    tokens = apart(tiny.template.rows(corpus["forget"][:2]))
    name = "model.layers.0.self_attn"
    with torch.no_grad():
        plain = tiny.logp(tokens)
        with displaced(tiny, tokens, name, torch.ones(*tokens.ids.shape, 64)):
            assert not torch.equal(tiny.logp(tokens), plain)
    assert displacement(tiny, tokens, name, 0.1, 1).any()


def test_names_and_shares_of_blocks(tiny, monkeypatch):
    assert [block_name(tiny, i) for i in (0, 1)] == ["model.layers.0", "model.layers.1"]
    monkeypatch.setattr(team, "blocks", lambda model: [model] * 30)
    assert [share_of(tiny, share) for share in (0.001, 0.13, 0.5, 1.0)] == [0, 3, 14, 29]  # 4 of 30 below, as published
    monkeypatch.setattr(team, "blocks", lambda model: [])
    with pytest.raises(BadModel, match=r'tiny has no list of blocks.*"npo"'):
        share_of(tiny, 0.13)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_is_attacked_like_the_model_around_which_it_is(taught, corpus):
    adapted, tokens = taught.adapted(4, 8), apart(uneven(taught, corpus))  # a fresh adapter is the identity
    name = block_name(adapted, 0)
    assert name != BLOCK and name.endswith(BLOCK)
    found, expected = displacement(adapted, tokens, name, 0.1, 1), displacement(taught, tokens, BLOCK, 0.1, 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# ── the wrapper ──


def wrapped(lm, corpus, method, radius=0.2, steps=2, **more):
    pools, plain = method.terms(lm, corpus)
    rows = {row.key: row for row in pools["forget"]}
    return pools, plain, Perturbed(plain, rows, BLOCK, radius, steps, **more)


def counting(lm, record):
    return lm.model.register_forward_hook(lambda *_: record.append(torch.is_grad_enabled()))


@pytest.mark.parametrize("steps", [0, 3])
def test_radius_zero_is_the_objective_itself_bit_for_bit(moved, corpus, steps):
    pools, plain, made = wrapped(moved, corpus, NPO(PLAN, 0.1), 0.0, steps)
    for role in ("forget", "retain"):
        tokens = pack(lanes(pools[role], 256), role)
        for term, value in plain(moved, tokens).items():
            assert torch.equal(made(moved, tokens)[term], value)


def test_laid_out_one_row_a_lane_it_is_the_same_loss(moved, corpus):
    """A vanishing radius takes the whole way round: the totals of the step survive the new lay-out."""
    pools, plain, made = wrapped(moved, corpus, NPO(PLAN, 0.1), 1e-9, 1)
    tokens = pack(lanes(pools["forget"], 256), "forget", (99, {"answer": 500, "span": 200, "train": 600}))
    with torch.no_grad():
        assert made(moved, tokens)["npo"].item() == pytest.approx(plain(moved, tokens)["npo"].item(), rel=1e-4)


@pytest.mark.parametrize("steps", [0, 3])
def test_the_loss_is_taken_under_the_displacement(moved, corpus, steps):
    pools, plain, made = wrapped(moved, corpus, Ascent(PLAN), 0.2, steps, seed=7, step=2)
    with torch.no_grad():
        found = made(moved, pack(lanes(pools["forget"], 256), "forget"))["ascent"].item()
        clean = plain(moved, pack(lanes(pools["forget"], 256), "forget"))["ascent"].item()
    tokens = apart(pools["forget"])
    nll = loss(moved, tokens, displacement(moved, tokens, BLOCK, 0.2, steps, seed=7, step=2))
    expected = -float((nll * tokens.lengths("answer")).sum() / tokens.lengths("answer").sum())
    assert found == pytest.approx(expected, rel=1e-4) and found != pytest.approx(clean, rel=1e-3)


def test_other_roles_and_other_passes_stay_clean(moved, corpus):
    pools, plain, made = wrapped(moved, corpus, NPO(PLAN, 0.1, kl=1.0))
    tokens, passes = pack(lanes(pools["retain"], 256), "retain"), []
    expected = plain(moved, tokens)
    handle = counting(moved, passes)
    found = made(moved, tokens)
    handle.remove()
    assert len(passes) == 1 and all(torch.equal(found[term], value) for term, value in expected.items())
    # DPO makes a second pass of its own, over refusals: it is no business of the adversary's.
    pools, plain, made = wrapped(moved, corpus, DPO(PLAN, 0.1))
    tokens = pack(lanes(pools["forget"], 256), "forget")
    said: dict[str, list[torch.Tensor]] = {"plain": [], "made": []}
    for name, objective in (("plain", plain), ("made", made)):
        keep = moved.model.register_forward_hook(
            lambda _, __, named, out, name=name: said[name].append((named["input_ids"], out.logits)), with_kwargs=True
        )
        with torch.no_grad():
            objective(moved, tokens)
        keep.remove()
    refusals = [out for ids, out in said["plain"] if not torch.equal(ids, tokens.ids)]
    assert len(refusals) == 1 and any(torch.equal(out, refusals[0]) for _, out in said["made"])


def test_its_cost_is_counted_in_passes(moved, corpus):
    """1 clean pass without gradients, S of the inner loop, the outer one.  test_adv looks at the time."""
    pools, _, made = wrapped(moved, corpus, NPO(PLAN, 0.1), steps=3)
    tokens, passes = pack(lanes(pools["forget"][:4], 256), "forget"), []
    handle = counting(moved, passes)
    for given in (tokens, tokens.silent()):  # a process that has run out of rows must make as many
        passes.clear()
        made(moved, given)
        assert passes == [False, True, True, True, True]
    handle.remove()


def test_a_silent_batch_adds_nothing_and_reaches_the_same_weights(moved, corpus):
    lm = moved.copy()
    pools, _, made = wrapped(lm, corpus, NPO(PLAN, 0.1))
    tokens, reached = pack(lanes(pools["forget"][:4], 256), "forget"), []
    for given in (tokens, tokens.silent()):
        [value] = made(lm, given).values()
        value.backward()
        reached.append({n for n, w in lm.model.named_parameters() if w.grad is not None})
        assert any(w.grad.any() for w in lm.model.parameters()) == bool(value) == (given is tokens)
        lm.model.zero_grad()
    assert reached[0] == reached[1] == {n for n, _ in lm.model.named_parameters()}


def test_micro_batches_add_up_with_their_gradients(moved, corpus):
    lm = moved.copy()
    pools, _, made = wrapped(lm, corpus, NPO(PLAN, 0.1), steps=3)
    rows, sums = pools["forget"][:5], []
    whole = pack([rows], "forget")
    totals = whole.step_rows, whole.step_tokens
    for cut in ([rows], [rows[:1], rows[1:3], rows[3:]]):
        for part in cut:
            made(lm, pack([part], "forget", totals))["npo"].backward()
        sums.append({n: w.grad.clone() for n, w in lm.model.named_parameters()})
        lm.model.zero_grad()
    for name, gradient in sums[0].items():
        torch.testing.assert_close(sums[1][name], gradient, rtol=1e-2, atol=1e-3 * float(gradient.abs().max()))


def test_each_step_draws_anew_and_the_inner_hooks_are_passed_on(moved, corpus):
    class Hooked:
        called = ()

        def before(self, lm, micros, step):
            self.called += ("before", *micros)

        def after(self, lm, micros):
            self.called += ("after", *micros)

        def __call__(self, lm, tokens):
            return {"nll": tokens.per_row(-lm.logp(tokens), "answer").sum()}

    rows = moved.template.rows(corpus["forget"][:3])
    tokens, inner = pack([rows], "forget"), Hooked()
    made = Perturbed(inner, {row.key: row for row in rows}, BLOCK, 0.3, 0)
    values = []
    with torch.no_grad():
        for step in (1, 2):
            made.before(moved, [tokens], step)
            values += [made(moved, tokens)["nll"].item(), made(moved, tokens)["nll"].item()]
            made.after(moved, [tokens])
        later = Perturbed(inner, made.rows, BLOCK, 0.3, 0)  # taken up after one step
        later.before(moved, [tokens], 2)
        values.append(later(moved, tokens)["nll"].item())
    assert inner.called == ("before", tokens, "after", tokens) * 2 + ("before", tokens)
    assert values[0] == values[1] != values[2] == values[3] == values[4]


def test_bad_values_are_refused_by_name():
    good = {"objective": print, "rows": {}, "block": BLOCK, "radius": 0.1, "steps": 1}
    Perturbed(**good)
    for key, value in (("radius", -0.1), ("radius", float("nan")), ("steps", -1), ("part", "all"), ("done", -1)):
        with pytest.raises(ValidationError) as raised:
            Perturbed(**good | {key: value})
        assert [error["loc"] for error in raised.value.errors()] == [(key,)]


def test_low_precision_is_fine(moved, corpus):
    lm = replace(moved, precision="bf16")
    tokens = apart(uneven(lm, corpus))
    delta = displacement(lm, tokens, BLOCK, 0.1, 2)
    assert delta.dtype == torch.float32 and delta.isfinite().all() and delta.any()
