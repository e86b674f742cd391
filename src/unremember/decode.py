"""Decoding: rows that have been read already go on together, a token a step, and each leaves the batch when it has ended.

Keys and values live in one piece of memory with room for what will be said, in the precision of attention: no step copies
them, and of a row that leaves only its gap is filled.  Everything here is about tensors; `LM` knows the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 2**14  # places of a cache: long prompts go on fewer at a time

Next = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""ids (B, T), seen (B, S) of what is kept and of ids (0 = padding), positions (B, T), cache -> the token behind the last (B,)"""

Pick = Callable[[Tensor, list[list[int]], list[int]], Tensor]
"""logits (B, V), the tokens that were read last, a list a row, how many stand in front of the next -> the next token (B,)"""


def likeliest(logits: Tensor, read: list[list[int]], length: list[int]) -> Tensor:
    """The Pick of greedy decoding."""
    return logits.argmax(-1)


def plain(config: Any) -> bool:
    """Whether every layer of a model keeps keys and values of all places: no windows, no recurrent state.

    GPT-Neo counts its windows, of which the cache knows nothing, from the end of all places that it is shown.
    """
    windows = "local" in getattr(config, "attention_layers", ())
    return not windows and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def together(rows: Sequence[tuple[int, int]], batch: int) -> int:
    """How many of the first rows go on together: one at least, `batch` at most, and no more places than `ROOM`.

    rows: (places that were read, most new tokens).
    """
    longest = most = 0
    for count, (places, new) in enumerate(rows[:batch]):
        longest, most = max(longest, places), max(most, new)
        if count and (count + 1) * (longest + most) > ROOM:
            return count
    return min(max(1, batch), len(rows))


def reading(config: Any, dtype: torch.dtype) -> Cache:
    """An empty cache for one pass, of a model that is `plain`; its keys, rotated in float32, are kept in another precision."""
    return Cache([_Reading(dtype) for _ in DynamicCache(config=config).layers])


class _Reading(DynamicLayer):
    """A layer of transformers' cache that is filled once."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert not self.is_initialized, "one pass is all"
        self.device, self.is_initialized = key_states.device, True
        self.keys, self.values = key_states.to(self.dtype), value_states.to(self.dtype)
        return self.keys, self.values


def roomy(cache: Any, places: Tensor, more: int) -> Cache:
    """Keys and values of rows that are to go on, with room for `more` places.

    cache: of L lanes with T places.  places: (B, S), which of the L · T a row has read, in their order, on the right.
    """
    rows, used = places.shape
    flat = places.flatten()

    def take(
        x: Tensor,
    ) -> Tensor:  # (L, K, T, D) -> (B, K, S + more, D); 0 where nothing is yet, since 0 times a NaN is one
        heads, size = x.shape[1], x.shape[-1]
        room = x.new_zeros(rows, heads, used + more, size)
        room[:, :, :used] = (
            x.transpose(1, 2).flatten(0, 1).index_select(0, flat).view(rows, used, heads, size).transpose(1, 2)
        )
        return room

    return Cache([_Roomy(take(layer.keys), take(layer.values), used) for layer in cache.layers])


class _Roomy(DynamicLayer):
    """A layer of transformers' cache that grows into memory which it has, and shows all of it: a piece would be copied."""

    keys: Any
    values: Any

    def __init__(self, keys: Tensor, values: Tensor, used: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values, self.used = keys, values, used

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.used + key_states.shape[2]
        self.keys[:, :, self.used : end] = key_states
        self.values[:, :, self.used : end] = value_states
        self.used = end
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What is not used yet is masked, like padding."""
        return self.keys.shape[2], 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows; those that stay where they are cost nothing."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for room in (self.keys, self.values) if len(moved) else ():
            room[moved, :, : self.used] = room[indices[moved], :, : self.used]
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]


def staying(keep: Sequence[bool]) -> list[int]:
    """Which row goes where when the others leave: the last ones move into the gaps, all others stay."""
    left = sum(keep)
    movers = iter([at for at in range(left, len(keep)) if keep[at]][::-1])
    return [at if keep[at] else next(movers) for at in range(left)]


def decode(
    following: Next, cache: Any, seen: Tensor, tokens: Tensor, news: Sequence[int], stop: set[int]
) -> list[list[int]]:
    """What rows say behind `tokens` (B,), at most news[b] tokens each, without the end mark.  Uses the cache up.

    cache: of all that stands in front of `tokens`, S places; seen: (B, S), 1 where a place is the row's own.
    """
    said: list[list[int]] = [[] for _ in news]
    alive, keep = list(range(len(news))), [new > 0 for new in news]
    positions = seen.sum(1)
    while any(keep):
        if not all(keep):
            order = staying(keep)
            kept = torch.tensor(order, device=tokens.device)
            cache.batch_select_indices(kept)
            seen, positions, tokens = seen[kept], positions[kept], tokens[kept]
            alive = [alive[at] for at in order]
        seen = torch.cat([seen, seen.new_ones(len(alive), 1)], 1)
        tokens = following(tokens[:, None], seen, positions[:, None], cache)
        positions = positions + 1
        keep = []
        for b, token in zip(alive, tokens.tolist(), strict=True):
            if token not in stop:
                said[b].append(token)
            keep.append(token not in stop and len(said[b]) < news[b])
    return said
