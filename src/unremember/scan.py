"""Scan: somebody has a model and a pile of documents; which of them does it know by heart?  Ends in a forget set and a report.

    p(w) = (1 + |{c in chance : s(c) >= s(w)}|) / (1 + |chance|),   found = {w : BH(p)(w) <= alpha}     w a window of tokens
    s: longest run of arg-max hits (ties by P^(1/T)), share of hits, extraction strength, mean log p, Min-K%++ (lowest k of
    (log p - mean) / sd), total log p / bytes of zlib, or mean log p less that of a reference model

One teacher-forced pass a window gives all of these; the model speaks only for the best passages: greedy, from the `prefix`
tokens before it, and what counts is the share of the passage said before the first difference.  Hits in found windows are
joined to passages, and each is an example to forget.  Chance are windows of documents that were never seen, or else of the
same documents with their words shuffled, which is less (see CHANCE).

Carlini et al. 2021, 2023 (extraction, zlib); Zhang et al. 2025 (Min-K%++); Bates, Candès, Lei, Romano, Sesia 2023 (rank p-values
against a sample of the null, and that Benjamini-Hochberg holds for them).
Differs: windows overlap, and windows of one document are alike, so that the p-values are not those of independent samples.
"""

from __future__ import annotations

import math
import random
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember import team
from unremember.annotate import annotated, named, together
from unremember.audit.extraction import extraction_strength
from unremember.audit.spans import runs
from unremember.bench import BENCH, Bench
from unremember.corpus import Example
from unremember.documents import Document, Documents
from unremember.errors import BadCorpus, BadFolder, BadInput, BadRequest
from unremember.folder import claim, fingerprint, read_json, write_json
from unremember.lm import LM
from unremember.readers import write_jsonl
from unremember.score import Share
from unremember.table import Reading, continuations, moments
from unremember.tokens import Row, pack, packs
from unremember.train import STRICT

SCHEMA = "unremember.scan/1"
MEASURES = ("run", "match", "strength", "probability", "min-k++", "zlib", "reference")
Measure = Literal["run", "match", "strength", "probability", "min-k++", "zlib", "reference"]
FLAT = 1e-3  # nats: a smaller standard deviation of log p counts as this

CHANCE = {
    "holdout": (
        "windows of documents that the model never saw. If these are like the scanned ones in all but that, at most a share "
        "alpha of the windows found is expected to be there by chance"
    ),
    "shuffled": (
        "windows of the same documents with their words in random order. What beats them is text whose wording the model "
        "follows: it may be memorised, or merely common or easy to predict. The false discovery rate does not cover text that "
        "was never seen, so only passages that the model goes on with by itself are put into the forget set. Documents that were "
        "never seen (--holdout) show more"
    ),
}


# ── arithmetic ──


def cuts(n: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Windows over n tokens: [a, a + size) at every `stride`; the last one ends with the text and is as long as the others."""
    starts = [*range(0, max(n - size, 0), stride), max(n - size, 0)]
    return [(a, min(a + size, n)) for a in starts] if n else []


def measures(reading: Reading, compressed: int, k: float, reference: Reading | None = None) -> dict[str, float]:
    """What one window says; of all, higher = more like memorised.  compressed: bytes of zlib(text).  k: share of Min-K%++."""
    logp, hit = reading.logp, reading.hit
    z = np.sort((logp - reading.mean) / np.maximum(reading.sd, FLAT))
    return {
        "run": float(max((b - a for a, b in runs(hit.tolist())), default=0)),
        "match": float(hit.mean()),
        "strength": float(extraction_strength(hit)),
        "probability": float(logp.mean()),
        "min-k++": float(z[: max(1, math.floor(k * len(z)))].mean()),
        "zlib": float(logp.sum() / compressed),
        **({} if reference is None else {"reference": float(logp.mean() - reference.logp.mean())}),
    }


def ordered(columns: dict[str, np.ndarray], measure: str) -> np.ndarray:
    """(N,) scores to rank by; equal runs are told apart by P^(1/T), which is at most 1."""
    return columns["run"] + np.exp(columns["probability"]) if measure == "run" else columns[measure]


def p_values(scores: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """(N,), (M,) -> (N,): share of the chance scores, and of the score itself, that are at least as high."""
    reached = len(chance) - np.searchsorted(np.sort(chance), scores, side="left")
    return (1 + reached) / (1 + len(chance))


def q_values(p: np.ndarray) -> np.ndarray:
    """(N,) -> (N,): the smallest alpha at which Benjamini-Hochberg calls each one a discovery."""
    from scipy.stats import false_discovery_control

    return false_discovery_control(p, method="bh") if len(p) else p


def together_at_least(windows: int, chance: int, alpha: float) -> int:
    """How many windows must beat all of chance before any is found: p is at least 1 / (1 + chance)."""
    return math.ceil(windows / (alpha * (1 + chance)) - 1e-9)


def joined(found: Iterable[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Half-open intervals in order, with those that overlap or lie at most `gap` apart made one."""
    whole: list[tuple[int, int]] = []
    for a, b in sorted(found):
        if whole and a - whole[-1][1] <= gap:
            whole[-1] = whole[-1][0], max(whole[-1][1], b)
        else:
            whole.append((a, b))
    return whole


def parts(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """[start, stop) in as few nearly equal parts as are at most so long."""
    n = max(1, math.ceil((stop - start) / most))
    edges = [start + (stop - start) * i // n for i in range(n + 1)]
    return list(pairwise(edges))


def whole_words(text: str, start: int, stop: int) -> tuple[int, int]:
    """The interval without white space at its ends, and widened so that it cuts no word."""
    start, stop = start + len(text[start:stop]) - len(text[start:stop].lstrip()), start + len(text[start:stop].rstrip())
    while 0 < start < stop and text[start - 1 : start + 1].isalnum():
        start -= 1
    while start < stop < len(text) and text[stop - 1 : stop + 1].isalnum():
        stop += 1
    return start, stop


def said_share(said: Sequence[int], truth: Sequence[int]) -> float:
    """Share of `truth` that was said before the first difference."""
    right = next((i for i, (a, b) in enumerate(zip(said, truth, strict=False)) if a != b), min(len(said), len(truth)))
    return right / len(truth)


def shuffled(text: str, seed: str) -> str:
    """The words of a text in another order, which depends on the seed alone."""
    words = text.split()
    random.Random(seed).shuffle(words)
    return " ".join(words)


# ── the model ──


@torch.no_grad()
def readings(lm: LM, rows: Sequence[Row], budget: int) -> list[Reading]:
    """As `table.read`, by this process alone, for windows are dealt out by document.  row.key: its number in `rows`."""
    found: dict[int, Reading] = {}
    width = max((len(row.ids) for row in rows), default=0)
    for group in packs(rows, budget, width):
        tokens = pack(group).to(lm.device)
        row, *values = (
            x.cpu().numpy() for x in (tokens.row, *moments(lm.logits(tokens).float(), tokens.target), tokens.span)
        )
        if not np.isfinite(values[0]).all():
            raise ValueError(
                f"{lm.name or 'the model'} gives probabilities that are not finite; its weights are broken"
            )
        edges = np.searchsorted(row, np.arange(tokens.rows + 1))
        for at, key in enumerate(tokens.keys):
            found[int(key)] = Reading(*(v[edges[at] : edges[at + 1]] for v in values))
    return [found[i] for i in range(len(rows))]


def coded(lm: LM, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a text, as it stands, and the characters of each."""
    found = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return found.input_ids, found.offset_mapping


# ── the scan ──


@dataclass(frozen=True, config=STRICT)
class Scan:
    """How to look, and when to believe.

    window: tokens; stride: 'half' a window (twice the work, no passage is lost on a border) or 'none'.
    score: what windows are ranked by; 'reference' needs a control model.  alpha: false discovery rate.
    least: shortest run of hits, in tokens, that makes a passage; bridge: tokens between two runs of one passage, at most.
    prefix, suffix: tokens given and tokens wanted where the model speaks; budget: passages it speaks for, at most.
    says: share of a passage it must say to enter the forget set where chance is shuffled words.
    k: share of Min-K%++.  annotators: see annotate.py; their findings within a passage are its spans.
    form: 'prompt' puts the text before a passage into the prompt; 'passage' leaves the prompt empty and both in the answer.
    piece: characters of documents between two saves.
    """

    window: Annotated[int, Field(ge=8)] = 128
    stride: Literal["half", "none"] = "half"
    score: Measure = "run"
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    least: Annotated[int, Field(ge=2)] = 10
    bridge: Annotated[int, Field(ge=0)] = 4
    prefix: Annotated[int, Field(ge=1)] = 50
    suffix: Annotated[int, Field(ge=1)] = 50
    budget: Annotated[int, Field(ge=0)] = 100
    says: Share = 0.5
    k: Annotated[float, Field(gt=0, le=1)] = 0.2
    annotators: tuple[str, ...] = ("date", "digits", "email", "money", "names", "phone", "url")
    form: Literal["prompt", "passage"] = "prompt"
    piece: Annotated[int, Field(ge=1)] = 100_000
    seed: Annotated[int, Field(ge=0)] = 0

    needs = ()
    paper = "Carlini et al. 2021, 2023; Zhang et al. 2025; Bates et al. 2023"
    summary = "finds the passages of a pile of documents that a model knows by heart, and makes a forget set of them"

    def check(self, documents: Documents, holdout: Documents | None = None, control: bool = False) -> None:
        """Everything that can be known before a weight is loaded; BadRequest with all problems.  Reads all texts once."""
        problems = (
            [] if self.least < self.window else [f"least is {self.least}; it must be below window, {self.window}"]
        )
        if self.score == "reference" and not control:
            problems.append(
                "score 'reference' needs a model to compare with; name one with --control, or take another score"
            )
        for name in self.annotators:
            try:
                named(name)
            except BadInput as error:
                problems += error.problems
        surveys = []
        for pile in filter(None, (documents, holdout)):
            try:
                surveys.append(pile.survey)
            except BadInput as error:
                problems += error.problems
        if len(surveys) == 2 and surveys[0].digest == surveys[1].digest:
            problems.append("the holdout is the pile itself; name documents that the model never saw")
        if problems:
            raise BadRequest(problems)

    def __call__(
        self,
        lm: LM,
        documents: Documents,
        out: Path,
        holdout: Documents | None = None,
        control: LM | None = None,
        bench: Bench = BENCH,
    ) -> dict[str, Any]:
        """Scan into the folder `out`, or go on there; writes forget.jsonl (where anything was found) and scan.json.

        Every process takes every so-many-th piece; all of them return the result.
        """
        self.check(documents, holdout, control is not None)
        self._fits(lm, control)
        mark = fingerprint(
            SCHEMA, asdict(self), lm.fingerprint, control and control.fingerprint,
            documents.survey.digest, holdout and holdout.survey.digest,
        )  # fmt: skip
        if (read_json(out / "of.json") or {"of": mark})["of"] != mark:
            raise BadFolder(
                f"{out} holds a scan of something else, or with other settings; choose another with --out DIR"
            )
        if team.rank() == 0:
            claim(out)
            write_json(out / "of.json", {"of": mark})
        team.wait()
        turn, of = team.rank(), team.size()
        if holdout:
            self.collect(lm, holdout, out / "chance", control, turn, of, bench=bench)
            team.wait()
            self._enough(len(gathered(out / "chance", "windows")["run"]))
        self.collect(lm, documents, out / "pieces", control, turn, of, shuffle=not holdout, bench=bench)
        team.wait()
        return self.finish(lm, documents, out, control, bench)

    def collect(
        self,
        lm: LM,
        documents: Documents,
        folder: Path,
        control: LM | None = None,
        turn: int = 0,
        of: int = 1,
        shuffle: bool = False,
        bench: Bench = BENCH,
    ) -> None:
        """Read the windows of every `of`-th piece from `turn` on, one file a piece; those that are there are kept."""
        done = tokens = 0
        began = time.perf_counter()
        with lm.lowered(), control.lowered() if control else nullcontext():
            for number, group in enumerate(pieces(documents, self.piece)):
                done += len(group)
                file = folder / f"{number:08}.json"
                if number % of == turn and not file.exists():
                    found = self._piece(lm, control, group, shuffle, bench)
                    write_json(file, found)
                    tokens += found["tokens"]
                speed = {"tokens/s": tokens / (time.perf_counter() - began)}
                bench.say("scan", done, documents.survey.documents, speed)

    def _piece(self, lm: LM, control: LM | None, group: list[Document], shuffle: bool, bench: Bench) -> dict[str, Any]:
        """Columns over the windows of some documents, and of the same with their words shuffled."""
        began = time.perf_counter()
        lead = lm.template.context("")
        rows: list[Row] = []
        places: list[tuple[str, int, int, int, int]] = []  # kind, document, tokens, first that is scored, bytes of zlib
        short = 0
        for document in group:
            texts = {"windows": document.text}
            if shuffle:
                texts["chance"] = shuffled(document.text, f"{self.seed}/{document.id}")
            for kind, text in texts.items():
                ids, characters = coded(lm, text)
                windows = [] if len(ids) + len(lead) < 2 else cuts(len(ids), self.window, self._stride)
                short += kind == "windows" and len(ids) < self.least
                for a, b in windows:
                    row = Row(
                        str(len(rows)), (*lead, *ids[a:b]), max(len(lead), 1), len(lead) + b - a, (True,) * (b - a)
                    )
                    size = len(zlib.compress(text[characters[a][0] : characters[b - 1][1]].encode()))
                    rows.append(row)
                    places.append((kind, document.number, b - a, a + row.start - len(lead), size))
        own = readings(lm, rows, bench.budget)
        other: Sequence[Reading | None] = readings(control, rows, bench.budget) if control else [None] * len(rows)
        found: dict[str, Any] = {
            kind: {
                name: []
                for name in ("document", "length", "runs", *(m for m in MEASURES if m != "reference" or control))
            }
            for kind in ("windows", *(("chance",) if shuffle else ()))
        }
        for (kind, number, length, scored, size), mine, reference in zip(places, own, other, strict=True):
            columns = found[kind]
            columns["document"].append(number)
            columns["length"].append(length)
            long = [[a, b] for a, b in runs(mine.hit.tolist(), scored) if b - a >= self.least]
            columns["runs"].append(long if kind == "windows" else [])
            for name, value in measures(mine, size, self.k, reference).items():
                columns[name].append(round(value, 6))
        tokens = sum(len(row.ids) for row in rows)
        return {
            "documents": len(group),
            "short": short,
            "tokens": tokens,
            "seconds": time.perf_counter() - began,
            **found,
        }

    def finish(
        self, lm: LM, documents: Documents, out: Path, control: LM | None = None, bench: Bench = BENCH
    ) -> dict[str, Any]:
        """Rank what was collected in `out`, let the model speak, and write the forget set and the result."""
        kind = "holdout" if (out / "chance").exists() else "shuffled"
        columns = gathered(out / "pieces", "windows")
        chance = gathered(out / "chance", "windows") if kind == "holdout" else gathered(out / "pieces", "chance")
        self._enough(len(chance["run"]))
        if not len(columns["run"]):
            raise BadCorpus("no document has two tokens, so there is nothing to predict; name others")
        scores, level = ordered(columns, self.score), ordered(chance, self.score)
        p = p_values(scores, level)
        q = q_values(p)
        found = int((q <= self.alpha).sum())
        hits = self._joined(out / "pieces", q <= self.alpha, scores)
        passages, left_out = self._passages(lm, documents, hits, columns, p, q, scores)
        passages.sort(key=lambda x: (-x["score"], x["document"], x["characters"]))
        self._speak(lm, passages[: self.budget], bench)
        example: dict[tuple[str, str], Example] = {}
        for x in passages:
            x["forget"] = kind == "holdout" or (x["said"] is not None and x["said"] >= self.says)
            if x["forget"]:  # a text that stands in several documents is forgotten once
                example.setdefault((x["example"].prompt, x["example"].answer), x["example"])
        meta = [read_json(file) or {} for file in sorted((out / "pieces").glob("*.json"))]
        plain = {"example", "asked", "wanted"}
        result = {
            "schema": SCHEMA,
            "model": lm.name,
            "control": control.name if control else None,
            "settings": asdict(self),
            "documents": {**asdict(documents.survey), "short": sum(m["short"] for m in meta)},
            "chance": {
                "kind": kind,
                "is": CHANCE[kind],
                "windows": len(level),
                "smallest p": 1 / (1 + len(level)),
                "together at least": together_at_least(len(scores), len(level), self.alpha),
                "tokens a window": float(np.median(chance["length"])),
                "quantiles": quantiles(level),
            },
            "windows": {
                "n": len(scores),
                "tokens a window": float(np.median(columns["length"])),
                "found": found,
                "without a run": found - len({w for own in hits.values() for x in own for w in x["windows"]}),
                "quantiles": quantiles(scores),
            },
            "passages": [{key: value for key, value in x.items() if key not in plain} for x in passages],
            "left out": left_out,
            "forget": len(example),
            "cost": {
                "tokens": sum(m["tokens"] for m in meta),
                "seconds": sum(m["seconds"] for m in meta),
            },
        }  # fmt: skip
        if team.rank() == 0:
            (out / "forget.jsonl").unlink(missing_ok=True)
            if example:
                write_jsonl(example.values(), out / "forget.jsonl")
            write_json(out / "scan.json", result)
        team.wait()
        return result

    @property
    def _stride(self) -> int:
        return self.window // 2 if self.stride == "half" else self.window

    def _fits(self, lm: LM, control: LM | None) -> None:
        limit, lead = lm.limit or 10**9, len(lm.template.context(""))
        most = min(limit, control.limit or 10**9) if control else limit
        problems = []
        if self.window + lead > most:
            problems.append(
                f"window is {self.window} tokens and the model's context {most}; take at most {most - lead}"
            )
        if self.prefix + self.suffix + lead > limit or self.prefix > limit // 4:
            problems.append(
                f"prefix is {self.prefix} and suffix {self.suffix} tokens and the model's context {limit}; "
                f"take a prefix of at most {limit // 4}, and less than the context together"
            )
        if control and control.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
            problems.append(
                "the control model has another tokenizer, so that its windows are others; take one with the same"
            )
        if problems:
            raise BadRequest(problems)

    def _enough(self, n: int) -> None:
        """BadCorpus where not even one window in one could be found."""
        if self.alpha * (1 + n) < 1:
            raise BadCorpus(
                f"chance has {n} windows and alpha = {self.alpha} needs at least {math.ceil(1 / self.alpha - 1e-9) - 1}; "
                "give more documents, smaller windows or a larger alpha"
            )

    def _joined(self, folder: Path, found: np.ndarray, scores: np.ndarray) -> dict[int, list[dict[str, Any]]]:
        """Document -> its passages as tokens [start, stop), with their runs and the found windows behind them, best first."""
        hits: dict[int, list[tuple[int, int, int]]] = {}
        at = 0
        for file in sorted(folder.glob("*.json")):
            windows = (read_json(file) or {})["windows"]
            for number, long in zip(windows["document"], windows["runs"], strict=True):
                if found[at]:
                    hits.setdefault(number, []).extend((a, b, at) for a, b in long)
                at += 1
        passages: dict[int, list[dict[str, Any]]] = {}
        for number, own in hits.items():
            whole = joined(((a, b) for a, b, _ in own), 0)
            for start, stop in joined(whole, self.bridge):
                behind = sorted({w for a, b, w in own if start <= a and b <= stop}, key=lambda w: (-scores[w], w))
                inside = [(a, b) for a, b in whole if start <= a and b <= stop]
                passages.setdefault(number, []).append(
                    {"start": start, "stop": stop, "runs": inside, "windows": behind}
                )
        return passages

    def _passages(
        self,
        lm: LM,
        documents: Documents,
        hits: dict[int, list[dict[str, Any]]],
        columns: dict[str, np.ndarray],
        p: np.ndarray,
        q: np.ndarray,
        scores: np.ndarray,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Every passage with its text, its numbers, its example and what to ask, from one more reading of the documents."""
        lead, longest = lm.template.context(""), min((lm.limit or 10**9) // 2, 4 * self.window)
        propose = together(*map(named, self.annotators))
        found: list[dict[str, Any]] = []
        left_out: list[str] = []
        for document in documents if hits else ():
            own = hits.get(document.number, ())
            ids, characters = coded(lm, document.text) if own else ([], [])
            for hit in own:
                for a, b in parts(hit["start"], hit["stop"], longest):
                    inside = [(max(a, c), min(b, d)) for c, d in hit["runs"] if c < b and d > a]
                    spans = [(characters[c][0], characters[d - 1][1]) for c, d in inside]
                    begin = characters[max(0, a - self.prefix)][0]
                    place = (begin, characters[a][0], characters[b - 1][1])
                    example, seen = self._example(document, place, spans, propose)
                    try:
                        lm.template.row(example.id, example.prompt, example.answer, example.spans, lm.limit)
                    except BadInput as error:
                        left_out += error.problems
                        continue
                    cut = max(a, min(self.prefix, (a + b) // 2), 1)
                    best = hit["windows"][0]
                    found.append({
                        "id": example.id,
                        "document": document.id,
                        "file": document.file,
                        "bytes": None if document.start is None else [document.start, document.stop],
                        **seen,
                        "tokens": b - a,
                        "score": float(scores[best]),
                        "p": float(p[best]),
                        "q": float(q[best]),
                        **{name: float(columns[name][best]) for name in MEASURES if name in columns},
                        "longest": max((d - c for c, d in inside), default=0),
                        "said": None,
                        "windows": len(hit["windows"]),
                        "example": example,
                        "asked": (*lead, *ids[max(0, cut - self.prefix) : cut]),
                        "wanted": tuple(ids[cut : min(b, cut + self.suffix)]),
                    })  # fmt: skip
        return found, left_out

    def _example(
        self, document: Document, place: tuple[int, int, int], memorised: Sequence[tuple[int, int]], propose: Any
    ) -> tuple[Example, dict[str, Any]]:
        """A passage to forget, and where it stands.  Its spans: values of which a part is memorised, or else what is."""
        start, stop = whole_words(document.text, *place[1:])
        begin, _ = whole_words(document.text, place[0], start)
        before, text = document.text[begin:start], document.text[start:stop]
        plain = Example(f"{document.id}@{start}-{stop}", before.strip(), text)
        known = [(max(a, start) - start, min(b, stop) - start) for a, b in memorised if a < stop and b > start]
        proposed = annotated([plain], propose).examples[0].spans if self.annotators else ()
        sensitive = [(a, b) for a, b in proposed if any(a < d and b > c for c, d in known)]
        spans = tuple(sensitive or joined(known, 0))
        seen = {
            "characters": [start, stop],
            "text": text,
            "spans": [list(x) for x in spans],
            "sensitive": len(sensitive),
        }
        if self.form == "prompt" or not plain.prompt:
            return replace(plain, spans=spans), seen
        shift = len(before)
        moved = tuple((a + shift, b + shift) for a, b in spans)
        return replace(plain, prompt="", answer=before + text, spans=moved), seen

    def _speak(self, lm: LM, passages: list[dict[str, Any]], bench: Bench) -> None:
        """Fill in the share of each passage that the model says when it is given what stands before."""
        asked = [x for x in passages if x["wanted"]]
        said = continuations(lm, [(x["asked"], len(x["wanted"])) for x in asked], bench)
        for x, spoken in zip(asked, said, strict=True):
            x["said"] = said_share(spoken, x["wanted"])


# ── pieces ──


def pieces(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """Neighbouring documents, as few as make up so many characters; which they are depends on the documents alone."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def gathered(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """The columns of all pieces, in order; 'windows' or 'chance'."""
    parts: dict[str, list[np.ndarray]] = {}
    for file in sorted(folder.glob("*.json")):
        for name, column in (read_json(file) or {}).get(kind, {}).items():
            if name != "runs":
                parts.setdefault(name, []).append(np.asarray(column))
    return {name: np.concatenate(part) for name, part in parts.items()} or {"run": np.zeros(0)}


def quantiles(scores: np.ndarray) -> list[float]:
    """The scores that a share of 0, 1/50 … 1 lies at or below."""
    return [float(x) for x in np.quantile(scores, np.linspace(0, 1, 51))]
