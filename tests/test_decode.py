"""Decoding: rows leave without disturbing others, and a cache with room equals one that is made anew for every token."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from unremember.decode import decode, reading, roomy, staying, together


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
    """And shows zeros where nothing is yet, of memory that is never copied: the mask hides them."""
    plain, read = laid(), reading(LlamaConfig(num_hidden_layers=2), dtype)
    for layer, x in enumerate(laid().layers):
        assert all(y.dtype == dtype for y in read.update(x.keys, x.values, layer))
    own = roomy(read, torch.arange(20).view(5, 4), 3)
    began = own.layers[0].keys.data_ptr()
    for alive in ([0, 1, 2, 3, 4], [0, 4, 2], [2, 1]):
        for cache in (plain, own):
            cache.batch_select_indices(torch.tensor(alive))
        for layer in range(2):
            new = torch.randn(len(alive), 3, 1, 8), torch.randn(len(alive), 3, 1, 8)
            for grown, shown in zip(plain.update(*new, layer), own.update(*new, layer), strict=True):
                used = grown.shape[2]
                assert shown.shape == (len(alive), 3, 7, 8) and shown.dtype == dtype
                assert torch.equal(grown.to(dtype), shown[:, :, :used]) and not shown[:, :, used:].any()
        assert own.get_seq_length() == plain.get_seq_length() and own.get_mask_sizes(1, 0) == (7, 0)
    assert own.layers[0].keys.data_ptr() == began and own.layers[0].keys.is_contiguous()


def test_rows_take_the_places_that_they_have_read():
    read, places = (
        laid(2, 4),
        torch.tensor([[0, 0, 1], [4, 5, 7]]),
    )  # the first is shorter; the second skips a place of its lane
    own = roomy(read, places, 1)
    for layer, kept in zip(read.layers, own.layers, strict=True):
        assert torch.equal(kept.keys[0, :, 1:3], layer.keys[0, :, :2])
        assert torch.equal(kept.values[1, :, :3], layer.values[1][:, [0, 1, 3]])


@pytest.mark.parametrize(
    ("rows", "batch", "count"),
    [
        ([(10, 5)] * 9, 4, 4),  # the batch is full
        ([(10, 5)] * 3, 4, 3),  # all of them
        ([(10, 5)] * 9, 64, 6),  # 6 times 15 are 90, 7 times 105
        ([(10, 5), (10, 5), (30, 5), (30, 5)], 64, 2),  # 3 times 35 would be too many
        ([(10, 5), (10, 30), (11, 30)], 64, 2),  # the longest of all, and the most that any may say
        ([(400, 5), (400, 5)], 64, 1),  # one always goes
        ([(10, 5)] * 3, 0, 1),
    ],
)
def test_rows_go_on_together_while_there_is_room(rows, batch, count, monkeypatch):
    monkeypatch.setattr("unremember.decode.ROOM", 100)
    assert together(rows, batch) == count


def test_each_row_says_as_much_as_it_may_and_stops_at_the_end_mark():
    """A model that counts up: behind token t comes t + 1; 9 ends a text."""
    seen_by: list[tuple[list[int], list[int], list[int]]] = []

    def following(ids, seen, positions, cache):
        seen_by.append((ids[:, 0].tolist(), seen.sum(1).tolist(), positions[:, 0].tolist()))
        return ids[:, 0] + 1

    lengths = torch.tensor([1, 2, 3, 2, 1])
    seen = (torch.arange(3) >= 3 - lengths[:, None]).long()
    cache = roomy(laid(5, 3), torch.arange(15).view(5, 3), 4)
    said = decode(following, cache, seen, torch.tensor([1, 7, 3, 12, 8]), [3, 3, 1, 0, 4], {9})
    assert said == [[2, 3, 4], [8], [4], [], []]
    assert [sorted(x[0]) for x in seen_by] == [[1, 3, 7, 8], [2, 8], [3]]  # who has ended is not fed any more
    for ids, seen_places, places in seen_by:  # the place of a token is how many stand in front of it
        assert [n - 1 for n in seen_places] == places and len(ids) == len(places)
