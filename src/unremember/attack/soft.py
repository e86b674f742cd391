"""Soft prompt: a handful of vectors, where words would stand, optimised until the model says what it was to forget.

    P = argmin_P Σ_j −log p_θ(y_j | x_j, P) / Σ_j T_j,    P (n, H) embeddings behind the question, Adam; the best P of all steps

Schwinn et al. 2024 (arXiv 2402.09063), attacks in embedding space; no code read.  The upper end of what `suffix` looks for.
How the auditor reads it: the questions get n rare words that occur nowhere in the corpus, and in a copy of the model a hook on
the embedding puts the vectors in their place.  The copy is a plain LM: packed rows, generation and copies work as ever, the
vectors are buffers of the embedding and so part of its fingerprint, and only questions with those words are read differently.
Differs: Adam with a constant rate, for signed descent there; one P for many questions, for one a question there.  n · H numbers
can hold the answers themselves, so what P was fitted to says nothing: with 'other', the default, the other half is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unremember.attack.fair import KNOWN
from unremember.attack.gcg import Ids, Pair, Victim, decoded, survives
from unremember.attack.suffix import (
    ATTACKED,
    Generalisation,
    Target,
    bar,
    falsified,
    folds,
    groups,
    once,
    refuse,
    slots,
)
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadModel, BadRequest
from unremember.lm import LM
from unremember.train import STRICT


class Stand(nn.Module):
    """A forward hook for an embedding: where the ids of `words` stand, `vectors` come out.

    Both are buffers of the embedding itself, so that a copy of the model takes its own along.
    """

    def forward(self, embedding: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        words, vectors = embedding.get_buffer("soft_words"), embedding.get_buffer("soft_vectors")  # (W,), (W, H)
        hit = torch.eq(inputs[0][..., None], words)  # (..., W)
        place = hit.int().argmax(-1)  # each word stands for one vector
        return torch.where(hit.any(-1, keepdim=True), vectors[place].to(output.dtype), output)


def softened(lm: LM, words: Sequence[int], vectors: Tensor) -> LM:
    """A copy of `lm` in which these words mean these vectors. vectors: (W, H)"""
    assert len(set(words)) == len(words) == len(vectors), "each word stands for one vector"
    lm = lm.copy()
    embedding = lm.model.get_input_embeddings()
    embedding.register_buffer("soft_words", torch.tensor(words, device=lm.device))
    embedding.register_buffer("soft_vectors", vectors.detach().clone().to(lm.device))
    embedding.register_forward_hook(Stand())
    return lm


def spare(lm: LM, corpus: Corpus, count: int, mask: Tensor) -> Ids:
    """`count` whole words of the vocabulary that no text of the corpus contains, the last (rarest) first.

    mask: (V,) tokens that may be used at all.  BadModel where there are too few.
    """
    code = lm.tokenizer
    texts = [t for x in corpus.of(*corpus) for t in (x.prompt, x.answer, *x.paraphrases, *x.distractors, x.rewording)]
    texts += [" " + t for t in texts]
    used = {i for ids in code(texts, add_special_tokens=False).input_ids for i in ids}
    words = []
    for i in reversed(mask.nonzero()[:, 0].tolist()):
        text = decoded(lm.template, [i])
        if i not in used and text[:1] == " " and text[1:].isalpha() and len(text) > 3:
            words.append(i)
            if len(words) == count:
                return tuple(words)
    raise BadModel(
        f"{lm.name or 'the model'} has {len(words)} whole words that the corpus does not use, and the vectors need {count} to "
        "stand for; take fewer tokens"
    )


@dataclass(frozen=True, config=STRICT)
class Soft:
    """tokens: vectors behind the question.  steps, lr: of Adam; lr is in units of the embeddings' own spread.
    generalisation, target: as in `suffix`, 'wrong' not for a run; the halves are those of a role.  seed: which words the vectors
    start as.
    """

    tokens: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    lr: Annotated[float, Field(gt=0)] = 0.1
    generalisation: Generalisation = "other"
    target: Target = "answer"
    seed: Annotated[int, Field(ge=0)] = 0

    needs = ("forget",)
    paper = "Schwinn et al. 2024, arXiv 2402.09063"
    summary = "optimised vectors behind the question, no words at all"
    alone = True

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where there is nothing to ask or to be shown, or where a run would score false answers."""
        refuse("soft", self.needs, corpus, self.generalisation, self.target, lambda _: "", run=True)

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        refuse("soft", self.needs, corpus, self.generalisation, self.target, lambda _: "")
        mask, _ = bar(lm, corpus)
        corpus = falsified(corpus) if self.target == "wrong" else corpus
        everybody = groups(corpus, lambda _: "")
        parts = [(role, fold) for role, rows in everybody for fold in folds(rows, self.generalisation)]
        words = spare(lm, corpus, self.tokens * len(parts), mask)
        vectors: list[Tensor] = []
        asked: dict[str, Example] = {}
        losses: list[tuple[float, float]] = []
        for i, (role, fold) in enumerate(parts):
            mine = words[i * self.tokens : (i + 1) * self.tokens]
            best, before, after = self._fitted(lm, fold.shown, mine, bench)
            vectors.append(best)
            losses += [(before, after)] if role == "forget" else []
            text = decoded(lm.template, mine)
            places = slots(lm.template, fold.asked, mine, lambda x: (x.prompt, ""), lm.limit)
            assert survives(lm.template, places, mine), "the words do not come back from their text"
            asked |= {x.id: replace(x, prompt=x.prompt + text) for x in fold.asked}
        for when, mean in zip(("before", "after"), np.mean(losses, axis=0), strict=True):
            bench.notes[f"loss {when}, nats a token"] = float(mean)
        seen = {role: tuple(asked.get(x.id, x) for x in corpus.of(role)) for role in ATTACKED if corpus.of(role)}
        return softened(lm, words, torch.cat(vectors)), Corpus({**corpus, **seen})

    def _fitted(self, lm: LM, shown: Sequence[Example], words: Ids, bench: Bench) -> tuple[Tensor, float, float]:
        """The best vectors of all steps (n, H), and the loss with the first of them and with these."""
        victim = Victim(lm, once(slots(lm.template, shown, words, lambda x: (x.prompt, ""), lm.limit)), bench.budget)
        table = victim.embedding.detach().float()
        drawn = np.random.default_rng(self.seed).choice(len(table), self.tokens, replace=len(table) < self.tokens)
        with lm.lowered():
            vectors = table[torch.from_numpy(drawn).to(table.device)].clone().requires_grad_()
            optimiser = torch.optim.Adam([vectors], lr=self.lr * float(table.std()))
            best, least, first = vectors.detach().clone(), float("inf"), 0.0
            for step in range(self.steps + 1):
                loss = self._loss(victim, words, vectors)
                if not np.isfinite(loss):
                    raise BadModel(
                        f'{lm.name or "the model"} gives losses that are not finite; take precision = "fp32" or a smaller lr'
                    )
                first = loss if step == 0 else first
                if loss < least:
                    best, least = vectors.detach().clone(), loss
                if step < self.steps:
                    optimiser.step()
                    optimiser.zero_grad()
                bench.say("soft", step, self.steps, {"loss": loss})
        if least >= first > KNOWN:  # a model that knows them by heart may need no vectors
            raise BadRequest(
                f"{self.steps} step(s) at lr = {self.lr} leave the loss at {first:.3g} or above, so nothing was attacked; "
                "take another lr"
            )
        return best, first, least

    def _loss(self, victim: Victim, words: Ids, vectors: Tensor) -> float:
        """Mean nll a target token; adds its gradient to `vectors`."""
        everything, total = len(victim.behaviours), 0.0

        def work(pairs: list[Pair]) -> tuple[float, Tensor]:
            seen = victim.run(pairs, vectors.expand(len(pairs), *vectors.shape))
            loss = victim.row_losses(seen).sum() / victim.share(everything)
            return float(loss.detach()), torch.autograd.grad(loss, vectors)[0]

        for _, (loss, gradient) in victim.over([words], everything, work):
            vectors.grad = gradient if vectors.grad is None else vectors.grad + gradient
            total += loss
        return total
