"""Gradient and weight times gradient: by hand, against one row at a time, and as the first term of what zeroing does."""

import pytest
import torch
from pydantic import ValidationError

from unremember.errors import BadCorpus, BadRequest
from unremember.locate.gradients import Gradients, score
from unremember.locate.neurons import neurons
from unremember.table import read

DOWN = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
PARTS = ["span", "answer"]


def test_the_scores_by_hand():
    weight, slope = torch.tensor([[1.0, 2.0], [3.0, -4.0]]), torch.tensor([[3.0, 1.0], [4.0, 2.0]])
    assert score(weight, slope, "gradient", "column").tolist() == pytest.approx([5, 5**0.5])
    assert score(weight, slope, "gradient", "row").tolist() == pytest.approx([10**0.5, 20**0.5])
    assert score(weight, slope, "gradient", "tensor").tolist() == pytest.approx([30**0.5])
    assert score(weight, slope, "weight", "column").tolist() == [15, -6]
    assert score(weight, slope, "weight", "row").tolist() == [5, 4]
    assert score(weight, slope, "weight", "tensor").tolist() == [9]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("unit", ["row", "column", "tensor"])
def test_it_equals_one_row_at_a_time(taught, corpus, slow_nll, part, unit):
    examples = corpus["forget"][:3]
    lm = taught.copy()
    for row in lm.template.rows(examples):
        nll = slow_nll(lm, row)
        (-nll[torch.tensor(row.span)] if part == "span" else -nll).sum().backward()
    weights = dict(lm.model.named_parameters())
    for kind in ("gradient", "weight"):
        found = Gradients(kind, unit, part)(taught, corpus.with_roles(forget=examples))
        assert set(found.scores) == {n for n, w in weights.items() if ".layers." in n and w.dim() == 2}
        for name, scores in found.scores.items():
            w, g = weights[name].detach(), weights[name].grad
            each = {
                "row": list(zip(w, g, strict=True)),
                "column": list(zip(w.T, g.T, strict=True)),
                "tensor": [(w, g)],
            }[unit]
            expected = [float(b.norm() if kind == "gradient" else (a * b).sum()) for a, b in each]
            torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-4, rtol=1e-3)


def test_a_neuron_is_its_activation_times_gradient(taught, corpus):
    """Σ_i W_ik ∂F/∂W_ik = Σ_t a_k(t) ∂F/∂a_k(t): the same number by another way, over all places."""
    [x] = corpus["forget"][:1]
    found = Gradients("weight")(taught, corpus.with_roles(forget=[x]))
    assert list(found.scores) == DOWN and found.unit == "column"
    [row] = taught.template.rows([x])
    lm = taught.copy()
    for name, layer in neurons(lm.model)[0].items():
        seen = []

        def keep(_, inputs, seen=seen):
            seen.append(inputs[0].detach().requires_grad_())
            return (seen[0],)

        hook = layer.register_forward_pre_hook(keep)
        logp = lm.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        hook.remove()
        spots = [row.start + i for i, inside in enumerate(row.span) if inside]
        [slope] = torch.autograd.grad(sum(logp[at - 1, row.ids[at]] for at in spots), seen[0])
        torch.testing.assert_close(found.scores[name], (seen[0] * slope).sum((0, 1)), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("unit", ["neuron", "row"])
def test_it_says_to_first_order_what_a_smaller_unit_does(taught, corpus, unit):
    """Shrinking a unit by a hundredth takes a hundredth of its score from log P; the score has the sign of the effect."""
    found = Gradients("weight", unit)(taught, corpus)

    def total(lm) -> float:
        return sum(x.total("span") for x in read(lm, lm.template.rows(corpus["forget"])))

    best, before = found.best(100_000), total(taught)
    for name, index in (*best[:2], *best[-2:]):
        lm = taught.copy()
        with torch.no_grad():
            weight = lm.model.get_parameter(name)
            (weight.T if unit == "neuron" else weight)[index].mul_(0.99)
        assert 100 * (before - total(lm)) == pytest.approx(float(found.scores[name][index]), rel=0.15)
    assert found.scores[best[0][0]][best[0][1]] > 0 > found.scores[best[-1][0]][best[-1][1]]


def test_only_what_is_named_is_ranked(taught, corpus):
    found = Gradients("gradient", "row", among=("*.layers.1.mlp.*", "*.norm.weight"))(taught, corpus)
    assert set(found.scores) == {f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert list(Gradients("gradient", among=("*.layers.1.*",))(taught, corpus).scores) == DOWN[1:]


def test_a_small_budget_of_places_changes_nothing(taught, corpus):
    from unremember.bench import Bench

    whole, cut = (Gradients("weight")(taught, corpus, Bench(budget=b)) for b in (4096, 64))
    for name, scores in whole.scores.items():
        torch.testing.assert_close(cut.scores[name], scores, atol=1e-4, rtol=1e-3)


def test_the_argument_is_untouched(taught, corpus):
    lm = taught.copy()
    Gradients("gradient", "column")(lm, corpus)
    assert all(torch.equal(a, b) for a, b in zip(lm.model.parameters(), taught.model.parameters(), strict=True))
    assert all(w.requires_grad and w.grad is None for w in lm.model.parameters())


def test_bad_requests_are_refused(taught, corpus):
    with pytest.raises(BadCorpus, match="needs examples in the role 'forget'"):
        Gradients("weight")(taught, corpus.with_roles(forget=()))
    with pytest.raises(BadRequest, match="matches no parameter"):
        Gradients("weight", "row", among=("*.layers.9.*",))(taught, corpus)
    with pytest.raises(BadRequest, match="leads to no parameter that has a neuron to rank"):
        Gradients("weight", among=("*.gate_proj.*",))(taught, corpus)
    with pytest.raises(ValidationError):
        Gradients("hessian")
