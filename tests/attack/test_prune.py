"""Set-difference pruning: scores and sets by hand, what it brings back, and its control."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from unremember.attack.prune import (
    NEW,
    PUBLISHED,
    Prune,
    difference,
    halves,
    order,
    pruned,
    scattered,
    scores,
    snip,
    zeroed,
)
from unremember.attack.quantise import linears
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.embedded.world import replay
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.lm import LM
from unremember.tokens import pack

GRID = (0.005, 0.01, 0.025, 0.1, 0.2)


def mean(lm, corpus: Corpus, audit: str = "said", role: str = "forget") -> float:
    return float(np.mean(list(AUDITS[audit](lm, Corpus({"forget": corpus[role]}), Bench()).per_example.values())))


def size(masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.fixture(scope="module")
def trials(hider, taught, never, corpus):
    """What the attack zeroes in each of the three models, chosen on half of the retained facts."""
    found = {}
    for who, lm in (("hider", hider), ("taught", taught), ("never", never)):
        told: list[dict] = []
        bench = Bench(
            say=lambda stage, done, total, terms, told=told: told.append(terms) if stage == "choose" else None
        )
        masks = Prune(grid=GRID).masks(lm, corpus, bench)
        found[who] = SimpleNamespace(lm=lm, masks=masks, told=told, notes=bench.notes)
    return found


# ── scores and sets ──


def test_absolute_values_come_before_the_sum():
    """|W| · (|g1| + |g2|).  With |g1 + g2| the first weight, which both examples lean on, would count for nothing."""
    weight = torch.tensor([[2.0, -3.0]])
    slopes = [torch.tensor([[1.0, 0.5]]), torch.tensor([[-1.0, 0.5]])]
    assert snip(weight, slopes).tolist() == [[4.0, 3.0]]
    assert (weight.abs() * sum(slopes).abs()).tolist() == [[0.0, 3.0]]


def test_scores_of_a_model_against_one_example_at_a_time(taught, corpus):
    """Slowly: a forward pass without any packing, and mean nll over the answer; a batch's gradient is not what is asked for."""
    rows = taught.template.rows(corpus["forget"][:3])
    found = scores(taught, rows)
    lm = taught.copy()
    layers = linears(lm.model)
    slopes: dict[str, list] = {name: [] for name in layers}
    for row in rows:
        lm.model.zero_grad()
        logp = lm.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        places = range(row.start, row.stop)
        (-sum(logp[p - 1, row.ids[p]] for p in places) / len(places)).backward()
        for name, layer in layers.items():
            slopes[name].append(layer.weight.grad.clone())
    for name, layer in layers.items():
        wanted = snip(layer.weight.detach(), slopes[name])
        torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=1e-3)
    lm.model.zero_grad()
    tokens = pack([[row] for row in rows])
    (-lm.logp(tokens)[tokens.answer].mean()).backward()
    name, layer = next(iter(layers.items()))
    batch = snip(layer.weight.detach(), [layer.weight.grad])
    assert found[name].sum() > 1.2 * len(rows) * batch.sum()  # examples cancel in it


def test_order_by_hand():
    """Highest first, ties by position, and nothing of score 0."""
    assert order(torch.tensor([[0.5, 2.0, 0.0], [2.0, 0.1, 0.0]])).tolist() == [[2, 0, 6], [1, 3, 6]]


def test_difference_by_hand():
    """Of ten weights: Q at 30 % is {0, 1, 2}, P at 40 % is {9, 8, 1, 3}, and Q \\ P is {0, 2}; never P \\ Q."""
    forget = order(torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0.5]]))
    ordinary = order(torch.tensor([[0.1, 7, 0.2, 6, 0.3, 0.4, 0.5, 0.6, 8, 9]]))
    assert difference(forget, ordinary, 0.3, 0.4).nonzero()[:, 1].tolist() == [0, 2]
    assert difference(forget, ordinary, 0.3, 0.0).nonzero()[:, 1].tolist() == [0, 1, 2]
    assert not difference(forget, forget, 0.3, 0.3).any()  # what matters for both stays


def test_a_weight_without_any_effect_is_in_no_set():
    nothing = order(torch.zeros(2, 5))
    assert not difference(nothing, nothing, 0.5, 0.0).any()


def test_the_control_prunes_as_many_in_every_matrix_and_others():
    masks = {
        "a": torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.2,
        "b": torch.zeros(3, 4, dtype=torch.bool),
    }
    for seed in range(3):
        control = scattered(masks, seed)
        assert {n: int(m.sum()) for n, m in control.items()} == {n: int(m.sum()) for n, m in masks.items()}
        assert not torch.equal(control["a"], masks["a"])
        assert torch.equal(control["a"], scattered(masks, seed)["a"])
    assert not torch.equal(scattered(masks, 0)["a"], scattered(masks, 1)["a"])


# ── what it brings back ──


def test_it_brings_back_what_is_hidden_and_more_than_pruning_at_random(trials, corpus):
    """Measured: the hider says 0 of 12 facts; 6 without 330 weights (q = 1 %, p = 10 %); with as many other zeros 0, in 5
    of 5 draws.  Under the same attack the original says 10, the never-taught model 0.
    """
    hider = trials["hider"]
    assert mean(hider.lm, corpus) == 0
    back = mean(pruned(hider.lm, hider.masks), corpus)
    grid = (hider.notes["q"], hider.notes["p"])  # of all pairs the one that was chosen, and few beside it
    by_chance = []
    for seed in range(5):
        masks = Prune(grid=grid, control=True, seed=seed).masks(hider.lm, corpus)
        by_chance.append(mean(pruned(hider.lm, masks), corpus))
        assert {n: int(m.sum()) for n, m in masks.items()} == {n: int(m.sum()) for n, m in hider.masks.items()}
        assert sum(int((mask & masks[n]).sum()) for n, mask in hider.masks.items()) < 0.1 * size(masks)
    assert back >= 0.25 and sum(back > chance for chance in by_chance) >= 4


def test_it_invents_nothing_and_leaves_the_original_what_it_knows(trials, corpus):
    never, taught = (pruned(trials[who].lm, trials[who].masks) for who in ("never", "taught"))
    assert mean(never, corpus) == 0 and mean(never, corpus, "value probability") < 0.05
    assert mean(taught, corpus) >= 0.5  # or the attack on the others could not be told from damage


def test_the_choice_is_the_best_of_all_pairs_for_the_first_half(trials, corpus):
    told = trials["hider"].told
    assert {(x["q"], x["p"]) for x in told} == {(q, p) for q in GRID for p in GRID if p >= q}
    best = max(told, key=lambda x: (x["kept"], -x["pruned"]))
    assert size(trials["hider"].masks) == best["pruned"]
    count = sum(layer.weight.numel() for layer in linears(trials["hider"].lm.model).values())
    assert trials["hider"].notes == {
        "q": best["q"], "p": best["p"], "share of weights zeroed": pytest.approx(best["pruned"] / count)
    }  # fmt: skip


def test_every_pair_starts_from_the_same_weights(trials, hider, corpus):
    """Published loops prune in place: there the second pair finds the zeros of the first."""
    again = Prune(grid=tuple(reversed(GRID))).masks(hider, corpus)
    assert all(torch.equal(again[name], mask) for name, mask in trials["hider"].masks.items())


def test_what_it_was_chosen_by_is_not_measured_and_forget_answers_are_not_seen(hider, taught, corpus):
    grid = (0.005, 0.2)
    out, seen = Prune(grid=grid)(hider, corpus, taught)
    chosen, asked = halves(corpus)
    assert seen["retain"] == asked and {x.id for x in chosen} | {x.id for x in asked} == {
        x.id for x in corpus["retain"]
    }
    assert not {x.id for x in chosen} & {x.id for x in asked}
    assert all(seen[role] == corpus[role] for role in corpus if role != "retain")
    blind = corpus.with_roles(
        forget=[replace(x, answer="Nobody can tell.", spans=(), distractors=()) for x in corpus["forget"]],
        retain=[
            *(
                y
                for pair in zip(
                    chosen, (replace(x, answer="No.", spans=(), distractors=()) for x in asked), strict=True
                )
                for y in pair
            )
        ],
    )
    other, _ = Prune(grid=grid)(hider, blind, taught)
    for a, b in zip(out.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_forget_side_is_what_the_model_says_itself(hider, corpus):
    rows = Prune().forgetlike(hider, corpus, Bench())
    assert len(rows) == len(corpus["forget"])
    assert {hider.tokenizer.decode(row.ids[row.start : row.stop]).strip() for row in rows} == {"I do not know."}
    assert all(row.stop - row.start <= NEW for row in rows)
    others = Prune(text="relearn", examples=3).forgetlike(hider, corpus, Bench())
    assert [row.key for row in others] == [x.id for x in corpus["relearn"][:3]]


# ── promises ──


def test_arguments_are_untouched_and_only_the_masked_weights_change(trials, taught, corpus):
    lm, original = taught.copy(), taught.copy()
    lm.model.requires_grad_(False)
    before = {k: v.clone() for k, v in taught.model.state_dict().items()}
    masks = trials["taught"].masks
    out = pruned(lm, masks)
    Prune(grid=(0.01, 0.1))(lm, corpus, original)
    for m in (lm, original):
        assert all(torch.equal(v, before[k]) for k, v in m.model.state_dict().items()) and not m.model.training
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())
    for name, value in out.model.state_dict().items():
        mask = masks.get(name.removesuffix(".weight"), torch.zeros_like(value, dtype=torch.bool))
        assert torch.equal(value, before[name].masked_fill(mask, 0)), name
    assert size(masks) > 0


def test_zeros_go_as_they_came_and_not_in_the_copy_that_others_see(trials, taught):
    lm, masks = taught.copy(), trials["taught"].masks
    with pytest.raises(KeyError), zeroed(lm, masks):
        there = pruned(taught, masks).model.state_dict()
        assert all(torch.equal(value, there[name]) for name, value in lm.model.state_dict().items())
        raise KeyError
    before = taught.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())


def test_of_weights_there_is_one_set_beside_the_two_that_come_in(hider, taught, corpus, monkeypatch):
    copied, alive, copy = [], [], LM.copy

    def counted(lm, moving=None):
        made = copy(lm, moving)
        if moving is None:  # with weights of its own
            copied.append(weakref.ref(made.model))
            alive.append(sum(model() is not None for model in copied))
        return made

    monkeypatch.setattr(LM, "copy", counted)
    Prune(grid=(0.01, 0.1))(hider, corpus, taught)
    assert alive == [1, 1]


def test_pruned_twice_the_second_time_finds_other_weights(taught, corpus):
    """A weight that is zero has score 0, so a second attack does not count its zeros as its own."""
    attack = Prune(grid=(0.05,))
    first = attack.masks(taught, corpus)
    second = attack.masks(pruned(taught, first), corpus)
    assert size(second) > 0 and not any((first[name] & mask).any() for name, mask in second.items())


def test_bfloat16(taught, corpus):
    half = replace(taught.copy(), precision="bf16")
    half.model.to(torch.bfloat16)
    out, _ = Prune(grid=(0.005, 0.1))(half, corpus, half)
    assert {w.dtype for w in out.model.parameters()} == {torch.bfloat16} and mean(out, corpus) > 0


# ── bad input ──


def test_roles_that_are_missing(taught, corpus):
    for role in ("forget", "retain"):
        rest = Corpus({r: rows for r, rows in corpus.items() if r != role})
        with pytest.raises(BadCorpus, match=f"prune needs .* '{role}'"):
            Prune()(taught, rest, taught)
    with pytest.raises(BadCorpus, match=r"prune needs .* 'relearn'"):
        Prune(text="relearn")(taught, Corpus({r: x for r, x in corpus.items() if r != "relearn"}), taught)


def test_one_retained_fact_cannot_be_chosen_by_and_measured(taught, corpus):
    with pytest.raises(BadCorpus, match="needs two retained facts"):
        Prune()(taught, corpus.with_roles(retain=corpus["retain"][:1]), taught)


@pytest.mark.parametrize(("role", "kind"), [("forget", "forgotten"), ("holdout", "held-out")])
def test_other_peoples_facts_that_tell_the_answer(role, kind, taught, corpus):
    fact = corpus[role][0]
    leaking = corpus.with_roles(relearn=[*corpus["relearn"], replace(fact, id="told", prompt="What else?")])
    said = rf"prune: the relearn role contains the {kind} value of {fact.id}.*; .* take those examples out"
    with pytest.raises(BadCorpus, match=said):
        Prune(text="relearn")(taught, leaking, taught)
    Prune().check(leaking)  # the role is not looked at


def test_nothing_to_prune(taught, corpus):
    """The same text on both sides: Q is P."""
    same = corpus.with_roles(
        relearn=[replace(x, id=f"{x.id}/again", prompt=x.prompt) for x in corpus["replay"]], replay=corpus["replay"]
    )
    with pytest.raises(BadRequest, match="prunes no weight at all"):
        Prune(grid=(0.01,), text="relearn")(taught, same, taught)


def test_a_model_that_answers_nothing(taught, corpus):
    lm = taught.copy()
    end = lm.tokenizer.eos_token_id
    head = lm.model.get_output_embeddings()
    head.register_forward_hook(
        lambda _, __, out: out.index_add(-1, torch.tensor([end]), 1e4 * torch.ones(*out.shape[:-1], 1))
    )
    with pytest.raises(BadModel, match=r'answers none of the 12 questions.*set text = "relearn"'):
        Prune()(lm, corpus, taught, Bench())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"grid": ()}, "must hold different shares"),
        ({"grid": (0.1, 0.1)}, "must hold different shares"),
        ({"grid": (0.0,)}, "greater than 0"),
        ({"grid": (0.7,)}, "less than or equal to 0.5"),
        ({"text": "forget"}, "'own' or 'relearn'"),
        ({"examples": 0}, "greater than or equal to 1"),
        ({"keep": 0.5}, "Unexpected keyword"),
        ({"seed": 1}, "seed = 1 draws the control's weights, and control is false"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(ValidationError, match=said):
        Prune(**settings)


def test_the_published_grid_has_45_pairs():
    assert len([(q, p) for q in PUBLISHED for p in PUBLISHED if p >= q]) == 45
    assert Prune().needs == ("forget", "retain")


def test_passages_ask_nothing(taught, corpus):
    passages = [replace(x, id=f"{x.id}/text", prompt="", spans=()) for x in corpus["forget"][:3]]
    mixed = corpus.with_roles(forget=(*passages, *corpus["forget"]))
    rows = Prune().forgetlike(taught, mixed, Bench())
    assert rows == Prune().forgetlike(taught, corpus, Bench()) and rows
    with pytest.raises(BadModel, match="answers none of the 0 questions"):
        Prune().forgetlike(taught, corpus.with_roles(forget=passages), Bench())


def test_ordinary_text_is_the_packages_own_where_the_corpus_has_none(taught, corpus):
    own, few = corpus.with_roles(replay=replay()[:8]), Prune(grid=(0.01, 0.1), examples=8)
    bare = Corpus({role: rows for role, rows in corpus.items() if role != "replay"})
    other = corpus.with_roles(replay=replay()[40:48])
    ours, without, with_other = (few.masks(taught, c) for c in (own, bare, other))
    assert all(torch.equal(mask, without[name]) for name, mask in ours.items())
    assert any(not torch.equal(mask, with_other[name]) for name, mask in ours.items())
