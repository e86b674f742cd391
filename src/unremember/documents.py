"""Documents: a pile of texts read one at a time, each with an id and its place in its file.  No torch here.

    .jsonl .json   one object a line, with the text under `field`, and its `id` where there is one
    .txt .md       the whole file is one document
    .csv .tsv      a header line, then rows: the same two columns
    .parquet       the same; needs the extra `tables`

A folder stands for the files in it and below it that end so, in the order of their names.  Never is more than one document held
(one batch of rows for Parquet), and what is wrong with a pile is found, all of it, by reading it once before any work.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

from unremember.errors import BadCorpus, nearest

SUFFIXES = (".jsonl", ".json", ".txt", ".md", ".csv", ".tsv", ".parquet")
SHOWN = 20
ROWS = 64  # of a Parquet file at a time
CELL = 2**31 - 1  # characters; the csv module would stop at 131,072

Note = Callable[[str], None]


@dataclass(frozen=True)
class Document:
    """One text.  number: its place in the pile, from 0.

    start, stop: the bytes of `file` that hold it, with its quotes and line end; None in Parquet, which compresses.
    """

    number: int
    id: str
    text: str
    file: str
    start: int | None
    stop: int | None


@dataclass(frozen=True)
class Survey:
    """What one reading of a pile found.  bad: how many problems there were; problems: the first of them.

    ignored: files in its folders with another suffix.  digest: of every id and text, in order.
    """

    documents: int
    characters: int
    bad: int
    problems: tuple[str, ...]
    ignored: int
    digest: str


@dataclass(frozen=True)
class Documents:
    """Files and folders, and how to read them; iterating gives what is good in them, in the same order every time.

    field: the JSON key or column of the text.  skip: leave bad documents out, where otherwise they are refused.
    """

    paths: tuple[Path, ...]
    field: str = "text"
    skip: bool = False

    def __iter__(self) -> Iterator[Document]:
        return self._each(lambda problem: None)

    @cached_property
    def survey(self) -> Survey:
        """Read everything once.  BadCorpus with every problem (the first 20 and how many more), unless they may be skipped."""
        problems: list[str] = []
        bad = documents = characters = 0

        def note(problem: str) -> None:
            nonlocal bad
            bad += 1
            problems.extend([problem] if len(problems) < SHOWN else [])

        digest = blake2b(digest_size=12)
        for document in self._each(note):
            documents, characters = documents + 1, characters + len(document.text)
            digest.update(json.dumps([document.id, document.text]).encode())
        shown = [*problems, *([f"... and {bad - SHOWN} more"] if bad > SHOWN else [])]
        if bad and not self.skip:
            raise BadCorpus([*shown, "mend these, or leave such documents out with --skip"])
        if not documents:
            raise BadCorpus(
                [*shown, f"no document in {', '.join(map(str, self.paths)) or 'no path at all'}; name others"]
            )
        return Survey(
            documents, characters, bad, tuple(shown), self._files(lambda problem: None)[1], digest.hexdigest()
        )

    def _files(self, note: Note) -> tuple[list[Path], int]:
        """The files in order, each once, and how many were passed over for their suffix."""
        found: dict[Path, Path] = {}  # the same file may be named twice
        ignored = 0
        for path in map(Path, self.paths):
            if path.is_dir():
                inside = []
                for folder, below, names in os.walk(path, onerror=lambda error: note(_unreadable(error))):
                    below[:] = sorted(name for name in below if not name.startswith("."))
                    inside += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
                good = [file for file in inside if file.suffix.lower() in SUFFIXES]
                ignored += len(inside) - len(good)
                if not good:
                    note(f"{path} holds no file that ends in {', '.join(SUFFIXES)}; name another folder")
            elif not path.exists():
                note(f"{path} does not exist; check the path")
                good = []
            elif path.suffix.lower() not in SUFFIXES:
                note(
                    f"{path}: {path.suffix or 'no suffix'!r} is not a format read here; allowed: {', '.join(SUFFIXES)}"
                )
                good = []
            else:
                good = [path]
            for file in good:
                found.setdefault(file.resolve(), file)
        return list(found.values()), ignored

    def _each(self, note: Note) -> Iterator[Document]:
        number, taken = 0, set[bytes]()
        for file in self._files(note)[0]:
            try:
                for place, name, text, start, stop in self._rows(file, note):
                    wrong = _wrong(text)
                    key = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                    if not wrong and key in taken:
                        wrong = f"the id {name!r} is already taken; ids must be unique in the whole pile"
                    if wrong:
                        note(f"{place}: {wrong}")
                        continue
                    taken.add(key)
                    yield Document(number, name, str(text), str(file), start, stop)
                    number += 1
            except OSError as error:
                note(_unreadable(error))

    def _rows(self, file: Path, note: Note) -> Iterator[tuple[str, str, object, int | None, int | None]]:
        """(place, id, text, start, stop) of every row that could be read."""
        suffix = file.suffix.lower()
        if suffix in (".txt", ".md"):
            return self._text(file, note)
        if suffix == ".parquet":
            return self._parquet(file, note)
        return self._json(file, note) if suffix in (".jsonl", ".json") else self._table(file, note)

    def _text(self, file: Path, note: Note):
        data = file.read_bytes()
        try:
            text = data.removeprefix(codecs.BOM_UTF8).decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            note(_encoding(f"{file}:{line}", error))
            return
        yield str(file), str(file), text, 0, len(data)

    def _json(self, file: Path, note: Note):
        with file.open("rb") as lines:
            at = 0
            for line, raw in enumerate(lines, 1):
                start, at = at, at + len(raw)
                place = f"{file}:{line}"
                raw = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
                if not raw.strip():
                    continue
                try:
                    row = json.loads(raw.decode())
                except UnicodeDecodeError as error:
                    note(_encoding(place, error))
                except (ValueError, RecursionError) as error:
                    note(f"{place}: not JSON ({error}); write one object a line")
                    if line == 1 and raw.lstrip().startswith(b"["):
                        note(f"{file} seems to hold one list, which cannot be read bit by bit; write one object a line")
                        return
                else:
                    if not isinstance(row, dict):
                        note(f"{place}: a row must be an object with {self.field!r}, not {json.dumps(row)[:60]}")
                    elif self.field not in row:
                        note(f"{place}: no {self.field!r}; {_known(self.field, row)} (choose another with --field)")
                    else:
                        yield place, _name(row.get("id"), place), row[self.field], start, at

    def _table(self, file: Path, note: Note):
        csv.field_size_limit(CELL)
        delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
        with file.open("rb") as lines:
            read = [0, 0]  # bytes and lines that the reader below has taken

            def text() -> Iterator[str]:
                for raw in lines:
                    read[:] = read[0] + len(raw), read[1] + 1
                    raw = raw.removeprefix(codecs.BOM_UTF8) if read[1] == 1 else raw
                    yield raw.decode(
                        errors="surrogateescape"
                    )  # a bad byte is reported with its row, and the next row is read

            rows = csv.reader(text(), delimiter=delimiter, strict=True)
            header: list[str] = []
            while True:
                start, place = read[0], f"{file}:{read[1] + 1}"
                try:
                    cells = next(rows)
                except StopIteration:
                    break
                except csv.Error as error:
                    note(f"{place}: not CSV ({error}); nothing after this line was read")
                    return
                if not header:
                    header = cells
                    if header and (n := header.count(self.field)) != 1:
                        known = _known(self.field, header)
                        note(f"{file}: {n or 'no'} column {self.field!r}; {known} (choose one with --field)")
                        return
                elif cells and len(cells) != len(header):
                    note(
                        f"{place}: {len(cells)} cells under a header of {len(header)}; quote cells that hold {delimiter!r}"
                    )
                elif cells:
                    row = dict(zip(header, cells, strict=True))
                    yield place, _name(row.get("id"), place), row[self.field], start, read[0]
            if not header:
                note(f"{file} is empty; add rows or leave the file out")

    def _parquet(self, file: Path, note: Note):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            note(f"{file}: .parquet needs pyarrow; pip install 'unremember[tables]'")
            return
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                columns = table.schema_arrow.names
                if columns.count(self.field) != 1:
                    note(f"{file}: no column {self.field!r}; {_known(self.field, columns)} (choose one with --field)")
                    return
                wanted = [self.field, *(["id"] if "id" in columns and self.field != "id" else [])]
                number = 0
                for batch in table.iter_batches(ROWS, columns=wanted):
                    for row in batch.to_pylist():
                        number += 1
                        place = f"{file}, row {number}"
                        yield place, _name(row.get("id"), place), row[self.field], None, None
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            note(f"{file} cannot be read as Parquet: {str(error).splitlines()[0]}; write it again")


def _name(given: object, place: str) -> str:
    """The id that a row gives itself, be it a number, or its place."""
    return place if given is None or str(given).strip() == "" else str(given)


def _wrong(text: object) -> str:
    """What keeps this from being a document, or nothing."""
    if not isinstance(text, str):
        return f"the text is {json.dumps(text, default=repr)[:60]}; it must be a string"
    if not text.strip():
        return "the document is empty; fill it in or remove it"
    if "\x00" in text:
        return "the text holds zero bytes, as binary files and UTF-16 do; save it as UTF-8 text"
    if any("\ud800" <= c <= "\udfff" for c in text):
        return "the text is not UTF-8; save the file as UTF-8 (if it is Latin-1: iconv -f latin1 -t utf-8)"
    return ""


def _encoding(place: str, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{place}: byte 0x{byte:02x} is not UTF-8; save it as UTF-8 (if it is Latin-1: iconv -f latin1 -t utf-8)"


def _unreadable(error: OSError) -> str:
    return f"{error.filename} cannot be read: {error.strerror}; check the path and its permissions"


def _known(field: str, names: Iterable[str]) -> str:
    names = [str(name) for name in names]
    return nearest(field, names) if names else "there is none"
