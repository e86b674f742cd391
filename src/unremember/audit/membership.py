"""Was this text in the training data?  One number an example, higher = more likely a member; `separation` compares groups.

    loss        m(x) = mean_t log p_t                       zlib        m(x) / bytes of zlib(x)
    lowercase   m(lower(x)) / m(x)                          ReCaLL      m(x | texts of the holdout) / m(x)
    Min-K%      mean of the lowest K % of log p_t           reference   m(x) − m_ref(x)
    Min-K%++    mean of the lowest K % of z_t = (log p_t − μ_t) / σ_t,   μ_t, σ_t of log p(v), v ~ p(.|x_<t)
    gradient    −‖∇_θ m(x)‖                                 neighbours  m(x) − mean_i m(x~_i), words of x replaced

Yeom et al. 2018; Carlini et al. 2021 (zlib, lowercase, reference); Shi et al. 2024 (Min-K%); Zhang et al. 2025 (Min-K%++);
Mattern et al. 2023; Xie et al. 2024 (ReCaLL); Nasr et al. 2019 (gradient).  Reference code, from descriptions,
not read: locuslab/open-unlearning, iamgroot42/mimir, zjysteven/mink-plus-plus.
Differs: the answer's content tokens, all of them (open-unlearning drops the last, "to ignore EOS").  max(1, floor(K·T)) tokens
(without the 1 short texts have none, and the score is NaN).  σ_t is not clamped at 1e-3, which flattens what the model is sure
or quite unsure of.  The gradient is taken with dropout off, by no touch of the stored gradients.  The reference is one model and
no LiRA (that is `shadows`).  ReCaLL's prefix is never scored.  zlib divides a mean by a length, and of a short text zlib counts
little but its 8 bytes of frame: the score then says so.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass as plain
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadModel
from unremember.folder import fingerprint
from unremember.lm import LM
from unremember.loading import check as check_name
from unremember.loading import load
from unremember.score import Score
from unremember.table import table
from unremember.tokens import Row, pack, packs
from unremember.train import STRICT

MEMBER = "higher = more likely a member"
ROLES = ("forget", "holdout")
SURE = 1e-6  # nats a token: a smaller loss, or a smaller deviation, is as good as this
BUDGET = 512  # places whose whole distributions, and their gradients, are in memory at once
WORD = re.compile(r"[^\W\d_]{2,}|\d+")
SPARE = 4  # more proposals than are needed, as some are the word itself


# ── what a teacher-forced pass gives ──


def lowest(values: np.ndarray, share: float) -> float:
    """Mean of the lowest max(1, floor(share · T)) of the (T,) values; of a single one its value, so that Min-K% is the loss."""
    count = max(1, math.floor(share * len(values) + 1e-9))  # 0.29 · 100 = 28.999…
    return float(np.sort(values)[:count].mean())


def surprise(logp: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """z of each token, (T,) each.  Where σ goes to 0 with the likeliest token, z does, too."""
    return (logp - mean).astype(float) / np.maximum(sd, SURE)


def frame(text: str) -> tuple[int, bool]:
    """Bytes of the compressed text, and whether zlib compressed it at all: a frame takes 8, and short texts grow."""
    raw = text.encode()
    size = len(zlib.compress(raw))
    return size, size < len(raw)


def quotient(above: float, below: float) -> float:
    """above / below of two mean log-probabilities, both at most −1e-6: a perfect memoriser has a large one and no infinite."""
    return min(above, -SURE) / min(below, -SURE)


@dataclass(frozen=True, config=STRICT)
class Membership:
    """The attacks that need nothing but the score table: one pass an example for all of them, a second one for 'lowercase'.

    share: K of 'Min-K' and 'Min-K++', as a share of the tokens; the paper has 0.2, MUSE and open-unlearning take 0.4.
    """

    attack: Literal["loss", "zlib", "lowercase", "Min-K", "Min-K++"]
    share: Annotated[float, Field(gt=0, le=1)] = 0.2
    roles: tuple[str, ...] = ROLES
    needs = ("forget",)
    paper = "Yeom et al. 2018; Carlini et al. 2021; Shi et al. 2024; Zhang et al. 2025"

    @property
    def summary(self) -> str:
        return {
            "loss": "membership by the mean log-probability of the text",
            "zlib": "membership by the log-probability over the length of the compressed text",
            "lowercase": "membership by how much stranger the text is in lower case",
            "Min-K": "membership by the least likely tokens",
            "Min-K++": "membership by the tokens least likely for their place",
        }[self.attack]

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        examples = asked(corpus, self.roles)
        readings = table(lm, lm.template.rows(examples, lm.limit), bench)
        means = [r.loglikelihood() for r in readings]
        note = ""
        if self.attack == "loss":
            values, formula = means, "mean log-probability of the answer's tokens, in nats"
        elif self.attack == "zlib":
            sizes = [frame(x.answer) for x in examples]
            values = [m / size for m, (size, _) in zip(means, sizes, strict=True)]
            formula = "mean log-probability of the answer's tokens over the bytes of its zlib-compressed text"
            if short := sum(not less for _, less in sizes):
                note = f"; {short} of {len(sizes)} texts are too short to compress: there it counts length and frame"
        elif self.attack == "lowercase":
            small = [lm.template.row(x.id, x.prompt.lower(), x.answer.lower(), (), lm.limit) for x in examples]
            values = [quotient(r.loglikelihood(), m) for r, m in zip(table(lm, small, bench), means, strict=True)]
            formula = "mean log-probability of the example in lower case over that of the example"
        elif self.attack == "Min-K":
            values = [lowest(r.logp, self.share) for r in readings]
            formula = f"mean of the lowest {self.share:.0%} of the token log-probabilities, at least one"
        else:
            values = [lowest(surprise(r.logp, r.mean, r.sd), self.share) for r in readings]
            formula = f"mean of the lowest {self.share:.0%} of (log p − μ) / σ, at least one"
        return _score(self.attack, formula + note, examples, values, self.paper)


def asked(corpus: Corpus, roles: Iterable[str]) -> tuple[Example, ...]:
    """The examples of `roles`; BadCorpus where a text of the holdout is, but for case and signs, one that was taught."""
    told: dict[str, str] = {}
    for x in corpus.of("forget", "retain", "replay"):
        told.setdefault(_bare(x), x.id)
    twice = [(x.id, told[_bare(x)]) for x in corpus.of("holdout") if _bare(x) in told]
    if twice:
        raise BadCorpus(
            f"membership: {id!r} of the holdout has the text of {other!r}, which was taught; take it out of one role"
            for id, other in twice
        )
    return corpus.of(*roles)


def _bare(x: Example) -> str:
    return " ".join(re.findall(r"\w+", f"{x.prompt} | {x.answer}".casefold()))


def _score(attack: str, formula: str, examples: Sequence[Example], values: Iterable[float], paper: str) -> Score:
    found = dict(zip((x.id for x in examples), map(float, values), strict=True))
    return Score(f"membership {attack}", formula, MEMBER, found, paper)


# ── a second model, and a prefix ──


@plain(frozen=True)
class Reference:
    """m(x) less that of a model that never saw the text.  It is one model: a score by several is `shadows`.

    reference: an LM, or a name for `load`, loaded when it is first asked.  It must have the same tokens.
    """

    reference: LM | str
    roles: tuple[str, ...] = ROLES
    needs = ("forget",)
    paper = "Carlini et al. 2021"
    summary = "membership by how much likelier the text is than to a reference model"

    def __post_init__(self):
        if isinstance(self.reference, str):
            check_name(self.reference)

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        examples = asked(corpus, self.roles)
        other = self._model(lm)
        rows = lm.template.rows(examples, lm.limit)
        if other.limit and (long := [row.key for row in rows if len(row.ids) > other.limit]):
            raise BadCorpus(
                f"{', '.join(long[:5])}: longer than the reference's {other.limit} tokens; shorten or split"
            )
        own, base = ([r.loglikelihood() for r in table(x, rows, bench)] for x in (lm, other))
        formula = f"mean log-probability of the answer's tokens, less that by the reference {other.name}".rstrip()
        return _score("reference", formula, examples, np.subtract(own, base), self.paper)

    def _model(self, lm: LM) -> LM:
        other = self.reference
        if isinstance(other, str):
            other = _loaded(other, lm.precision, str(lm.device))
        if other.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
            raise BadModel(
                f"the reference {other.name!r} has other tokens than {lm.name!r}, so their means a token cannot be compared; "
                "use a model with the same tokenizer"
            )
        other = replace(other, template=lm.template)
        if other.fingerprint == lm.fingerprint:
            raise BadModel(
                f"the reference {other.name!r} is the model itself, which tells nothing; name one that never saw the texts"
            )
        return other


@lru_cache(maxsize=1)
def _loaded(name: str, precision: str, device: str) -> LM:
    return load(name, template="plain", precision=precision, device=device)


@dataclass(frozen=True, config=STRICT)
class ReCaLL:
    """How much less likely a text gets behind texts that were never taught: a known one falls more.

    shots: how many examples of the holdout stand in front, the same for all; they are not scored.
    """

    shots: Annotated[int, Field(ge=1)] = 4
    seed: int = 0
    roles: tuple[str, ...] = ROLES
    needs = ("forget", "holdout")
    paper = "Xie et al. 2024"
    summary = "membership by how much stranger the text is behind never-taught texts"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        corpus.require("ReCaLL", self.needs)
        shown = self.prefix(corpus)
        names = {x.id for x in shown}
        examples = [x for x in asked(corpus, self.roles) if x.id not in names]
        rows, front = lm.template.rows(examples, lm.limit), lm.template.rows(shown, lm.limit)
        behind = [prefixed(lm, front, row) for row in rows]
        if lm.limit and (long := [row for row in behind if len(row.ids) > lm.limit]):
            most = max(len(row.ids) for row in long)
            raise BadCorpus(
                f"ReCaLL: with {self.shots} texts in front {len(long)} examples are longer than the model's {lm.limit} tokens "
                f"({long[0].key!r} and others, up to {most}); give fewer shots, or shorter texts"
            )
        own, after = ([r.loglikelihood() for r in table(lm, x, bench)] for x in (rows, behind))
        formula = f"mean log-probability behind {len(shown)} texts of the holdout over that of the text alone"
        return _score("ReCaLL", formula, examples, map(quotient, after, own), self.paper)

    def prefix(self, corpus: Corpus) -> list[Example]:
        """The examples in front: chosen by a hash of their ids, whatever their order; BadCorpus if too few are left."""
        held = corpus["holdout"]
        if len(held) < self.shots + 2:
            raise BadCorpus(
                f"ReCaLL takes {self.shots} examples of the holdout as its prefix and needs 2 more to compare with, and there "
                f"are {len(held)}; add some, or give fewer shots"
            )
        return sorted(held, key=lambda x: sha256(f"{self.seed}/{x.id}".encode()).digest())[: self.shots]


def prefixed(lm: LM, shown: Sequence[Row], row: Row) -> Row:
    """`row` behind the texts of `shown`, an empty line between two; the same tokens are scored as before."""
    own = lm.template.context("")  # what the tokenizer itself puts in front of a text, and wants once

    def bare(ids: tuple[int, ...]) -> tuple[int, ...]:
        return ids[len(own) :] if ids[: len(own)] == own else ids

    gap = tuple(lm.tokenizer("\n\n", add_special_tokens=False).input_ids)
    front = own + tuple(i for x in shown for i in (*bare(x.ids[: x.stop]), *gap))
    ids = front + bare(row.ids)
    more = len(ids) - len(row.ids)
    return Row(row.key, ids, row.start + more, row.stop + more, row.span)


# ── neighbours ──


@dataclass(frozen=True, config=STRICT)
class Neighbourhood:
    """The text against itself with a few words replaced; a model that learnt it by heart falls further.

    neighbours: how many at most; the paper has 100.  words: replaced in each.
    fill(text, (start, end), count) -> at least `count` words for that place, best first, as a masked LM gives them; None = the
    model itself is sampled there, among words of the same form.  The original word is never taken.
    """

    neighbours: Annotated[int, Field(ge=1)] = 20
    words: Annotated[int, Field(ge=1)] = 1
    seed: int = 0
    fill: Callable[[str, tuple[int, int], int], Sequence[str]] | None = None
    roles: tuple[str, ...] = ROLES
    needs = ("forget",)
    paper = "Mattern et al. 2023"
    summary = "membership by how much likelier the text is than neighbours of it"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        examples = asked(corpus, self.roles)
        near = self.around(lm, examples, bench)
        rows = lm.template.rows(examples, lm.limit)
        others = [lm.template.row(x.id, x.prompt, text, (), lm.limit) for x in examples for text in near[x.id]]
        readings = iter(table(lm, [*rows, *others], bench))
        own = [next(readings).loglikelihood() for _ in rows]
        values = [
            m - np.mean([next(readings).loglikelihood() for _ in near[x.id]])
            for m, x in zip(own, examples, strict=True)
        ]
        formula = f"mean log-probability of the text, less the mean over {self.neighbours} texts with {self.words} words replaced"
        return _score("neighbourhood", formula, examples, values, self.paper)

    def around(self, lm: LM, examples: Sequence[Example], bench: Bench = BENCH) -> dict[str, list[str]]:
        """id -> different texts, each with other words in `words` places; BadCorpus where a text has too few places."""
        places = {x.id: _places(lm, x) for x in examples}
        if few := [x.id for x in examples if len(places[x.id]) < self.words]:
            raise BadCorpus(
                f"neighbourhood replaces {self.words} words, and {', '.join(few[:5])} ({len(few)} in all) have fewer to replace; "
                "leave them out, or give fewer words"
            )
        count = {x.id: math.ceil(self.neighbours * self.words / len(places[x.id])) + SPARE for x in examples}
        if self.fill:
            proposed = {(x.id, p): tuple(self.fill(x.answer, p, count[x.id])) for x in examples for p in places[x.id]}
        else:
            proposed = _proposals(lm, examples, places, count, self.seed, bench)
        found = {}
        for x in examples:
            pools = {p: _others(x.answer[slice(*p)], proposed[x.id, p]) for p in places[x.id]}
            found[x.id] = self._texts(x, pools)
        if none := [x.id for x in examples if not found[x.id]]:
            raise BadCorpus(
                f"neighbourhood finds no other words for {', '.join(none[:5])} ({len(none)} in all); leave them out, or give a "
                "fill that proposes more"
            )
        return found

    def _texts(self, x: Example, pools: Mapping[tuple[int, int], list[str]]) -> list[str]:
        """Every proposal is used once, from the places that have most of them left: no two texts are alike."""
        rng = _seeded(self.seed, x)
        left = {place: list(words) for place, words in pools.items()}
        texts: list[str] = []
        while len(texts) < self.neighbours:
            open_places = [p for p in left if left[p]]
            if len(open_places) < self.words:
                break
            mixed = [open_places[i] for i in rng.permutation(len(open_places))]
            chosen = sorted(mixed, key=lambda p: -len(left[p]))[: self.words]
            text = x.answer
            for start, end in sorted(chosen, reverse=True):
                text = text[:start] + left[start, end].pop(0) + text[end:]
            texts.append(text)
        return texts


def _seeded(seed: int, x: Example, *more: object) -> np.random.Generator:
    """Randomness that hangs on the text alone, not on what is measured beside it."""
    return np.random.default_rng(zlib.crc32(repr((seed, x.prompt, x.answer, *more)).encode()))


def _places(lm: LM, x: Example) -> list[tuple[int, int]]:
    """Words and numbers of the answer; without any context the first word has nothing to be predicted from."""
    found = [m.span() for m in WORD.finditer(x.answer)]
    return found if lm.template.context(x.prompt) else found[1:]


def _others(original: str, words: Iterable[str]) -> list[str]:
    """The words that are there and not the original, in any case, each once."""
    kept = {}
    for word in words:
        if word.strip() and word.strip().casefold() != original.casefold():
            kept.setdefault(word.strip().casefold(), word.strip())
    return list(kept.values())


def _form(word: str) -> str:
    return "number" if word.isdigit() else "title" if word.istitle() else "upper" if word.isupper() else "lower"


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: Any) -> dict[tuple[str, bool], tuple[np.ndarray, tuple[str, ...]]]:
    """(form, space in front) -> ids of the tokens that are one whole word, and the words."""
    found: dict[tuple[str, bool], dict[int, str]] = {}
    special = set(tokenizer.all_special_ids)
    for i, raw in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if i in special:
            continue
        text = tokenizer.convert_tokens_to_string([raw])
        spaced, word = text.startswith(" ") or raw[:1] in ("Ġ", "▁"), text.strip()
        if WORD.fullmatch(word):
            found.setdefault((_form(word), spaced), {})[i] = word
    return {key: (np.array(list(words)), tuple(words.values())) for key, words in found.items()}


@torch.no_grad()
def _proposals(
    lm: LM,
    examples: Sequence[Example],
    places: Mapping[str, Sequence[tuple[int, int]]],
    count: Mapping[str, int],
    seed: int,
    bench: Bench,
) -> dict[tuple[str, tuple[int, int]], tuple[str, ...]]:
    """Words sampled from the model where each place begins, without putting back: the highest of log p + Gumbel noise."""
    known = bench.memory.setdefault(f"{lm.fingerprint}/fill", {})
    names, rows, wanted = {}, {}, {}
    for x in examples:
        for place in places[x.id]:
            whole = lm.template.row(x.id, x.prompt, x.answer, (place,), lm.limit)
            at = whole.start + whole.span.index(True)
            names[x.id, place] = key = fingerprint(whole.ids, place, count[x.id], seed)
            if key not in known:
                rows[key] = Row(key, whole.ids[: at + 1], at, at + 1, (True,))  # scored: the first token of the word
                wanted[key] = x, place
    for group in packs(list(rows.values()), min(BUDGET, bench.budget)):
        tokens = pack(group).to(lm.device)
        logp = lm.logits(tokens).float().log_softmax(-1).cpu().numpy()  # (N, V), a row each
        if not np.isfinite(logp).any(-1).all():
            raise ValueError(
                f"{lm.name or 'the model'} gives probabilities that are not finite; its weights are broken"
            )
        for key, line in zip(tokens.keys, logp, strict=True):
            x, place = wanted[key]
            known[key] = _sampled(lm, line, x, place, count[x.id], seed)
    return {name: known[key] for name, key in names.items()}


def _sampled(lm: LM, logp: np.ndarray, x: Example, place: tuple[int, int], count: int, seed: int) -> tuple[str, ...]:
    """`count` words of the original's form, fewer where there are fewer.  logp: (V,)"""
    original = x.answer[slice(*place)]
    before = x.answer[: place[0]] or (" " if x.prompt and not lm.template.chat else "")
    words = _vocabulary(lm.tokenizer)
    form = _form(original)
    ids, texts = words.get((form, before.endswith(" "))) or words.get((form, not before.endswith(" "))) or ((), ())
    keep = [i for i, text in enumerate(texts) if text.casefold() != original.casefold()]
    if not keep:
        return ()
    noise = _seeded(seed, x, place).gumbel(size=len(keep))
    order = np.argsort(-(logp[np.asarray(ids)[keep]] + noise), kind="stable")
    return tuple(texts[keep[i]] for i in order[:count])


# ── gradients ──


@dataclass(frozen=True, config=STRICT)
class GradientNorm:
    """Minus the norm of the gradient that the text would give all weights, frozen ones too: what was learnt pulls no more."""

    roles: tuple[str, ...] = ROLES
    needs = ("forget",)
    paper = "Nasr et al. 2019"
    summary = "membership by how little the text would move the weights"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        examples = asked(corpus, self.roles)
        rows = lm.template.rows(examples, lm.limit)
        known = bench.memory.setdefault(f"{lm.fingerprint}/gradient", {})
        keys = [fingerprint(row.ids, row.start, row.stop) for row in rows]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        known.update(zip(new, gradient_norms(lm, list(new.values()), bench), strict=True))
        formula = "minus the norm, over all weights, of the gradient of the mean log-probability of the answer's tokens"
        return _score("gradient", formula, examples, (-known[key] for key in keys), self.paper)


@plain
class _Call:
    """One use of a module's own weights.  added: zeros on its output, whose gradient is the output's."""

    module: nn.Module
    args: tuple
    kwargs: dict
    added: Tensor


def gradient_norms(lm: LM, rows: Sequence[Row], bench: Bench = BENCH) -> list[float]:
    """‖∇_θ mean_t log p_t‖ of each row, many rows in one pass, in float32; mode, flags and stored gradients stay as they are.

    Rows do not see one another, so the gradient of an output at a row's places is that row's own; each weight's share of the
    norm follows from it without a gradient of the weight being kept.
    """
    exact = replace(lm, precision="fp32")
    found: dict[int, float] = {}
    groups: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].ids)):
        if groups and (len(groups[-1]) + 1) * (len(rows[i].ids) - 1) <= min(BUDGET, bench.budget):
            groups[-1].append(i)
        else:
            groups.append([i])
    with torch.inference_mode(False), torch.enable_grad(), _evaluating(lm.model):
        for done, group in enumerate(groups):
            tokens = pack([[rows[i]] for i in group]).to(lm.device)
            with _watched(lm.model) as calls:
                logp = exact.logp(tokens)
                means = tokens.per_row(logp, "answer") / tokens.lengths("answer")
            outer = torch.autograd.grad(means.sum(), [c.added for c in calls], allow_unused=True)
            used = [(c, g) for c, g in zip(calls, outer, strict=True) if g is not None]
            norms = _norms(used, tokens.row, len(group))
            if not torch.isfinite(norms).all():
                raise ValueError(f"{lm.name or 'the model'} has gradients that are not finite; its weights are broken")
            found.update(zip(group, norms.tolist(), strict=True))
            bench.say("gradients", done + 1, len(groups), {})
    return [found[i] for i in range(len(rows))]


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """Dropout off while the context lasts, and every module in its own mode again afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _watched(model: nn.Module) -> Generator[list[_Call]]:
    """Collects the calls of all modules that have weights of their own."""
    calls: list[_Call] = []

    def hook(module, args, kwargs, output):
        if not isinstance(output, Tensor):
            raise BadModel(f"the gradient norm cannot follow {type(module).__name__}, which returns no tensor")
        added = torch.zeros_like(output, requires_grad=True)
        calls.append(_Call(module, args, kwargs, added))
        return output + added

    hooks = [
        m.register_forward_hook(hook, with_kwargs=True)
        for m in model.modules()
        if any(True for _ in m.parameters(False))
    ]
    try:
        yield calls
    finally:
        for handle in hooks:
            handle.remove()


def _norms(used: Sequence[tuple[_Call, Tensor]], row: Tensor, count: int) -> Tensor:
    """(count,) float64.  row: (N,) the row of each place that the head sees."""
    uses: dict[int, list[tuple[_Call, Tensor, str]]] = {}  # a weight -> its uses; tied ones have several
    for call, outer in used:
        for name, weight in call.module.named_parameters(recurse=False):
            uses.setdefault(id(weight), []).append((call, outer, name))
    squares = torch.zeros(count, dtype=torch.float64)
    for at in range(count):
        here = row == at

        def own(call: _Call, value: Any, at: int = at, here: Tensor = here) -> Any:
            """This row's part of what a module saw or gave."""
            if not isinstance(value, Tensor):
                return value
            if call.added.shape[0] == count:
                return value[at : at + 1].detach() if value.ndim and value.shape[0] == count else value.detach()
            if call.added.shape[:2] == (1, len(row)):  # the head sees the scored places of all rows in a line
                return value[:, here].detach()
            raise BadModel(
                f"the gradient norm cannot follow {type(call.module).__name__}, which mixes the rows of a batch"
            )

        for several in uses.values():
            if all(_factored(call.module, name) for call, _, name in several):
                parts = [_factors(call, own(call, call.args[0]), own(call, outer)) for call, outer, _ in several]
                squares[at] += sum(float(_inner(u, v)) for u in parts for v in parts)
            else:
                whole = sum(_gradient(call, own, own(call, outer), name) for call, outer, name in several)
                squares[at] += float(torch.as_tensor(whole).double().square().sum())
    return squares.clamp(min=0).sqrt()


def _factored(module: nn.Module, name: str) -> bool:
    """Whether the weight's gradient is a sum over places of left ⊗ right, so that its norm needs no matrix."""
    return name == "weight" and type(module) in (nn.Linear, nn.Embedding)


def _factors(call: _Call, seen: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """left, right: (K, O) and (K, I) of a linear layer; (K,) ids and (K, I) of an embedding."""
    outer = outer.flatten(0, -2).double()
    if isinstance(call.module, nn.Embedding):
        ids = seen.flatten()
        keep = ids != (-1 if call.module.padding_idx is None else call.module.padding_idx)  # torch gives it no gradient
        return ids[keep], outer[keep]
    return outer, seen.flatten(0, -2).double()


def _inner(u: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor]) -> Tensor:
    """⟨Σ left ⊗ right of u, Σ left ⊗ right of v⟩"""
    right = u[1] @ v[1].T  # (K, K')
    if u[0].ndim == 1 and v[0].ndim == 1:
        left = (u[0][:, None] == v[0]).to(right)
    elif u[0].ndim == 1:
        left = v[0][:, u[0]].T
    elif v[0].ndim == 1:
        left = u[0][:, v[0]]
    else:
        left = u[0] @ v[0].T
    return (left * right).sum()


def _gradient(call: _Call, own: Callable[[_Call, Any], Any], outer: Tensor, name: str) -> Tensor:
    """The gradient of one weight by one row, of any module, by running the module again on that row."""
    weight = dict(call.module.named_parameters(recurse=False))[name].detach().requires_grad_()
    args = tuple(own(call, x) for x in call.args)
    kwargs = {key: own(call, x) for key, x in call.kwargs.items()}
    out = torch.func.functional_call(call.module, {name: weight}, args, kwargs)
    return torch.autograd.grad(out, weight, outer)[0]
