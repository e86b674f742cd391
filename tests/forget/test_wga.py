"""WGA: the loss by hand, a force that fades with what is known, ascent as its limit."""

import math

import pytest
import torch

from unremember.forget.ascent import Ascent
from unremember.forget.wga import WGA, wga_loss
from unremember.tokens import lanes, pack
from unremember.train import Plan

PLAN = Plan(steps=1, lr=1e-3)


def test_the_loss_and_its_slope_by_hand():
    # p = 1/2 and alpha = 1: 1/2 · log 1/2; the weight is a constant, so the slope is 1/2 and not 1/2 + 1/2 · log 1/2
    logp = torch.tensor([math.log(0.5), math.log(0.1)], requires_grad=True)
    found = wga_loss(logp, 1.0)
    torch.testing.assert_close(found, torch.tensor([0.5 * math.log(0.5), 0.1 * math.log(0.1)]))
    [slope] = torch.autograd.grad(found.sum(), logp)
    torch.testing.assert_close(slope, torch.tensor([0.5, 0.1]))
    [steep] = torch.autograd.grad(wga_loss(logp, 2.0).sum(), logp)
    torch.testing.assert_close(steep, torch.tensor([0.25, 0.01]))


def test_without_weights_it_is_ascent(taught, moved, corpus):
    pools, mine = WGA(PLAN, alpha=0.0, retain=0.0).terms(taught, corpus)
    _, theirs = Ascent(PLAN).terms(taught, corpus)
    tokens = pack(lanes(pools["forget"], 256), "forget")
    with torch.no_grad():
        [found], [expected] = mine(moved, tokens).values(), theirs(moved, tokens).values()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_it_is_the_weighted_mean_over_answer_tokens(taught, moved, corpus, slow_nll):
    pools, objective = WGA(PLAN, alpha=1.0, retain=0.0).terms(taught, corpus)
    with torch.no_grad():
        nll = torch.cat([slow_nll(moved, row) for row in pools["forget"]])
        found = objective(moved, pack(lanes(pools["forget"], 256), "forget"))["wga"].item()
    assert found == pytest.approx(-((-nll).exp() * nll).mean().item(), rel=1e-4)
