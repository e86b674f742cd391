"""Greedy coordinate gradient: a short string of tokens that makes a model say given texts, found one swap at a time.

A step takes the gradient of the loss with respect to the one-hot rows of the string, keeps for every place the tokens that would
lower the loss most, tries some random swaps among them exactly, and moves to the best:

    loss(q) = Σ_j Σ_t −log p_θ(y_jt | before_j, q, after_j, y_j<t) / Σ_j T_j
              or, with mellowmax a over the T logits z of a target, mean_j (1/a) · (log Σ_t exp(−a · z_t) − log T)
    pool_i  = the k allowed tokens v with the most negative G_iv,    G = Σ_j ∂loss_j/∂onehot(q), each row of each j at unit norm
    step    `candidates` copies of q, each with `replaced` random places swapped for uniform draws from their pools

Zou et al. 2023 (arXiv 2307.15043); the many-target sum is that of Yuan et al. 2024 (arXiv 2408.10682), divided by a constant.
Code read: GraySwanAI/nanoGCG 0.2.3 and @d4a20a8, nanogcg/gcg.py.
Differs: a string survives only if it comes back from text *between its neighbours*, in every prompt (there: alone); pools never
hold a forbidden token (there, once fewer than k are allowed, the +inf rows are drawn); all special tokens are forbidden (there
four); each prompt's keys and values are computed once and handed to every pass in a cache of its own (there one that grows is
shared); the head runs on the target's places only; draws depend on (seed, step) alone; no string is tried twice in a step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass as plain
from dataclasses import field
from functools import cached_property
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from unremember import team
from unremember.bench import BENCH, LEAST, Bench
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.lm import LM
from unremember.tokens import Template
from unremember.train import STRICT

T = TypeVar("T")
Ids = tuple[int, ...]
Pair = tuple[Ids, int]  # a string, and the index of the behaviour that it is tried on
ATTEMPTS = 4  # draws a step before a string that never comes back from text is an error
PROBE = " ?"  # a second string, to tell the slot from the same signs in the prompt
WORD = 4  # letters from which a secret value is also looked for across words
SHORT = 2  # letters from which a token that stands in a secret value counts as a part of it


@dataclass(frozen=True, config=STRICT)
class Search:
    """How a string is looked for.

    tokens: its length.  steps: the most swaps.  candidates: strings tried a step.  pool: best tokens a place they come from.
    replaced: places swapped in each.  buffer: 0 = move to the step's best string even if it is worse; b = keep the b best ever
    and go on from the best (more than 1 matter only where `growing` changes the loss under them).
    mellowmax: 0 = cross-entropy, else its a.  growing: prompts come in one at a time, once the greedy answers to those before are
    the targets.  stop: end where the greedy answers to all are the targets.  start: what every place holds at first.
    """

    tokens: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    candidates: Annotated[int, Field(ge=1)] = 32
    pool: Annotated[int, Field(ge=1)] = 256
    replaced: Annotated[int, Field(ge=1)] = 1
    buffer: Annotated[int, Field(ge=0)] = 8
    mellowmax: Annotated[float, Field(ge=0)] = 0.0
    growing: bool = False
    stop: bool = True
    start: Annotated[str, Field(min_length=1)] = " !"
    seed: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self):
        if self.replaced > self.tokens:
            raise ValueError(
                f"replaced = {self.replaced} places of a string of {self.tokens} tokens; allowed: at most all"
            )


@plain(frozen=True)
class Behaviour:
    """One prompt with a slot, and what the model is to say: before + string + after + target, all token ids.

    left, right: the prompt's text around the slot, from which before and after came.
    """

    key: str
    left: str
    right: str
    before: Ids
    after: Ids
    target: Ids


@plain(frozen=True)
class Entry:
    """A string with its loss, and whether the greedy answers to it are the targets."""

    loss: float
    ids: Ids
    solved: bool = False


@plain(frozen=True)
class Found:
    """The best string of all steps.  curve: the loss of the string held at first and after each step.

    tokens: places that went through the model, those of a gradient counted three times.  first: the loss of the start string on
    all behaviours, which `loss` may be held against; curve[0] is that on one where they come in one at a time.
    """

    ids: Ids
    text: str
    loss: float
    solved: bool
    curve: tuple[float, ...]
    tokens: int
    first: float


# ── strings and slots ──


def decoded(template: Template, ids: Sequence[int]) -> str:
    return template.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def started(template: Template, start: str, count: int) -> Ids:
    """`count` times the sign `start`; BadRequest where that is not so many tokens."""
    ids = tuple(template.tokenizer(start * count, add_special_tokens=False).input_ids)
    if len(ids) != count:
        raise BadRequest(
            f"start = {start!r}, {count} times over, makes {len(ids)} tokens of this model; choose a sign that is "
            "one, such as ' !'"
        )
    return ids


def behaviour(
    template: Template, key: str, left: str, right: str, target: Ids, start: Ids, limit: int = 0
) -> Behaviour:
    """Find the slot between `left` and `right` in the encoded prompt.

    BadCorpus where the target is empty, the slot is not there exactly once, or the whole is longer than `limit` (0 = no limit).
    """
    if not target:
        raise BadCorpus(f"example {key!r} has no token that the model could be made to say; make its answer longer")
    text, n = decoded(template, start), len(start)
    other = tuple(template.tokenizer(PROBE * n, add_special_tokens=False).input_ids)
    whole = template.context(left + text + right)
    probed = template.context(left + PROBE * n + right)
    differ = len(other) == n and other != start
    places = [
        i for i in range(len(whole) - n + 1) if whole[i : i + n] == start and (not differ or probed[i : i + n] == other)
    ]
    if len(places) != 1:
        raise BadCorpus(
            f"example {key!r}: the slot for {text!r} is in the encoded prompt {len(places)} times; it must be there once. "
            "Change start, or the template that shows it twice or lets it merge with its neighbours"
        )
    before, after = whole[: places[0]], whole[places[0] + n :]
    if limit and len(whole) + len(target) > limit:
        raise BadCorpus(
            f"example {key!r} is {len(whole) + len(target)} tokens long with a string of {n}, and the model's context "
            f"is {limit}; take fewer tokens or shorten it"
        )
    return Behaviour(key, left, right, before, after, target)


def survives(template: Template, behaviours: Iterable[Behaviour], ids: Ids) -> bool:
    """Whether the string's text, put into every prompt, is encoded as the same tokens again."""
    text = decoded(template, ids)
    return all(template.context(b.left + text + b.right) == b.before + ids + b.after for b in behaviours)


def allowed(tokenizer: Any, size: int, answers: Iterable[str], values: Iterable[str]) -> Tensor:
    """(size,) bool: printable ASCII with something to see, no special token, no token of `answers`, no part of `values`."""
    texts = tokenizer.batch_decode([[i] for i in range(min(len(tokenizer), size))], clean_up_tokenization_spaces=False)
    secret = "\0".join(sorted({v.strip().casefold() for v in values}))
    barred = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    said: set[str] = set()  # in whatever case, with or without a space
    for text in {a.strip() for a in answers}:
        for written in (text, text.lower(), text.upper(), f" {text}", f" {text.lower()}", f" {text.upper()}"):
            said.update(texts[i].strip().casefold() for i in tokenizer(written, add_special_tokens=False).input_ids)
    mask = torch.zeros(size, dtype=torch.bool)
    for i, text in enumerate(texts):
        bare = text.strip().casefold()
        told = bare in said or (len(bare) >= SHORT and bare in secret)
        mask[i] = bool(bare) and text.isascii() and text.isprintable() and i not in barred and not told
    if not mask.any():
        raise BadRequest(
            "no token is left for the string: all are special, unprintable, or stand in an answer; attack fewer facts at once"
        )
    return mask


def tells(text: str, values: Iterable[str]) -> bool:
    """Whether a secret value stands in `text`, however it is spaced and written; a very short one only as a word."""
    text = text.casefold()
    flat = re.sub(r"\W", "", text)
    for value in (re.sub(r"\W", "", v.casefold()) for v in values):
        found = value in flat if len(value) >= WORD else re.search(rf"(?<!\w){value}(?!\w)", text) if value else None
        if found:
            return True
    return False


# ── the arithmetic of a step ──


def mellowmax(values: Tensor, alpha: float) -> Tensor:
    """(1/a) · (log Σ exp(a · x) − log T): between the mean (a → 0) and the largest (a → ∞). (R, T) -> (R,)"""
    return (torch.logsumexp(alpha * values, -1) - np.log(values.shape[-1])) / alpha


def unit(gradient: Tensor) -> Tensor:
    """Every place's row at norm one, so that no prompt outweighs the others. (n, V) -> (n, V)"""
    return gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)


def pools(gradient: Tensor, mask: Tensor, count: int) -> Tensor:
    """For each place the `count` allowed tokens with the most negative gradient, or all where fewer are allowed. -> (n, k)"""
    barred = gradient.masked_fill(~mask, torch.inf)
    return barred.topk(min(count, int(mask.sum())), dim=-1, largest=False).indices


def swaps(ids: Ids, pool: Tensor, count: int, replaced: int, rng: np.random.Generator) -> list[Ids]:
    """`count` copies of `ids`, each with `replaced` distinct places swapped for draws from their pools; none twice, not `ids`."""
    table, out = pool.tolist(), {}
    for _ in range(count):
        new = list(ids)
        for place in rng.permutation(len(ids))[:replaced]:
            new[place] = table[place][rng.integers(len(table[place]))]
        out[tuple(new)] = None
    out.pop(ids, None)
    return list(out)


def moved(held: Sequence[Entry], new: Entry, size: int) -> tuple[Entry, ...]:
    """The buffer after a step, best first.  Size 0: the new one, whatever it is; else the `size` best of all."""
    if size == 0:
        return (new,)
    return tuple(sorted((*held, new), key=lambda entry: entry.loss)[:size])


# ── the model ──


@plain(frozen=True)
class Pass:
    """What came out of one batch of pairs: logits (R, F, V) of the scored target places, their targets (R, F), and the hidden
    states (R, S, H) of the watched blocks from the string's first place on."""

    logits: Tensor
    targets: Tensor
    hidden: tuple[Tensor, ...]

    @property
    def nll(self) -> Tensor:
        """(R, F)"""
        flat = torch.nn.functional.cross_entropy(
            self.logits.float().flatten(0, 1), self.targets.flatten(), reduction="none"
        )
        return flat.view(self.targets.shape)

    @property
    def solved(self) -> Tensor:
        """(R,) bool: whether all targets are the likeliest."""
        return (self.logits.argmax(-1) == self.targets).all(-1)


@plain(frozen=True)
class Victim:
    """A model and what it is to be made to say.

    budget: places in one pass, cached ones included.  alpha: 0 = cross-entropy, else mellowmax.  forced: score the first so many
    target tokens, 0 = all.  watched: names of blocks whose output is wanted.  cached: keep each prompt's keys and values.
    places: what is left of the budget where the GPU had no room for it; it says how pairs are grouped, and nothing else.
    """

    lm: LM
    behaviours: tuple[Behaviour, ...]
    budget: int = 2048
    alpha: float = 0.0
    forced: int = 0
    watched: tuple[str, ...] = ()
    cached: bool = True
    embedding: Tensor = field(init=False, repr=False, compare=False)
    places: int = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        assert self.behaviours, "a victim without behaviours"
        object.__setattr__(self, "places", self.budget)
        object.__setattr__(self, "embedding", self.lm.model.get_input_embeddings().weight)

    @cached_property
    def prefixes(self) -> tuple[tuple[tuple[Tensor, Tensor], ...] | None, ...]:
        """Keys and values of what stands in front of each slot, (1, heads, places, width) a layer; None = not kept."""
        return tuple(self._prefix(b.before) for b in self.behaviours)

    @torch.no_grad()
    def _prefix(self, before: Ids) -> tuple[tuple[Tensor, Tensor], ...] | None:
        from transformers import DynamicCache

        if not self.cached or not before:
            return None
        cache = DynamicCache(config=self.lm.model.config)
        with self.lm.headed(lambda hidden: hidden[:, :0]):
            self.lm.model(
                input_ids=torch.tensor([before], device=self.lm.device), past_key_values=cache, use_cache=True
            )
        layers: Any = cache.layers
        kept: Any = tuple((getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers)
        # a window that has dropped places cannot be taken up again, nor a state that is no list of places
        return kept if all(k is not None and k.shape[-2] == len(before) for k, _ in kept) else None

    def _cache(self, which: Sequence[int]) -> Any:
        """A fresh cache that nobody else holds: a forward pass lets it grow."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.lm.model.config)
        kept = [self.prefixes[j] or () for j in which]
        for layer in range(len(kept[0])):
            keys, values = (torch.cat([k[layer][part] for k in kept]) for part in (0, 1))
            cache.update(keys, values, layer)
        return cache

    def _lead(self, j: int) -> Ids:
        """What must go through the model in front of the string each time."""
        return () if self.prefixes[j] else self.behaviours[j].before

    def cost(self, length: int, active: int) -> int:
        """Places that one string of this length puts through the model."""
        return sum(
            len(self._lead(j)) + length + len(b.after) + len(b.target) - 1
            for j, b in enumerate(self.behaviours[:active])
        )

    def batches(self, strings: Sequence[Ids], active: int) -> list[list[Pair]]:
        """Every string on each of the first `active` behaviours: pairs of equal lengths together, at most `places` places.

        What stands before the slot counts, cached or not: each row of a pass gets its keys and values anew.
        """
        groups: dict[tuple[int, ...], list[Pair]] = {}
        for j, b in enumerate(self.behaviours[:active]):
            for ids in strings:
                shape = len(b.before), len(self._lead(j)), len(ids), len(b.after), len(b.target)
                groups.setdefault(shape, []).append((ids, j))
        out: list[list[Pair]] = []
        for (before, _, *tail), pairs in sorted(groups.items()):
            rows = max(1, self.places // (before + sum(tail)))
            out += [pairs[i : i + rows] for i in range(0, len(pairs), rows)]
        return out

    def over(self, strings: Sequence[Ids], active: int, work: Callable[[list[Pair]], T]) -> list[tuple[list[Pair], T]]:
        """Each of `batches` with what `work` makes of it.

        Where one process's GPU has no room for a pass, all begin again in passes half as large, while LEAST places are left.
        """
        while True:
            try:
                return [(pairs, work(pairs)) for pairs in self.batches(strings, active)]
            except torch.OutOfMemoryError:
                if self.places < 2 * LEAST or team.size() > 1:  # the others would wait
                    raise
                object.__setattr__(self, "places", self.places // 2)

    def run(self, pairs: Sequence[Pair], embedded: Tensor | None = None) -> Pass:
        """One forward pass over pairs of equal lengths.  embedded: (R, n, H) in place of the strings' own embeddings."""
        first = self.behaviours[pairs[0][1]]
        lead, n, last = len(self._lead(pairs[0][1])), len(pairs[0][0]), len(first.target)
        rows = [(*self._lead(j), *ids, *self.behaviours[j].after, *self.behaviours[j].target[:-1]) for ids, j in pairs]
        ids = torch.tensor(rows, device=self.lm.device)
        scored = min(self.forced or last, last)
        targets = torch.tensor([self.behaviours[j].target[:scored] for _, j in pairs], device=self.lm.device)
        given: dict[str, Tensor] = {"input_ids": ids}
        if embedded is not None:
            own = self.lm.model.get_input_embeddings()(ids).detach()
            given = {"inputs_embeds": torch.cat([own[:, :lead], embedded.to(own.dtype), own[:, lead + n :]], 1)}
        cache = self._cache([j for _, j in pairs]) if first.before and not lead else None
        found: list[Tensor] = []

        def keep(_, __, output):
            found.append((output[0] if isinstance(output, tuple) else output)[:, lead:])

        hooks = [self.lm.model.get_submodule(name).register_forward_hook(keep) for name in self.watched]
        try:
            # the head sees the places that predict the scored target tokens, and no others
            with self.lm.headed(lambda hidden: hidden[:, hidden.shape[1] - last :][:, :scored]):
                logits = self.lm.model(**given, past_key_values=cache, use_cache=cache is not None).logits
        finally:
            for hook in hooks:
                hook.remove()
        assert len(found) == len(self.watched), "a watched block did not speak"
        return Pass(logits, targets, tuple(found))

    def row_losses(self, seen: Pass) -> Tensor:
        """(R,): summed nll of the target, or its mellowmax."""
        if not self.alpha:
            return seen.nll.sum(-1)
        logits = seen.logits.float().gather(-1, seen.targets[..., None])[..., 0]
        return mellowmax(-logits, self.alpha)

    def share(self, active: int) -> float:
        """What a sum of `row_losses` over the behaviours is divided by."""
        return active if self.alpha else sum(len(b.target) for b in self.behaviours[:active])

    @torch.no_grad()
    def losses(self, strings: Sequence[Ids], active: int) -> list[Entry]:
        """The exact loss of every string.  BadModel where one is not finite."""
        total = dict.fromkeys(strings, 0.0)
        solved = dict.fromkeys(strings, True)

        def work(pairs: list[Pair]) -> tuple[list[float], list[bool]]:
            seen = self.run(pairs)
            return self.row_losses(seen).tolist(), seen.solved.tolist()

        for pairs, (losses, hits) in self.over(list(total), active, work):
            for (ids, _), loss, hit in zip(pairs, losses, hits, strict=True):
                total[ids] += loss
                solved[ids] &= hit
        if not np.isfinite(list(total.values())).all():
            raise BadModel(
                f"{self.lm.name or 'the model'} gives losses that are not finite in {self.lm.precision}; "
                'load it with precision = "fp32", or its weights are broken'
            )
        return [Entry(total[ids] / self.share(active), ids, solved[ids]) for ids in strings]

    def gradients(self, ids: Ids, active: int, loss: Callable[[Pass, Sequence[Pair]], Tensor]) -> list[Tensor]:
        """∂loss_j/∂onehot(string) for each behaviour; loss: (pass, its pairs) -> (R,). -> J times (n, V) float32"""
        out: dict[int, Tensor] = {}
        vectors = self.lm.model.get_input_embeddings()(torch.tensor(ids, device=self.lm.device)).detach()

        def work(pairs: list[Pair]) -> Tensor:
            leaf = vectors.expand(len(pairs), *vectors.shape).clone().requires_grad_()
            with torch.enable_grad():
                value = loss(self.run(pairs, leaf), pairs).sum()
            return torch.autograd.grad(value, leaf)[0].float()

        for pairs, gradients in self.over([ids], active, work):
            for (_, j), rows in zip(pairs, gradients, strict=True):
                out[j] = rows @ self.embedding.detach().float().T
        return [out[j] for j in range(active)]

    def slope(self, ids: Ids, active: int) -> Tensor:
        """G of the formula. -> (n, V)"""
        each = self.gradients(ids, active, lambda seen, _: self.row_losses(seen))
        return torch.stack([unit(g) for g in each]).sum(0)


# ── the search ──


def search(
    victim: Victim,
    how: Search,
    mask: Tensor,
    keep: Callable[[Ids], bool],
    bench: Bench = BENCH,
    stage: str = "search",
) -> Found:
    """Look for the string with the least loss on all of the victim's behaviours.

    mask: (V,) tokens that may be drawn.  keep: whether a string may be used, such as that it survives encoding.
    BadRequest where no candidate may, several times over.
    """
    everything = len(victim.behaviours)
    active = 1 if how.growing else everything
    with victim.lm.lowered():
        start = started(victim.lm.template, how.start, how.tokens)
        held = tuple(victim.losses([start], active))
        best, curve, tokens = held[0], [held[0].loss], victim.cost(how.tokens, active)
        first = held[0].loss
        if active < everything:
            first, tokens = victim.losses([start], everything)[0].loss, tokens + victim.cost(how.tokens, everything)
        for step in range(how.steps):
            while held[0].solved and active < everything:
                active += 1
                again = victim.losses([entry.ids for entry in held], active)
                held = tuple(sorted(again, key=lambda entry: entry.loss))
                best, tokens = held[0], tokens + len(held) * victim.cost(how.tokens, active)
            if how.stop and held[0].solved:
                break
            gradient = victim.slope(held[0].ids, active)
            drawn = _drawn(held[0].ids, pools(gradient, mask.to(gradient.device), how.pool), how, step, keep)
            tried = victim.losses(drawn, active)
            tokens += (len(drawn) + 3) * victim.cost(how.tokens, active)
            held = moved(held, min(tried, key=lambda entry: entry.loss), how.buffer)
            best = min(best, held[0], key=lambda entry: entry.loss)
            curve.append(held[0].loss)
            bench.say(stage, step + 1, how.steps, {"loss": held[0].loss})
        if active < everything:
            [best] = victim.losses([best.ids], everything)
    text = decoded(victim.lm.template, best.ids)
    return Found(best.ids, text, best.loss, best.solved, tuple(curve), tokens, first)


def _drawn(ids: Ids, pool: Tensor, how: Search, step: int, keep: Callable[[Ids], bool]) -> list[Ids]:
    """The candidates of one step that may be used."""
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([how.seed, step, attempt])
        kept = [new for new in swaps(ids, pool, how.candidates, how.replaced, rng) if keep(new)]
        if kept:
            return kept
    raise BadRequest(
        f"none of {ATTEMPTS} x {how.candidates} strings of step {step + 1} comes back from its text as the same tokens; "
        f"choose another start than {how.start!r}, more candidates or a larger pool"
    )
