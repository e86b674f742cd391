"""LLMU: its three terms by hand, the cap that really holds, and answers that have nothing to do with the question."""

import math
from dataclasses import replace

import pytest
import torch

from unremember.errors import BadCorpus
from unremember.forget.llmu import LLMU, capped_ascent, mismatched
from unremember.tokens import lanes, pack
from unremember.train import Plan

PLAN = Plan(steps=1, lr=1e-3)


def llmu(**settings) -> LLMU:
    return LLMU(**{"plan": PLAN, "forget": 0.5, "mismatch": 2.0, "kl": 3.0, "answers": 2, **settings})


def test_the_ascent_by_hand():
    # means 2 and 5 nats a token, the cap at 4
    torch.testing.assert_close(
        capped_ascent(torch.tensor([6.0, 10.0]), torch.tensor([3.0, 2.0]), 4.0), torch.tensor([-2.0, -4.0])
    )


def test_an_answer_beyond_a_uniform_guess_is_left_alone():
    nll = torch.tensor([6.0, 10.0], requires_grad=True)
    [slope] = torch.autograd.grad(capped_ascent(nll, torch.tensor([3.0, 2.0]), 4.0).sum(), nll)
    torch.testing.assert_close(slope, torch.tensor([-1 / 3, 0.0]))


def test_terms_by_hand(taught, moved, corpus, slow_nll):
    """Answer tokens only: the published code trains the mismatch on the question as well."""
    pools, objective = llmu().terms(taught, corpus)
    assert list(pools) == ["forget", "mismatch", "retain", "replay"]
    cap = math.log(taught.model.config.vocab_size)
    with torch.no_grad():
        means = {r: torch.stack([slow_nll(moved, row).mean() for row in pools[r]]) for r in ("forget", "mismatch")}
        found = {}
        for role, rows in pools.items():
            found |= objective(moved, pack(lanes(rows, 256), role))
        at_home = {k: v for role in pools for k, v in objective(taught, pack(lanes(pools[role], 256), role)).items()}
    assert found["llmu"].item() == pytest.approx(-0.5 * means["forget"].clamp(max=cap).mean().item(), rel=1e-4)
    assert found["mismatch"].item() == pytest.approx(2.0 * means["mismatch"].mean().item(), rel=1e-4)
    assert found["retain KL"].item() > 0 and at_home["retain KL"].item() == pytest.approx(0, abs=1e-3)


def test_mismatched_answers_belong_to_others(corpus):
    pairs = mismatched(corpus, 3, seed=0)
    assert len(pairs) == 3 * len(corpus["forget"]) and pairs == mismatched(corpus, 3, seed=0)
    assert pairs != mismatched(corpus, 3, seed=1)
    answers = {x.answer for x in corpus.of("retain", "replay")}
    for x in corpus["forget"]:
        mine = [p for p in pairs if p.id.startswith(f"{x.id}/")]
        assert len({p.answer for p in mine}) == 3 and {p.answer for p in mine} <= answers
        assert all(p.prompt == x.prompt and v.lower() not in p.answer.lower() for p in mine for v in x.values())


def test_a_pool_that_holds_the_value_or_is_too_small_is_refused(corpus):
    x = corpus["forget"][0]
    gold = replace(corpus["retain"][0], answer=f"Somebody else: {x.values()[0]}", spans=(), distractors=())
    small = corpus.with_roles(forget=(x,), retain=(gold, *corpus["retain"][1:3]), replay=())
    assert {p.answer for p in mismatched(small, 2, 0)} == {y.answer for y in corpus["retain"][1:3]}
    with pytest.raises(BadCorpus, match=rf"needs 3 answers that have nothing to do with '{x.id}' and finds 2"):
        llmu(answers=3).check(small)
