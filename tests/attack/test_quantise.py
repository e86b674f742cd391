"""Rounding the weights: the grids by hand and slowly, what it undoes, and what it does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import norm
from torch import nn

from unremember.attack.quantise import BLOCK, NF4, Quantise, code_change, coded, lies, linears, plain, survival, whole
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.forget.npo import NPO
from unremember.score import Rule, evidence
from unremember.tokens import pack
from unremember.train import Plan

GRIDS = [(4, "symmetric"), (8, "symmetric"), (4, "asymmetric"), (8, "asymmetric"), (4, "nf4")]


def scores(lm, corpus: Corpus, audit: str = "said", role: str = "forget") -> dict[str, float]:
    return dict(AUDITS[audit](lm, Corpus({"forget": corpus[role]}), Bench()).per_example)


def mean(lm, corpus: Corpus, audit: str = "said", role: str = "forget") -> float:
    return float(np.mean(list(scores(lm, corpus, audit, role).values())))


def attacked(lm, corpus, original, bench=None, **settings):
    return Quantise(**{"bits": 4, **settings})(lm, corpus, original, bench or Bench())[0]


def heard() -> tuple[Bench, list[dict]]:
    said: list[dict] = []
    return Bench(say=lambda stage, done, total, terms: said.append(terms)), said


def same(a, b) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    )


@pytest.fixture(scope="module")
def within(taught, corpus):
    """The taught model with each weight moved inside its 4-bit bin until it says nothing: hidden from everybody but Q."""
    lm, attack = taught.copy(), Quantise(bits=4)
    weights = attack.weights(lm.model)
    lm.model.requires_grad_(False)
    box = []
    for weight in weights.values():
        on, w = attack.coded(weight), weight.detach().clone()
        largest = w.unflatten(1, (-1, 64)).abs().amax(-1, keepdim=True).expand(-1, -1, 64).flatten(1)
        low, high = on.values - 0.45 * on.step, on.values + 0.45 * on.step
        low, high = low.maximum(-largest).minimum(w), high.minimum(largest).maximum(w)
        fixed = w.abs() == largest  # it sets the step
        box.append((torch.where(fixed, w, low), torch.where(fixed, w, high)))
        weight.requires_grad_(True)
    forget, retain = (pack([[row] for row in lm.template.rows(corpus[role])]) for role in ("forget", "retain"))
    for _ in range(30):
        gain, loss = (lm.logp(tokens)[tokens.answer].mean() for tokens in (forget, retain))
        slopes = torch.autograd.grad(gain - loss, list(weights.values()))
        with torch.no_grad():
            for weight, slope, (low, high) in zip(weights.values(), slopes, box, strict=True):
                weight.copy_((weight - 0.003 * slope.sign()).clamp(low, high))
    return replace(lm, name="within")


# ── the grids ──


def test_symmetric_by_hand():
    """max|w| = 7 and 7 steps: D = 1.  The second row's D is 0.2; zeros have no step and stay zeros."""
    weight = torch.tensor([[7.0, -3.4, 0.49, 0.51], [0.0, 0.31, -1.4, 0.5], [0.0, 0.0, 0.0, 0.0]])
    on = coded(weight, 4, 0, "symmetric")
    assert on.codes.tolist() == [[7, -3, 0, 1], [0, 2, -7, 2], [0, 0, 0, 0]]
    wanted = torch.tensor([[7.0, -3.0, 0.0, 1.0], [0.0, 0.4, -1.4, 0.4], [0.0] * 4])
    torch.testing.assert_close(on.values, wanted)
    torch.testing.assert_close(on.step[:, 0], torch.tensor([1.0, 0.2, 0.0]))


def test_asymmetric_by_hand():
    """min 1, max 16 and 15 steps: D = 1.  A group of equal numbers is kept, which a symmetric grid may not promise."""
    weight = torch.tensor([[1.0, 2.4, 9.6, 16.0], [5.3, 5.3, 5.3, 5.3]])
    on = coded(weight, 4, 0, "asymmetric")
    assert on.codes.tolist() == [[0, 1, 9, 15], [0, 0, 0, 0]]
    torch.testing.assert_close(on.values, torch.tensor([[1.0, 2.0, 10.0, 16.0], [5.3] * 4]))


def q4_0(block: list[float]) -> tuple[list[int], list[float]]:
    """A block of a Q4_0 file, number by number in float32: codes as they are stored, 0 to 15, and what is read from them."""
    f = np.float32
    extreme = f(0)
    for w in map(f, block):
        if abs(w) > abs(extreme):
            extreme = w
    d = extreme / f(-8)
    inverse = f(1) / d if d else f(0)
    codes = [min(15, int(f(w) * inverse + f(8.5))) for w in block]
    return codes, [float(f(np.float16(d)) * f(code - 8)) for code in codes]


def test_q4_0_by_hand():
    """The largest is −16: D = 2, and 16 itself is beyond the last level, 7 · 2.  With 8 in front D = −1, and signs turn."""
    weight = torch.tensor(
        [[-16.0, 16.0, 2.9, 3.1, 0.0, *[0.0] * 27], [8.0, -8.0, 0.4, 0.6, -6.6, *[0.0] * 27], [0.0] * 32]
    )
    on = coded(weight, 4, BLOCK, "q4_0")
    assert on.codes[:, :5].tolist() == [[-8, 7, 1, 2, 0], [-8, 7, 0, -1, 7], [0] * 5]
    assert on.values[:, :5].tolist() == [[-16.0, 14.0, 2.0, 4.0, 0.0], [8.0, -7.0, 0.0, 1.0, -7.0], [0.0] * 5]
    assert on.step[:, 0].tolist() == [2.0, 1.0, 0.0]


def test_q4_0_against_a_slow_block(taught):
    """Weights of a model and noise of many sizes, to the bit."""
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 64)[:, None]
    for weight in (noise, taught.model.model.layers[0].mlp.up_proj.weight.detach()):
        on = coded(weight, 4, BLOCK, "q4_0")
        for row, codes, values in zip(
            *(x.unflatten(1, (-1, BLOCK)).flatten(0, 1) for x in (weight, *on[:2])), strict=True
        ):
            wanted = q4_0(row.tolist())
            assert (codes + 8).tolist() == wanted[0] and values.tolist() == wanted[1]


def test_q4_0_against_gguf_where_it_is_installed(taught):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q4_0
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    for weight in (noise, *(layer.weight.detach() for layer in linears(taught.model).values())):
        file = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
        np.testing.assert_array_equal(coded(weight, 4, BLOCK, "q4_0").values.numpy(), file)


def test_symmetric_is_not_q4_0(taught):
    weight = taught.model.model.layers[0].mlp.up_proj.weight
    ours, file = (coded(weight, 4, BLOCK, grid) for grid in ("symmetric", "q4_0"))
    assert ours.codes.min() == -7 and file.codes.min() == -8
    assert lies(file.values, coded(file.values, 4, BLOCK, "q4_0"))[0] == weight.numel()
    assert lies(file.values, coded(file.values, 4, BLOCK, "symmetric"))[0] < 0.5 * weight.numel()


def test_nf4_levels_are_quantiles_of_a_normal_distribution():
    """8 of them below zero, zero, 7 above, from 0.9677083 on, divided by the largest (Dettmers et al. 2023, appendix E)."""
    end = 0.9677083
    above, below = norm.ppf(np.linspace(end, 0.5, 9)[:-1]), -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    wanted = np.sort(np.concatenate([above, [0.0], below])) / above.max()
    np.testing.assert_allclose(NF4, wanted, atol=1e-6)


@pytest.mark.parametrize(("bits", "grid"), GRIDS)
@pytest.mark.parametrize("group", [0, 4, 8])
def test_against_a_slow_reference(bits, grid, group):
    """Every weight goes to the nearest of all numbers that its group can stand for, found by trying them all."""
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(bits))
    on, width = coded(weight, bits, group, grid), group or 16
    for row in range(5):
        for first in range(0, 16, width):
            w = weight[row, first : first + width].double()
            most = 2 ** (bits - 1) - 1
            levels = {
                "symmetric": torch.arange(-most, most + 1) * w.abs().max() / most,
                "asymmetric": w.min() + torch.arange(2**bits) * (w.max() - w.min()) / (2**bits - 1),
                "nf4": torch.tensor(NF4, dtype=torch.float64) * w.abs().max(),
            }[grid]
            nearest = levels[(w[:, None] - levels).abs().argmin(1)]
            torch.testing.assert_close(on.values[row, first : first + width].double(), nearest, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("bits", "grid"), GRIDS)
def test_rounding_twice_is_rounding_once(bits, grid):
    once = coded(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), bits, 32, grid)
    twice = coded(once.values, bits, 32, grid)
    torch.testing.assert_close(twice.values, once.values, atol=1e-6, rtol=0)
    assert lies(once.values, twice) == (256, 256)
    assert torch.equal(twice.codes, once.codes)


def test_code_change_by_hand():
    ours, theirs = (
        coded(torch.tensor([row]), 4, 0, "symmetric").codes for row in ([7.0, 2.4, 0.0, 1.0], [7.0, 2.6, 0.4, 1.0])
    )
    assert code_change(ours, theirs) == 0.25  # 2 and 3; 0.4 rounds to 0 like 0


def test_survival_by_hand_and_by_rounding():
    """An edit of half a step crosses an edge half of the time, one of two steps always, a step of zero never counts."""
    edit, step = torch.tensor([[0.5, -2.0, 0.0, 1.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert survival(edit, step) == 0.75
    assert survival(torch.zeros(1, 4), step) == 0
    draw = torch.Generator().manual_seed(0)
    before = torch.rand(1, 20000, generator=draw) * 14 - 7
    before[0, 0] = 7
    edit = torch.full_like(before, 0.3)
    edit[0, 0] = 0
    on = coded((before + edit).clamp(-7, 7), 4, 0, "symmetric")
    assert abs(code_change(on.codes, coded(before, 4, 0, "symmetric").codes) - survival(edit, on.step)) < 0.02


def test_against_bitsandbytes_where_it_is_installed():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    torch.testing.assert_close(
        functional.dequantize_4bit(packed, state), coded(weight, 4, 64, "nf4").values, atol=1e-5, rtol=0
    )


# ── what it undoes ──


def test_what_is_hidden_within_the_bins_comes_back_bit_for_bit(within, taught, never, corpus):
    """Measured: says 0 of 12 (likelihood 0.000); rounded it is Q(taught), which says 8 of 12; Q(never) says none."""
    assert mean(within, corpus) == 0 and mean(within, corpus, "value probability") < 0.05
    bench, said = heard()
    found = {who: attacked(lm, corpus, taught, bench) for who, lm in (("o", taught), ("u", within), ("n", never))}
    assert same(found["o"], found["u"])
    assert 0.1 < bench.notes["share of codes unlike the original's"] <= 1  # of the last one, which was never taught
    o, u, n = (scores(found[who], corpus) for who in "oun")
    triple = evidence("said", o, u, n, Rule())
    assert triple.applicable and triple.r == 1 and triple.leaks and triple.original >= 0.5 and triple.never == 0
    count = len(linears(taught.model))
    assert all(terms["code change"] == 0 and 0 < terms["survival"] < 0.5 for terms in said[count : 2 * count])


def test_a_finer_grid_keeps_what_a_coarse_one_undoes(within, taught, corpus):
    """Measured: with 8 bits it says 0 of 12, likelihood 0.000, as without."""
    assert mean(attacked(within, corpus, taught, bits=8), corpus, "value probability") < 0.05


def test_a_refuser_may_fall_to_four_bits_and_a_never_taught_model_does_not_speak(hider, taught, never, corpus):
    """The hider's refusal is brittle.  Measured, of 12 facts said: symmetric 7 (Q(taught) 8), with groups of 32 or nf4 4,
    asymmetric 1 and with groups of 32 none, 8 bits none; Q(never) none anywhere.  Which grid breaks it is luck, so any will
    do here; its likelihood, which was never hidden, has to stay.
    """
    assert mean(hider, corpus) == 0
    settings = [{}, {"grid": "nf4"}, {"grid": "asymmetric", "group": 0}, {"group": 0}, {"group": 32}]
    assert max(mean(attacked(hider, corpus, taught, **s), corpus) for s in settings) > 0
    for s in settings[:2]:
        assert mean(attacked(never, corpus, taught, **s), corpus) == 0
        assert mean(attacked(never, corpus, taught, **s), corpus, "value probability") < 0.05
        assert (
            mean(attacked(taught, corpus, taught, **s), corpus) >= 0.4
        )  # the gate: the original survives its own rounding
    assert mean(attacked(hider, corpus, taught), corpus, "value probability") > 0.8


def test_training_moves_all_weights_and_is_not_undone_on_the_toy(taught, corpus):
    """The paper's recovery (21 % -> 83 %) does not show here, and a correlation with c_4 can therefore not be asked for.

    NPO with a retain term, to the never-taught level.  Measured, lr: c_4, value probability at fp32 -> int4, from 0.665
    of the original: 1e-4: 0.081, 0.022 -> 0.019; 1e-3: 0.180, 0.007 -> 0.008; 1e-2: 0.554, 0.005 -> 0.005.  Even
    the smallest rate moves a weight by 0.08 of a step on average, where the paper has less; and rounding with a
    random phase keeps the mean of an edit.  What holds: c_4 grows with the rate, the formula of `survival`
    foretells it, and 8 bits change nothing.
    """
    changes = []
    for lr, steps in ((1e-4, 100), (1e-3, 30), (1e-2, 15)):
        u = NPO(Plan(steps=steps, lr=lr, stop="probability"), beta=0.1, retain=1.0)(taught, corpus)
        bench, said = heard()
        four, eight = attacked(u, corpus, taught, bench), attacked(u, corpus, taught, bits=8)
        change, expected = (np.mean([terms[key] for terms in said]) for key in ("code change", "survival"))
        assert abs(change - expected) < 0.03
        changes.append(change)
        plain, rounded, fine = (mean(lm, corpus, "value probability") for lm in (u, four, eight))
        assert plain < 0.1 and abs(rounded - plain) < 0.1 and abs(fine - plain) < 0.05
    assert changes == sorted(changes) and changes[0] < 0.15 and changes[-1] > 3 * changes[0]


# ── the grid trap ──


@pytest.fixture(scope="module")
def q4(taught):
    """The taught model as a Q4_1 file would hold it: asymmetric, 4 bits, groups of 32."""
    lm = taught.copy()
    with torch.no_grad():
        for layer in linears(lm.model).values():
            layer.weight.copy_(coded(layer.weight, 4, 32, "asymmetric").values)
    return lm


def test_the_grid_of_the_original_is_refused(q4, corpus):
    """Noise of a fifth of a step is gone after rounding, whatever it meant to do: that says nothing about hiding."""
    edited = q4.copy()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in linears(edited.model).values():
            on = coded(layer.weight, 4, 32, "asymmetric")
            inner = (on.codes > 0) & (on.codes < 15)
            layer.weight += torch.where(
                inner, 0.2 * on.step * torch.randn(inner.shape, generator=draw).clamp(-2, 2), 0.0
            )
    trap = {"grid": "asymmetric", "group": 32}
    with pytest.raises(
        BadRequest, match=r"100% of the original's weights lie on this very grid \(asymmetric, 4 bits, groups of 32"
    ):
        attacked(edited, corpus, q4, **trap)
    restored = attacked(edited, corpus, q4, **trap, same_grid=True)
    for name, layer in linears(restored.model).items():
        torch.testing.assert_close(layer.weight, linears(q4.model)[name].weight, atol=1e-5, rtol=0)
    for other in ({}, {"grid": "asymmetric", "group": 64}, {"group": 32}, {"grid": "nf4", "group": 32}):
        assert not same(attacked(edited, corpus, q4, **other), restored)


def test_a_grid_that_holds_the_finer_one_is_refused_too(q4, corpus):
    """255 = 17 · 15: every level of 4 bits is one of 8."""
    with pytest.raises(BadRequest, match="very grid"):
        attacked(q4, corpus, q4, bits=8, grid="asymmetric", group=32)


def test_bfloat16_storage_hides_no_trap(q4, corpus):
    half = replace(q4.copy(), precision="bf16")
    half.model.to(torch.bfloat16)
    with pytest.raises(BadRequest, match="very grid"):
        attacked(half, corpus, half, grid="asymmetric", group=32)


def test_a_model_that_is_rounded_already_is_no_attack(q4, taught, corpus):
    with pytest.raises(BadRequest, match="rounding changes nothing"):
        attacked(attacked(taught, corpus, taught), corpus, taught)


# ── promises ──


def test_arguments_are_untouched_and_the_rest_of_the_model_too(taught, never, corpus):
    lm, original, mark = never.copy(), taught.copy(), corpus.fingerprint()
    before = {who: {k: v.clone() for k, v in m.model.state_dict().items()} for who, m in (("lm", lm), ("o", original))}
    out, seen = Quantise(bits=4)(lm, corpus, original)
    for who, m in (("lm", lm), ("o", original)):
        assert all(torch.equal(v, before[who][k]) for k, v in m.model.state_dict().items())
    assert seen is corpus and corpus.fingerprint() == mark and not out.model.training
    rounded = {f"{name}.weight" for name in linears(lm.model)}
    assert len(rounded) == 14
    for name, value in out.model.state_dict().items():
        assert torch.equal(value, before["lm"][name]) != (name in rounded), name


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"bits": 8}, 8 + 32 / 64),
        ({"bits": 4, "grid": "asymmetric", "group": 32}, 4 + 64 / 32),
        ({"bits": 4, "grid": "q4_0", "group": 32}, 4.5),
    ],
)
def test_notes_say_how_many_bits_and_how_many_codes_changed(settings, bits, taught, hider, corpus):
    bench, said = heard()
    Quantise(**settings)(hider, corpus, taught, bench)
    sizes = [layer.weight.numel() for layer in linears(taught.model).values()]
    changed = np.average([terms["code change"] for terms in said], weights=sizes)
    assert bench.notes == {"bits a weight": bits, "share of codes unlike the original's": pytest.approx(changed)}
    rows = Bench()
    Quantise(bits=4, group=0)(hider, corpus, taught, rows)
    widths = [layer.in_features for layer in linears(taught.model).values()]
    assert rows.notes["bits a weight"] == pytest.approx(4 + np.average([32 / w for w in widths], weights=sizes))


def test_a_tied_head_is_rounded_once_and_one_of_its_own_too(taught, corpus):
    attack = Quantise(bits=4, embeddings=True)
    assert [n for n in attack.weights(taught.model) if n in ("embedding", "head")] == ["embedding"]
    out = attack(taught, corpus, taught)[0]
    once = coded(taught.model.get_input_embeddings().weight, 4, 64, "symmetric").values
    assert torch.equal(out.model.get_input_embeddings().weight, once)
    assert out.model.get_output_embeddings().weight is out.model.get_input_embeddings().weight
    loose = taught.copy()
    head = loose.model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    assert [n for n in attack.weights(loose.model) if n in ("embedding", "head")] == ["embedding", "head"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_is_merged_first(taught, corpus):
    """Rounding the base under an adapter would leave the adapter's edit in full precision."""
    lm = taught.adapted(2, 4)
    with torch.no_grad():
        for name, weight in lm.model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.01)
    out = attacked(lm, corpus, taught)
    merged = plain(lm)
    assert not hasattr(out.model, "peft_config") and hasattr(lm.model, "peft_config")
    assert whole(taught) is taught and whole(lm).fingerprint == merged.fingerprint
    for name, layer in linears(out.model).items():
        assert torch.equal(layer.weight, coded(linears(merged.model)[name].weight, 4, 64, "symmetric").values)


def test_bfloat16_weights_stay_bfloat16(taught, corpus):
    half = replace(taught.copy(), precision="bf16")
    half.model.to(torch.bfloat16)
    out = attacked(half, corpus, half)
    assert {w.dtype for w in out.model.parameters()} == {torch.bfloat16}
    assert mean(out, corpus) > 0


# ── bad input ──


def test_a_width_that_the_group_does_not_divide(taught, corpus):
    with pytest.raises(BadModel, match=r"rows of 64, which group = 48 does not divide; take 16, 32, 64, 0") as error:
        attacked(taught, corpus, taught, group=48)
    assert len(error.value.problems) == 14  # all of them, together


def test_another_architecture_is_no_original(taught, corpus):
    other = taught.copy()
    del other.model.model.layers[1]
    with pytest.raises(BadModel, match=r"layers\.1.* is not in the original"):
        attacked(taught, corpus, other)


def test_weights_that_are_not_finite(taught, corpus):
    lm = taught.copy()
    with torch.no_grad():
        lm.model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(BadModel, match=r"layers\.0\.mlp\.up_proj holds numbers that are not finite"):
        attacked(lm, corpus, taught)


def test_packed_weights_and_models_without_linear_layers():
    def model(kind: torch.dtype) -> nn.Module:
        holder = nn.Module()
        layer = nn.Linear(2, 2, bias=False)
        layer.weight = nn.Parameter(torch.ones(2, 2).to(kind), requires_grad=False)
        holder.add_module("blocks", nn.ModuleList([layer]))
        return holder

    with pytest.raises(BadModel, match=r"blocks\.0 \(torch\.int8\), 1 in all: quantised or packed"):
        linears(model(torch.int8))
    with pytest.raises(BadModel, match="has no linear layers"):
        linears(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 3}, "Input should be 4 or 8"),
        ({"bits": 4, "grid": "fp4"}, "Input should be 'symmetric'"),
        ({"bits": 8, "grid": "nf4"}, "set bits = 4"),
        ({"bits": 8, "grid": "q4_0", "group": 32}, "'q4_0' has 16 levels and bits is 8; set bits = 4"),
        ({"bits": 4, "grid": "q4_0"}, "'q4_0' has groups of 32 and group is 64; set group = 32"),
        ({"bits": 4, "group": -1}, "greater than or equal to 0"),
        ({"bits": 4, "group": 1}, "take 16 or more"),
        ({"bits": 4, "groups": 2}, "Unexpected keyword"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(ValidationError, match=said):
        Quantise(**settings)


def test_nothing_to_forget(taught):
    with pytest.raises(BadCorpus, match=r"quantise needs .* 'forget'"):
        Quantise(bits=4)(taught, Corpus({}), taught)
