"""Documents: every format read one at a time, with ids and bytes that lead back to the file, and every bad input named."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from unremember.documents import SHOWN, Documents
from unremember.errors import BadCorpus

TEXTS = ["Hanna keeps bees.", "Two\nlines, “quoted”: äöü", 'She said "no", then left.']


def pile(*paths: Path, **settings) -> Documents:
    return Documents(tuple(paths), **settings)


def refused(documents: Documents) -> str:
    with pytest.raises(BadCorpus) as found:
        _ = documents.survey
    return str(found.value)


def jsonl(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def csv_of(path: Path, delimiter: str = ",") -> Path:
    cells = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    rows = [delimiter.join((f"c{i}", cell)) for i, cell in enumerate(cells)]
    path.write_bytes("\r\n".join((delimiter.join(("id", "text")), *rows, "")).encode())
    return path


def parquet(path: Path, texts) -> Path:
    tables, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    tables.write_table(arrow.table({"id": [f"p{i}" for i in range(len(texts))], "text": texts}), path)
    return path


# ── what is read ──


def test_json_lines_with_ids_and_bytes_that_hold_the_row(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", {"text": TEXTS[0]}, {"id": 7, "text": TEXTS[1]}, {"id": "x", "text": TEXTS[2]})
    found = list(pile(file))
    assert [(x.number, x.id, x.text) for x in found] == [
        (0, f"{file}:1", TEXTS[0]), (1, "7", TEXTS[1]), (2, "x", TEXTS[2]),
    ]  # fmt: skip
    data = file.read_bytes()
    assert [json.loads(data[x.start : x.stop])["text"] for x in found] == TEXTS
    assert pile(file).survey.documents == 3 and pile(file).survey.characters == sum(map(len, TEXTS))


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_tables_with_quotes_and_line_breaks_and_bytes(tmp_path, name, delimiter):
    file = csv_of(tmp_path / name, delimiter)
    found = list(pile(file))
    assert [(x.id, x.text) for x in found] == [(f"c{i}", text) for i, text in enumerate(TEXTS)]
    data = file.read_bytes()
    for x in found:
        assert data[x.start : x.stop].startswith(x.id.encode()) and data[x.start : x.stop].endswith(b'"\r\n')
    assert found[0].start == len("id,text\r\n") and found[-1].stop == len(data)


def test_parquet_in_batches_without_bytes(tmp_path):
    texts = [f"text {i}" for i in range(150)]  # more than two batches
    found = list(pile(parquet(tmp_path / "a.parquet", texts)))
    assert [x.text for x in found] == texts and found[149].id == "p149" and found[0].start is None


def test_a_folder_stands_for_its_files_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "no.txt").write_text("hidden")
    (tmp_path / "z.txt").write_text(TEXTS[0], encoding="utf-8")
    (tmp_path / "b" / "a.md").write_text("\ufeff" + TEXTS[1], encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    documents = pile(tmp_path, tmp_path / "z.txt")  # named twice, read once
    assert [x.text for x in documents] == [TEXTS[0], TEXTS[1]]
    assert [Path(x.id).name for x in documents] == ["z.txt", "a.md"]
    assert documents.survey.ignored == 1 and documents.survey.bad == 0


def test_a_byte_order_mark_belongs_to_no_text(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + jsonl(tmp_path / "b.jsonl", {"text": "x y"}).read_bytes())
    table = tmp_path / "a.csv"
    table.write_bytes(b"\xef\xbb\xbftext\nhello\n")
    assert [x.text for x in pile(file, table)] == ["x y", "hello"]


def test_a_cell_longer_than_the_csv_module_likes(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("text\n" + "long " * 40_000 + "\n")
    assert len(next(iter(pile(file))).text) >= 199_999


def test_another_field(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", {"answer": "yes"})
    assert [x.text for x in pile(file, field="answer")] == ["yes"]


def test_the_digest_is_of_texts_and_ids_in_order(tmp_path):
    a, b = {"id": "a", "text": "one"}, {"id": "b", "text": "two"}
    digests = {
        pile(jsonl(tmp_path / f"{i}.jsonl", *rows)).survey.digest
        for i, rows in enumerate([(a, b), (b, a), (a,), ({"id": "c", "text": "one"}, b)])
    }
    assert len(digests) == 4
    assert pile(jsonl(tmp_path / "again.jsonl", a, b)).survey.digest in digests


def test_never_all_in_memory(tmp_path):
    """7 MB of documents, of 8 kB each: reading them takes less than 1 MB."""
    file = tmp_path / "a.jsonl"
    with file.open("w") as out:
        for i in range(1000):
            out.write(json.dumps({"id": str(i), "text": f"{i} " * 2000}) + "\n")
    assert file.stat().st_size > 7e6
    tracemalloc.start()
    try:
        n = sum(1 for _ in pile(file))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert n == 1000 and peak < 1e6


# ── what is refused ──


def test_all_problems_together_with_their_places(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(
        b'{"text": "good", "id": "a"}\n{"text": ""}\n{"tekst": "x"}\n[1]\nnot json\n{"text": "caf\xe9"}\n'
        b'{"text": 5}\n{"text": "again", "id": "a"}\n{"text": "\\ud800"}\n{"text": "a\\u0000b"}\n'
    )
    latin = tmp_path / "latin.txt"
    latin.write_bytes("one\ncafé".encode("latin1"))
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    text = refused(pile(bad, latin, empty, tmp_path / "absent.txt", tmp_path / "a.doc"))
    for part in (
        f"{bad}:2: the document is empty", f"{bad}:3: no 'text'; did you mean 'tekst'?", f"{bad}:4: a row must be an object",
        f"{bad}:5: not JSON", f"{bad}:6: byte 0xe9 is not UTF-8", f"{bad}:7: the text is 5; it must be a string",
        f"{bad}:8: the id 'a' is already taken", f"{bad}:9: the text is not UTF-8", f"{bad}:10: the text holds zero bytes",
        f"{latin}:2: byte 0xe9 is not UTF-8", f"{empty}: the document is empty", "absent.txt does not exist", "--skip",
    ):  # fmt: skip
        assert part in text, part
    (tmp_path / "a.doc").write_text("x")
    assert "'.doc' is not a format read here; allowed: .jsonl" in refused(pile(tmp_path / "a.doc"))


def test_bad_documents_may_be_skipped_and_are_counted(tmp_path):
    bad = jsonl(tmp_path / "a.jsonl", {"text": "good"}, {"text": ""}, {"text": "too"})
    documents = pile(bad, tmp_path / "absent.txt", skip=True)
    assert [(x.number, x.text) for x in documents] == [(0, "good"), (1, "too")]
    survey = documents.survey
    assert survey.documents == 2 and survey.bad == 2 and "is empty" in survey.problems[1]
    assert "no document in" in refused(pile(jsonl(tmp_path / "b.jsonl", {"text": ""}), skip=True))


def test_many_problems_are_counted(tmp_path):
    text = refused(pile(jsonl(tmp_path / "a.jsonl", *({"text": ""} for _ in range(50)))))
    assert text.count("is empty") == SHOWN and f"... and {50 - SHOWN} more" in text


def test_tables_that_are_none(tmp_path):
    ragged, other, void = tmp_path / "r.csv", tmp_path / "o.csv", tmp_path / "v.csv"
    ragged.write_bytes(b"id,text\n1,a\n2,b,c\n3,caf\xe9\n4,d\n")
    other.write_text("id,body\n1,a\n")
    void.write_text("")
    text = refused(pile(ragged, other, void))
    assert f"{ragged}:3: 3 cells under a header of 2" in text and f"{ragged}:4: the text is not UTF-8" in text
    assert f"{other}: no column 'text'; " in text and f"{void} is empty" in text
    assert [x.id for x in pile(ragged, skip=True)] == ["1", "4"]
    broken = tmp_path / "b.csv"
    broken.write_text('text\nfine\n"open\n')
    assert f"{broken}:3: not CSV" in refused(pile(broken))


def test_files_that_cannot_be_opened(tmp_path):
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling.txt")
    (tmp_path / "good.txt").write_text("good")
    assert "dangling.txt cannot be read: No such file" in refused(pile(tmp_path))
    (tmp_path / "void").mkdir()
    assert "holds no file that ends in" in refused(pile(tmp_path / "void"))
    fake = tmp_path / "fake.parquet"
    fake.write_text("no parquet")
    assert "fake.parquet cannot be read as Parquet" in refused(pile(fake))
    assert "no document in no path at all" in refused(pile())


def test_a_json_list_is_sent_back(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('[\n{"text": "x"},\n{"text": "y"}\n]')
    text = refused(pile(file))
    assert "seems to hold one list, which cannot be read bit by bit" in text and text.count("not JSON") == 1


def test_parquet_of_other_columns_and_values(tmp_path):
    tables, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    other, numbers = tmp_path / "o.parquet", tmp_path / "n.parquet"
    tables.write_table(arrow.table({"body": ["x"]}), other)
    tables.write_table(arrow.table({"text": [1, None]}), numbers)
    text = refused(pile(other, numbers))
    assert f"{other}: no column 'text'; known: body" in text
    assert f"{numbers}, row 1: the text is 1" in text and f"{numbers}, row 2: the text is null" in text
