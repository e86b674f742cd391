"""Decoding: rows leave without disturbing others, and a cache with room equals one that is made anew for every token."""

import pytest
import torch
from transformers import DynamicCache

from unremember.decode import decode, likeliest, roomy, staying


@pytest.mark.parametrize(
    "keep", [[], [True], [False], [True, True, False, True, False], [False, True], [False] * 3, [True] * 4]
)
def test_gaps_are_filled_from_the_end_and_all_others_stay(keep):
    order = staying(keep)
    assert sorted(order) == [at for at, stays in enumerate(keep) if stays]
    assert all(order[at] == at for at in range(len(order)) if keep[at])


def laid(rows: int = 5, places: int = 4) -> DynamicCache:
    torch.manual_seed(0)
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(rows, 3, places, 8), torch.randn(rows, 3, places, 8), layer)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_with_room_holds_what_one_that_grows_holds(dtype):
    plain, own = laid(), roomy(laid(), torch.arange(20).view(5, 4), 3, dtype)
    for alive in ([0, 1, 2, 3, 4], [0, 4, 2], [2, 1]):
        for cache in (plain, own):
            cache.batch_select_indices(torch.tensor(alive))
        for layer in range(2):
            new = torch.randn(len(alive), 3, 1, 8), torch.randn(len(alive), 3, 1, 8)
            pairs = zip(plain.update(*new, layer), own.update(*new, layer), strict=True)
            assert all(torch.equal(a.to(dtype), b) and b.dtype == dtype for a, b in pairs)
        assert own.get_seq_length() == plain.get_seq_length()
    assert own.layers[0].room[0].shape == (5, 3, 7, 8)  # the memory it began with


def test_rows_take_the_places_that_they_have_read():
    read, places = (
        laid(2, 4),
        torch.tensor([[0, 0, 1], [4, 5, 7]]),
    )  # the first is shorter; the second skips a place of its lane
    own = roomy(read, places, 1, torch.float32)
    for layer, kept in zip(read.layers, own.layers, strict=True):
        assert torch.equal(kept.keys[0, :, 1:], layer.keys[0, :, :2])
        assert torch.equal(kept.values[1], layer.values[1][:, [0, 1, 3]])


def test_each_row_says_as_much_as_it_may_and_stops_at_the_end_mark():
    """A model that counts up: behind token t comes t + 1; 9 ends a text."""
    seen_by: list[tuple[list[int], list[int], list[int]]] = []

    def step(ids, seen, positions, cache):
        seen_by.append((ids[:, 0].tolist(), seen.sum(1).tolist(), positions[:, 0].tolist()))
        return torch.nn.functional.one_hot(ids[:, 0] + 1, 20).float()

    lengths = torch.tensor([1, 2, 3, 2, 1])
    seen = (torch.arange(3) >= 3 - lengths[:, None]).long()
    cache = roomy(laid(5, 3), torch.arange(15).view(5, 3), 4, torch.float32)
    said = decode(step, likeliest, cache, seen, torch.tensor([1, 7, 3, 12, 8]), [3, 3, 1, 0, 4], {9})
    assert said == [[2, 3, 4], [8], [4], [], []]
    assert [sorted(x[0]) for x in seen_by] == [[1, 3, 7, 8], [2, 8], [3]]  # who has ended is not fed any more
    for ids, seen_places, places in seen_by:  # the place of a token is how many stand in front of it
        assert [n - 1 for n in seen_places] == places and len(ids) == len(places)
