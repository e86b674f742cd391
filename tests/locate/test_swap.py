"""Residual use: damage at a known place, both directions against plain forward passes, and pairs that cannot be compared."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadModel
from unremember.locate.subject import facts
from unremember.locate.swap import ResidualUse, Use, levels


def damaged(lm, block: int):
    """A copy in which one block's MLP is gone."""
    other = lm.copy()
    with torch.no_grad():
        other.model.model.layers[block].mlp.down_proj.weight.zero_()
    return replace(other, name=f"damaged {block}")


@pytest.mark.parametrize(("block", "into"), [(0, (0.0, 1.0, 1.0)), (1, (0.0, 0.0, 1.0))])
def test_the_damage_is_where_the_stream_begins_to_help(taught, corpus, block, into):
    """Before the damaged block both streams are the same; behind it the original's has all that is needed."""
    use = ResidualUse(facts=0)(taught, damaged(taught, block), corpus)
    assert use.into == pytest.approx(into, abs=1e-4)
    assert use.onset == block + 1
    assert use.back[: block + 1] == pytest.approx((0.0,) * (block + 1), abs=1e-4), "as good as its own"
    assert use.back[-1] == pytest.approx(1.0, abs=1e-4) and use.kept[-1] == pytest.approx(0.0, abs=1e-4)
    assert use.keys == tuple(sorted(use.keys, key=use.keys.index)) and len(use.gap) == len(corpus["forget"])


def test_hidden_at_the_end_is_not_removed(taught, corpus):
    """Late damage: the stream of the unlearned model, read by the original's upper blocks, still tells everything."""
    late, early = (ResidualUse(facts=0)(taught, damaged(taught, block), corpus) for block in (1, 0))
    assert late.kept[1] > 0.99 and early.kept[1] < 0.9
    assert late.onset == 2 > early.onset == 1


def test_both_directions_against_plain_forward_passes(taught, moved, corpus):
    """A fact at a time, hooks of this test's own, no packing; every weight of one of the two was moved."""
    made = ResidualUse(facts=4, seed=1)(taught, moved, corpus)
    every = {f.row.key: f for f in facts(taught, corpus["forget"])}

    @torch.no_grad()
    def odds(lm, fact, level=None, value=None):
        module = lm.model.get_submodule(levels(lm)[level or 0][0])
        kept = []

        def hook(_, __, output):
            plain = output[0] if isinstance(output, tuple) else output
            kept.append(plain.clone())
            if value is None:
                return None
            return (value, *output[1:]) if isinstance(output, tuple) else value

        handle = module.register_forward_hook(hook)
        logp = lm.model(input_ids=torch.tensor([fact.row.ids[:-1]])).logits[0].double().log_softmax(-1)
        handle.remove()
        spots = [fact.row.start + i for i, hit in enumerate(fact.row.span) if hit]
        p = torch.stack([logp[s - 1, fact.row.ids[s]] for s in spots]).exp()
        return float((p / (1 - p)).log().sum()), kept[0]

    for at, key in enumerate(made.keys):
        fact = every[key]
        whole, least = odds(taught, fact)[0], odds(moved, fact)[0]
        assert made.gap[at] == pytest.approx(whole - least, abs=2e-3)
        for level in range(3):
            into = odds(moved, fact, level, odds(taught, fact, level)[1])[0] - least
            back = whole - odds(taught, fact, level, odds(moved, fact, level)[1])[0]
            assert made.gains_into[level, at] == pytest.approx(into, abs=5e-3)
            assert made.gains_back[level, at] == pytest.approx(back, abs=5e-3)


def test_numbers_by_hand():
    use = Use(np.array([[0.0, 1.0], [3.0, 1.0]]), np.array([[1.0, 1.0], [4.0, 4.0]]), np.array([4.0, 4.0]), ("a", "b"))
    assert use.into == (0.125, 0.5) and use.back == (0.25, 1.0) and use.kept == (0.75, 0.0) and use.onset == 1
    assert use.interval(use.gains_into) == [(0.0, 0.25), (0.25, 0.75)]
    never = Use(use.gains_into * 0, use.gains_back, use.gap, use.keys)
    assert never.onset is None


def test_a_dip_moves_the_onset():
    """Half at once, then nothing, then all: the stream is needed from the last level on."""
    use = Use(np.array([[0.6], [0.1], [0.9]]), np.zeros((3, 1)), np.ones(1), ("a",))
    assert use.onset == 2


def test_neither_batches_nor_the_weights_matter(taught, moved, corpus):
    before = [{n: w.clone() for n, w in lm.model.named_parameters()} for lm in (taught, moved)]
    a, b = (ResidualUse()(taught, moved, corpus, Bench(budget=budget)) for budget in (2048, 64))
    assert a.into == pytest.approx(b.into, abs=1e-3) and a.back == pytest.approx(b.back, abs=1e-3)
    for lm, kept in zip((taught, moved), before, strict=True):
        assert all(torch.equal(w, kept[n]) for n, w in lm.model.named_parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_bf16_is_read_in_fp32(taught, corpus):
    lower = replace(taught, precision="bf16")
    a, b = (ResidualUse(facts=3)(lm, damaged(lm, 1), corpus) for lm in (taught, lower))
    assert a.into == pytest.approx(b.into, abs=1e-6)


def test_what_has_forgotten_nothing_is_refused(taught, corpus):
    with pytest.raises(BadModel, match=r"unlearning took 0\.00 nats of log-odds"):
        ResidualUse()(taught, taught.copy(), corpus)
    with pytest.raises(BadModel, match="unlearning took -"):
        ResidualUse()(damaged(taught, 1), taught, corpus)


def test_models_that_are_not_alike_are_refused_together(taught, corpus):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(taught.tokenizer), hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        bos_token_id=None, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    other = replace(taught, model=LlamaForCausalLM(config).train(), name="other")
    with pytest.raises(BadModel) as raised:
        ResidualUse()(taught, other, corpus)
    text = "\n".join(raised.value.problems)
    assert "blocks 2 and the unlearned model 3" in text and "dimensions 64 and the unlearned model 32" in text
    assert "other is in training mode" in text and len(raised.value.problems) == 3
    with pytest.raises(BadCorpus, match="needs examples in the role 'forget'"):
        ResidualUse()(taught, damaged(taught, 0), Corpus({"retain": corpus["retain"]}))
    for wrong in ({"facts": -1}, {"seed": -1}):
        with pytest.raises(ValidationError):
            ResidualUse(**wrong)
