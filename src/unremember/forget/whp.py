"""Who's Harry Potter: learn, at every place of a text, what a model that never read it would have said there.

    v_gen[t] = v_b[π(t)] − alpha · ReLU( v_r[t] − v_b[π(t)] )          over the whole vocabulary
    loss = mean_{t in M} CE( softmax(v_gen[t]), p_θ(· | x_≤t) )
         + retain · mean_tokens nll_θ(retain)  +  kl · mean_tokens KL(p_ref ‖ p_θ)(retain)

v_r: logits of a model that was trained further on the text x; v_b: those of the model that came in, on x with its anchors
replaced; π: place of x -> place of the replaced text whose next token is the image of the next token of x; M: the places that
predict an answer token with an image (a passage is an answer without a prompt).  Two rules against "Harry said: my name is Jon":
  i.  tokens of an anchor that occurred before in the same example get no label (the prompt counts);
  ii. once an anchor was replaced, the logits of its replacement's words are lowered by 5.
Eldan, Russinovich 2023 (arXiv 2310.02238), section 2.  No training code was published; v_gen alone, as a decoder over two models:
jaechan-repo/muse_bench@54719c5 `whos_harry_potter.py`.
Differs: π follows the token that is predicted, not the last one that is seen, so that what comes behind a replaced term has a
label whatever the term's length in tokens; rule ii lowers the token that begins a word, in every case and with and without a
blank, and leaves alone words that the text has itself; reinforcing must lower the text's NLL, or it is refused; labels are
read once, in float32, and kept: as the `top` likeliest tokens and the rest as one, as the likeliest ("hard"), or whole ("soft").
Of a text known by heart there is little left to raise; there the anchors must do most of the work.  The frame that the text
shares with others is lowered with it: give `retain` a weight where such others must stay.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field, PlainValidator
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from unremember import team
from unremember.anchors import SUFFIXES, Anchors, Translation, folded, read, rules, words
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadRequest
from unremember.folder import fingerprint
from unremember.forget.descend import descend
from unremember.forget.retain import keeping, needed
from unremember.lm import LM
from unremember.sites import EVERYWHERE, Sites
from unremember.table import read as readings
from unremember.tokens import Row, Template, Tokens, lanes, pack, packs
from unremember.train import STRICT, Objective, Plan, train

LOWERED = 5.0  # logits, rule ii; the paper names no number
BUDGET = 512  # places whose whole distributions are in memory at once
WIDTH = 256  # places a lane

Source = Callable[[Sequence[Example]], Mapping[str, str]]


def generic(baseline: Tensor, reinforced: Tensor, alpha: float) -> Tensor:
    """What training on the text raised is lowered, the rest is left as it was. (…, V) logits -> (…, V)

    With both models on the same text these are the logits of the decoder that leaves the weights alone.
    """
    return baseline - alpha * F.relu(reinforced - baseline)


def soft_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy against a whole distribution. logits, label: (N, V), the latter log-probabilities -> (N,)"""
    return -(label.exp() * F.log_softmax(logits, -1)).sum(-1)


def coarse_loss(logits: Tensor, ids: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy over the tokens `ids` and, as one outcome, all others.

    logits: (N, V); ids: (N, K) different tokens, K < V; label: (N, K) their log-probabilities, the rest is what is left -> (N,)
    """
    total = logits.logsumexp(-1)
    head = (label.exp() * (logits.gather(1, ids) - total[:, None])).sum(-1)
    rest = logits.scatter(1, ids, float("-inf")).logsumexp(-1) - total
    return -head - (1 - label.exp().sum(-1)).clamp(min=0) * rest


def _source(value: Any) -> str | Source:
    if callable(value) or (isinstance(value, str) and (value in ("", "rules") or value.endswith(SUFFIXES))):
        return value
    raise ValueError("give 'rules', the path of a .json or .toml file, a callable, or '' for no anchors")


def _endless(plan: Plan) -> Plan:
    if plan.stop != "never":
        raise ValueError("reinforcing takes all of its steps; leave stop at 'never'")
    return plan


@dataclass(frozen=True, config=STRICT)
class WHP:
    """Generic labels from a reinforced model and an anchor dictionary.

    reinforce: how the copy is trained on the text.  labels: 'topk' (`top` tokens and the rest), 'soft' or 'hard'.
    anchors: '' = none, reinforcement alone; 'rules'; the path of a JSON or TOML file; or examples -> {term: replacement}.
    consistent: rules i and ii.
    """

    plan: Plan
    reinforce: Annotated[Plan, AfterValidator(_endless)]
    alpha: Annotated[float, Field(ge=0)]
    labels: Literal["soft", "hard", "topk"] = "topk"
    top: Annotated[int, Field(ge=1)] = 64
    anchors: Annotated[str | Source, PlainValidator(_source)] = ""
    consistent: bool = True
    retain: Annotated[float, Field(ge=0)] = 0.0
    kl: Annotated[float, Field(ge=0)] = 0.0

    paper = "Eldan, Russinovich 2023, arXiv 2310.02238"
    summary = "learn what a model would say that never read the text: a reinforced copy and replaced names tell"

    @property
    def needs(self) -> tuple[str, ...]:
        return needed(self.retain, self.kl)

    def __call__(self, lm: LM, corpus: Corpus, sites: Sites = EVERYWHERE, bench: Bench = BENCH) -> LM:
        return descend(self, lm, corpus, sites, bench)

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where a role is missing; BadRequest for a dictionary that cannot be used, or that has no term in common."""
        corpus.require("whp", self.needs)
        self.dictionary(corpus["forget"])

    @property
    def files(self) -> tuple[str, ...]:
        """Files whose content the result depends on."""
        return (self.anchors,) if isinstance(self.anchors, str) and self.anchors not in ("", "rules") else ()

    def dictionary(self, examples: Sequence[Example]) -> Anchors:
        """The anchors for these examples; warns where the rules find none and only reinforcement is left."""
        if self.anchors == "":
            if not self.alpha:
                raise BadRequest("whp with alpha = 0 and no anchors asks for the model as it is; set one of them")
            return Anchors({})
        if self.anchors == "rules":
            found = rules(examples, self.plan.seed)
        else:
            found = read(Path(self.anchors)) if isinstance(self.anchors, str) else Anchors(self.anchors(examples))
        if any(found.translate(text).swaps for x in examples for text in (x.prompt, x.answer)):
            return found
        if self.anchors != "rules":
            raise BadRequest(
                f"whp: none of the {len(found.terms)} anchors stands in the forget texts; give terms that do, or anchors = ''"
            )
        if not self.alpha:
            raise BadCorpus("whp with alpha = 0 needs anchors, and the rules find no name in the forget texts")
        warnings.warn("whp: the rules find no anchor in the forget texts; reinforcement alone is left", stacklevel=2)
        return found

    def terms(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> tuple[dict[str, list[Row]], Objective]:
        pools, keep = keeping(lm, corpus, self.retain, self.kl)
        anchors = self.dictionary(corpus["forget"])
        matches = [match(lm.template, x, anchors, self.consistent, lm.limit) for x in corpus["forget"]]
        if not any(any(row.span) for row in (m.labelled for m in matches)):
            raise BadCorpus(
                "whp: no token of the forget texts has a label, all are anchors; take terms off the dictionary"
            )
        labels = self._labels(lm, matches, bench)
        pools = {**pools, "forget": [m.labelled for m in matches]}  # their spans are the labelled tokens, M

        def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
            if tokens.role != "forget":
                return keep(lm, tokens)
            ids, label = (
                torch.cat(part).to(tokens.ids.device) for part in zip(*map(labels.get, tokens.keys), strict=True)
            )
            logits, label = lm.logits(tokens).float(), label.float()
            loss = soft_loss(logits, label) if self.labels == "soft" else coarse_loss(logits, ids.long(), label)
            return {"whp": tokens.per_row(loss, "span").sum() / max(tokens.step_tokens["span"], 1)}

        return pools, objective

    def _labels(self, lm: LM, matches: Sequence[Match], bench: Bench) -> dict[str, tuple[Tensor, Tensor]]:
        """Row key -> ids (T, K) and log-probabilities (T, K) at its scored tokens; kept in bench.folder while there is one."""
        made_from = fingerprint(
            lm.fingerprint,
            [repr(self.reinforce), self.alpha, self.labels, self.top],
            [[m.row.key, m.row.ids, m.other.ids, m.images, m.lowered] for m in matches],
        )
        path = bench.folder / "labels.safetensors" if bench.folder else None
        kept = _kept(path, made_from) if path else {}
        if team.total({"kept": float(bool(kept))})["kept"] == team.size():  # all or none
            return kept
        found = self._read(lm, self.reinforced(lm, [m.row for m in matches], bench) if self.alpha else lm, matches)
        if path and team.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f".{path.name}")
            flat = {f"{part}/{key}": x.contiguous() for key, pair in found.items() for part, x in enumerate(pair)}
            save_file(flat, fresh, metadata={"fingerprint": made_from})
            os.replace(fresh, path)
        team.wait()
        return found

    def reinforced(self, lm: LM, rows: Sequence[Row], bench: Bench = BENCH) -> LM:
        """A copy that was trained further on the answers of `rows`; BadRequest where it does not know them better than before."""

        def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
            return {"reinforce": tokens.per_row(-lm.logp(tokens), "answer").sum() / tokens.step_tokens["answer"]}

        inside = replace(bench, folder=bench.folder / "reinforce" if bench.folder else None)
        result = train(lm, objective, {"forget": rows}, self.reinforce, bench=inside, stage="reinforce")
        before, after = (_nll(x, rows, bench) for x in (lm, result))
        if not after < before:
            raise BadRequest(
                f"whp: reinforcing left the forget texts at {after:.3g} nats a token, from {before:.3g}; what it did not raise "
                "cannot be lowered. Change forget.reinforce: more steps, or another learning rate (lower, if it rose)"
            )
        return result

    @torch.no_grad()
    def _read(self, lm: LM, reinforced: LM, matches: Sequence[Match]) -> dict[str, tuple[Tensor, Tensor]]:
        """The labels, some rows at a time: each model goes over each row once."""
        lm, reinforced = (
            replace(lm, precision="fp32"),
            replace(reinforced, precision="fp32"),
        )  # differences of large numbers
        known = {m.row.key: m for m in matches}
        found = {}
        for group in packs([m.row for m in matches], BUDGET):
            rows = [known[row.key] for lane in group for row in lane]
            raised = _logits(reinforced, [m.row for m in rows]) if self.alpha else {}
            baseline = _logits(lm, [m.other for m in rows])
            for m in rows:
                at = torch.tensor([i for i, image in enumerate(m.images) if image >= 0], dtype=torch.long)
                base = baseline[m.other.key][torch.tensor([i for i in m.images if i >= 0], dtype=torch.long)]  # (M, V)
                wanted = generic(base, raised[m.row.key][at], self.alpha) if self.alpha else base.clone()
                wanted[:, len(lm.tokenizer) :] = float("-inf")  # columns that pad the vocabulary
                for line, place in enumerate(at.tolist()):
                    wanted[line, list(m.lowered[place])] -= LOWERED
                found[m.row.key] = self._spread(at, wanted.log_softmax(-1), len(m.row.ids) - m.row.start)
        return found

    def _spread(self, at: Tensor, logp: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The labels logp (M, V) at places `at` of a row with `length` scored tokens; elsewhere something finite, never used."""
        size = logp.shape[1]
        if self.labels == "soft":
            whole = torch.zeros(length, size, dtype=torch.float16)
            whole[at] = logp.half()
            return torch.zeros(length, 0, dtype=torch.int32), whole
        best = logp.topk(1 if self.labels == "hard" else min(self.top, size - 1), -1)
        width = best.values.shape[1]
        ids, label = torch.arange(width, dtype=torch.int32).repeat(length, 1), torch.zeros(length, width)
        ids[at] = best.indices.int()
        label[at] = torch.zeros_like(best.values) if self.labels == "hard" else best.values
        return ids, label


@plain(frozen=True)
class Match:
    """One example and its translation.

    images: for each answer token of `row`, that token of `other` whose prediction is its label, -1 = no label.
    lowered: for each, the token ids that rule ii lowers.
    """

    row: Row
    other: Row
    images: tuple[int, ...]
    lowered: tuple[tuple[int, ...], ...]

    @property
    def labelled(self) -> Row:
        """The row with its labelled tokens as its span."""
        return replace(self.row, span=tuple(image >= 0 for image in self.images))


def match(template: Template, x: Example, anchors: Anchors, consistent: bool, limit: int = 0) -> Match:
    """Translate an example, find for each of its answer tokens the image, and apply rules i and ii."""
    prompt, answer = anchors.translate(x.prompt), anchors.translate(x.answer)
    row = template.row(x.id, x.prompt, x.answer, x.spans, limit)
    if not (prompt.swaps or answer.swaps):
        length = row.stop - row.start
        return Match(row, row, tuple(range(length)), ((),) * length)
    other = template.row(f"{x.id} (translated)", prompt.text, answer.text, (), limit)
    old, new = _offsets(template, x.prompt, x.answer, row), _offsets(template, prompt.text, answer.text, other)
    images = answer.images(old, new)
    lowered: list[tuple[int, ...]] = [()] * len(old)
    if consistent:
        repeated, since = _repeats(prompt, answer, folded(f"{x.prompt} {x.answer}"))
        variants = {word: _variants(template, word) for word in since}
        for at, (start, end) in enumerate(old):
            if any(a < end and start < b for a, b in repeated):
                images[at] = -1
            lowered[at] = tuple(sorted({i for word, place in since.items() if place <= start for i in variants[word]}))
    return Match(row, other, tuple(images), tuple(lowered))


def _repeats(prompt: Translation, answer: Translation, own: set[str]) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """The intervals of the answer where an anchor, or a part of it, occurs again; and since where a word has been produced.

    own: words that the example has itself; these are nobody's name.
    """
    terms: set[str] = set()
    since: dict[str, int] = {}
    repeated = []
    for swap, inside in [*((s, False) for s in prompt.swaps), *((s, True) for s in answer.swaps)]:
        said = [word for word in words(swap.new) if word.casefold() not in own]
        if inside and (swap.term in terms or any(word in since for word in said)):
            repeated.append((swap.start, swap.end))
        terms.add(swap.term)
        for word in said:
            since.setdefault(word, swap.end if inside else 0)
    return repeated, since


def _variants(template: Template, word: str) -> set[int]:
    """The tokens with which `word` begins, in any case, with and without a blank in front."""
    found = set()
    for form in (word, word.lower(), word.upper(), word[:1].upper() + word[1:].lower()):
        for text in (form, f" {form}"):
            ids = template.tokenizer(text, add_special_tokens=False).input_ids
            found.add(next(i for i in ids if template.tokenizer.decode([i]).strip()))
    return found


def _offsets(template: Template, prompt: str, answer: str, row: Row) -> list[tuple[int, int]]:
    """The half-open character intervals of the scored answer tokens of `row`, without blanks in front."""
    lead = " " if prompt and not template.chat else ""  # as Template.row has it
    coded = template.tokenizer(lead + answer, add_special_tokens=False, return_offsets_mapping=True)
    found = []
    for start, end in coded.offset_mapping[row.start - row.stop :]:
        said = (lead + answer)[start:end]
        found.append((start + len(said) - len(said.lstrip() or said) - len(lead), end - len(lead)))
    return found


def _logits(lm: LM, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Row key -> (T, V) float32 logits at its scored tokens, on the CPU."""
    tokens = pack(lanes(rows, WIDTH)).to(lm.device)
    lengths = tokens.row.bincount(minlength=tokens.rows).tolist()
    return dict(zip(tokens.keys, lm.logits(tokens).float().cpu().split(lengths), strict=True))


def _nll(lm: LM, rows: Sequence[Row], bench: Bench) -> float:
    """Nats a token of the answers of `rows`."""
    return -float(np.concatenate([x.logp for x in readings(lm, rows, bench)]).mean(dtype=np.float64))


def _kept(path: Path, made_from: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The labels that an interrupted run of the same kind has left, or nothing."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("fingerprint") != made_from:
                return {}
            keys = [name[2:] for name in file.keys() if name.startswith("0/")]  # noqa: SIM118, not a dictionary
            return {key: (file.get_tensor(f"0/{key}"), file.get_tensor(f"1/{key}")) for key in keys}
    except (OSError, SafetensorError):
        return {}
