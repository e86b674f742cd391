"""LM: weights, tokenizer and template as one value that knows how to score and to speak."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from unremember import team
from unremember.bench import BENCH
from unremember.decode import Pick, decode, likeliest, plain, reading, roomy, together
from unremember.greatest import Greatest, greatest
from unremember.logp import LogP
from unremember.tokens import Row, Template, Tokens, joined, lanes, pack

SHARED = 256  # places of a lane of prompts
WORTH = 128  # tokens to be said for which the head's stand-in is made


@dataclass(frozen=True)
class LM:
    """A causal language model with what is needed to ask it.

    precision: 'bf16' runs matrix products in bfloat16 (weights stay as they are), 'fp32' runs all in float32.
    """

    model: Any  # a transformers causal language model, or a peft one around it
    template: Template
    precision: str = "fp32"
    name: str = ""
    pick: Pick = likeliest  # how generation chooses a token
    joint: _Joint | None = field(default=None, repr=False)  # micro-batches that share a pass

    @property
    def tokenizer(self):
        return self.template.tokenizer

    @property
    def stop(self) -> set[int]:
        """The tokens that end a text."""
        ends = self.model.generation_config.eos_token_id
        return {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    @property
    def limit(self) -> int:
        """The longest sequence, in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or 0)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of weights, tokenizer, template, precision and `pick`.  Do not ask before training has ended."""
        digest = blake2b(digest_size=12)
        for name, weight in sorted(self.model.state_dict().items()):
            flat = weight.detach().cpu().contiguous().view(torch.uint8)
            digest.update(name.encode())
            digest.update(memoryview(flat.reshape(-1).numpy()))
        said = self.template.row("", "What?", "That.")
        digest.update(json.dumps([self.precision, len(self.tokenizer), said.ids]).encode())
        if self.pick is not likeliest:
            digest.update(repr(self.pick).encode())
        return digest.hexdigest()

    def copy(self, moving: Collection[str] | None = None) -> LM:
        """An LM with weights of its own; with `moving`, of those so named alone: the rest is shared, to be read only."""
        shared = {} if moving is None else {n: w for n, w in self.model.named_parameters() if n not in moving}
        known = {id(w): nn.Parameter(w.detach(), requires_grad=False) for w in shared.values()}
        return replace(self, model=copy.deepcopy(self.model, known))

    def untied(self) -> LM:
        """A copy whose head has weights of its own, so that it can change without the token table."""
        lm = self.copy()
        head = lm.model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        lm.model.config.tie_word_embeddings = False
        return lm

    def adapted(self, rank: int, alpha: int, targets: str = "all-linear") -> LM:
        """The same weights under a fresh LoRA adapter (peft), which starts as the identity; they are frozen, and shared.

        Merging an adapter writes into its base: merge a `copy`, or what `train` gives.
        """
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
        return replace(self, model=get_peft_model(self.copy(()).model, config).eval())

    def together(self, micros: Sequence[Tokens]) -> LM:
        """The same, for one step: whoever first asks it for one of these micro-batches, with gradients, has all of them read.

        One pass has larger products, and casts and adds up each weight's gradient once.  To be dropped after the step.
        """
        return replace(self, joint=_Joint(tuple(micros))) if len(micros) > 1 else self

    def logits(self, tokens: Tokens, cache: Any = None) -> Tensor:
        """Logits that predict each scored token, and no others. -> (N, V)

        The head sees only the N places that are needed (a hook narrows its input), so no (T, V) matrix ever exists.
        Without gradients the head runs in the weights' own precision: bfloat16 logits would tie close candidates.
        cache: an empty one of transformers, which gets keys and values of every place.
        """
        if self.joint and torch.is_grad_enabled() and any(t is tokens for t in self.joint.micros):
            return self.joint.logits(self, tokens)
        with self.headed(lambda hidden: hidden.flatten(0, 1)[tokens.source][None]):
            out = self.model(
                input_ids=tokens.ids,
                position_ids=tokens.positions,
                attention_mask=_additive(tokens.visible, self.attention_dtype),
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return out.logits[0]

    def hidden(self, tokens: Tokens, block: int) -> Tensor:
        """Residual stream behind block `block` at the places that predict the scored tokens. -> (N, H)

        The forward pass ends there, upper blocks left out and the head given nothing.
        """
        found: list[Tensor] = []

        def keep(_, __, output):
            found.append(output[0] if isinstance(output, tuple) else output)

        handle = team.blocks(self.model)[block].register_forward_hook(keep)
        try:
            with self.headed(lambda hidden: hidden[:, :0]), team.cut(self.model, block):
                self.model(
                    input_ids=tokens.ids,
                    position_ids=tokens.positions,
                    attention_mask=_additive(tokens.visible, self.attention_dtype),
                    use_cache=False,
                )
        finally:
            handle.remove()
        return found[0].flatten(0, 1)[tokens.source]

    @contextmanager
    def headed(self, select: Callable[[Tensor], Tensor]) -> Generator[None]:
        """Autocast for the body; the head sees `select(hidden)`, and keeps its weights' precision without gradients."""
        head, kind = self.model.get_output_embeddings(), self.device.type
        exact, lower = not torch.is_grad_enabled(), self.precision == "bf16"

        def narrow(_, inputs):
            if exact:
                torch.set_autocast_enabled(kind, False)
            hidden = select(inputs[0])
            return (hidden.to(head.weight.dtype) if exact else hidden,)

        def widen(*_):
            torch.set_autocast_enabled(kind, lower)

        hooks = [head.register_forward_pre_hook(narrow), head.register_forward_hook(widen)]
        try:
            # a copy of a weight that was made without gradients must not serve a pass that wants them
            with torch.autocast(kind, torch.bfloat16, enabled=lower, cache_enabled=not exact):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def casts(self) -> Generator[None]:
        """While the context lasts, passes with gradients share autocast's bfloat16 copies of the weights: one cast a step.

        Weights must not change inside.  Sharded weights are cast at every pass: copies that stay would be whole ones.
        """
        with torch.autocast(self.device.type, enabled=False) if team.size() == 1 else nullcontext():
            yield  # autocast keeps its copies until the outermost context ends

    @contextmanager
    def lowered(self) -> Generator[None]:
        """While the context lasts, linear weights are bfloat16 already, where autocast would make them so at every call.

        Changes no number: the head, norms and embeddings stay, and the same rounding happens once.  For reading only.
        """
        head = self.model.get_output_embeddings()
        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m is not head]
        whole = not any(hasattr(m.weight, "full_tensor") for m in layers)  # a sharded weight is not ours to replace
        full = [m.weight.data for m in layers] if self.precision == "bf16" and whole else []
        try:
            with torch.inference_mode(False):
                for layer, weight in zip(layers, full, strict=False):
                    layer.weight.data = weight.to(torch.bfloat16)
            yield
        finally:
            for layer, weight in zip(layers, full, strict=False):
                layer.weight.data = weight

    @property
    def attention_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else next(self.model.parameters()).dtype

    def logp(self, tokens: Tokens) -> Tensor:
        """Log-probability of each scored token, float32. -> (N,)"""
        logits = self.logits(tokens)
        if logits.dtype == torch.float32:  # nothing to spare: no copy is made
            return -nn.functional.cross_entropy(logits, tokens.target, reduction="none")
        return LogP.apply(logits, tokens.target)

    def step(self, ids: Tensor, seen: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits behind the last of ids (B, T), whose keys and values go into the cache. -> (B, V)

        seen: (B, S), 1 for each place of the cache and of ids that is no padding.
        """
        with self.headed(lambda hidden: hidden[:, -1:]):
            out = self.model(
                input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
            )
        return out.logits[:, -1]

    def next(self, ids: Tensor, seen: Tensor, positions: Tensor, cache: Any, *, head: Greatest | None) -> Tensor:
        """The token behind the last of ids, as `pick` chooses it; as `step`. -> (B,)"""
        if self.pick is not likeliest:
            return self.pick(self.step(ids, seen, positions, cache), ids.tolist(), (positions[:, -1] + 1).tolist())
        asked = {"input_ids": ids, "attention_mask": seen, "position_ids": positions, "past_key_values": cache}
        return self.best(head, lambda hidden: hidden[:, -1], asked)[1]

    def best(
        self, head: Greatest | None, select: Callable[[Tensor], Tensor], asked: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The greatest logit and its token at each place of `select(hidden)` (N, H). -> (N,), (N,)

        head: `greatest()`, made once for many calls; asked: what transformers' model takes.
        """
        if head is None:
            with self.headed(lambda hidden: select(hidden)[None]):
                values, tokens = self.model(**asked, use_cache=True).logits[0].max(-1)
            return values, tokens
        found = []

        def keep(hidden: Tensor) -> Tensor:
            found.append(head(select(hidden)))
            return hidden[:, :0]

        with self.headed(keep):
            self.model(**asked, use_cache=True)
        return found[0]

    def greatest(self) -> Greatest | None:
        """What stands in for the head in `best`, where that saves something."""
        return greatest(self.model) if self.precision == "bf16" else None

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[tuple[int, ...]], new: int | Sequence[int], batch: int = BENCH.batch
    ) -> list[tuple[int, ...]]:
        """Continuations of at most `new` tokens, without the end mark, in the order of `prompts`; greedy unless `pick` is not.

        Prompts are sorted by length, read as tries and decoded together, and rows that are done leave.
        new: for all, or for each.  batch: prompts at a time, at most (see `decode.together`).
        Raises ValueError for a prompt without a token.
        """
        if not all(prompts):
            raise ValueError("a prompt has no token, so there is nothing to go on from; ask something")
        asked = list(zip(prompts, new if isinstance(new, Sequence) else [new] * len(prompts), strict=True))
        out: list[tuple[int, ...]] = [()] * len(prompts)
        order = sorted((i for i, (_, most) in enumerate(asked) if most > 0), key=lambda i: len(prompts[i]))
        follow = sum(asked[i][1] - 1 for i in order)
        head = self.greatest() if follow > WORTH and self.pick is likeliest else None
        with self.lowered():
            while order:
                count = together([(len(asked[i][0]), asked[i][1]) for i in order], batch)
                part, order = order[:count], order[count:]
                for i, said in zip(part, self._said([asked[i] for i in part], head), strict=True):
                    out[i] = tuple(said)
        return out

    def _said(self, asked: Sequence[tuple[tuple[int, ...], int]], head: Greatest | None) -> list[list[int]]:
        prompts, news = zip(*asked, strict=True)
        cache, seen, logits = (self._tries if plain(self.model.config) else self._padded)(prompts, max(news))
        tokens = self.pick(logits, [list(ids) for ids in prompts], [len(ids) for ids in prompts])
        stop = self.stop
        first = [[] if t in stop else [t] for t in tokens.tolist()]
        left = [new - 1 if said else 0 for new, said in zip(news, first, strict=True)]
        rest = decode(partial(self.next, head=head), cache, seen, tokens, left, stop)
        return [a + b for a, b in zip(first, rest, strict=True)]

    def _tries(self, prompts: Sequence[tuple[int, ...]], new: int) -> tuple[Any, Tensor, Tensor]:
        """Prompts read as tries: what they share, such as a system prompt, is computed once.

        -> a cache of each prompt with padding on the left, what is no padding (B, S), logits behind each (B, V).
        """
        rows = [Row(str(i), (*ids, 0), len(ids), len(ids), ()) for i, ids in enumerate(prompts)]
        tokens = pack(lanes(rows, SHARED)).to(self.device)
        read = reading(self.model.config, self.attention_dtype)
        logits = self.logits(tokens, read)
        longest, width = max(map(len, prompts)), tokens.ids.shape[1]
        places = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.device)
        seen = torch.zeros_like(places)
        for key, last in zip(tokens.keys, tokens.source.tolist(), strict=True):
            lane, end = divmod(last, width)
            path = tokens.visible[lane, 0, end].nonzero()[:, 0]  # its ancestors, in the order of their depth
            places[int(key), longest - len(path) :] = lane * width + path
            seen[int(key), longest - len(path) :] = 1
        order = torch.tensor([int(key) for key in tokens.keys], device=self.device)
        return (
            roomy(read, places, new),
            seen,
            torch.empty_like(logits).index_copy_(0, order, logits),
        )

    def _padded(self, prompts: Sequence[tuple[int, ...]], new: int) -> tuple[Any, Tensor, Tensor]:
        """As `_tries`, for layers with windows or recurrent state, which know no tries: each prompt in full."""
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.device)
        seen = torch.zeros_like(ids)
        for at, prompt in enumerate(prompts):
            ids[at, longest - len(prompt) :] = torch.tensor(prompt)
            seen[at, longest - len(prompt) :] = 1
        cache = DynamicCache(config=self.model.config)
        return cache, seen, self.step(ids, seen, (seen.cumsum(1) - 1).clamp(min=0), cache)

    def answer(self, prompts: Sequence[str], new: int, batch: int = BENCH.batch) -> list[str]:
        """What the model says to each prompt, as text."""
        coded = self.generate([self.template.context(p) for p in prompts], new, batch)
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in coded]

    @contextmanager
    def at(self, block: str, edit: Callable[[Tensor], Tensor]) -> Generator[LM]:
        """While the context lasts, the output of sub-module `block` passes through `edit`; the hook always comes off."""

        def hook(_, __, output):
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        handle = self.model.get_submodule(block).register_forward_hook(hook)
        try:
            yield self
        finally:
            handle.remove()

    def save(self, folder: Path) -> None:
        """Write weights (safetensors; the adapter alone for a LoRA model), tokenizer and generation settings to `folder`."""
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)


@dataclass
class _Joint:
    """Micro-batches of a step, and their logits once they have been read."""

    micros: tuple[Tokens, ...]
    parts: tuple[Tensor, ...] = ()

    def logits(self, lm: LM, tokens: Tokens) -> Tensor:
        if not self.parts:
            whole = replace(lm, joint=None).logits(joined(self.micros))
            self.parts = whole.split([len(t.row) for t in self.micros])
        return next(part for t, part in zip(self.micros, self.parts, strict=True) if t is tokens)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean 'may see' matrix as the additive mask that every attention implementation accepts."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
