"""Causal tracing: against a slow forward pass, its two ends, and on a model whose lookup is known by construction."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from planted import INDOORS, LOOKUP, planted
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadModel
from unremember.locate.anatomy import components, edited, watched
from unremember.locate.ranking import Budget, select
from unremember.locate.subject import facts, sigma, swapped
from unremember.locate.tracing import CausalTracing


@pytest.fixture(scope="module")
def circuit(tiny):
    return planted(tiny)


def best(effects) -> tuple[int, str]:
    found = max(effects, key=effects.get)
    return found.block, found.kind


# ── the parts ──


def test_components_are_the_matrices_of_the_blocks(tiny):
    parts = components(tiny.model)
    assert [(x.block, x.kind) for x in parts] == [(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")]
    named = {name for x in parts for name in x.weights}
    assert named == {n for n, w in tiny.model.named_parameters() if n.startswith("model.layers") and w.dim() > 1}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_moves_its_own_matrices(tiny):
    pytest.importorskip("peft")
    named = [name for x in components(tiny.adapted(2, 4).model) for name in x.weights]
    assert len(named) == 2 * 7 * 2 and all("lora_" in name for name in named)


def test_an_unknown_architecture_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    fused = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=2, n_head=2, n_positions=8))
    with pytest.raises(BadModel, match=r"block 0 has 0 modules 'q_proj'.*forget\.sites"):
        components(fused)


def test_hooks_come_off_whatever_happens(tiny, corpus):
    part = components(tiny.model)[0]
    with (
        pytest.raises(RuntimeError, match="stop"),
        edited(tiny.model, {part.inner: lambda x: x}),
        watched(tiny.model, [part.output]),
    ):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.model.modules())


# ── the number ──


@pytest.mark.parametrize("corruption", ["noise", "swap"])
def test_against_plain_forward_passes(taught, corpus, corruption):
    """One fact, one draw, every component: no packing, hooks of this test's own."""
    one = CausalTracing(corruption=corruption, draws=1, facts=1, seed=3)
    found = one.effects(taught, corpus)
    chosen = int(np.random.default_rng(3).choice(len(corpus["forget"]), 1, replace=False)[0])
    every = facts(taught, corpus["forget"])
    fact = every[chosen]
    noise = torch.zeros(len(fact.row.ids) - 1, 64)
    if corruption == "noise":
        drawn = np.random.default_rng([3, 0, zlib.crc32(fact.row.key.encode())]).standard_normal(
            (len(fact.subject), 64)
        )
        noise[list(fact.subject)] = 3 * sigma(taught, [fact]) * torch.from_numpy(drawn).float()
        corrupt_ids = fact.row.ids
    else:
        corrupt_ids = swapped([fact], every, 3, 0)[0].ids
    value = [fact.row.start + i for i, hit in enumerate(fact.row.span) if hit]

    @torch.no_grad()
    def odds(ids, noise, put=None) -> tuple[float, dict]:
        seen, handles = {}, []
        for x in found:
            module = taught.model.get_submodule(x.modules[-1])

            def hook(_, inputs, x=x):
                seen[x] = inputs[0].clone()
                return (put[1],) if put and put[0] == x else None

            handles.append(module.register_forward_pre_hook(hook))
        embedded = taught.model.get_input_embeddings()(torch.tensor([ids[:-1]])) + noise
        logp = taught.model(inputs_embeds=embedded).logits[0].double().log_softmax(-1)
        for handle in handles:
            handle.remove()
        p = torch.stack([logp[place - 1, ids[place]] for place in value]).exp()
        return float((p / (1 - p)).log().sum()), seen

    clean, activations = odds(fact.row.ids, 0)
    low, _ = odds(corrupt_ids, noise)
    for x, effect in found.items():
        expected = (odds(corrupt_ids, noise, (x, activations[x]))[0] - low) / (clean - low)
        assert effect == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("corruption", ["noise", "swap"])
def test_everything_back_is_the_whole_effect_and_nothing_back_none(circuit, corruption):
    lm, corpus = circuit
    parts = tuple(components(lm.model))
    whole, none = CausalTracing(corruption=corruption).restored(lm, corpus, [parts, ()])
    assert none == 0.0
    assert whole == pytest.approx(
        1.0, abs=0.02
    )  # what is left is the corrupt name itself, which nobody reads at the end


def test_neither_batches_nor_the_weights_matter(taught, corpus):
    before = {n: w.clone() for n, w in taught.model.named_parameters()}
    a, b = (CausalTracing().effects(taught, corpus, Bench(budget=budget)) for budget in (2048, 64))
    assert list(a.values()) == pytest.approx(list(b.values()), abs=1e-3)
    assert all(torch.equal(w, before[n]) and w.grad is None for n, w in taught.model.named_parameters())
    assert CausalTracing(seed=1).effects(taught, corpus) != a


# ── the planted site ──


@pytest.mark.parametrize("corruption", ["noise", "swap"])
def test_at_the_subject_it_finds_the_lookup(circuit, corruption):
    lm, corpus = circuit
    effects = CausalTracing(corruption=corruption, at="subject").effects(lm, corpus)
    assert best(effects) == (LOOKUP, "mlp")
    # .34 with noise, .44 with other names; the rest of the subject's worth is that the head no longer finds the name.
    assert max(effects.values()) > 0.3
    assert sum(abs(e) > 0.02 for e in effects.values()) == 1


def test_everywhere_it_finds_the_read_out_first(circuit):
    """What the paper says of tracing: the head that carries the answer out ranks above the place that knows it."""
    lm, corpus = circuit
    effects = CausalTracing().effects(lm, corpus)
    ordered = sorted(effects, key=effects.get, reverse=True)
    assert [(x.block, x.kind) for x in ordered[:2]] == [(INDOORS, "attention"), (LOOKUP, "mlp")]
    assert best(CausalTracing(at="last").effects(lm, corpus)) == (INDOORS, "attention")


def test_a_ranking_opens_whole_components_within_the_budget(circuit):
    lm, corpus = circuit
    ranking = CausalTracing(at="subject")(lm, corpus)
    lookup = next(x for x in components(lm.model) if (x.block, x.kind) == (LOOKUP, "mlp"))
    weights = dict(lm.model.named_parameters())
    size = sum(weights[name].numel() for name in lookup.weights)
    assert ranking.unit == "tensor" and {n for n, _ in ranking.best(3)} == set(lookup.weights)
    assert set(select(ranking, lm.model, Budget(parameters=size)).masks) == set(lookup.weights)
    for short in (size - 1, size + 1):
        assert sum(weights[n].numel() for n in select(ranking, lm.model, Budget(parameters=short)).masks) <= short


# ── refusals ──


def test_what_is_not_known_cannot_be_traced(tiny, corpus):
    with pytest.raises(BadModel, match=r"on average, and shares of less than 1 are noise"):
        CausalTracing().effects(tiny, corpus)


def test_a_missing_role_and_a_missing_name_are_refused(taught, corpus):
    with pytest.raises(BadCorpus, match="needs examples in the role 'forget'"):
        CausalTracing()(taught, Corpus({"retain": corpus["retain"]}))
    nameless = corpus.with_roles(forget=[replace(x, entity="") for x in corpus["forget"]])
    with pytest.raises(BadCorpus, match="does not stand in its question"):
        CausalTracing()(taught, nameless)


@pytest.mark.parametrize(
    "wrong", [{"noise": 0.0}, {"draws": 0}, {"at": "first"}, {"corruption": "zero"}, {"facts": -1}]
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        CausalTracing(**wrong)
