"""Direct logit attribution: what adds up to the logit, part by part, and what it cannot see."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from planted import INDOORS, LOOKUP, planted
from unremember.errors import BadModel
from unremember.locate.anatomy import components, watched
from unremember.locate.attribution import attribute, contributions, gain_and_scale
from unremember.tokens import pack


@pytest.fixture(scope="module")
def circuit(tiny):
    return planted(tiny)


def test_contributions_by_hand():
    parts = torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]])  # two parts, one token, two dimensions
    found = contributions(parts, torch.tensor([2.0, 1.0]), torch.tensor([0.5]), torch.tensor([[1.0, 10.0]]))
    assert found.tolist() == [[0.5 * (2 * 1 + 1 * 2 * 10)], [0.5 * (2 * 3 - 10)]]


@pytest.mark.parametrize("against", ["nothing", "mean"])
def test_they_add_up_to_the_logit(taught, circuit, corpus, against):
    for lm, examples in ((taught, corpus["forget"]), (circuit[0], circuit[1]["forget"])):
        for row in lm.template.rows(examples)[:4]:
            found = attribute(lm, row, against)
            torch.testing.assert_close(found.total(), found.logit, atol=1e-4, rtol=0)
            with torch.no_grad():
                logits = lm.model(torch.tensor([row.ids])).logits[0]
            places = [row.start + i for i, hit in enumerate(row.span) if hit]
            less = logits.mean(-1) if against == "mean" else torch.zeros(len(logits))
            slow = torch.stack([logits[p - 1, row.ids[p]] - less[p - 1] for p in places])
            torch.testing.assert_close(found.logit.float(), slow, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_each_is_what_its_absence_takes_away_while_the_scale_stands_still(taught, corpus):
    [row] = taught.template.rows(corpus["forget"][:1])
    found, parts = attribute(taught, row), components(taught.model)
    sites = [("model.layers.1", "out"), *(x.output for x in parts)]
    tokens = pack([[row]])
    with watched(taught.model, sites) as seen:
        taught.logits(tokens)
    at, target = tokens.source[tokens.span], tokens.target[tokens.span]
    final = seen[sites[0]][0, at]
    eps = taught.model.model.norm.variance_epsilon
    scale = (final.square().mean(-1, keepdim=True) + eps).rsqrt()
    gain, head = taught.model.model.norm.weight, taught.model.lm_head.weight

    def logit(hidden):
        return ((hidden * scale * gain) @ head.T).gather(1, target[:, None])[:, 0]

    for x in parts:
        without = logit(final) - logit(final - seen[x.output][0, at])
        torch.testing.assert_close(found.parts[x].float(), without, atol=1e-4, rtol=1e-4)


def test_it_sees_who_writes_and_not_who_knows(circuit):
    """The lookup works through the head that carries its answer out: its own part is nothing, and patching knows better."""
    lm, corpus = circuit
    for row in lm.template.rows(corpus["forget"]):
        found = attribute(lm, row, "mean")
        by = {(x.block, x.kind): float(v[0]) for x, v in found.parts.items()}
        assert max(by, key=by.get) == (INDOORS, "attention")
        assert by[INDOORS, "attention"] > 0.8 * float(found.logit[0])
        assert abs(by[LOOKUP, "mlp"]) < 0.02 * float(found.logit[0])


def test_against_the_mean_what_raises_all_logits_counts_nothing(taught, corpus):
    lm = taught.copy()
    head = nn.Linear(64, len(lm.tokenizer), bias=True)
    with torch.no_grad():
        head.weight.copy_(lm.model.lm_head.weight + 1.0)  # one direction of the stream now raises every logit alike
        head.bias.copy_(torch.linspace(-1, 1, len(lm.tokenizer)))
    lm.model.set_output_embeddings(head)
    [row] = lm.template.rows(corpus["forget"][:1])
    raw, mean, old = attribute(lm, row), attribute(lm, row, "mean"), attribute(taught, row, "mean")
    for found in (raw, mean):  # a head's bias is a part, too
        torch.testing.assert_close(found.total(), found.logit, atol=1e-4, rtol=0)
        assert found.bias.abs().max() > 0
    for x, values in mean.parts.items():
        torch.testing.assert_close(values, old.parts[x], atol=1e-4, rtol=1e-3)
        assert not torch.allclose(raw.parts[x], values, atol=1e-2)


def test_precision_of_the_matrices_changes_nothing_and_nothing_stays(taught, corpus):
    [row] = taught.template.rows(corpus["forget"][:1])
    a, b = attribute(taught, row), attribute(replace(taught, precision="bf16"), row)
    assert torch.equal(a.total(), b.total())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in taught.model.modules())
    assert all(w.grad is None for w in taught.model.parameters())


# ── refusals ──


class OnePlus(nn.Module):
    """Gemma's norm: the gain is one plus the weight."""

    eps = 1e-6
    weight = torch.tensor([0.5, -0.2, 0.0])

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)


def test_the_gain_is_measured_and_not_read_off_a_weight():
    hidden = torch.tensor([[1.0, 2.0, -2.0], [4.0, 0.0, 3.0]])
    gain, scale = gain_and_scale(OnePlus(), hidden)
    torch.testing.assert_close(gain, torch.tensor([1.5, 0.8, 1.0]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(scale, torch.tensor([3**-0.5, (3 / 25) ** 0.5]).double(), atol=1e-6, rtol=0)


def test_another_norm_is_refused():
    with pytest.raises(BadModel, match="LayerNorm is no root-mean-square norm"):
        gain_and_scale(nn.LayerNorm(4), torch.randn(3, 4))


def test_parts_that_do_not_add_up_are_refused(tiny, corpus):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tiny.tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=None, attn_implementation="eager", pad_token_id=0,
    )  # fmt: skip
    lm = replace(tiny, model=Gemma2ForCausalLM(config).eval(), name="normed twice")
    [row] = tiny.template.rows(corpus["forget"][:1])
    with pytest.raises(BadModel, match="normed twice: embedding, attentions and MLPs add up to a stream that is"):
        attribute(lm, row)
