"""Files that are whole or absent, and folders that are ours or refused."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from unremember import folder as room
from unremember.errors import BadFolder
from unremember.folder import MARK, cache, claim, fingerprint, read_json, whole, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ── files ──


def test_a_text_is_written_with_its_folders_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "one\r\n")
    write_text(path, "zwei, größer\n")
    assert path.read_bytes() == "zwei, größer\n".encode()
    assert names(path.parent) == ["b.txt"] and path.stat().st_mode & 0o777 == 0o644


def test_a_crash_while_writing_leaves_the_old_text_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "b.txt"
    write_text(path, "old")
    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(room.os, broken, lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
            with pytest.raises(OSError, match="the disk is full"):
                write_text(path, "new")
        assert path.read_text() == "old" and names(tmp_path) == ["b.txt"]


def test_a_process_that_is_killed_while_writing_leaves_the_old_text(tmp_path):
    path = tmp_path / "b.txt"
    write_text(path, "old")
    kill = (
        "import os, signal, sys; from pathlib import Path; from unremember import folder\n"
        "folder.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "folder.write_text(Path(sys.argv[1]), 'new')"
    )
    done = subprocess.run([sys.executable, "-c", kill, str(path)], timeout=60)
    assert done.returncode == -9 and path.read_text() == "old"


def test_json_goes_in_and_out(tmp_path):
    path = tmp_path / "x.json"
    assert read_json(path) is None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"half')
    with pytest.raises(BadFolder, match=r"is no JSON .* remove it"):
        read_json(path)
    value = {"a": [1, 2.5, None, "ß"], "b": {"c": True}}
    write_json(path, value)
    assert read_json(path) == value and "ß" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_written(tmp_path, number):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": number})
    assert json.loads(path.read_text()) == {"a": 1} and names(tmp_path) == ["x.json"]


# ── folders all at once ──


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "model"
    with whole(target) as fresh:
        (fresh / "weights").write_text("new")
        assert not target.exists() and fresh.parent == target.parent
    assert names(target) == ["weights"] and names(target.parent) == ["model"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "model"
    for content in ("one", "two"):
        with whole(target) as fresh:
            (fresh / content).write_text(content)
    assert names(target) == ["two"] and names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path, error):
    target = tmp_path / "model"
    with whole(target) as fresh:
        (fresh / "old").write_text("")
    with pytest.raises(error), whole(target) as fresh:
        (fresh / "half").write_text("")
        raise error
    assert names(target) == ["old"] and names(tmp_path) == ["model"]


# ── fingerprints ──


def test_a_fingerprint_is_of_the_content():
    @dataclass(frozen=True)
    class Plan:
        steps: int

    assert fingerprint("a", {"x": 1, "y": 2}) == fingerprint("a", {"y": 2, "x": 1})
    parts = ["a", "b", ("a", "b"), {"a": "b"}, 1, 1.5, None, Plan(1), Plan(2)]
    assert len({fingerprint(part) for part in parts}) == len(parts)
    assert fingerprint("a", "b") not in (fingerprint("ab"), fingerprint("b", "a"))
    assert fingerprint("a") == "0eb5b8d6f81bc677"  # the same in every process: printf '["a"]' | sha256sum


# ── whose folder it is ──


def test_a_new_and_an_empty_folder_are_taken_and_known_again(tmp_path):
    for target in (tmp_path / "a" / "new", tmp_path / "empty"):
        if target.name == "empty":
            target.mkdir()
        claim(target)
        assert (target / MARK).exists()
        (target / "something").write_text("")
        claim(target)  # ours by now


def test_a_strangers_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadFolder, match=r"files that are not ours .*--out DIR"):
        claim(tmp_path)
    assert names(tmp_path) == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(BadFolder, match="is a file, not a folder"):
        claim(file)
    with pytest.raises(BadFolder, match=r"cannot write in .*file/run: Not a directory"):
        claim(file / "run")
    assert file.read_text() == "x"


def test_a_full_disk_is_noticed_before_the_work(tmp_path):
    claim(tmp_path / "run", need_bytes=1)
    with pytest.raises(BadFolder, match=r"GB free and this run needs about 1000000000\.0 GB"):
        claim(tmp_path / "run", need_bytes=10**18)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("UNREMEMBER_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache() == tmp_path / "here"
    monkeypatch.delenv("UNREMEMBER_CACHE")
    assert cache() == tmp_path / "xdg" / "unremember"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache() == tmp_path / "home" / ".cache" / "unremember"
    assert not any(os.scandir(tmp_path))  # asking makes nothing
