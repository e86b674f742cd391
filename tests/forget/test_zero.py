"""Zeroing what was located: exactly that, in a copy, in what is saved, and taken back bit for bit."""

import pytest
import torch
from torch import nn

from unremember.errors import BadModel, BadRequest
from unremember.forget.zero import undo, zero
from unremember.loading import load
from unremember.locate.neurons import neurons
from unremember.locate.ranking import sites as opened
from unremember.sites import EVERYWHERE, Sites
from unremember.table import read
from unremember.tokens import pack

DOWN = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
CHOSEN = [(DOWN[0], 3), (DOWN[1], 5), (DOWN[1], 100)]
NORM = "model.norm.weight"


def same(a, b) -> bool:
    """Every bit: torch.equal would call 0 and -0 the same."""
    pairs = zip(a.model.state_dict().items(), b.model.state_dict().items(), strict=True)
    return all(m == n and torch.equal(v.view(torch.int32), w.view(torch.int32)) for (m, v), (n, w) in pairs)


def neurons_of(lm, chosen) -> Sites:
    return opened(chosen, lm.model, "column")


def test_exactly_the_sites_become_zero_and_the_argument_does_not_move(taught):
    lm = taught.copy()
    result, removed = zero(lm, neurons_of(lm, CHOSEN))
    assert same(lm, taught)
    for name, weight in result.model.named_parameters():
        former = lm.model.get_parameter(name)
        changed = (weight != former).any(0) if name in DOWN else (weight != former).any()
        expected = [k for n, k in CHOSEN if n == name]
        assert changed.nonzero().flatten().tolist() == (expected if name in DOWN else [])
        assert not weight[:, expected].any() if name in DOWN else True
    assert torch.equal(removed.values[DOWN[0]], lm.model.get_parameter(DOWN[0])[:, 3])


def test_undo_bit_for_bit(taught):
    lm = taught.copy()
    with torch.no_grad():
        lm.model.get_parameter(DOWN[0])[0, 3] = -0.0
        lm.model.get_parameter(DOWN[0])[1, 3] = float("nan")
    result, removed = zero(lm, neurons_of(lm, CHOSEN))
    assert not same(result, lm) and not result.model.get_parameter(DOWN[0])[:, 3].any()
    back = undo(result, removed)
    assert same(back, lm) and not same(back, result), "in a copy, too"


def test_several_edits_are_undone_the_last_one_first(taught):
    once, first = zero(taught, neurons_of(taught, CHOSEN[:2]))
    twice, second = zero(once, Sites({NORM: None, **neurons_of(taught, CHOSEN[1:]).masks}))
    assert not twice.model.get_parameter(NORM).any()
    assert same(undo(undo(twice, second), first), taught)
    with pytest.raises(BadModel, match="is not zero where the edit left it so; undo what was done"):
        undo(undo(twice, first), second)


def test_nothing_is_no_edit(taught):
    result, removed = zero(taught, Sites({}))
    assert same(result, taught) and not removed.values and same(undo(result, removed), taught)


def test_a_zero_column_is_a_neuron_that_is_silent_at_every_place(taught, corpus):
    """Not a hook that looks at the place of detection alone: all places, generated ones included."""
    result, _ = zero(taught, neurons_of(taught, CHOSEN))
    layers, _ = neurons(taught.model)

    def silence(name):
        silent = [k for n, k in CHOSEN if n == name]

        def hook(_, inputs):
            a = inputs[0].clone()
            a[..., silent] = 0
            return (a,)

        return hook

    tokens = pack([taught.template.rows(corpus["retain"][:4])])
    prompts = [x.prompt for x in corpus["forget"][:3]]
    with torch.no_grad():
        found, said = result.logits(tokens), result.answer(prompts, 8)
        assert not torch.equal(found, taught.logits(tokens))
        hooks = [layer.register_forward_pre_hook(silence(name)) for name, layer in layers.items()]
        torch.testing.assert_close(found, taught.logits(tokens), atol=1e-5, rtol=1e-4)
        assert said == taught.answer(prompts, 8)
        for hook in hooks:
            hook.remove()


def test_where_the_neuron_is_silent_nothing_changes(taught, corpus):
    """Section (g) 4: at a prompt where its activation is exactly zero, the output is the same."""
    lm = taught.copy()
    with torch.no_grad():
        lm.model.model.layers[1].mlp.up_proj.weight[5] = 0  # neuron 5 of block 1 never fires
    result, _ = zero(lm, neurons_of(lm, [(DOWN[1], 5)]))
    assert not same(result, lm)
    tokens = pack([lm.template.rows(corpus["forget"][:4])])
    with torch.no_grad():
        assert torch.equal(result.logits(tokens), lm.logits(tokens))


def test_what_is_saved_is_edited(taught, tmp_path, corpus):
    result, _ = zero(taught, neurons_of(taught, CHOSEN))
    result.save(tmp_path / "model")
    again = load(str(tmp_path / "model"), template="plain", precision="fp32")
    assert same(again, result)
    rows = result.template.rows(corpus["forget"][:3])
    assert [x.total() for x in read(again, rows)] == [x.total() for x in read(result, rows)]


# ── refusals ──


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_is_refused(taught):
    lm = taught.adapted(2, 4)
    name = next(n for n, _ in lm.model.named_parameters() if n.endswith("down_proj.base_layer.weight"))
    with pytest.raises(BadModel, match=r"LoRA adapter.*merge it first"):
        zero(lm, Sites({name: None}))


def test_quantised_weights_are_refused(taught):
    lm = taught.copy()
    layer = lm.model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(BadModel, match=r"down_proj.weight is quantised \(torch.int8\)"):
        zero(lm, Sites({DOWN[0]: None}))


def test_sites_that_are_not_of_this_model_are_refused(taught, tiny):
    with pytest.raises(BadRequest, match="zeroing everywhere leaves no model"):
        zero(taught, EVERYWHERE)
    with pytest.raises(BadRequest, match=r"has no parameter 'model.layers.7.*'; did you mean 'model.layers."):
        zero(taught, Sites({"model.layers.7.mlp.down_proj.weight": None}))
    with pytest.raises(BadRequest, match=r"the mask of .* is \(3, 3\) and the parameter \(64, 128\)"):
        zero(taught, Sites({DOWN[0]: torch.ones(3, 3, dtype=torch.bool)}))
