"""What `make bench` compares with does the same mathematics: the same losses and gradients, scores and words, in fp32."""

import pytest
import torch
from benchmarks.baselines import audit, speak
from benchmarks.baselines.step import step
from benchmarks.demo import Products, table
from benchmarks.stages import LR, RMU_STEP, trained

from unremember.audit import AUDITS
from unremember.audit.prefixes import from_prefixes
from unremember.bench import Bench


@pytest.mark.parametrize("name", ["ascent", "npo", "npo + KL", "rmu"])
def test_a_step_is_ours(name, moved, corpus):
    """AdamW's first step is the sign of the gradient, so that equal gradients are asked for, and not equal weights."""
    few = corpus.with_roles(forget=corpus["forget"][:5], retain=corpus["retain"][:4], replay=())
    ours, theirs = moved.copy(), moved.copy()
    rows = {role: moved.template.rows(few[role]) for role in ("forget", "retain")}
    gradients: dict[str, dict[str, torch.Tensor]] = {"ours": {}, "theirs": {}}
    for who, lm in (("ours", ours), ("theirs", theirs)):
        for n, w in lm.model.named_parameters():
            w.register_post_accumulate_grad_hook(lambda w, n=n, who=who: gradients[who].__setitem__(n, w.grad.clone()))
    loss = trained(ours, name, few)()
    other = step(theirs, name, rows["forget"], rows["retain"], LR, RMU_STEP)()
    assert loss == pytest.approx(other, rel=2e-3, abs=1e-5)
    assert gradients["ours"].keys() == gradients["theirs"].keys() and gradients["ours"]
    for n, g in gradients["ours"].items():
        size = float(g.norm())
        assert float((g - gradients["theirs"][n]).norm()) <= 2e-2 * size + 1e-6, n


@pytest.mark.parametrize("name", list(audit.METRICS))
def test_a_score_is_ours(name, moved, corpus):
    ours = AUDITS[name](moved, corpus, Bench()).per_example
    theirs = audit.METRICS[name](moved, corpus)
    assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-4) and len(ours) > 5


def test_the_words_are_ours(taught, corpus):
    prompts = [taught.template.context(x.prompt) for x in corpus.of("forget", "holdout", "world")]
    assert speak.answers(taught, prompts, 12, 5) == taught.generate(prompts, 12)


def test_so_are_those_behind_every_prefix(taught, corpus):
    texts = [taught.template.row(x.id, "", x.answer).ids[:-1] for x in corpus["forget"][:4]]
    cuts = [range(1, len(ids) - 2) for ids in texts]
    assert speak.from_prefixes(taught, texts, 3) == from_prefixes(taught, texts, cuts, Bench())


def test_products_are_counted_both_ways():
    """Forward one product of 2 · 5 · 7 · 3 operations; backward one for the weights, and one for an input that has a gradient."""
    w = torch.randn(7, 3, requires_grad=True)
    with Products() as counter:
        (torch.randn(5, 7) @ w).sum().backward()
        assert counter.flops == 2 * 210
        (torch.randn(5, 7, requires_grad=True) @ w).exp().sum().backward()
        assert counter.flops == 5 * 210
        with torch.inference_mode():  # where a whole `linear` comes, and no product by name
            torch.nn.functional.linear(torch.randn(2, 5, 7), w.t())
    assert counter.flops == 7 * 210


def test_the_share_of_the_peak_by_hand():
    """10 s, of which 2 TFLOP take 4 at half a TFLOP a second; and a stage without products."""
    rows = table({"teach": [10.0, 2 * 10**12], "report": [10.0, 0]}, 5e11).splitlines()[2:]
    assert rows == ["| teach | 10.0 | 2.0 | 40% |", "| report | 10.0 | 0.0 | 0% |", "| all | 20.0 | 2.0 | 20% |"]
