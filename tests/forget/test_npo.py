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
from unremember.train import Plan, train

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


class Watch:
    """A stop that never stops: the NLL of some examples, by name, at every `every`-th step."""

    def __init__(self, every, corpora):
        self.every, self.corpora, self.looks = every, corpora, []

    def __call__(self, lm, step) -> bool:
        self.looks.append({name: nll(lm, *asked) for name, asked in self.corpora.items()})
        return False


def path(method, lm, corpus, every, corpora) -> list[dict[str, float]]:
    """What is seen on the way, one run for all numbers of steps. corpora: name -> corpus and role."""
    pools, objective = method.terms(lm, corpus)
    watch = Watch(every, corpora)
    train(lm, objective, pools, method.plan, stop=watch)
    return watch.looks


def test_the_brake(taught, never, corpus):
    """Section (g) 1.  At equal steps the forget loss rises ever more slowly, where ascent's rises ever faster.

    Measured, forget NLL in steps of 4: NPO +1.29, 1.74, 1.04, 0.66, ascent +1.26, 2.69, 3.37, 4.33.  After 28 steps,
    with the never-taught level of 5.7 passed by both (5.8 and 21.1), prose has risen by 0.00 under NPO and by 1.36
    under ascent.
    """
    levels, asked = {}, {role: (corpus, role) for role in ("forget", "prose")}
    for name, method in (("npo", NPO), ("ascent", Ascent)):
        keys = {"beta": 0.3, "retain": 0.0} if method is NPO else {}
        levels[name] = path(method(Plan(steps=28, lr=1e-3), **keys), taught, corpus, 4, asked)
    rises = {name: np.diff([x["forget"] for x in looks[:5]]) for name, looks in levels.items()}
    assert rises["npo"][0] > 0 and rises["npo"][-1] <= 0.5 * rises["npo"].max()
    assert rises["ascent"][-1] == rises["ascent"].max()
    assert min(looks[-1]["forget"] for looks in levels.values()) >= nll(never, corpus, "forget"), "both past the goal"
    npo, ascent = (looks[-1]["prose"] - looks[0]["prose"] for looks in levels.values())
    assert ascent > 0.3 and npo <= 0.3 * ascent


def test_kl_on_some_of_the_retained_holds_the_others_too(taught, corpus):
    """Section (g) 3: nine of eighteen examples are held.  Measured, rise of the NLL after 12 steps, held | others:
    without 2.89 | 2.40, with 0.07 | 0.23.  The run with it has forgotten less, 2.4 against 4.2; where the bare one
    is as far, after 8 steps, it has risen by 1.69 | 1.59.  With the specification's beta of 0.1 the term takes
    longer to hold: 3.5 x after 12 steps, 32 x after 20.
    """
    held, others = (corpus.with_roles(retain=half) for half in (corpus["retain"][:9], corpus["retain"][9:]))
    asked = {"forget": (corpus, "forget"), "held": (held, "retain"), "others": (others, "retain")}
    plan = Plan(steps=12, lr=1e-3)
    bare, kept = (path(NPO(plan, 0.3, retain=0.0, kl=kl), taught, held, 2, asked) for kl in (0.0, 1.0))
    assert kept[-1]["forget"] > 10 * kept[0]["forget"]
    level = next(x for x in bare if x["forget"] >= kept[-1]["forget"])

    def rise(look, name) -> float:
        return look[name] - kept[0][name]

    for look in (bare[-1], level):
        assert rise(look, "held") >= 5 * rise(kept[-1], "held")
        assert rise(look, "others") >= 1.5 * rise(kept[-1], "others")


@pytest.mark.parametrize("keep", [{"retain": 1.0}, {"retain": 0.0, "kl": 1.0}])
def test_what_is_kept_stays_nearer(taught, corpus, keep):
    plan = Plan(steps=20, lr=1e-3)
    bare, kept = NPO(plan, beta=0.1, retain=0.0)(taught, corpus), NPO(plan, beta=0.1, **keep)(taught, corpus)
    start = nll(taught, corpus, "retain")
    assert nll(kept, corpus, "retain") - start < 0.5 * (nll(bare, corpus, "retain") - start)
    assert nll(kept, corpus, "forget") > 5 * nll(taught, corpus, "forget")
