"""The command line as a user meets it: what is printed, and the exit code."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from unremember import __version__, cli
from unremember.attack import ATTACKS, VARIANTS
from unremember.audit import AUDITS
from unremember.errors import Diverged
from unremember.folder import cache
from unremember.forget import METHODS
from unremember.readers import write_jsonl

COMMANDS = (
    "demo", "init", "annotate", "validate", "run", "audit", "locate", "forget", "attack", "report", "compare", "ls",
)  # fmt: skip


@pytest.fixture
def said(monkeypatch, capsys):
    """said("ls"): (exit code, what was printed, what was complained about), in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unremember", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code or 0, *capsys.readouterr()

    return call


def started(*arguments: object, **more) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-m", "unremember", *map(str, arguments)],
        env=environment,
        text=True,
        # tests that were started in the background ignore Ctrl-C, and would hand that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **pipes,
    )


@pytest.fixture
def place(taught, never, corpus, tmp_path, monkeypatch) -> Path:
    """A working folder with a request that is small enough to be run."""
    monkeypatch.chdir(tmp_path)
    taught.save(tmp_path / "model")
    never.save(tmp_path / "control")
    for role in ("forget", "retain", "holdout"):
        write_jsonl(corpus[role], tmp_path / f"{role}.jsonl")
    for role in ("world", "replay", "prose"):
        write_jsonl(corpus[role][:12], tmp_path / f"{role}.jsonl")
    roles = ("forget", "retain", "holdout", "world", "replay", "prose")
    (tmp_path / "request.toml").write_text(
        '[run]\nname = "cli"\nout = "out"\n[model]\nname = "model"\ncontrol = "control"\nprecision = "fp32"\n[corpus]\n'
        + "".join(f'{role} = "{role}.jsonl"\n' for role in roles)
        + '[forget]\nmethod = "ascent"\nplan = { steps = 2, lr = 1e-3, stop = "never" }\n'
        + "[audit]\naudits = []\n[attack.rephrase]\nwordings = 1\n"
    )
    return tmp_path


# ── at once ──


def test_help_takes_under_a_second():
    """The best of three: what is measured is our imports, not what else the machine does."""
    spent = []
    for _ in range(3):
        began = time.monotonic()
        out, err = started("--help").communicate(timeout=60)
        spent.append(time.monotonic() - began)
        assert not err and all(re.search(rf"\b{command}\b", out) for command in COMMANDS)
    assert min(spent) < 1.0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, said):
    code, out, _ = said(command, "--help")
    assert code == 0 and "Usage" in out and command in out


def test_the_version(said):
    assert said("--version") == (0, f"{__version__}\n", "")


def test_ls_names_everything(said):
    code, out, _ = said("ls")
    assert code == 0
    for item in (*METHODS, *AUDITS, *ATTACKS):
        assert re.search(rf"^{re.escape(item)}(?!\w)", out, re.MULTILINE), item
    assert all(f"{name} ({kind})" in out for name, kind in VARIANTS.items())
    assert "Zhang et al. 2024" in out


# ── init, validate ──


def test_init_writes_a_request_once(said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = said("init")
    assert code == 0 and "wrote request.toml" in out and "[forget]" in Path("request.toml").read_text()
    Path("request.toml").write_text("mine")
    code, _, err = said("init")
    assert code == 2 and "request.toml exists" in err and Path("request.toml").read_text() == "mine"
    assert said("init", "--force")[0] == 0 and Path("request.toml").read_text() != "mine"
    assert said("init", "sub/other.toml")[0] == 0 and Path("sub/other.toml").exists()


def test_validate_a_good_request(said, place):
    code, out, err = said("validate", "request.toml")
    assert code == 0 and not err
    assert re.search(r"forget +12 examples", out) and "method ascent, attacks: rephrase; the request is good" in out
    assert not (place / "out").exists()


def test_all_problems_are_printed(said, place):
    with (place / "forget.jsonl").open("a") as file:
        file.write("not json\n")
    changes = ("run.seed=-1", "forget.method=asent", "model.name=./nowhere")
    code, out, err = said("validate", "request.toml", *(x for change in changes for x in ("--set", change)))
    assert code == 2 and not out and "Traceback" not in err
    assert err.count("✗ ") == 4
    for part in ("run.seed is -1", "did you mean 'ascent'?", "model './nowhere'", "forget.jsonl:13: not JSON"):
        assert part in err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("validate", "none.toml"), "no such request file: none.toml"),
        (("validate", "."), "no run folder"),
        (("run",), "Missing argument"),
        (("run", "request.toml", "--bogus"), "No such option"),
        (("bogus",), "No such command 'bogus'"),
        (("report", "."), "is no run folder"),
        (("report", "none"), "is no run folder"),
        (("demo", "--preset", "tni"), "unknown preset 'tni'; did you mean 'tiny'?"),
        (("demo", "--seed", "x"), "Invalid value for '--seed'"),
        (("run", "request.toml", "--set", "x"), "write it as section.key=value"),
        (("run", "request.toml", "--out", "retain.jsonl"), "is a file, not a folder"),
        (("run", "request.toml", "--out", "."), "holds files that are not ours"),
        (("run", "request.toml", "--out", "retain.jsonl/x"), "cannot write in"),
        (("attack", "request.toml"), "no forgotten model yet"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_exits_with_2_and_no_traceback(arguments, part, said, place):
    code, _, err = said(*arguments)
    assert code == 2 and part in err and "Traceback" not in err


def test_other_errors_of_ours_have_codes_of_their_own(said, place, monkeypatch):
    def diverge(*_, **__):
        raise Diverged(3, {"ascent": float("nan")})

    monkeypatch.setattr(METHODS["ascent"], "__call__", diverge)
    code, _, err = said("forget", "request.toml")
    assert code == 3 and "training diverged at step 3 (ascent = nan)" in err and "Traceback" not in err
    assert not (place / "out" / "model").exists()


def test_no_arguments_is_a_call_for_help(said):
    code, out, err = said()
    assert "Usage" in out + err and "✗" not in out + err and code in (0, 2)


# ── the rooms ──


def test_room_by_room_is_the_whole_job(said, place):
    """audit, forget, attack, and report do together what run does, and run afterwards has nothing left to do."""
    code, out, _ = said("audit", "request.toml")
    assert code == 0 and "audit the original model" in out and "done: out" in out
    assert sorted(p.name for p in Path("out/audit").iterdir()) == ["never.json", "original.json"]
    code, out, _ = said("forget", "request.toml")
    assert code == 0 and "forget with ascent" in out and "audit the original" not in out
    assert Path("out/audit/forgotten.json").exists() and Path("out/model/model.safetensors").exists()
    code, out, _ = said("attack", "request.toml")
    assert code == 0 and "attack the never-taught model: rephrase" in out and not Path("out/report.json").exists()
    code, out, _ = said("report", "out")
    assert code == 0 and "report: out/report.html" in out and Path("out/model/README.md").exists()
    words = Path("out/report.json").read_text()
    code, out, _ = said("run", "request.toml")
    assert code == 0 and Path("out/report.json").read_text() == words
    assert [line for line in out.splitlines() if line.startswith("▸")] == ["▸ report"]
    for part in ("verdict", "unattacked", "rephrase", "report: out/report.html"):
        assert part in out
    code, out, _ = said("run", "out", "--set", "rule.tolerance=0.5")  # the folder is a request, too
    assert code == 0 and [line for line in out.splitlines() if line.startswith("▸")] == ["▸ report"]


def test_a_smaller_suite_leaves_what_a_larger_one_made(said, place, monkeypatch):
    from unremember.attack import SUITES

    for suite, names in (
        ("quick", ("rephrase",)),
        ("standard", ("multihop", "rephrase")),
        ("full", ("multihop", "rephrase")),
    ):
        monkeypatch.setitem(SUITES, suite, names)
    assert said("forget", "request.toml")[0] == 0

    def columns() -> list[str]:
        return [c["attack"] for c in json.loads(Path("out/report.json").read_text())["conditions"]]

    code, out, _ = said("attack", "out", "--suite", "quick")
    assert code == 0 and "multihop" not in out and columns() == ["none", "rephrase"]
    assert said("attack", "out", "--suite", "standard")[0] == 0 and set(columns()) == {"none", "rephrase", "multihop"}
    code, out, _ = said("attack", "out", "--suite", "quick")
    assert code == 0 and [line for line in out.splitlines() if line.startswith("▸")] == ["▸ report"]
    assert set(columns()) == {"none", "rephrase", "multihop"}
    code, _, err = said("attack", "out", "--suite", "fast")
    assert code == 2 and "attack.suite is 'fast'" in err


def test_out_and_set_change_the_request(said, place):
    code, out, _ = said("forget", "request.toml", "--out", "other", "--set", "forget.plan.steps=1")
    assert code == 0 and "done: other" in out and not Path("out").exists()
    assert len(Path("other/train.jsonl").read_text().splitlines()) == 1


def test_a_full_gpu_says_what_takes_less(monkeypatch, capsys):
    def full(**_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it.")

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().err
    assert left.value.code == 1 and "out of memory" in said and "More" not in said
    assert all(remedy in said for remedy in ("run.recompute", "forget.lora", "run.places"))


# ── Ctrl-C ──


def test_ctrl_c_says_that_it_goes_on(tmp_path):
    mine = tmp_path / "cache"
    shutil.copytree(cache() / "models", mine / "models")
    process = started("demo", "--preset", "tiny", "--out", tmp_path / "run", UNREMEMBER_CACHE=str(mine))
    for line in process.stdout:
        if "teach the original model" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    told = " ".join(err.split())
    assert "Interrupted." in told and "the same command again goes on from there" in told and "Traceback" not in told


def test_the_verdict_names_who_is_not_forgotten_under_each_attack(capsys, tmp_path):
    def condition(attack: str, overall: str, **people: str) -> dict:
        entities = [{"name": name, "verdict": verdict} for name, verdict in people.items()]
        return {"attack": attack, "overall": {"verdict": overall}, "entities": entities}

    people = {name: "remembered" for name in "ABCDEF"}
    conditions = [
        condition("none", "forgotten", A="forgotten"),
        condition("lens", "remembered", **people, G="forgotten"),
    ]
    cli._verdict({"conditions": conditions, "words": "In words.", "luck": None, "method": {"stop": ""}}, tmp_path)
    first, second = [
        " ".join(line.split()) for line in capsys.readouterr().out.splitlines() if "forgotten" in line or "lens" in line
    ]
    assert (first, second) == ("unattacked forgotten", "lens remembered A, B, C, D and 2 more")
