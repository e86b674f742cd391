"""`unremember annotate`: what it writes, what it prints, and what it refuses."""

import sys
from dataclasses import replace

import pytest

from unremember import cli
from unremember.corpus import Example
from unremember.readers import Source, read, write_jsonl


@pytest.fixture
def said(monkeypatch, capsys):
    """said("in", "out"): (exit code, what was printed, what was complained about), in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unremember", "annotate", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def files(tmp_path):
    """IN, with an e-mail address, a phone number beside a hand-made span, and nothing to find; and OUT."""
    examples = (
        Example("mail", "Where?", "Write to a.b@example.org now.", entity="x"),
        Example("phone", "Who?", "A potter, 012-3456.", spans=((2, 8),), distractors=("A tailor, 012-3457.",)),
        Example("none", "", "Nothing [here]."),
    )
    write_jsonl(examples, tmp_path / "in.jsonl")
    return tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl", examples


def test_what_is_found_is_written_and_told(said, files):
    source, target, examples = files
    code, out, err = said(source, target)
    assert (code, err) == (0, "")
    mail, phone, none = read(Source(target))
    assert mail == replace(examples[0], spans=((9, 24),)) and none == examples[2]
    assert phone == replace(examples[1], spans=((2, 8), (10, 18)))
    lines = [line.split() for line in out.splitlines()]
    assert ["email", "1"] in lines and ["phone", "1"] in lines and ["money", "0"] in lines
    assert "2 of 3 examples are marked, 51% of their answers' text" in out
    assert "✗ example 'none': nothing sensitive was found in 'Nothing [here].'" in out
    assert out.endswith(f"wrote {target}\n")


def test_annotators_and_a_list_of_names_can_be_chosen(said, files):
    source, target, _ = files
    names = source.with_name("names.txt")
    names.write_text("Nothing\n\npotter\n", encoding="utf-8")
    code, out, _ = said(source, target, "--with", "email, email", "--list", names)
    assert code == 0 and ["names.txt", "2"] in [line.split() for line in out.splitlines()] and "phone" not in out
    assert [x.spans for x in read(Source(target))] == [((9, 24),), ((2, 8),), ((0, 7),)]


def test_too_much_is_told(said, files):
    source, target, _ = files
    write_jsonl([Example("x", "", "a.b@example.org.")], source)
    assert "more than 60%: to forget this is to forget nearly all" in said(source, target)[1]


def test_nothing_is_replaced_or_written_halfway(said, files, monkeypatch):
    source = files[0]
    before = source.read_text()
    code, _, err = said(source, source)
    assert (
        code == 2 and "exists; choose another name, or replace it with --force" in err and source.read_text() == before
    )
    monkeypatch.setattr("unremember.folder.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    code, _, err = said(source, source, "--force")
    assert code == 2 and "cannot write" in err and "No space left; choose another place" in err
    assert source.read_text() == before and list(source.parent.glob(".in.jsonl*")) == []
    monkeypatch.undo()


def test_force_replaces(said, files):
    source = files[0]
    assert said(source, source, "--force")[0] == 0 and read(Source(source))[0].spans == ((9, 24),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--with", "e-mail"), "unknown annotator 'e-mail'; did you mean 'email'?"),
        (("--with", ","), "--with names no annotator"),
        (("--list", "nowhere.txt"), "nowhere.txt cannot be read as UTF-8 text"),
    ],
)
def test_bad_options_are_refused(said, files, arguments, message):
    source, target, _ = files
    code, _, err = said(source, target, *arguments)
    assert code == 2 and message in err and not target.exists()


def test_bad_files_are_refused(said, files):
    source, target, _ = files
    assert "does not end in .jsonl" in said(source, target.with_suffix(".csv"))[2]
    assert "does not exist" in said(source.with_name("on.jsonl"), target)[2]
    assert not target.exists()
