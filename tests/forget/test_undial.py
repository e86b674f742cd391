"""UNDIAL: the target by hand, its fixed point, and the places that the published code distils by accident."""

import pytest
import torch
from torch.nn import functional as F

from unremember.forget.undial import Undial, undial_loss
from unremember.tokens import lanes, pack
from unremember.train import Plan

PLAN = Plan(steps=1, lr=1e-3)


def test_the_loss_by_hand():
    # reference odds 4 : 2 : 2 with the first token, the true one, lowered by log 2: odds 2 : 2 : 2
    reference = torch.tensor([[4.0, 2.0, 2.0]]).log()
    found = undial_loss(
        torch.tensor([[0.5, 0.25, 0.25]]).log(), reference, torch.tensor([0]), torch.tensor(2.0).log().item()
    )
    torch.testing.assert_close(found, -torch.tensor([0.5, 0.25, 0.25]).log().mean()[None])
    torch.testing.assert_close(reference, torch.tensor([[4.0, 2.0, 2.0]]).log())  # and the reference stays as it is


def test_strength_zero_distils_what_is_there_already():
    reference, target = torch.randn(5, 7), torch.arange(5)
    logits = reference.clone().requires_grad_(True)
    [slope] = torch.autograd.grad(undial_loss(logits, reference, target, 0.0).sum(), logits)
    torch.testing.assert_close(slope, torch.zeros(5, 7), atol=1e-6, rtol=0)


def test_its_fixed_point_is_the_lowered_distribution():
    """So it cannot run away: beyond the point the slope turns round."""
    reference, target = torch.randn(1, 7), torch.tensor([3])
    lowered = reference.clone()
    lowered[0, 3] -= 2.0
    for shift, sign in ((0.5, 1), (0.0, 0), (-0.5, -1)):
        logits = lowered.clone()
        logits[0, 3] += shift
        logits.requires_grad_(True)
        [slope] = torch.autograd.grad(undial_loss(logits, reference, target, 2.0).sum(), logits)
        assert torch.sign(slope[0, 3].round(decimals=5)).item() == sign


def test_only_answer_tokens_are_distilled(taught, moved, corpus):
    """open-unlearning@19a6141 takes the mean over all places, and label -100 for an index into the vocabulary."""
    few = corpus.with_roles(forget=corpus["forget"][:2])
    pools, objective = Undial(PLAN, strength=10.0, retain=0.0).terms(taught, few)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in pools["forget"]:
            before, now = (lm.model(input_ids=torch.tensor([row.ids])).logits[0] for lm in (taught, moved))
            for place in range(row.start, row.stop):
                target = before[place - 1].clone()
                target[row.ids[place]] -= 10.0
                total += F.cross_entropy(now[place - 1][None], target.softmax(-1)[None]).item()
                count += 1
        found = objective(moved, pack(lanes(pools["forget"], 256), "forget"))["undial"].item()
    assert found == pytest.approx(total / count, rel=2e-3)  # the reference is kept in float16
