"""What the documentation says is true: its code runs, its commands and files exist, its tables are complete."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from typer.main import get_command

from unremember.attack import ATTACKS, VARIANTS
from unremember.audit import AUDITS, EVIDENCE, UTILITY
from unremember.cli import app
from unremember.corpus import ROLES
from unremember.forget import METHODS
from unremember.locate import LOCATORS
from unremember.readers import Source, read
from unremember.request import SECTIONS
from unremember.score import RULE

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "unremember"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAPERS = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
CORPUS = (ROOT / "docs" / "corpus.md").read_text(encoding="utf-8")
ATTACKS_PAGE = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def code(page: str) -> list[str]:
    """Every line of a shell block, comments cut off, and every piece of code in a sentence."""
    lines = [line.partition(" #")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL))


def section(page: str, title: str) -> str:
    return re.split(r"^## ", page.partition(f"## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def first_cells(page: str) -> list[str]:
    """The names in the first column of a page's tables, where they are written as code."""
    return re.findall(r"^\| `([^`|]+)` \|", page, re.MULTILINE)


# ── code ──


@pytest.mark.parametrize("block", blocks(README, "python"))
def test_the_python_of_the_readme_runs(block, tmp_path):
    """With the cache that UNREMEMBER_CACHE names, so that the toy model is made once in a session."""
    done = subprocess.run(
        [sys.executable, "-c", block],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    words = ("forgotten", "remembered", "over-forgotten", "not applicable")
    assert done.stdout.startswith(tuple(f"{word} - " for word in words)), done.stdout


def test_there_is_python_in_the_readme():
    assert len(blocks(README, "python")) == 1


@pytest.mark.parametrize("block", blocks(ATTACKS_PAGE, "python"))
def test_python_of_the_attacks_page_runs(block, tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "attacks.md", "exec"), {})
    assert capsys.readouterr().out == "said of 12 facts\n"


@pytest.mark.parametrize("page", [README, CORPUS, ATTACKS_PAGE], ids=["README", "corpus", "attacks"])
def test_requests_have_known_sections_and_keys(page):
    requests = [tomllib.loads(block) for block in blocks(page, "toml")]
    assert requests
    for name, table in ((name, table) for request in requests for name, table in request.items()):
        assert name in SECTIONS
        assert set(table) <= set(SECTIONS[name] or table)


@pytest.mark.parametrize(
    ("language", "suffix", "rows"), [("jsonl", "jsonl", (2, 1)), ("csv", "csv", (2,)), ("text", "txt", (2,))]
)
def test_the_files_of_the_corpus_page_are_read(language, suffix, rows, tmp_path):
    shown = blocks(CORPUS, language)
    assert len(shown) == len(rows)
    for text, expected in zip(shown, rows, strict=True):
        file = tmp_path / f"shown.{suffix}"
        file.write_text(text, encoding="utf-8")
        examples = read(Source(file))
        assert len(examples) == expected
        assert all(x.values()[0] in ("Coimbra", x.answer) for x in examples)


def test_the_corpus_page_has_every_role():
    assert first_cells(section(CORPUS, "Roles")) == list(ROLES)


# ── commands ──


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_and_option_exists(page):
    commands = get_command(app).commands
    for line in code(page.read_text(encoding="utf-8")):
        words = shlex.split(line) if re.search(r"(^|-m )unremember [a-z]", line) else ()
        if words:
            name, *rest = words[words.index("unremember") + 1 :]
            assert name in commands, line
            known = {option for parameter in commands[name].params for option in parameter.opts}
            assert {word for word in rest if word.startswith("-")} <= known, line


def test_the_readme_shows_every_command():
    told = " ".join(code(README)) + " make demo"
    assert {name for name in get_command(app).commands if name != "demo" and f"unremember {name}" not in told} == set()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_make_target_exists(page):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line in code(page.read_text(encoding="utf-8")):
        if found := re.match(r"make ([a-z]+)", line):
            assert found[1] in targets, line


# ── files ──


def drawn() -> set[str]:
    """The files of the README's tree, relative to the package."""
    [tree] = re.findall(r"^```\nsrc/unremember/\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    folders, found = [], set()
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2 - 1, line.split()[0]
        folders[depth:] = [name.rstrip("/")]
        if not name.endswith("/"):
            found.add("/".join(folders))
    return found


def test_the_tree_is_the_package():
    there = {
        str(file.relative_to(SOURCE))
        for file in SOURCE.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
    }
    assert drawn() - there == set(), "drawn in README.md and not there"
    assert there - drawn() == set(), "there and not drawn in README.md"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    relative = {link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)} - {""}
    assert {link for link in relative if not (page.parent / link).exists()} == set()


def test_the_named_tests_exist():
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAPERS):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


# ── tables ──


def test_the_tables_of_the_readme_are_complete():
    told = first_cells(section(README, "What is in it"))
    assert sorted(told) == sorted([*METHODS, *LOCATORS, *AUDITS, *ATTACKS])


@pytest.mark.parametrize(
    ("title", "room"), [("Methods", METHODS), ("Locators", LOCATORS), ("Audits", AUDITS), ("Attacks", ATTACKS)]
)
def test_everything_has_its_row_among_the_papers(title, room):
    assert sorted(first_cells(section(PAPERS, title))) == sorted(room)


def test_the_page_of_attacks_has_every_attack_and_setting_and_name():
    rows = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| (`.+`) \|$", ATTACKS_PAGE, re.MULTILINE)
    told = {name: re.findall(r"`(\w+)`", cell) for name, cell in rows}
    assert told == {name: [x.name for x in fields(made)] for name, made in ATTACKS.items()}
    assert first_cells(section(ATTACKS_PAGE, "Names that are known")) == list(VARIANTS)


def test_the_readme_says_what_a_verdict_rests_on():
    used = dict(re.findall(r"^\| `([^`|]+)` \| [^|]+ \| (verdict|gate|report) \|$", README, re.MULTILINE))
    assert used == {name: "verdict" if name in EVIDENCE else "gate" if name in UTILITY else "report" for name in AUDITS}


def test_the_readme_has_the_rule():
    told = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", section(README, "What a verdict means"), re.MULTILINE)
    assert {name: float(value) for name, value in told} == asdict(RULE)
