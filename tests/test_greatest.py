"""The stand-in for the head finds what the whole product finds, whatever the weights are, and says when it cannot."""

import pytest
import torch
from torch import nn

from unremember.greatest import UNIT, Greatest, greatest
from unremember.loading import load


def whole(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, tokens = (hidden.double() @ weight.double().t()).max(-1)
    return values, tokens


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])  # all logits far below, around and far above 0
def test_it_finds_the_greatest(size, shift):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(3000, 64, generator=random) * size + shift
    hidden = torch.randn(50, 64, generator=random) + 1
    value, token = Greatest(weight)(hidden)
    right, best = whole(hidden, weight)
    assert torch.equal(token, best)
    torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-5)


def test_near_ties_that_bfloat16_gets_wrong_are_right():
    """Pairs of tokens that differ by less than bfloat16 can tell, many of them the greatest."""
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(400, 64, generator=random)
    weight = torch.cat([weight, weight * (1 + UNIT / 50 * torch.randn(400, 64, generator=random))])
    hidden = torch.randn(300, 64, generator=random)
    _, token = Greatest(weight)(hidden)
    _, best = whole(hidden, weight)
    low = (hidden.bfloat16() @ weight.bfloat16().t()).max(-1).indices
    assert torch.equal(token, best)
    assert (low != best).float().mean() > 0.2  # or the pairs would prove nothing


@pytest.mark.parametrize("size", [0.1, 5.0])
def test_no_logit_is_further_off_than_the_bound(size):
    random = torch.Generator().manual_seed(2)
    weight, hidden = torch.randn(500, 48, generator=random) * size, torch.randn(40, 48, generator=random)
    head = Greatest(weight)
    off, exact = head.off(hidden)[:, None], hidden.double() @ weight.double().t()
    sums = hidden.bfloat16().float() @ head.low.float().t()
    gap, low = (exact - sums).abs(), (sums - sums.bfloat16().float()).abs()
    assert (gap <= off).all() and (low <= UNIT * sums.bfloat16().abs()).all()
    assert (gap > 0.05 * off).any() and (low > 0.4 * UNIT * sums.abs()).any()  # and neither bound is idle


def test_the_bound_is_reached_where_all_errors_point_one_way():
    """Weights and states a hair below the middle between two numbers, so that all are rounded down: each term is needed."""
    near = 1 + UNIT * (1 - 2**-10)  # rounds to 1: the next number is 1 + 2 UNIT
    weight, hidden = torch.full((4, 32), near), torch.full((1, 32), near)
    off = float(Greatest(weight).off(hidden))
    gap = float((hidden.double() @ weight.double().t()).max()) - 32.0
    assert gap <= off < 1.01 * gap
    assert float(Greatest(weight).off(hidden.bfloat16().float())) < 0.51 * off  # half of it is the state's


def test_where_many_could_be_the_greatest_the_whole_product_is_taken(monkeypatch):
    weight = torch.ones(2000, 16) + torch.arange(2000)[:, None] * 1e-6  # all alike in bfloat16
    hidden = torch.ones(3, 16)
    monkeypatch.setattr(torch.linalg, "vecdot", None)  # must not be called
    value, token = Greatest(weight)(hidden)
    assert token.tolist() == [1999] * 3
    torch.testing.assert_close(value, weight[1999].sum().expand(3))


def test_of_equals_the_first_wins_and_no_place_gives_nothing():
    weight = torch.randn(3000, 8, generator=torch.Generator().manual_seed(5))
    weight[2500] = weight[700] = 9.0
    head = Greatest(weight)
    assert head(torch.ones(2, 8))[1].tolist() == [700, 700]
    assert [len(x) for x in head(torch.ones(0, 8))] == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_handed_on(bad):
    random = torch.Generator().manual_seed(4)
    weight, hidden = torch.randn(50, 8, generator=random), torch.randn(2, 8, generator=random).abs()
    weight[7, 3] = bad
    value, token = Greatest(weight)(hidden)
    right = (hidden @ weight.t()).max(-1)
    torch.testing.assert_close(value, right.values, equal_nan=True)
    assert torch.equal(token, right.indices)


def test_candidates_are_few(monkeypatch):
    """Of 4096 random tokens less than ten a place: the whole product would not be worth leaving out otherwise."""
    random, counted, dot = torch.Generator().manual_seed(3), [], torch.linalg.vecdot
    weight, hidden = torch.randn(4096, 64, generator=random), torch.randn(64, 64, generator=random)
    monkeypatch.setattr(torch.linalg, "vecdot", lambda a, b: counted.append(len(a)) or dot(a, b))
    Greatest(weight)(hidden)
    assert 64 <= counted[0] < 10 * 64


def test_heads_that_are_not_plain_have_no_stand_in():
    model = load("tiny", precision="fp32").copy().model
    assert type(greatest(model)) is Greatest
    head = model.get_output_embeddings()
    head.bias = nn.Parameter(torch.zeros(head.out_features))
    assert greatest(model) is None
    head.bias = None
    handle = head.register_forward_hook(lambda *_: None)
    assert greatest(model) is None
    handle.remove()
    assert type(greatest(model)) is Greatest
    head.weight.data = head.weight.data.bfloat16()
    assert greatest(model) is None


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_a_head_under_an_adapter_has_no_stand_in(tiny):
    under = tiny.adapted(2, 4, "all-linear")
    assert type(greatest(under.model)) is Greatest  # peft leaves the head alone
    head = tiny.untied().adapted(2, 4, "lm_head")
    assert greatest(head.model) is None
