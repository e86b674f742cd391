"""The flow is one-way and the light modules stay light: read from the imports themselves."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import pytest

import unremember

SOURCE = Path(unremember.__file__).parent
FILES = {
    ".".join(("unremember", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(SOURCE.rglob("*.py"))
}
ROOMS = ("forget", "align", "audit", "attack")
LIGHT = (
    "anchors",
    "annotate",
    "bias_data",
    "errors",
    "corpus",
    "zsre",
    "score",
    "request",
    "report",
    "readers",
    "folder",
)  # a room stands for all its files
HEAVY = ("torch", "transformers")
VAGUE = ("utils", "util", "helpers", "helper", "common", "base", "manager")


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below `node` that runs when the module is imported: no function bodies, no TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (later for branch in child.orelse for later in (branch, *at_import(branch)))
            continue
        yield child
        yield from at_import(child)


@cache
def imports(module: str, ever: bool) -> frozenset[str]:
    """Full names that a module imports, names taken from modules included; `ever`: inside functions too."""
    file = FILES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree) if ever else at_import(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = resolve_name("." * node.level + (node.module or ""), package)
            found.add(start)
            found.update(f"{start}.{alias.name}" for alias in node.names)
    return frozenset(found)


def parents(name: str) -> Iterator[str]:
    """a.b.c -> a, a.b, a.b.c: importing the last runs them all."""
    parts = name.split(".")
    yield from (".".join(parts[: end + 1]) for end in range(len(parts)))


def chain_to_heavy(module: str) -> list[str] | None:
    """The shortest chain of imports, from `module` to torch or transformers, that runs when it is imported."""
    waiting = [[name] for name in parents(module)]
    seen: set[str] = set()
    while waiting:
        chain = waiting.pop(0)
        if chain[-1] in HEAVY:
            return chain
        if chain[-1] not in FILES or chain[-1] in seen:
            continue
        seen.add(chain[-1])
        for name in imports(chain[-1], ever=False):
            lazy = unremember._WHERE.get(name.removeprefix("unremember."), name)  # `from unremember import LM` loads lm
            waiting += [[*chain, step] for step in (*parents(name), *parents(lazy))]
    return None


def light_modules() -> list[str]:
    return [name for name in FILES if name.split(".")[1:2] and name.split(".")[1] in LIGHT]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_that_change_and_measure_do_not_know_one_another(room):
    others = tuple(f"unremember.{other}." for other in ROOMS if other != room)
    for module in FILES:
        if f"{module}.".startswith(f"unremember.{room}."):
            wrong = [name for name in imports(module, ever=True) if f"{name}.".startswith(others)]
            assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_what_locates_knows_nobody_who_changes_or_measures():
    """The flow is one-way: methods may ask locators, and not the other way round."""
    later = tuple(f"unremember.{room}." for room in ROOMS)
    for module in FILES:
        if f"{module}.".startswith("unremember.locate."):
            wrong = [name for name in imports(module, ever=True) if f"{name}.".startswith(later)]
            assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_are_there(name):
    assert f"unremember.{name}" in FILES


@pytest.mark.parametrize("module", light_modules())
def test_light_modules_lead_to_no_torch(module):
    chain = chain_to_heavy(module)
    assert chain is None, " imports ".join(chain or ())


def test_the_reading_of_imports_finds_what_it_should():
    lazy = "if TYPE_CHECKING:\n import a\nelse:\n import b\n"
    tree = ast.parse(lazy + "try:\n import c\nexcept E:\n def f():\n  import d\n")
    assert [node.names[0].name for node in at_import(tree) if isinstance(node, ast.Import)] == ["b", "c"]
    assert chain_to_heavy("unremember.tokens") == ["unremember.tokens", "torch"]
    assert {"unremember.errors", "unremember.errors.BadCorpus"} <= imports("unremember.corpus", ever=False)
    assert "pyarrow.parquet" in imports("unremember.readers", ever=True) - imports("unremember.readers", ever=False)


def test_no_file_has_a_name_that_says_nothing():
    vague = [str(path) for path in SOURCE.rglob("*") if path.stem.strip("_") in VAGUE]
    assert not vague


def test_light_modules_really_load_no_torch():
    """What the reading of imports cannot see: a third-party package that loads torch behind our back."""
    done = run("-c", f"import sys, {', '.join(light_modules())}; print(*sorted({set(HEAVY)} & set(sys.modules)))")
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


def test_importing_the_package_loads_no_torch():
    done = run("-c", f"import sys, unremember; print(*sorted({set(HEAVY)} & set(sys.modules)))")
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


def test_help_answers_without_torch():
    done = run("-X", "importtime", "-m", "unremember", "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = re.findall(rf"\| +({'|'.join(HEAVY)})$", done.stderr, re.MULTILINE)
    assert "Usage" in done.stdout and not loaded
    assert re.search(r"\| +unremember$", done.stderr, re.MULTILINE)  # the times were really there to be read
