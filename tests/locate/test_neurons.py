"""Where the neurons of an architecture are, and which models have none that could be switched off."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from unremember.errors import BadModel
from unremember.locate.neurons import neurons, norms

SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
MADE = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL, intermediate_size=12)),
    "gpt-2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2, n_inner=12)
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=12)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=12, word_embed_proj_dim=8)),
}
BIASES = {"bert": "output.dense.bias", "gpt-2": "mlp.c_proj.bias", "gpt-neox": "4h_to_h.bias", "opt": "fc2.bias"}


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_zero_unit_is_a_zero_activation(name):
    """What the editor does to the weight and what silence of the neuron does to the output are one and the same."""
    torch.manual_seed(0)
    model = MADE[name]().eval()
    layers, unit = neurons(model)
    assert len(layers) == 2 and unit == ("row" if name == "gpt-2" else "column")
    weights = dict(model.named_parameters())
    for parameter, layer in layers.items():
        assert weights[parameter] is layer.weight and parameter.replace("weight", "bias").endswith(BIASES[name])
        assert layer.weight.shape[1 if unit == "column" else 0] == 12
        nn.init.normal_(layer.bias)
        seen = []
        hook = layer.register_forward_hook(lambda _, inputs, out, seen=seen: seen.append((inputs[0], out)))
        with torch.no_grad():
            kept = layer.weight.clone()
            if unit == "column":
                layer.weight[:, 3] = 0
            else:
                layer.weight[3] = 0
            model(input_ids=torch.arange(6)[None])
            layer.weight.copy_(kept)
            a, out = seen[0]
            a = a.clone()
            a[..., 3] = 0
            torch.testing.assert_close(layer(a), out)
        hook.remove()


def test_neurons_of_the_toy_in_block_order(tiny):
    layers, unit = neurons(tiny.model)
    assert list(layers) == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)] and unit == "column"


def test_norms_by_hand():
    weight = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, -1.0]])  # two outputs, three neurons
    assert norms(weight, "column").tolist() == pytest.approx([5, 0, 2**0.5])
    assert norms(weight.T, "row").tolist() == pytest.approx([5, 0, 2**0.5])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_is_refused(tiny):
    with pytest.raises(BadModel, match=r"carries a LoRA adapter.*merge"):
        neurons(tiny.adapted(2, 4).model)


def test_an_architecture_without_an_mlp_is_told_so():
    model = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, state_size=4))
    with pytest.raises(BadModel, match=r"block 0 \(MambaBlock\) has none of mlp.down_proj"):
        neurons(model)
    with pytest.raises(BadModel, match="has no blocks"):
        neurons(nn.Linear(2, 2))


def test_quantised_and_shared_maps_are_refused(tiny):
    lm = tiny.copy()
    layer = lm.model.model.layers[1].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(BadModel, match=r"down_proj of block 1 is quantised or wrapped \(Linear, torch.int8\)"):
        neurons(lm.model)
    layer.weight = lm.model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(BadModel, match="blocks share the weight"):
        neurons(lm.model)
