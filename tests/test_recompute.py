"""Activation checkpointing: the same gradients, from less that is kept."""

from dataclasses import replace

import pytest
import torch

from unremember.bench import BENCH, Bench
from unremember.lm import LM
from unremember.recompute import recomputed
from unremember.team import blocks
from unremember.train import Plan, backward, batch, train

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks for it


def objective(lm, tokens):
    return {"nll": tokens.per_row(-lm.logp(tokens), "answer").sum() / tokens.step_tokens["answer"]}


def rows(lm: LM, corpus):
    return {"forget": lm.template.rows(corpus["forget"][:6])}


def gradients(lm: LM, corpus, wanted: bool, budget: int = 64) -> tuple[dict[str, torch.Tensor], int, int]:
    """Gradients of a step in several passes, bytes of activations that autograd was seen to keep, how often blocks ran."""
    fresh, kept, ran = lm.copy(), 0, 0
    words = lm.model.config.vocab_size

    def keep(x):
        nonlocal kept
        body = x.ndim >= 3 and x.shape[-1] != words  # neither weights nor logits
        kept += x.numel() * x.element_size() * body
        return x

    def run(*_):
        nonlocal ran
        ran += 1

    for block in blocks(fresh.model):
        block.mlp.register_forward_pre_hook(run)
    micros = batch(rows(fresh, corpus), Plan(steps=1, lr=1e-3), 0, budget)
    assert len(micros) > 1
    with recomputed(fresh.model, wanted), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        backward(fresh, objective, micros, budget)
    return {n: w.grad for n, w in fresh.model.named_parameters() if w.grad is not None}, kept, ran


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_the_same_and_little_is_kept(taught, corpus, precision):
    lm = replace(taught, precision=precision)
    plain, much, once = gradients(lm, corpus, False)
    again, little, twice = gradients(lm, corpus, True)
    assert set(plain) == set(again) and all(torch.equal(w, again[name]) for name, w in plain.items())
    assert twice == 2 * once and little < 0.3 * much, little / much


def test_an_adapter_too(taught, corpus):
    torch.manual_seed(0)
    lm = taught.adapted(2, 4)
    plain, *_ = gradients(lm, corpus, False)
    again, *_ = gradients(lm, corpus, True)
    assert plain and set(plain) == set(again) and all(torch.equal(w, again[name]) for name, w in plain.items())


def test_training_ends_with_the_same_weights_and_no_trace(taught, corpus):
    plan = Plan(steps=3, lr=1e-3, batch=4)
    plain = train(taught, objective, rows(taught, corpus), plan)
    again = train(taught, objective, rows(taught, corpus), plan, bench=Bench(recompute=True))
    names = dict(again.model.named_parameters())
    assert all(torch.equal(w, names[n]) for n, w in plain.model.named_parameters())
    assert not any("forward" in vars(x) for lm in (taught, again) for x in blocks(lm.model))
    assert not BENCH.recompute


def test_a_failure_inside_leaves_no_trace(taught):
    with pytest.raises(KeyError), recomputed(taught.model):
        raise KeyError
    assert not any("forward" in vars(x) for x in blocks(taught.model))
