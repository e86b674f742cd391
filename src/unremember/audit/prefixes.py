"""Greedy continuations of a text from every one of its prefixes, for little more than those that leave the text.

    greedy(x_<i) = x_i … x_{m−1}, p_m, greedy(x_<m p_m),    m = first place ≥ i where the arg-max p_m is not x_m

One teacher-forced pass gives every p.  Where a run of them follows the text, the continuation is the text; so all prefixes
in front of the same miss share one branch, and only a branch is decoded.  Texts with a beginning in common share the branches
there, and a branch that runs into another text goes on in it.  A branch starts from the keys and values that the pass left
for its prefix, and is decoded in a batch with the branches of other places and texts.
Differs from one generation a prefix: nothing but rounding.  In bfloat16 the winner of a near tie may depend on the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.decode import decode, likeliest, plain, reading, roomy, together
from unremember.greatest import Greatest
from unremember.lm import LM

Ids = tuple[int, ...]


@torch.inference_mode()
def from_prefixes(
    lm: LM, texts: Sequence[Ids], cuts: Sequence[Iterable[int]], bench: Bench = BENCH
) -> list[dict[int, Ids]]:
    """For each text and each cut i (1 ≤ i ≤ its length T): what greedy decoding says after text[:i], at most T − i tokens.

    Without the end mark.  Each (model, text, cut) is decoded once in the life of `bench.memory`.
    """
    known = bench.memory.setdefault(f"{lm.fingerprint}/prefixes", {})
    asked = [tuple(at) for at in cuts]
    missing: dict[Ids, set[int]] = {}
    for ids, at in zip(texts, asked, strict=True):
        missing.setdefault(ids, set()).update(set(at) - known.get(ids, {}).keys())
    fresh = sorted(ids for ids, at in missing.items() if at)  # neighbours in the trie go together
    mine = fresh[team.rank() :: team.size()]
    found: dict[Ids, dict[int, Ids]] = {}
    greedy = replace(lm, pick=likeliest)
    head = greedy.greatest() if mine else None
    with lm.lowered():
        for group in _groups(mine, bench.budget):
            found.update(_speak(greedy, {ids: missing[ids] for ids in group}, bench, head))
            bench.say("speak", len(found), len(mine), {})
    for ids, said in team.merge(found).items():
        known[ids] = {**known.get(ids, {}), **said}
    return [{cut: known[ids][cut] for cut in at} for ids, at in zip(texts, asked, strict=True)]


def _groups(texts: Sequence[Ids], budget: int) -> list[list[Ids]]:
    """Cut sorted texts into groups of at most `budget` padded places; a longer text stands alone."""
    groups: list[list[Ids]] = []
    longest = 0
    for ids in texts:
        longest = max(longest, len(ids))
        if groups and (len(groups[-1]) + 1) * longest <= budget:
            groups[-1].append(ids)
        else:
            groups.append([ids])
            longest = len(ids)
    return groups


def _speak(lm: LM, wanted: dict[Ids, set[int]], bench: Bench, head: Greatest | None) -> dict[Ids, dict[int, Ids]]:
    """The continuations of one group of texts."""
    texts = list(wanted)
    child, where, paths = _trie(texts)
    best, cache = _read(lm, texts, where, head)
    stop = lm.stop
    walked: dict[tuple[Ids, int], tuple[list[int], int, int]] = {}  # what follows texts; then a branch, and its tokens
    need: dict[int, int] = {}  # branch -> most tokens after its first
    for ids, path in zip(texts, paths, strict=True):
        for cut in wanted[ids]:
            said, node, branch = [], path[cut], -1
            while len(said) < len(ids) - cut and (token := best[node]) not in stop:
                said.append(token)
                if (node, token) not in child:
                    branch = node
                    break
                node = child[node, token]
            left = len(ids) - cut - len(said)
            walked[ids, cut] = said, branch, left
            if branch >= 0 and left:
                need[branch] = max(left, need.get(branch, 0))

    starts = [(node, *where[node], best[node], new) for node, new in need.items()]
    if plain(lm.model.config):
        tails = _decode(lm, cache, starts, bench.batch, head)
    else:  # windows and recurrent states cannot be cut at a place: from the tokens, then
        asked = [((*texts[b][:t], token), new) for _, b, t, token, new in starts]
        said = lm.generate([ids for ids, _ in asked], [new for _, new in asked], bench.batch)
        tails = {start[0]: list(ids) for start, ids in zip(starts, said, strict=True)}
    found: dict[Ids, dict[int, Ids]] = {ids: {} for ids in texts}
    for (ids, cut), (said, branch, left) in walked.items():
        found[ids][cut] = (*said, *tails.get(branch, ())[:left])
    return found


def _trie(texts: Sequence[Ids]) -> tuple[dict[tuple[int, int], int], list[tuple[int, int]], list[list[int]]]:
    """(node, token) -> node; node -> (text, length) of the prefix that it stands for; text, length -> node.  Node 0 is empty."""
    child: dict[tuple[int, int], int] = {}
    where, paths = [(0, 0)], []
    for b, ids in enumerate(texts):
        path = [0]
        for t, token in enumerate(ids, start=1):
            if (path[-1], token) not in child:
                child[path[-1], token] = len(where)
                where.append((b, t))
            path.append(child[path[-1], token])
        paths.append(path)
    return child, where, paths


def _read(
    lm: LM, texts: Sequence[Ids], where: Sequence[tuple[int, int]], head: Greatest | None
) -> tuple[list[int], Any]:
    """The arg-max after each node's prefix (nothing is asked of node 0), and the keys and values of all texts."""
    from transformers import DynamicCache

    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    for b, text in enumerate(texts):
        ids[b, : len(text)] = torch.tensor(text)  # nobody looks to the right, so padding there is seen by none
    places = torch.tensor([b * width + t - 1 for b, t in where[1:]], device=lm.device)
    config = lm.model.config
    cache = reading(config, lm.attention_dtype) if plain(config) else DynamicCache(config=config)
    asked = {"input_ids": ids.to(lm.device), "past_key_values": cache}
    values, tokens = lm.best(head, lambda hidden: hidden.flatten(0, 1)[places], asked)
    if not torch.isfinite(values).all():
        raise ValueError(f"{lm.name or 'the model'} gives probabilities that are not finite; its weights are broken")
    return [-1, *tokens.tolist()], cache


def _decode(
    lm: LM, cache: Any, starts: Sequence[tuple[int, int, int, int, int]], batch: int, head: Greatest | None
) -> dict[int, list[int]]:
    """starts: (node, text, length of the prefix, first token behind it, most further tokens) -> node: further tokens."""
    tails: dict[int, list[int]] = {}
    order = sorted(starts, key=lambda start: (-start[-1], start[2]))  # who may say as much goes together
    while order:
        count = together([(length, new) for _, _, length, _, new in order], batch)
        part, order = order[:count], order[count:]
        nodes, texts, lengths, tokens, news = zip(*part, strict=True)
        text, length, token = (torch.tensor(x, device=lm.device) for x in (texts, lengths, tokens))
        slots = torch.arange(max(lengths), device=lm.device) - (max(lengths) - length)[:, None]  # (B, S), right-aligned
        seen, slots = (slots >= 0).long(), slots.clamp(min=0)
        own = roomy(cache, text[:, None] * cache.layers[0].keys.shape[2] + slots, max(news))
        tails |= zip(nodes, decode(partial(lm.next, head=head), own, seen, token, news, lm.stop), strict=True)
    return tails
