"""Attribution patching: the sum by hand, against finite differences, and what it finds on a model with a known lookup."""

import pytest
import torch
from pydantic import ValidationError

import unremember.locate.patching as module
from planted import INDOORS, LOOKUP, planted
from unremember.bench import Bench
from unremember.errors import BadCorpus, BadModel
from unremember.forget.mechanistic import Mechanistic
from unremember.locate.anatomy import components, edited, watched
from unremember.locate.patching import AttributionPatching, attribution, nodes
from unremember.locate.ranking import Budget, select
from unremember.locate.subject import facts, known, laid, swapped
from unremember.locate.tracing import CausalTracing
from unremember.train import Plan


@pytest.fixture(scope="module")
def circuit(tiny):
    return planted(tiny)


def by_component(lm, ranking) -> dict[tuple[int, str], float]:
    return {(x.block, x.kind): float(ranking.scores[x.weights[0]]) for x in components(lm.model)}


def test_the_sum_by_hand():
    clean = torch.tensor(
        [[[1.0, 2.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]]
    )  # one row, two places, two heads of two dimensions
    corrupt = torch.tensor([[[2.0, 2.0, 0.0, 3.0], [0.0, 0.0, 2.0, 0.0]]])
    slope = torch.tensor([[[2.0, 9.0, 9.0, -1.0], [9.0, 4.0, 0.5, 9.0]]])
    # head 0: 1 · 2 and −1 · 4; head 1: 3 · −1 and 1 · 0.5
    torch.testing.assert_close(attribution(clean, corrupt, slope, 2), torch.tensor([-2.0, -2.5]))
    torch.testing.assert_close(attribution(clean, corrupt, slope, 4), torch.tensor([-4.5]))


def test_it_is_the_slope_of_patching(taught, corpus):
    """Move one node a little towards its corrupt value: d changes by as much as the score says.  Central differences in fp32."""
    found = facts(taught, corpus["forget"])
    scores = AttributionPatching(facts=0, seed=5).nodes(taught, corpus)
    sites, eps = list(scores), 0.02
    clean_tokens, corrupt_tokens = laid(taught, [f.row for f in found]), laid(taught, swapped(found, found, 5, 0))
    with torch.no_grad():
        with watched(taught.model, sites) as clean:
            known(taught, clean_tokens)
        with watched(taught.model, sites) as corrupt:
            known(taught, corrupt_tokens)

        def moved(site, step) -> float:
            value = clean[site] + step * (corrupt[site] - clean[site])
            edits = {site: lambda _: value}
            if site[0].endswith("gate_proj"):  # what goes into an MLP goes into both projections
                edits[site[0].replace("gate_proj", "up_proj"), "in"] = lambda _: value
            with edited(taught.model, edits):
                return float(known(taught, clean_tokens).double().mean())

        for site in sites:
            slope = (moved(site, eps) - moved(site, -eps)) / (2 * eps)
            assert float(scores[site].sum()) == pytest.approx(slope, abs=0.02)


def test_opposite_heads_do_not_cancel(tiny, monkeypatch):
    """The published default adds signed scores over heads and q, k, v, z before it takes the absolute value."""
    first, mlp = components(tiny.model)[:2]
    values = {site: torch.zeros(1) for x in components(tiny.model) for site in nodes(x)}
    q, k, _, z = nodes(first)
    values |= {q: torch.tensor([3.0, -3.0]), k: torch.tensor([1.0, 1.0]), z: torch.tensor([-2.0, -1.0])}
    values |= {nodes(mlp)[0]: torch.tensor([-2.0]), nodes(mlp)[1]: torch.tensor([1.0])}
    monkeypatch.setattr(AttributionPatching, "nodes", lambda *_: values)
    found = by_component(tiny, AttributionPatching()(tiny, None))
    assert found[0, "attention"] == 6.0, "|3| + |−3|; not 0, and not q, k and z added up"
    assert found[0, "mlp"] == 2.0


def test_it_names_lookup_and_read_out_and_nothing_else(circuit):
    lm, corpus = circuit
    found = by_component(lm, AttributionPatching()(lm, corpus))
    ordered = sorted(found, key=found.get, reverse=True)
    # 7.9 for the read-out, 7.7 for the lookup, the rest below 0.01: like tracing it does not tell the one from the other.
    assert ordered[:2] == [(INDOORS, "attention"), (LOOKUP, "mlp")]
    assert all(found[x] < 0.05 * found[LOOKUP, "mlp"] for x in ordered[2:])


def test_random_components_do_not(circuit):
    lm, corpus = circuit
    size = sum(dict(lm.model.named_parameters())[n].numel() for n in components(lm.model)[0].weights)
    hits = 0
    for seed in range(16):
        made = Mechanistic(Plan(steps=1, lr=1e-3, seed=seed), "random", parameters=size)
        hits += any(f"layers.{LOOKUP}.mlp" in name for name in made.sites(lm, corpus).masks)
    assert 1 <= hits <= 7  # of 16, where one component in eight is the lookup and a budget may hold parts of two


def test_the_metric_does_not_saturate(circuit, monkeypatch):
    """A first order of log p sees nothing of a fact that is known by heart, though patching undoes it; log-odds do."""
    lm, corpus = circuit
    assert lm.logp(laid(lm, [f.row for f in facts(lm, corpus["forget"])])).max() > -1e-3
    ours = max(by_component(lm, AttributionPatching()(lm, corpus)).values())
    monkeypatch.setattr(module, "known", lambda lm, tokens: tokens.per_row(lm.logp(tokens), "span"))
    theirs = max(by_component(lm, AttributionPatching()(lm, corpus)).values())
    assert theirs < 0.01 < 1 < ours  # 0.003 and 7.9
    assert max(CausalTracing().effects(lm, corpus).values()) > 0.9


def test_neither_batches_nor_weights_nor_who_asks_for_gradients_matter(taught, corpus):
    lm = taught.copy()
    for weight in lm.model.parameters():
        weight.requires_grad_(False)
    with torch.no_grad():
        a = AttributionPatching().nodes(lm, corpus)
    b = AttributionPatching().nodes(taught, corpus, Bench(budget=64))
    for site, value in a.items():
        torch.testing.assert_close(value, b[site], atol=1e-4, rtol=1e-3)
    assert all(w.grad is None for w in taught.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in taught.model.modules())


def test_the_budget_is_never_overshot(taught, corpus):
    """The published fill goes up to one component beyond."""
    ranking, weights = AttributionPatching()(taught, corpus), dict(taught.model.named_parameters())
    for budget in (4096, 9000, 30000, 60000):
        opened = sum(weights[name].numel() for name in select(ranking, taught.model, Budget(parameters=budget)).masks)
        assert budget - 4096 < opened <= budget  # 4096: the smallest matrix


def test_refusals(tiny, corpus):
    with pytest.raises(BadModel, match="hardly knows them"):
        AttributionPatching()(tiny, corpus)
    one = corpus.with_roles(forget=corpus["forget"][:6])
    with pytest.raises(BadCorpus, match="no other entity has a name"):
        AttributionPatching()(tiny, one)
    with pytest.raises(ValidationError):
        AttributionPatching(draws=0)
