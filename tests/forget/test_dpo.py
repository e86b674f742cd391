"""DPO towards refusals: the loss by hand, on a model, and what it is known for: it hides more than it forgets."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from unremember.forget import dpo
from unremember.forget.dpo import DPO, REFUSALS, dpo_loss
from unremember.forget.npo import npo_loss
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


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_where_no_refusal_wins_anything_it_is_npo(beta):
    """Section (g) 4: the loser's half alone, with NPO's factor of 2 / beta in both: equal as they stand."""
    after, before = torch.tensor([1.0, 5.0, 40.0, 3.0]), torch.tensor([1.0, 3.0, 0.0, 9.0])
    lose = before - after  # the answer's gain in log-probability
    torch.testing.assert_close(dpo_loss(torch.zeros(4), lose, beta), npo_loss(after, before, beta))
    assert not torch.allclose(dpo_loss(torch.ones(4), lose, beta), npo_loss(after, before, beta))


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


# ── section (g), on questions in other words ──

REFUSAL = "I do not know."


def total(lm, examples, answer) -> np.ndarray:
    """Log-probability of an answer to each, in nats."""
    rows = [lm.template.row(str(i), x.prompt, answer(x)) for i, x in enumerate(examples)]
    return np.array([x.total() for x in read(lm, rows)])


@pytest.fixture(scope="module")
def reworded(corpus):
    """Every forget question in its four paraphrases, which nobody is trained on."""
    return [
        replace(x, id=f"{x.id}#{i}", prompt=p, paraphrases=())
        for x in corpus["forget"] for i, p in enumerate(x.paraphrases)
    ]  # fmt: skip


def refused(x) -> str:
    return REFUSAL


def told(x) -> str:
    return x.answer


def test_a_refusal_beats_the_answer_in_other_words_and_where_nothing_was_to_go_it_does_not(
    taught, corpus, reworded, monkeypatch
):
    """Section (g) 1, with one refusal: of eight, the toy learns none to the letter in so few steps.

    Measured: on paraphrases the refusal is ahead in 48 of 48, before in 11; of 12 questions none is answered as
    before, 7 with something that says "know", 3 of them to the letter.  Of the retained questions none is, nor is
    the refusal ahead in any; but it is in 71 of their 72 paraphrases, before in 12: on wordings that are not
    rehearsed the specification's gate does not hold.
    """
    monkeypatch.setattr(dpo, "REFUSALS", (REFUSAL,))
    result = DPO(Plan(steps=24, lr=3e-3), beta=0.03, retain=2.0)(taught, corpus)
    before, after = (total(lm, reworded, refused) > total(lm, reworded, told) for lm in (taught, result))
    assert before.mean() < 0.4 and after.mean() >= 0.9
    said = {role: result.answer([x.prompt for x in corpus[role]], 12) for role in ("forget", "retain")}
    assert not set(said["forget"]) & {x.answer for x in corpus["forget"]}
    refusing = {role: np.mean(["know" in answer for answer in answers]) for role, answers in said.items()}
    assert refusing["forget"] >= 0.3 and refusing["retain"] <= 0.1
    kept = corpus["retain"]
    assert np.mean(total(result, kept, refused) > total(result, kept, told)) <= 0.1
    assert np.mean([answer == x.answer for answer, x in zip(said["retain"], kept, strict=True)]) >= 0.5


@pytest.mark.parametrize("swapped", [False, True])
def test_swapping_winner_and_loser_swaps_what_gains(taught, corpus, reworded, monkeypatch, swapped):
    """Section (g) 2, on 48 paraphrases: after six steps the refusal gained more than the answer in all, or in none."""
    if swapped:
        monkeypatch.setattr(dpo, "dpo_loss", lambda win, lose, beta: dpo_loss(lose, win, beta))
    result = DPO(Plan(steps=6, lr=1e-3), beta=0.1, retain=0.0)(taught, corpus)

    def own(x) -> str:
        return dpo._refusal(x.id.partition("#")[0], 0)

    win, lose = (total(result, reworded, said) - total(taught, reworded, said) for said in (own, told))
    assert np.mean(win > lose) <= 0.1 if swapped else np.mean(win > lose) >= 0.9


def test_a_larger_beta_stays_nearer_to_the_model_as_it_came(taught, corpus, reworded):
    """Section (g) 3, without a term that holds.  KL to the reference, nats a reworded answer: 31.9, 14.5, 11.4."""
    tokens, apart = pack(lanes(taught.template.rows(reworded), 256)), []
    for beta in (0.01, 0.1, 1.0):
        result = DPO(Plan(steps=8, lr=1e-3), beta=beta, retain=0.0)(taught, corpus)
        with torch.no_grad():
            before, after = (lm.logits(tokens).log_softmax(-1) for lm in (taught, result))
            gap = (after.exp() * (after - before)).sum(-1)
        apart.append(float(tokens.per_row(gap, "answer").mean()))
    assert apart[0] > 1.5 * apart[1] > 1.5 * 1.1 * apart[2] > 0
