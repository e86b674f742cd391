"""NPO: the loss by hand, its gradient as weighted ascent, a frozen reference, and the brake."""

import math

import numpy as np
import pytest
import torch

from unremember.corpus import Example
from unremember.forget.ascent import Ascent
from unremember.forget.npo import NPO, npo_loss
from unremember.table import read
from unremember.tokens import lanes, pack
from unremember.train import Plan

PLAN = Plan(steps=1, lr=1e-3)
SHORT = Example("short", "Who?", "The cat.")
LONG = Example("long", "Who?", "The cat sat on the table in the kitchen and looked at the rain.")


def forget(rows):
    return pack(lanes(rows, 256), "forget")


def gradient(lm, loss) -> torch.Tensor:
    lm.model.zero_grad()
    grads = torch.autograd.grad(loss, list(lm.model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), 0).item()


# ── the pure function ──


def test_the_loss_by_hand():
    found = npo_loss(torch.tensor([3.0, 3.0 + math.log(3), 3.0 - math.log(3)]), torch.full((3,), 3.0), beta=1.0)
    # sigmoid of 0, log 3 and -log 3 is 1/2, 3/4 and 1/4
    torch.testing.assert_close(found, 2 * torch.tensor([math.log(2), math.log(4 / 3), math.log(4)]))
    half = npo_loss(torch.tensor([3.0 + 2 * math.log(3)]), torch.tensor([3.0]), beta=0.5)
    torch.testing.assert_close(half, torch.tensor([4 * math.log(4 / 3)]))


def test_its_slope_is_the_weight():
    nll = torch.tensor([1.0, 5.0, 40.0], requires_grad=True)
    [slope] = torch.autograd.grad(npo_loss(nll, torch.tensor([1.0, 3.0, 0.0]), 0.1).sum(), nll)
    # -2 / (1 + exp(beta * gap)): -1 where nothing has moved, towards 0 where much has
    torch.testing.assert_close(slope, torch.tensor([-1.0, -2 / (1 + math.exp(0.2)), -2 / (1 + math.exp(4))]))


def test_it_stays_finite_far_away():
    found = npo_loss(torch.tensor([1e6, 0.0]), torch.tensor([0.0, 1e6]), 4.5)
    torch.testing.assert_close(found, torch.tensor([0.0, 2e6]))


# ── on a model ──


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_the_loss_starts_at_its_known_value(taught, corpus, beta):
    pools, objective = NPO(PLAN, beta=beta).terms(taught, corpus)
    start = objective(taught, forget(pools["forget"]))["npo"].item()
    assert start == pytest.approx(2 / beta * math.log(2), rel=1e-4)


def test_answers_count_by_their_sum_and_the_reference_is_frozen(taught, moved, corpus, slow_nll):
    pools, objective = NPO(PLAN, beta=0.3).terms(taught, corpus.with_roles(forget=(SHORT, LONG)))
    with torch.no_grad():
        before = torch.stack([slow_nll(taught, row).sum() for row in pools["forget"]])
        after = torch.stack([slow_nll(moved, row).sum() for row in pools["forget"]])
        lengths = torch.tensor([float(row.stop - row.start) for row in pools["forget"]])
        found = objective(moved, forget(pools["forget"]))["npo"].item()
    assert (after - before).abs().min() > 0.05 and lengths[1] > 4 * lengths[0]
    expected = (-2 / 0.3 * torch.log(torch.sigmoid(0.3 * (after - before)))).mean().item()
    assert found == pytest.approx(expected, rel=1e-4)
    by_token = (-2 / 0.3 * torch.log(torch.sigmoid(0.3 * (after - before) / lengths))).mean().item()
    assert found != pytest.approx(by_token, rel=1e-3)


def test_its_gradient_is_weighted_ascent(taught, moved, corpus, slow_nll):
    beta = 0.5
    pools, objective = NPO(PLAN, beta=beta).terms(taught, corpus)
    rows = pools["forget"][:6]
    live = torch.stack([slow_nll(moved, row).sum() for row in rows])
    with torch.no_grad():
        before = torch.stack([slow_nll(taught, row).sum() for row in rows])
        weight = 2 * torch.sigmoid(-beta * (live - before))
    assert weight.max() / weight.min() > 1.5  # otherwise the weights would not be tested
    found = gradient(moved, objective(moved, forget(rows))["npo"])
    expected = gradient(moved, -(weight * live).mean())
    assert cosine(found, expected) > 0.999
    assert found.norm().item() == pytest.approx(expected.norm().item(), rel=1e-3)


def test_a_small_beta_is_gradient_ascent(taught, moved, corpus, slow_nll):
    pools, objective = NPO(PLAN, beta=1e-4).terms(taught, corpus)
    rows = pools["forget"][:6]
    found = gradient(moved, objective(moved, forget(rows))["npo"])
    expected = gradient(moved, -torch.stack([slow_nll(moved, row).sum() for row in rows]).mean())
    assert cosine(found, expected) > 0.99


def nll(lm, corpus, role: str) -> float:
    return -np.mean([x.loglikelihood() for x in read(lm, lm.template.rows(corpus[role]))])


def test_the_brake(taught, corpus):
    """At equal steps the forget loss rises ever more slowly, where ascent's rises ever faster."""
    levels = {}
    for name, method in (("npo", lambda plan: NPO(plan, beta=0.3, retain=0.0)), ("ascent", Ascent)):
        path = [nll(taught, corpus, "forget")]
        path += [nll(method(Plan(steps=steps, lr=1e-3))(taught, corpus), corpus, "forget") for steps in (4, 8, 12, 16)]
        levels[name] = np.diff(path)
    assert levels["npo"][0] > 0 and levels["npo"][-1] <= 0.5 * levels["npo"].max()
    assert levels["ascent"][-1] == levels["ascent"].max()


@pytest.mark.parametrize("keep", [{"retain": 1.0}, {"retain": 0.0, "kl": 1.0}])
def test_what_is_kept_stays_nearer(taught, corpus, keep):
    plan = Plan(steps=20, lr=1e-3)
    bare, kept = NPO(plan, beta=0.1, retain=0.0)(taught, corpus), NPO(plan, beta=0.1, **keep)(taught, corpus)
    start = nll(taught, corpus, "retain")
    assert nll(kept, corpus, "retain") - start < 0.5 * (nll(bare, corpus, "retain") - start)
    assert nll(kept, corpus, "forget") > 5 * nll(taught, corpus, "forget")
