"""Rankings: ties, what must never be chosen, budgets that are kept, and masks that open exactly what was chosen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from unremember.errors import BadRequest
from unremember.locate.ranking import Budget, Ranking, select, sites, size

NEVER = -torch.inf


class Pair(nn.Module):
    """Two matrices and a vector: a (2, 3), b (3, 4), v (5,)."""

    def __init__(self):
        super().__init__()
        for name, shape in (("a", (2, 3)), ("b", (3, 4)), ("v", (5,))):
            setattr(self, name, nn.Parameter(torch.zeros(shape)))


def test_the_best_by_hand():
    ranking = Ranking({"b": torch.tensor([1.0, 9.0, 2.0, 2.0]), "a": torch.tensor([2.0, 0.0, 5.0])}, "column")
    assert ranking.best(3) == [("b", 1), ("a", 2), ("a", 0)], "a tie goes to the earlier name"
    assert ranking.best(5)[3:] == [("b", 2), ("b", 3)], "and then to the earlier index"
    assert ranking.best(0) == ranking.best(-1) == [] and len(ranking.best(99)) == 7


def test_the_order_in_which_parameters_are_named_does_not_matter():
    scores = {"b": torch.ones(4), "a": torch.ones(3), "v": torch.ones(1)}
    assert Ranking(scores, "column").best(6) == Ranking(dict(reversed(scores.items())), "column").best(6)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    whole = torch.tensor([1.5, NEVER, 2.0, 0.1])
    ranking = Ranking({"a": whole[:2], "b": whole[2:].double()}, "row")
    ranking.save(tmp_path / "sites.safetensors")
    again = Ranking.load(tmp_path / "sites.safetensors")
    assert again.unit == "row" and [p.name for p in tmp_path.iterdir()] == ["sites.safetensors"]
    assert all(torch.equal(again.scores[name], scores.float()) for name, scores in ranking.scores.items())
    assert again.best(4) == ranking.best(4) == [("b", 0), ("a", 0), ("b", 1)]


def test_minus_infinity_is_never_chosen():
    ranking = Ranking({"a": torch.tensor([NEVER, 1.0, NEVER]), "b": torch.full((4,), NEVER)}, "column")
    assert ranking.best(7) == [("a", 1)]
    with pytest.raises(BadRequest, match="2 units were asked for and 1 can be chosen"):
        select(ranking, Pair(), Budget(units=2))
    assert select(ranking, Pair(), Budget(share=0.1)).masks["a"].sum() == 2, "a share is of all ranked units"
    with pytest.raises(BadRequest, match="4 units were asked for and 1 can be chosen"):
        select(ranking, Pair(), Budget(share=0.5))


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("row", {"a": 3, "b": 4, "v": 5}), ("column", {"a": 2, "b": 3, "v": 5}), ("tensor", {"a": 6, "b": 12, "v": 5})],
)
def test_the_size_of_a_unit_is_what_its_mask_opens(unit, expected):
    model = Pair()
    for name, weight in model.named_parameters():
        assert size(weight, unit) == expected[name]
        mask = sites([(name, 0)], model, unit).masks[name]
        assert (weight.numel() if mask is None else int(mask.sum())) == expected[name]


def test_masks_open_exactly_what_was_chosen():
    rows = sites([("a", 1), ("b", 0), ("b", 2)], Pair(), "row")
    assert rows.masks["a"].tolist() == [[False] * 3, [True] * 3] and set(rows.masks) == {"a", "b"}
    assert rows.masks["b"].all(1).tolist() == [True, False, True] and rows.masks["b"].sum() == 8
    columns = sites([("b", 3), ("v", 0)], Pair(), "column")
    assert columns.masks["b"].all(0).tolist() == [False] * 3 + [True] and columns.masks["b"].sum() == 3
    assert columns.masks["v"] is None and not columns.everywhere, "a vector is one unit, and None is all of it"


def test_a_unit_that_no_longer_fits_is_passed_over_for_smaller_ones():
    ranking = Ranking({"b": torch.tensor([9.0, 8.0, 0.0]), "a": torch.tensor([7.0, 1.0])}, "row")
    chosen = select(ranking, Pair(), Budget(parameters=7))  # b[0] takes 4, b[1] does not fit, a[0] takes 3
    assert chosen.masks["b"].sum() == 4 and chosen.masks["a"].tolist() == [[True] * 3, [False] * 3]
    with pytest.raises(BadRequest, match="a budget of 2 parameters holds not one unit"):
        select(ranking, Pair(), Budget(parameters=2))


@given(st.data(), st.sampled_from(["row", "column"]))
def test_budgets_are_never_overshot_and_little_is_left(data, unit):
    model = Pair()
    along = 0 if unit == "row" else 1
    number = st.floats(-10, 10, width=32) | st.just(float("-inf"))
    scores = {
        name: torch.tensor(data.draw(st.lists(number, min_size=n, max_size=n)))
        for name, n in (("a", model.a.shape[along]), ("b", model.b.shape[along]), ("v", 1))
    }
    ranking = Ranking(scores, unit)
    weights = dict(model.named_parameters())
    cost = {name: size(weights[name], unit) for name in scores}
    eligible = ranking.best(99)
    limit = data.draw(st.integers(1, 30))
    if not any(cost[name] <= limit for name, _ in eligible):
        with pytest.raises(BadRequest):
            select(ranking, model, Budget(parameters=limit))
        return
    masks = select(ranking, model, Budget(parameters=limit)).masks
    used = sum(weights[name].numel() if mask is None else int(mask.sum()) for name, mask in masks.items())
    assert used <= limit

    def opened(name: str, k: int) -> bool:
        return name in masks and (masks[name] is None or bool(masks[name].select(along, k).all()))

    left = [(name, k) for name, k in eligible if not opened(name, k)]
    assert all(cost[name] > limit - used for name, _ in left), "what is left out would not fit any more"
    units = data.draw(st.integers(1, len(eligible)))
    chosen = select(ranking, model, Budget(units=units)).masks
    count = sum(1 if m is None else int(m.sum()) // cost[n] for n, m in chosen.items())
    assert count == units
    least = min(float(scores[name][k]) for name, k in ranking.best(units))
    assert all(float(scores[name][k]) <= least for name, k in eligible[units:])


@pytest.mark.parametrize("given_", [{}, {"units": 1, "share": 0.5}, {"units": 1, "share": 0.5, "parameters": 3}])
def test_a_budget_is_exactly_one_number(given_):
    with pytest.raises(ValidationError, match=f"given: {', '.join(given_) or 'none'}"):
        Budget(**given_)


@pytest.mark.parametrize(("name", "value"), [("units", 0), ("share", 0.0), ("share", 1.5), ("parameters", -1)])
def test_a_budget_of_nothing_is_refused(name, value):
    with pytest.raises(ValidationError) as raised:
        Budget(**{name: value})
    assert [error["loc"] for error in raised.value.errors()] == [(name,)]


def test_a_unit_of_another_kind_is_refused():
    with pytest.raises(ValidationError):
        Ranking({"a": torch.zeros(3)}, "head")
