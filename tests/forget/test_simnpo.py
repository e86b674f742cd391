"""SimNPO: the loss by hand, weights that depend on how well an answer is known, lengths that count what is scored."""

import math

import numpy as np
import pytest
import torch

from unremember.corpus import Example
from unremember.forget.ascent import Ascent
from unremember.forget.simnpo import SimNPO, simnpo_loss
from unremember.table import read
from unremember.tokens import lanes, pack
from unremember.train import Plan

PLAN = Plan(steps=1, lr=1e-3)
SHORT = Example("short", "Who?", "The cat.")
LONG = Example("long", "Who?", "The cat sat on the table in the kitchen and looked at the rain.")


def forget(rows):
    return pack(lanes(rows, 256), "forget")


# ── the pure function ──


def test_the_loss_by_hand():
    # a mean of log 3 a token: sigmoid(log 3) = 3/4, and with gamma = log 3 sigmoid(0) = 1/2
    nll, length = torch.tensor([4 * math.log(3)]), torch.tensor([4.0])
    torch.testing.assert_close(simnpo_loss(nll, length, 1.0), torch.tensor([2 * math.log(4 / 3)]))
    torch.testing.assert_close(simnpo_loss(nll, length, 1.0, math.log(3)), torch.tensor([2 * math.log(2)]))
    torch.testing.assert_close(simnpo_loss(nll, length, 2.0), torch.tensor([math.log(10 / 9)]))


def test_gamma_stands_inside_beta():
    # beta (u - gamma) = 2.5 (1.0 - 0.2) = 2, not 2.5 * 1.0 - 0.2
    found = simnpo_loss(torch.tensor([3.0]), torch.tensor([3.0]), 2.5, 0.2).item()
    assert found == pytest.approx(2 / 2.5 * math.log(1 + math.exp(-2)), rel=1e-5)


def test_its_slope_is_the_weight_of_its_mean_probability():
    nll, length = torch.tensor([0.0, 4 * math.log(10), 6.0], requires_grad=True), torch.tensor([3.0, 4.0, 2.0])
    [slope] = torch.autograd.grad(simnpo_loss(nll, length, 2.5).sum(), nll)
    weight = []
    for total, tokens in zip(nll.tolist(), length.tolist(), strict=True):
        known = math.exp(-total / tokens) ** 2.5
        weight.append(2 * known / (1 + known))
    assert weight[0] == 1 and weight[1] == pytest.approx(0.006, abs=5e-4)  # the numbers of the specification
    torch.testing.assert_close(slope, -torch.tensor(weight) / length)


# ── on a model ──


def test_lengths_count_what_is_scored(tiny, corpus, slow_nll):
    """A passage has nothing to predict its first token from: it is neither scored nor counted."""
    known = (corpus["world"][0], corpus["world"][1], corpus["prose"][0])
    pools, objective = SimNPO(PLAN, beta=2.5).terms(tiny, corpus.with_roles(forget=known, world=(), prose=()))
    whole = [len(tiny.tokenizer(x.answer).input_ids) for x in known]
    with torch.no_grad():
        nll = [slow_nll(tiny, row) for row in pools["forget"]]
        found = objective(tiny, forget(pools["forget"]))
    assert [len(x) for x in nll] == [whole[0], whole[1], whole[2] - 1]
    u = torch.stack([x.mean() for x in nll])
    expected = (2 / 2.5 * torch.log(1 + torch.exp(-2.5 * u))).mean().item()
    assert set(found) == {"simnpo"} and found["simnpo"].item() == pytest.approx(expected, rel=1e-4)


def test_the_loss_starts_where_the_mean_probability_says(taught, corpus):
    pools, objective = SimNPO(PLAN, beta=2.5, forget=0.5).terms(taught, corpus)
    known = np.array([x.likelihood() for x in read(taught, pools["forget"])])
    start = objective(taught, forget(pools["forget"]))["simnpo"].item()
    assert start == pytest.approx(0.5 * np.mean(2 / 2.5 * np.log(1 + known**2.5)), rel=1e-4)


def test_length_does_not_weigh_but_certainty_does(taught, corpus):
    """Gradient with respect to what each token is worth: equal for equal mean probabilities, whatever the length."""
    pools, objective = SimNPO(PLAN, beta=2.5).terms(taught, corpus.with_roles(forget=(SHORT, LONG)))
    tokens = forget(pools["forget"])
    value = torch.full((len(tokens.row),), -0.7, requires_grad=True)

    class Fixed:
        def logp(self, tokens):
            return value

    [slope] = torch.autograd.grad(objective(Fixed(), tokens)["simnpo"], value)
    rows = tokens.per_row(slope, "answer")
    torch.testing.assert_close(rows[0], rows[1])
    assert rows[0] > 0 and not tokens.per_row(slope, "train").sub(rows).any()  # the end mark is left alone


def nll(lm, corpus, role: str) -> float:
    return -np.mean([x.loglikelihood() for x in read(lm, lm.template.rows(corpus[role]))])


def test_its_pace_does_not_grow(taught, corpus):
    """Known answers go as fast as under ascent and unknown ones slowly: the increments shrink at last."""
    levels = {}
    for name, method in (("simnpo", lambda plan: SimNPO(plan, beta=2.5, retain=0.0)), ("ascent", Ascent)):
        path = [nll(taught, corpus, "forget")]
        path += [nll(method(Plan(steps=steps, lr=1e-3))(taught, corpus), corpus, "forget") for steps in (6, 12, 18)]
        levels[name] = np.diff(path)
    assert levels["simnpo"][0] > 0 and levels["simnpo"][-1] <= 0.5 * levels["simnpo"].max()
    assert levels["ascent"][-1] > 2 * levels["simnpo"][-1]


@pytest.mark.parametrize("keep", [{"retain": 1.0}, {"retain": 0.0, "kl": 1.0}])
def test_what_is_kept_stays_nearer(taught, corpus, keep):
    plan = Plan(steps=12, lr=1e-3)
    bare, kept = SimNPO(plan, beta=2.5, retain=0.0)(taught, corpus), SimNPO(plan, beta=2.5, **keep)(taught, corpus)
    start = nll(taught, corpus, "retain")
    assert nll(kept, corpus, "retain") - start < 0.5 * (nll(bare, corpus, "retain") - start)
    assert nll(kept, corpus, "forget") > 5 * nll(taught, corpus, "forget")
