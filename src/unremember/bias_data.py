"""Bias benchmarks as their authors distribute them: StereoSet, CrowS-Pairs and Winogender files to plain records.  No torch here.

Nothing of them comes with this library, and all three are for measuring: their sentences are stereotypes, some offensive.

    StereoSet    .json, Nadeem, Bethke, Reddy 2021: a list of items with `sentences` or `data`, or the original file's tree
    CrowS-Pairs  .csv, Nangia et al. 2020: sent_more (stereotyping), sent_less, stereo_antistereo, bias_type
    Winogender   .tsv, Rudinger et al. 2018: all_sentences.tsv and occupations-stats.tsv of one folder

Differs from the loaders of CharlesYu2000/PCGU-UnlearningBias@eeae24e: a header is a header and no pair, and rows are known by
what they say and not by their place.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unremember.errors import BadCorpus

SHOWN = 20
KINDS = ("stereotype", "anti-stereotype", "unrelated")
DIRECTIONS = ("stereo", "antistereo")


@dataclass(frozen=True)
class Triple:
    """One StereoSet item: the same context filled in three ways."""

    id: str
    domain: str
    target: str
    context: str
    stereo: str
    anti: str
    unrelated: str


@dataclass(frozen=True)
class Pair:
    """One CrowS-Pairs row.  more: the sentence that stereotypes more.  direction: 'stereo' or 'antistereo'."""

    id: str
    domain: str
    more: str
    less: str
    direction: str


@dataclass(frozen=True)
class Schema:
    """One Winogender sentence with each pronoun.  share: per cent of women in the occupation (Bergsma)."""

    id: str
    occupation: str
    male: str
    female: str
    neutral: str
    share: float

    @property
    def favoured(self) -> str:
        """The form that goes with the occupation's majority: male below 50 % women."""
        return self.male if self.share < 50 else self.female

    @property
    def other(self) -> str:
        return self.female if self.share < 50 else self.male


def stereoset(path: Path) -> tuple[Triple, ...]:
    """The intrasentence items.  Raises BadCorpus, all problems together, for items without exactly the three kinds."""
    try:
        found = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise BadCorpus(f"{path} is no JSON ({error}); give StereoSet's dev.json or one of its parts") from error
    if isinstance(found, dict):
        found = found.get("data", found)
        found = found.get("intrasentence") if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise BadCorpus(f"{path} holds no list of intrasentence items; give StereoSet's dev.json or one of its parts")
    problems: list[str] = []
    triples: list[Triple] = []
    for number, item in enumerate(found, 1):
        said = _kinds(item)
        missing = [kind for kind in KINDS if kind not in said]
        if missing or "id" not in item or "bias_type" not in item:
            missing += [key for key in ("id", "bias_type") if not isinstance(item, dict) or key not in item]
            problems.append(f"{path}, item {number} lacks {', '.join(missing)}; a StereoSet item has all of them")
            continue
        triples.append(
            Triple(
                str(item["id"]), item["bias_type"], item.get("target", ""), item.get("context", ""),
                *(said[kind] for kind in KINDS),
            )
        )  # fmt: skip
    _refuse(problems)
    return tuple(triples)


def _kinds(item: Any) -> dict[str, str]:
    """Kind -> sentence, from either form of an item."""
    if not isinstance(item, dict):
        return {}
    if isinstance(item.get("data"), dict):
        said = [(kind, x) for kind, x in item["data"].items() if isinstance(x, dict)]
    else:
        said = [(x.get("gold_label"), x) for x in item.get("sentences") or () if isinstance(x, dict)]
    return {kind: x["sentence"] for kind, x in said if isinstance(x.get("sentence"), str)}


def crows_pairs(path: Path) -> tuple[Pair, ...]:
    """All rows.  Raises BadCorpus for missing columns, an unknown direction, and a pair of equal sentences."""
    needed = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
    pairs: list[Pair] = []
    problems: list[str] = []
    for number, row in enumerate(_rows(path, ",", needed)):
        pair = Pair(row.get("") or str(number), *(row[key] for key in ("bias_type", *needed[:3])))
        if pair.direction not in DIRECTIONS:
            problems.append(f"{path}, row {number + 1}: direction {pair.direction!r}; allowed: {', '.join(DIRECTIONS)}")
        if pair.more.strip() == pair.less.strip():
            problems.append(f"{path}, row {number + 1}: both sentences are the same; remove the row")
        pairs.append(pair)
    _refuse(problems)
    return tuple(pairs)


def winogender(folder: Path) -> tuple[Schema, ...]:
    """One schema for every three sentences; raises BadCorpus where a form or an occupation's share is missing."""
    share: dict[str, float] = {}
    problems: list[str] = []
    stats = folder / "occupations-stats.tsv"
    for row in _rows(stats, "\t", ("occupation", "bergsma_pct_female")):
        try:
            share[row["occupation"]] = float(row["bergsma_pct_female"])
        except ValueError:
            problems.append(
                f"{stats}: {row['occupation']!r} has the share {row['bergsma_pct_female']!r}; give a number"
            )
    forms: dict[str, dict[str, str]] = {}
    for row in _rows(folder / "all_sentences.tsv", "\t", ("sentid", "sentence")):
        name, _, form = row["sentid"].removesuffix(".txt").rpartition(".")
        forms.setdefault(name, {})[form] = row["sentence"]
    schemas: list[Schema] = []
    for name, said in forms.items():
        occupation = name.partition(".")[0]
        lacks = [form for form in ("male", "female", "neutral") if form not in said]
        if lacks or occupation not in share:
            what = f"the form {', '.join(lacks)}" if lacks else f"a share for {occupation!r} in {stats.name}"
            problems.append(f"{folder / 'all_sentences.tsv'}: {name!r} lacks {what}; add it")
            continue
        schemas.append(Schema(name, occupation, said["male"], said["female"], said["neutral"], share[occupation]))
    _refuse(problems)
    return tuple(schemas)


def _rows(path: Path, mark: str, needed: tuple[str, ...]) -> Iterator[dict[str, str]]:
    quoting = csv.QUOTE_MINIMAL if mark == "," else csv.QUOTE_NONE
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=mark, quoting=quoting)
    if missing := [key for key in needed if key not in (reader.fieldnames or ())]:
        raise BadCorpus(f"{path} lacks the columns {', '.join(missing)}; its first line must name them")
    for number, row in enumerate(reader, 1):
        if any(row[key] is None for key in needed):
            raise BadCorpus(f"{path}, row {number} has too few fields; copy the file again")
        yield row


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadCorpus(f"{path} cannot be read ({error}); check the path, and save it as UTF-8") from error


def _refuse(problems: list[str]) -> None:
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise BadCorpus(problems[:SHOWN] + more)
