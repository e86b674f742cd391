"""DPO towards refusals: the loss by hand, on a model, and what it is known for: it hides more than it forgets."""

import math

import numpy as np
import pytest
import torch

from unremember.forget.dpo import DPO, REFUSALS, dpo_loss
from unremember.table import read
from unremember.tokens import lanes, pack
from unremember.train import Plan

PLAN = Plan(steps=1, lr=1e-3)


def test_the_loss_by_hand():
    # the refusal gained log 3 on the answer: sigmoid(log 3) = 3/4
    win, lose = torch.tensor([0.5 * math.log(3)]), torch.tensor([-0.5 * math.log(3)])
    torch.testing.assert_close(dpo_loss(win, lose, 1.0), torch.tensor([2 * math.log(4 / 3)]))
    torch.testing.assert_close(dpo_loss(win, lose, 2.0), torch.tensor([math.log(10 / 9)]))
    torch.testing.assert_close(dpo_loss(lose, win, 1.0), torch.tensor([2 * math.log(4)]))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_it_starts_at_its_known_value(taught, corpus, beta):
    pools, objective = DPO(PLAN, beta=beta).terms(taught, corpus)
    start = objective(taught, pack(lanes(pools["forget"], 256), "forget"))["dpo"].item()
    assert start == pytest.approx(2 / beta * math.log(2), rel=1e-3)


def test_refusal_and_answer_are_summed_and_compared_with_the_model_as_it_came(taught, moved, corpus, slow_nll):
    few = corpus.with_roles(forget=corpus["forget"][:3])
    pools, objective = DPO(PLAN, beta=0.3).terms(taught, few)

    def logp(lm, prompt, answer, end):
        row = lm.template.row("", prompt, answer)
        whole = lm.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        return sum(whole[place - 1, row.ids[place]].item() for place in range(row.start, row.stop + end))

    with torch.no_grad():
        found = objective(moved, pack(lanes(pools["forget"], 256), "forget"))["dpo"].item()
        possible = []
        for x in few["forget"]:
            lose = logp(moved, x.prompt, x.answer, 0) - logp(taught, x.prompt, x.answer, 0)
            wins = [logp(moved, x.prompt, r, 1) - logp(taught, x.prompt, r, 1) for r in REFUSALS]
            possible.append([2 / 0.3 * math.log(1 + math.exp(-0.3 * (win - lose))) for win in wins])
    sums = {a + b + c for a in possible[0] for b in possible[1] for c in possible[2]}
    assert min(abs(s / 3 - found) for s in sums) < 1e-3 * found, "the mean over rows, each with one of the refusals"


def test_refusals_gain_on_answers(taught, corpus):
    few = corpus.with_roles(forget=corpus["forget"][:4])
    result = DPO(Plan(steps=12, lr=1e-3), beta=0.1)(taught, few)

    def gained(x, answer):
        rows = [taught.template.row("", x.prompt, answer)]
        after, before = (read(lm, rows)[0].loglikelihood() for lm in (result, taught))
        return after - before

    for x in few["forget"]:
        assert np.mean([gained(x, refusal) for refusal in REFUSALS]) > 0 > gained(x, x.answer)
