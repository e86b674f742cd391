"""Corpus files to examples, and examples to a file.  No torch here.

The suffix names the format:

    .jsonl .json   one object a line, or one list of objects, with the fields of Example as keys, or TOFU's keys:
                   question, answer, paraphrased_question, paraphrased_answer, perturbed_answer (option1 … are ignored)
    .csv .tsv      a header line; the two columns a Source names, and `id` and `entity` where there are such columns
    .parquet       the same columns; needs the extra `tables`
    .txt           passages, separated by blank lines
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from unremember.corpus import Example
from unremember.errors import BadCorpus, nearest
from unremember.folder import write_text

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
SHOWN = 20

FIELDS = tuple(field.name for field in fields(Example))
TOFU = {
    "paraphrased_question": "paraphrases",
    "paraphrased_answer": "rewording",
    "perturbed_answer": "distractors",
}


@dataclass(frozen=True)
class Source:
    """A corpus file and how to read it.

    entity: whom a row is about that does not say so itself.
    question, answer: names of the two columns or JSON keys (not for .txt); question "" means that rows are passages.
    limit: only the first so many rows; 0 means all.
    """

    file: Path
    entity: str = ""
    question: str = "question"
    answer: str = "answer"
    limit: int = 0


def read(source: Source) -> tuple[Example, ...]:
    """The examples of a file, in its order; a row without an id gets `<file stem>/<row number>`, counted from 1.

    Raises BadCorpus, with the place of every problem (the first 20 and the number of the others): no such file, a
    format or an encoding that is not read here, malformed rows, unknown or missing keys, values of the wrong type,
    repeated ids, and whatever Example.problems finds.
    """
    problems: list[str] = []
    examples: list[Example] = []
    first: dict[str, str] = {}  # id -> where it was given
    for number, (place, row) in enumerate(islice(_rows(source, problems), source.limit or None), 1):
        wrong = list(_misfits(row, source))
        if not wrong:
            example = _example(row, source, f"{source.file.stem}/{number}")
            wrong += example.problems()
            if example.id in first:
                wrong.append(f"the id {example.id!r} is already taken by {first[example.id]}; ids must be unique")
            first.setdefault(example.id, place)
            examples.append(example)
        problems += [f"{place}: {problem}" for problem in wrong]
    if not (examples or problems):
        problems.append(f"{source.file} holds no rows; add some or leave the file out")
    if len(problems) > SHOWN:
        problems[SHOWN:] = [f"... and {len(problems) - SHOWN} more"]
    if problems:
        raise BadCorpus(problems)
    return tuple(examples)


def write_jsonl(examples: Iterable[Example], path: Path) -> None:
    """Write one example a line, atomically; `read` gives back equal examples.  Empty optional fields are left out.

    Raises OSError where the file cannot be written.
    """
    always = ("id", "prompt", "answer")
    rows = ({key: value for key, value in asdict(x).items() if value or key in always} for x in examples)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ── from rows to examples ──


def _names(source: Source) -> dict[str, str]:
    """Their keys -> fields of Example."""
    return {**TOFU, source.question: "prompt", source.answer: "answer"}


def _misfits(row: object, source: Source) -> Iterator[str]:
    """What keeps a row from becoming an Example."""
    if not isinstance(row, dict):
        yield f'a row must be an object such as {{"prompt": …, "answer": …}}, not {_shown(row)}'
        return
    names = _names(source)
    given: dict[str, str] = {}  # field -> the key that gave it
    for key, value in row.items():
        field = names.get(key, key)
        if field not in FIELDS:
            if not re.fullmatch(r"option\d+", key):
                yield f"unknown key {key!r}; {nearest(key, (*FIELDS, *names))}"
        elif value is None:
            continue
        elif field in given:
            yield f"{given[field]!r} and {key!r} both give the {field}; keep one"
        else:
            given[field] = key
            if not _fits(field, value):
                yield f"{key!r} must be {_kind(field)}, not {_shown(value)}"
    if "prompt" not in given and source.question:
        yield f"no 'prompt' and no {source.question!r}; add one (a passage without a question has the prompt \"\")"
    if "answer" not in given:
        yield "no 'answer'" + ("" if source.answer == "answer" else f" and no {source.answer!r}") + "; add it"


def _example(row: Mapping, source: Source, default_id: str) -> Example:
    names = _names(source)
    value = {names.get(key, key): value for key, value in row.items() if value is not None}
    return Example(
        id=value.get("id", default_id),
        prompt=value.get("prompt", ""),
        answer=value["answer"],
        entity=value.get("entity") or source.entity,
        spans=tuple((a, b) for a, b in value.get("spans", ())),
        paraphrases=_several(value.get("paraphrases", ())),
        rewording=value.get("rewording", ""),
        distractors=_several(value.get("distractors", ())),
    )


def _several(value: str | Iterable[str]) -> tuple[str, ...]:
    """TOFU gives one string where there is one and a list where there are several."""
    return ((value,) if value else ()) if isinstance(value, str) else tuple(value)


def _fits(field: str, value: object) -> bool:
    if field == "spans":
        return isinstance(value, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair) for pair in value
        )
    if field in ("paraphrases", "distractors") and isinstance(value, list):
        return all(_is_text(item) and item.strip() for item in value)
    return _is_text(value)


def _kind(field: str) -> str:
    if field == "spans":
        return "a list of [start, end] pairs of whole numbers"
    return "text or a list of texts, none empty" if field in ("paraphrases", "distractors") else "text"


def _is_text(value: object) -> bool:
    """A string that UTF-8 can hold: JSON's \\ud800 alone is no character, and would only fail later, when hashed."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _shown(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ── from files to rows: (place, row) pairs; what is malformed goes to `problems` and the reading goes on ──


def _rows(source: Source, problems: list[str]) -> Iterator[tuple[str, Any]]:
    file, suffix = source.file, source.file.suffix.lower()
    if source.limit < 0:
        raise BadCorpus(f"{file}: limit is {source.limit}; give the number of rows to read, or 0 for all of them")
    if not file.exists():
        raise BadCorpus(f"{file} does not exist; {_neighbour(file)}")
    if not file.is_file():
        raise BadCorpus(f"{file} is not a file; name one that ends in {', '.join(SUFFIXES)}")
    if suffix not in SUFFIXES:
        raise BadCorpus(f"{file}: {suffix or 'no suffix'!r} is not a format read here; allowed: {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        return _parquet(source)
    text = _text(file)
    if suffix == ".txt":
        return _passages(file, text)
    if suffix in (".csv", ".tsv"):
        return _table(source, text, problems)
    return _json(file, text, problems)


def _neighbour(file: Path) -> str:
    if not file.parent.is_dir():
        return f"nor does the folder {file.parent}"
    names = [other.name for other in file.parent.iterdir() if other.suffix.lower() in SUFFIXES]
    return nearest(file.name, names) if names else f"the folder {file.parent} holds no corpus file"


def _text(file: Path) -> str:
    try:
        data = file.read_bytes().removeprefix(codecs.BOM_UTF8)
        text = data.decode()
    except OSError as error:
        raise BadCorpus(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadCorpus(
            f"{file}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8 "
            f"(if it is Latin-1: iconv -f latin1 -t utf-8 {file})"
        ) from error
    if not text.strip():
        raise BadCorpus(f"{file} is empty; add some rows or leave the file out")
    return text


def _json(file: Path, text: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Content, not the name, says whether it is a list or one object a line: TOFU ships JSON lines as .json."""
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            problems.append(_malformed(file, getattr(error, "lineno", 1), error))
        else:
            yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also break at U+2028 inside a string
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                problems.append(_malformed(file, number, error))
            else:
                yield f"{file}:{number}", row


def _malformed(file: Path, line: int, error: Exception) -> str:
    what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return f"{file}:{line}: not JSON ({what}); write one object a line, or one list of objects"


def _passages(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    start, lines = 0, []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            start = start or number
            lines.append(line.removesuffix("\r"))
        elif lines:
            yield f"{file}:{start}", {"prompt": "", "answer": "\n".join(lines)}
            start, lines = 0, []


def _columns(source: Source, header: list[str]) -> list[str]:
    """The columns to keep; raises BadCorpus for those that are named and missing, or there twice."""
    named = [name for name in (source.question, source.answer) if name]
    kept = [*named, *(name for name in ("id", "entity") if name in header and name not in named)]
    problems = [
        f"{source.file}: no column {name!r}; {nearest(name, header)} (set question and answer to the columns' names)"
        for name in named
        if name not in header
    ]
    problems += [f"{source.file}: {header.count(name)} columns {name!r}" for name in kept if header.count(name) > 1]
    if problems:
        raise BadCorpus(problems)
    return kept


def _cells(row: Mapping[str, object], kept: Iterable[str]) -> dict[str, object]:
    """The cells that are kept; an empty id is an absent one, and a number may serve as an id."""
    cells = {name: row[name] for name in kept}
    if "id" in cells:
        cells["id"] = None if cells["id"] in (None, "") else str(cells["id"])
    return cells


def _table(source: Source, text: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    delimiter = "\t" if source.file.suffix.lower() == ".tsv" else ","
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    kept: list[str] = []
    start = 1
    try:
        for cells in lines:
            place = f"{source.file}:{start}"
            start = lines.line_num + 1  # a quoted cell may hold line breaks
            if not header:
                header = cells
                kept = _columns(source, header) if header else []
            elif cells and len(cells) != len(header):
                problems.append(
                    f"{place}: {len(cells)} cells under a header of {len(header)}; quote cells that hold {delimiter!r}"
                )
            elif cells:
                yield place, _cells(dict(zip(header, cells, strict=True)), kept)
    except csv.Error as error:
        problems.append(f"{source.file}:{start}: not CSV ({error}); nothing after this line was read")


def _parquet(source: Source) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BadCorpus(f"{source.file}: .parquet needs pyarrow; pip install 'unremember[tables]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(source.file)
        kept = _columns(source, table.schema_arrow.names)
        rows = table.read(columns=kept).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise BadCorpus(f"{source.file} cannot be read as Parquet: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"{source.file}, row {number}", _cells(row, kept)
