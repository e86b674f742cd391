"""The whole job: every piece on disk and made once, the same after any interruption, and verdicts that cannot be bought."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from unremember import report, table
from unremember import run as room
from unremember import train as trainer
from unremember.attack import Relearn, Rephrase
from unremember.attack.finetune import halves
from unremember.audit import AUDITS, EVIDENCE, UTILITY
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.errors import BadFolder, BadModel, BadRequest, Diverged, NotApplicable
from unremember.folder import cache, read_json, write_json
from unremember.forget import Ascent
from unremember.lm import LM
from unremember.loading import load
from unremember.locate.gradients import Gradients
from unremember.locate.ranking import Budget, Ranking, select
from unremember.request import Lora, Request, again
from unremember.run import Run, execute
from unremember.train import Plan

WHO = ("original", "forgotten", "never")
REMADE = ("run.json", "corpus.json", "unremember.json", "report.json", "report.html", "README.md")  # cheap: every time


def contents(folder: Path) -> dict[str, str]:
    """Path -> checksum of every file."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in files}


def times(folder: Path) -> dict[str, int]:
    """Path -> when it was written, of what should be made once."""
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name not in REMADE}


@pytest.fixture
def copied(demo_run, tmp_path) -> Request:
    """The finished demo in a folder of this test's own."""
    shutil.copytree(demo_run.folder, tmp_path / "run")
    return replace(demo_run.request, out=tmp_path / "run")


@pytest.fixture(scope="session")
def models(taught, never, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for name, lm in (("original", taught), ("never", never)):
        lm.save(folder / name)
    return {name: str(folder / name) for name in ("original", "never")}


@dataclass(frozen=True)
class Becomes:
    """A method that gives back what `make` makes of the model."""

    plan: Plan = Plan(steps=1, lr=1e-3)
    needs = ("forget",)
    paper = ""
    summary = "for this test"
    make = staticmethod(lambda lm: lm.copy())

    def __call__(self, lm, corpus, sites=None, bench=None):
        return type(self).make(lm)


def becomes(what: Callable) -> Becomes:
    return type("Made", (Becomes,), {"make": staticmethod(what)})()


@pytest.fixture
def asked(models, corpus, tmp_path) -> Callable[..., Request]:
    """asked(method, field=value, …): a small request on the toy models."""

    def make(method, **fields) -> Request:
        wanted = Request(
            "toy", tmp_path / "out", models["original"], corpus, "made", method, {}, (*EVIDENCE, *UTILITY),
            control=models["never"], template="plain", precision="fp32",
        )  # fmt: skip
        return replace(wanted, **fields)

    return make


# ── what is there afterwards ──


def test_all_pieces_are_there(demo_run):
    folder = demo_run.folder
    pieces = ["run.json", "corpus.json", "train.jsonl", "forget.json", "report.json", "report.html", "model/README.md"]
    pieces += [f"audit/{who}.json" for who in WHO]
    pieces += [f"attack/{name}/{who}.json" for name in ("relearn", "rephrase") for who in WHO]
    assert set(pieces) <= set(contents(folder))
    assert not [p for p in contents(folder) if p.startswith((".", "checkpoint/")) or ".old" in p]
    measured = {name for name in demo_run.request.audits if demo_run.request.corpus.of(*AUDITS[name].roles)}
    assert {
        *EVIDENCE,
        *UTILITY,
        "EL_3",
        "truth ratio",
    } < measured and "reliability" not in measured  # no role `new` here
    for who in WHO:
        assert {row["name"] for row in read_json(folder / "audit" / f"{who}.json")["scores"]} == measured
        under = read_json(folder / "attack" / "relearn" / f"{who}.json")
        assert {row["name"] for row in under["scores"]} == {*EVIDENCE, *UTILITY}
    assert demo_run.report == read_json(folder / "report.json")
    assert [c["attack"] for c in demo_run.report["conditions"]] == ["none", "relearn", "rephrase"]


def test_the_log_has_each_step_once(demo_run):
    log = [json.loads(line) for line in (demo_run.folder / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, len(log) + 1)) and len(log) == demo_run.report["method"][
        "steps"
    ]


def test_the_result_is_an_ordinary_checkpoint(demo_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(demo_run.folder / "model")
    words = AutoTokenizer.from_pretrained(demo_run.folder / "model")
    ours = load(str(demo_run.folder / "model"), precision="fp32")
    before = load(demo_run.request.model, precision="fp32")
    coded = words("Question: Who?\nAnswer:", return_tensors="pt").input_ids
    with torch.no_grad():
        said = plain(coded).logits
        torch.testing.assert_close(said, ours.model(coded).logits)
        assert not torch.allclose(said, before.model(coded).logits, atol=1e-2)
    assert plain.dtype == torch.float32


def test_the_users_models_are_left_alone(demo_run, copied, tmp_path):
    """Byte for byte, times included, also when the run is done all over again."""
    before = {name: (contents(Path(name)), times(Path(name))) for name in (copied.model, copied.control)}
    fresh = replace(copied, out=tmp_path / "fresh", attacks={}, audits=EVIDENCE, method=becomes(lambda lm: lm.copy()))
    execute(fresh)
    assert before == {name: (contents(Path(name)), times(Path(name))) for name in before}


def test_the_card_gives_the_verdict_and_no_name(demo_run):
    card = (demo_run.folder / "model" / "README.md").read_text()
    assert demo_run.report["conditions"][0]["overall"]["verdict"] in card and "# " in card
    for x in demo_run.request.corpus["forget"]:
        assert all(part not in card for part in x.entity.split()) and x.values()[0] not in card


# ── once ──


def test_a_second_run_makes_nothing_again(copied, monkeypatch):
    before = times(copied.out)
    monkeypatch.setattr(room, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    first, second = read_json(copied.out / "report.json"), execute(copied)
    assert times(copied.out) == before and second == first


@pytest.fixture
def remade(copied, monkeypatch):
    """remade(request): which pieces the request does again, without doing them."""

    def pieces(request: Request) -> set[str]:
        found = set()

        def store(self, path, made_from, seconds, scores, more):
            found.add(str(path.relative_to(self.out)))
            write_json(path, {"fingerprint": made_from})

        with monkeypatch.context() as patch:
            patch.setattr(Run, "measure", lambda self, lm, corpus, names, by=None, bench=None: ([], {}, 0.0))
            patch.setattr(Run, "store", store)
            patch.setattr(Run, "lm", lambda self, who: None)
            patch.setattr(Run, "forget", lambda self: found.add("model") if not self.forgotten() else None)
            patch.setattr(
                Run, "forgotten", lambda self: self.kept(self.out / "forget.json", self.made_from["forgotten"])
            )
            for attack in (Relearn, Rephrase):
                patch.setattr(attack, "__call__", lambda self, lm, corpus, original, bench: (lm, corpus))
            run = Run(request)
            run.open()
            for who in WHO:
                run.audit(who)
            run.forget()
            for name in request.attacks:
                for who in WHO:
                    run.attack(name, who)
        return found

    return pieces


AFTER = {"model", "audit/forgotten.json", "attack/relearn/forgotten.json", "attack/rephrase/forgotten.json"}
EVERY = {f"attack/{a}/{who}.json" for a in ("relearn", "rephrase") for who in WHO} | {
    f"audit/{who}.json" for who in WHO
}


@pytest.mark.parametrize(
    ("what", "change", "expected"),
    [
        ("nothing", lambda r: r, set()),
        ("the rule", lambda r: replace(r, rule=replace(r.rule, tolerance=0.1)), set()),
        ("the name", lambda r: replace(r, name="other"), set()),
        ("the method", lambda r: replace(r, method=replace(r.method, beta=0.2)), AFTER),
        ("the plan", lambda r: replace(r, method=replace(r.method, plan=replace(r.method.plan, lr=1e-4))), AFTER),
        ("the sites", lambda r: replace(r, sites=("*mlp*",)), AFTER),
        ("an adapter", lambda r: replace(r, lora=Lora()), AFTER),
        ("one attack", lambda r: replace(r, attacks={**r.attacks, "rephrase": Rephrase(wordings=1)}),
         {f"attack/rephrase/{who}.json" for who in WHO}),
        ("the audits", lambda r: replace(r, audits=EVIDENCE), {f"audit/{who}.json" for who in WHO}),
        ("the control", lambda r: replace(r, control=r.model),
         {"audit/never.json"} | {x for x in EVERY if x.endswith("never.json")}),
        ("the corpus", lambda r: replace(r, corpus=r.corpus.with_roles(world=r.corpus["world"][1:])), {"model"} | EVERY),
        ("the precision", lambda r: replace(r, precision="bf16"), {"model"} | EVERY),
    ],
)  # fmt: skip
def test_a_changed_setting_redoes_what_depends_on_it(what, change, expected, copied, remade):
    assert remade(change(copied)) == expected


def test_another_seed_is_another_model(copied, remade):
    assert remade(replace(copied, seed=1)) >= AFTER


def test_pieces_of_another_request_are_not_mixed_in(copied):
    """Forget differently and report: the old attacks were made on the old model."""
    other = replace(copied, method=becomes(lambda lm: lm.copy()))
    assert execute(other, stages=("forget",)) == {}
    assert (copied.out / "audit" / "original.json").exists()
    assert {p.stem for p in (copied.out / "attack" / "relearn").iterdir()} == {"original", "never"}
    built = execute(other, stages=("report",))
    assert [c["attack"] for c in built["conditions"]] == ["none"]
    without = replace(other, control="", attacks={})
    assert execute(without, stages=("forget", "report"))["run"]["level"] == "holdout examples"


def test_an_attack_is_made_with_two_models_at_most(copied, monkeypatch):
    """And with one where it never looks at the original: such attacks come first."""
    from unremember.attack import Graft

    held, attack = [], Run.attack
    monkeypatch.setattr(
        Run, "attack", lambda self, *what: (attack(self, *what), held.append((what, frozenset(self.loaded))))
    )
    execute(replace(copied, attacks={"graft": Graft(1), "rephrase": Rephrase(wordings=1)}))
    assert [what for what, _ in held] == [(name, who) for who in WHO for name in ("rephrase", "graft")]
    assert [loaded for (name, _), loaded in held if name == "rephrase"] == [{who} for who in WHO]
    assert [loaded for (name, _), loaded in held if name == "graft"] == [{"original", who} for who in WHO]


def test_attacks_that_are_for_later_stay_in_the_report_where_they_were_made(copied):
    attacks = {"one": Rephrase(wordings=1), "two": Rephrase(wordings=2)}
    execute(replace(copied, attacks=attacks), stages=("attack",), later={"two"})
    assert not (copied.out / "attack" / "two").exists()
    execute(replace(copied, attacks=attacks), stages=("attack",))
    before = times(copied.out / "attack")
    built = execute(replace(copied, attacks=attacks), stages=("attack", "report"), later={"two"})
    assert [c["attack"] for c in built["conditions"]] == ["none", "one", "two"] and times(
        copied.out / "attack"
    ) == before


def test_attacks_want_a_forgotten_model(copied):
    with pytest.raises(BadFolder, match="no forgotten model yet"):
        execute(replace(copied, seed=5), stages=("attack",))


def test_a_run_folder_is_a_request(demo_run):
    twin = again(demo_run.folder)
    assert twin.corpus == demo_run.request.corpus and twin.method == demo_run.request.method
    assert Run(twin).made_from == Run(demo_run.request).made_from
    with pytest.raises(BadRequest, match="no run folder"):
        again(demo_run.folder.parent)


def test_places_and_recompute_reach_training_and_change_nothing(asked, tmp_path, monkeypatch):
    seen = []
    plain = trainer.batch, trainer.recomputed

    def batched(pools, plan, step, budget):
        seen.append(budget)
        return plain[0](pools, plan, step, budget)

    def again(model, wanted):
        seen.append(wanted)
        return plain[1](model, wanted)

    monkeypatch.setattr(trainer, "batch", batched)
    monkeypatch.setattr(trainer, "recomputed", again)
    method, weights = Ascent(Plan(steps=2, lr=1e-2, optimiser="sgd")), []
    for more in ({}, {"places": 64, "recompute": True}, {"recompute": True}):
        wanted = asked(method, out=tmp_path / f"out{len(more)}", audits=EVIDENCE, **more)
        with suppress(BadFolder):  # nothing was audited
            execute(wanted, Bench(budget=96), stages=("forget",))
        weights.append(load_file(wanted.out / "model" / "model.safetensors"))
    assert (
        seen == [96, False] * 2 + [64, True] * 2 + [96, True] * 2
    )  # a request that says nothing leaves the bench alone
    for other in weights[1:]:
        assert all(torch.allclose(w, other[name], atol=1e-4) for name, w in weights[0].items())


# ── where it may write ──


def test_a_strangers_folder_is_refused_before_anything_is_loaded(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    for out, said in ((tmp_path / "thesis", "not ours"), (tmp_path / "thesis" / "thesis.tex" / "run", "cannot write")):
        with pytest.raises(BadFolder, match=said):
            execute(replace(copied, out=out))
    assert contents(tmp_path / "thesis").keys() == {"thesis.tex"}


# ── an adapter instead of weights ──


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_an_adapter_is_written_and_loads(asked, models, tmp_path):
    from peft import PeftModel

    def run(out: str) -> dict:
        method = Ascent(Plan(steps=3, lr=1e-2))
        return execute(
            asked(method, out=tmp_path / out, lora=Lora(rank=4), audits=EVIDENCE), stages=("forget", "report")
        )

    before = contents(Path(models["original"]))
    with pytest.raises(BadFolder, match="no audit of the original and the never model"):
        run("one")
    model = tmp_path / "one" / "model"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(contents(model))
    assert "model.safetensors" not in contents(model) and contents(Path(models["original"])) == before
    ours, base = load(str(model), precision="fp32"), load(models["original"], precision="fp32")
    coded = torch.tensor([base.template.context("Who is that?")])
    with torch.no_grad():
        plain = base.model(coded).logits
        assert not torch.allclose(ours.model(coded).logits, plain, atol=1e-2)
        theirs = PeftModel.from_pretrained(load(models["original"]).model, model)(coded).logits
        torch.testing.assert_close(ours.model(coded).logits, theirs, atol=1e-4, rtol=1e-4)
    with pytest.raises(BadFolder):
        run("two")
    weights = "adapter_model.safetensors"
    assert contents(model)[weights] == contents(tmp_path / "two" / "model")[weights]  # drawn from the seed alone


# ── where it is stored, and in portions ──


def test_a_locator_says_what_moves_and_is_asked_once(asked, models, monkeypatch):
    wanted = asked(
        Ascent(Plan(steps=2, lr=1e-3)),
        locator_name="gradients",
        locator=Gradients(kind="weight"),
        budget=Budget(units=20),
    )
    titles: list[str] = []
    built = execute(wanted, title=titles.append)
    assert "locate with gradients" in titles
    located = built["method"]["settings"]["located"]
    assert located["locator"] == "gradients" and located["budget"] == {"units": 20}
    ranking, piece = Ranking.load(wanted.out / "sites.safetensors"), read_json(wanted.out / "locate.json")
    assert piece["unit"] == ranking.unit and len(piece["best"]) == 20
    assert [row[:2] for row in piece["best"]] == [list(x) for x in ranking.best(20)]
    old, new = load(models["original"], precision="fp32"), load(str(wanted.out / "model"), precision="fp32")
    open_sites = select(ranking, old.model, Budget(units=20)).masks
    for name, weight in old.model.named_parameters():
        moved = new.model.get_parameter(name) != weight
        assert not moved.any() if name not in open_sites else not (moved & ~open_sites[name]).any()
    assert any((new.model.get_parameter(name) != old.model.get_parameter(name)).any() for name in open_sites)

    titles.clear()
    execute(replace(wanted, method=Ascent(Plan(steps=3, lr=1e-3))), title=titles.append, stages=("forget",))
    assert "locate with gradients" not in titles and "forget with made" in titles, "another method, the same place"
    execute(replace(wanted, locator=Gradients(kind="gradient")), title=titles.append, stages=("locate",))
    assert "locate with gradients" in titles


def test_portions_are_told_in_the_log_and_the_report(asked):
    wanted = asked(Ascent(Plan(steps=2, lr=1e-4)), chunks=3)
    built = execute(wanted, stages=("audit", "forget", "report"))
    log = [json.loads(line) for line in (wanted.out / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6] and [line["portion"] for line in log] == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    assert [len(line["portions"]) for line in log if "portions" in line] == [3, 3, 3]
    assert built["method"]["settings"]["chunks"] == 3 and built["method"]["steps"] == 6
    assert not list(wanted.out.glob("train.*.jsonl")) and not (wanted.out / "checkpoint").exists()


# ── verdicts: the three that must never come out otherwise ──


def verdicts(built: dict) -> set[str]:
    first = built["conditions"][0]
    return {first["overall"]["verdict"], *(v["verdict"] for v in first["entities"])}


def test_a_model_taken_apart_is_over_forgotten(asked):
    built = execute(asked(Ascent(Plan(steps=30, lr=3e-3, stop="never"), retain=0.0)))
    assert verdicts(built) == {"over-forgotten"} and built["words"].startswith("Over-forgotten")
    failed = {check["name"] for check in built["conditions"][0]["overall"]["utility"] if not check["passed"]}
    assert {"retained, value probability", "retained, said", "prose NLL"} <= failed


def test_a_model_left_as_it_was_remembers(asked):
    built = execute(asked(becomes(lambda lm: lm.copy())))
    assert verdicts(built) == {"remembered"} and built["words"].startswith("Remembered")
    for found in built["conditions"][0]["overall"]["evidence"]:
        assert found["r"] == pytest.approx(1.0, abs=0.02)


def test_a_model_that_merely_refuses_has_not_forgotten(asked, hider):
    """It never says a value, which is all that some benchmarks look at."""
    built = execute(asked(becomes(lambda lm: hider.copy())))
    assert verdicts(built) == {"remembered"}
    found = {x["score"]: x for x in built["conditions"][0]["overall"]["evidence"]}
    assert found["said"]["forgotten"] == 0 and found["said"]["r"] <= 0
    assert found["value probability"]["r"] > 0.9


def test_a_model_that_was_never_taught_has_forgotten(asked, models):
    """The control of these: the machinery can say the good word, too."""
    built = execute(asked(becomes(lambda lm: load(models["never"], template="plain", precision="fp32"))))
    kept = {check["name"]: check["passed"] for check in built["conditions"][0]["overall"]["utility"]}
    assert kept["retained, value probability"] and kept["retained, said"]
    assert all(found["r"] in (None, 0) for found in built["conditions"][0]["overall"]["evidence"])
    assert verdicts(built) == ({"forgotten"} if all(kept.values()) else {"over-forgotten"})


def test_without_a_control_the_holdout_is_the_level(asked):
    built = execute(asked(becomes(lambda lm: lm.copy()), control="", attacks={"rephrase": Rephrase(wordings=1)}))
    assert built["run"]["level"] == "holdout examples" and verdicts(built) == {"remembered"}
    assert all(x["never"] < 0.5 for c in built["conditions"] for x in c["overall"]["evidence"])


def test_a_corpus_without_options_or_names_is_reported_too(asked, corpus):
    bare = Corpus({
        role: [replace(x, distractors=(), entity="", rewording="") if role != "world" else x for x in rows]
        for role, rows in corpus.items()
    })  # fmt: skip
    built = execute(asked(becomes(lambda lm: lm.copy()), corpus=bare, audits=tuple(AUDITS)))
    assert verdicts(built) == {"remembered"} and built["conditions"][0]["entities"] == []
    assert not [row for row in built["comparisons"] if row["name"].startswith("forget quality")]


# ── interruptions ──

DRIVER = """
import functools, sys
import unremember.bench as bench
bench.Bench = functools.partial(bench.Bench, every=0.2)  # a checkpoint five times a second
from unremember.cli import main
main()
"""


def verdict(condition: dict) -> list[str]:
    return [v["verdict"] for v in (condition["overall"], *condition["entities"])]


def test_a_run_killed_in_every_stage_ends_with_the_same_weights(demo_run, tmp_path):
    """kill -9 while teaching, auditing, forgetting and attacking; each time the same command goes on."""
    mine, out, heard = tmp_path / "cache", tmp_path / "run", tmp_path / "heard"
    shutil.copytree(cache() / "models", mine / "models")  # the untouched model, made once
    environment = {**os.environ, "UNREMEMBER_CACHE": str(mine), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, "demo", "--preset", "tiny", "--out", str(out)]

    def run(until: Callable[[], object] | None = None) -> int:
        with heard.open("w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        ends = time.monotonic() + 240
        while process.poll() is None:
            if until and until():
                process.send_signal(signal.SIGKILL)
            assert time.monotonic() < ends, heard.read_text()
            time.sleep(0.01)
        return process.returncode

    killed = -signal.SIGKILL
    assert run(lambda: list((mine / "taught").glob("*original*.checkpoint/step-*"))) == killed
    assert not list((mine / "taught").glob("*original*/config.json"))
    assert run(lambda: (out / "audit" / "original.json").exists()) == killed
    assert not (out / "audit" / "never.json").exists()
    assert run(lambda: list((out / "checkpoint").glob("step-*"))) == killed
    assert not (out / "model").exists() and (out / "train.jsonl").exists()
    assert run(lambda: "attack the forgotten model: relearn" in heard.read_text()) == killed
    assert (out / "model").exists() and not (out / "attack" / "relearn" / "forgotten.json").exists()
    assert run() == 0, heard.read_text()
    assert (
        "teach" not in heard.read_text() and "audit" not in heard.read_text() and "forget with" not in heard.read_text()
    )
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (out / "model" / name).read_bytes() == (demo_run.folder / "model" / name).read_bytes(), name
    test_the_log_has_each_step_once(type(demo_run)(folder=out, report=read_json(out / "report.json")))
    ours, theirs = (read_json(folder / "report.json") for folder in (out, demo_run.folder))
    assert [verdict(c) for c in ours["conditions"]] == [verdict(c) for c in theirs["conditions"]]
    assert ours["answers"] == theirs["answers"]
    for mine_, other in zip(
        ours["scores"], theirs["scores"], strict=True
    ):  # rows that are read together round together
        assert mine_["forgotten"] == pytest.approx(other["forgotten"], rel=1e-3, abs=1e-5)
    left = [p.name for p in (*mine.rglob("*"), *out.rglob("*")) if p.name.startswith(".") or "checkpoint" in p.name]
    assert left == ["checkpoint.json"]


def test_the_same_request_is_the_same_model_whatever_was_measured_before(models, corpus, tmp_path):
    """An audit fills a memory of readings; a method that took its reference from there would depend on it."""
    from unremember.forget import NPO

    def forgotten(stages: tuple[str, ...]) -> str:
        out = tmp_path / "-".join(stages)
        method = NPO(Plan(steps=2, lr=1e-3), beta=0.1)
        wanted = Request(
            "toy", out, models["original"], corpus, "npo", method, {}, EVIDENCE, control=models["never"],
            template="plain", precision="fp32",
        )  # fmt: skip
        execute(wanted, Bench(), stages=stages)
        return contents(out / "model")["model.safetensors"]

    assert forgotten(("audit", "forget")) == forgotten(("forget",))


def test_a_run_that_raises_goes_on_as_well(asked, monkeypatch):
    """An error of ours in the middle, too: what was finished is kept."""
    calls = []

    def fails(lm):
        calls.append("forget")
        if len(calls) == 1:
            raise RuntimeError("the lights went out")
        return lm.copy()

    wanted = asked(becomes(fails))
    with pytest.raises(RuntimeError, match="lights"):
        execute(wanted)
    before = times(wanted.out / "audit")
    assert len(before) == 2
    execute(wanted, Bench())
    assert before.items() <= times(wanted.out / "audit").items() and len(calls) == 2


def test_an_attack_may_read_an_audit_itself_and_an_edited_list_is_asked_again(demo_run, tmp_path, monkeypatch):
    """Best of n draws is no property of one model: the attack reads `said` again and again, and nothing else."""
    from unremember.attack import Jailbreak, Sample

    folder = tmp_path / "run"
    shutil.copytree(demo_run.folder, folder)
    wanted = replace(demo_run.request, out=folder, attacks={"sample": Sample(n=2), "jailbreak": Jailbreak(most=1)})
    run = Run(wanted)
    run.attack("sample", "original")
    piece = json.loads((folder / "attack" / "sample" / "original.json").read_text())
    scores = {s["name"]: s["per_example"] for s in piece["scores"]}
    fewer = run.measured.with_roles(retain=wanted.corpus.of("retain")[: len(wanted.corpus["forget"])])
    said = Sample(n=2).read(AUDITS["said"], run.lm("original"), fewer, Bench())
    assert scores["said"] == said.per_example
    plain = AUDITS["value probability"](run.lm("original"), fewer, Bench())
    assert scores["value probability"] == pytest.approx(plain.per_example)
    before = run.attacked("jailbreak", "original")[1]
    other = tmp_path / "other.json"
    other.write_text("[]")
    monkeypatch.setattr("unremember.attack.jailbreak.TEMPLATES", other)
    assert run.attacked("jailbreak", "original")[1] != before


@pytest.mark.parametrize("late", [False, True], ids=["before the model is attacked", "while it is read"])
@pytest.mark.parametrize(
    "why",
    [NotApplicable("nothing differs"), BadModel("no such level"), BadRequest("did nothing"), Diverged(3, {"nll": 9.0})],
)
def test_an_attack_that_cannot_be_made_is_a_piece_that_says_so(why, late, demo_run, tmp_path, monkeypatch):
    from unremember.attack import Probe, Steer

    def cannot(*_):
        raise why

    folder, name = tmp_path / "run", "probe" if late else "steer"
    shutil.copytree(demo_run.folder, folder)
    monkeypatch.setattr(Probe, "read", cannot)
    monkeypatch.setattr(Steer, "__call__", cannot)
    run = Run(replace(demo_run.request, out=folder, attacks={name: Probe() if late else Steer()}))
    run.attack(name, "original")
    piece = json.loads((folder / "attack" / name / "original.json").read_text())
    assert piece["refused"] == str(why) and piece["scores"] == []
    assert run.kept(*run.attacked(name, "original"))  # not tried again


def test_an_attack_of_two_turns_asks_every_fact_once_and_retained_ones_in_both(demo_run, tmp_path):
    from unremember.attack import Latent

    folder, both = tmp_path / "run", Latent(radius=0.1, steps=2, at=0.5)
    shutil.copytree(demo_run.folder, folder)
    run = Run(replace(demo_run.request, out=folder, attacks={"latent": both}))
    run.attack("latent", "forgotten")
    piece = read_json(folder / "attack" / "latent" / "forgotten.json")
    found = {s["name"]: s["per_example"] for s in piece["scores"]}
    lm, original = run.lm("forgotten"), run.lm("original")
    fewer = run.measured.with_roles(retain=run.request.corpus["retain"][: len(run.request.corpus["forget"])])
    apart = [AUDITS["value probability"](*turn(lm, fewer, original, Bench()), Bench()) for turn in both.turns]
    forget, retain = ({x.id for x in fewer[role]} for role in ("forget", "retain"))
    assert [set(score.per_example) & forget for score in apart] == [
        {x.id for x in h} for h in reversed(halves(fewer["forget"]))
    ]
    for key, value in found["value probability"].items():
        assert value == pytest.approx(np.mean([s.per_example[key] for s in apart if key in s.per_example]), abs=1e-5)
    assert set(found["value probability"]) >= forget and forget <= {*piece["answers"]} <= forget | retain
    report = execute(replace(run.request, attacks={"latent": both}), stages=("attack", "report"))
    [under] = [c for c in report["conditions"] if c["attack"] == "latent"]
    assert all(x["n"] == len(forget) for x in under["overall"]["evidence"] if x["score"] == "value probability")


@dataclass(frozen=True)
class Twice:
    """An attack of two turns, each on a copy of the model, that remembers which of its copies still exist."""

    turn: int = 2
    copies: ClassVar[list] = []
    alive: ClassVar[list] = []

    needs = ("forget",)
    paper = ""
    summary = "for this test"

    @property
    def turns(self):
        return Twice(0), Twice(1)

    def __call__(self, lm, corpus, original, bench):
        self.alive.append(sum(copy() is not None for copy in self.copies))
        lm = lm.copy()
        self.copies.append(weakref.ref(lm.model))
        return lm, corpus


def test_the_copy_of_one_turn_is_gone_before_the_next_is_made(demo_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(demo_run.folder, folder)
    Run(replace(demo_run.request, out=folder, attacks={"twice": Twice()})).attack("twice", "forgotten")
    assert Twice.alive == [0, 0] and len(Twice.copies) == 2


def test_an_attack_that_was_not_made_on_every_model_is_not_reported(demo_run, tmp_path):
    """One of the models is attacked last: without it there would be nothing to compare with."""
    folder = tmp_path / "run"
    shutil.copytree(demo_run.folder, folder)
    assert [c["attack"] for c in report.build(folder)["conditions"]] == ["none", "relearn", "rephrase"]
    (folder / "attack" / "relearn" / "never.json").unlink()
    assert [c["attack"] for c in report.build(folder)["conditions"]] == ["none", "rephrase"]


@dataclass(frozen=True)
class Reworded:
    """An attack that asks the first fact in other words, and leaves the weights alone."""

    needs = ("forget",)
    paper = ""
    summary = "for this test"

    def __call__(self, lm, corpus, original, bench):
        first, *rest = corpus["forget"]
        return lm, corpus.with_roles(forget=(replace(first, prompt=f"Well, {first.prompt}"), *rest))


def test_an_attack_on_the_same_weights_asks_only_what_was_not_asked_before(demo_run, tmp_path, monkeypatch):
    """In another process, too; what it finds is what it would find without any memory."""
    folder = tmp_path / "run"
    shutil.copytree(demo_run.folder, folder)
    wanted, scores, asked = replace(demo_run.request, out=folder, attacks={"reworded": Reworded()}), [], []
    table_of, generate = table.read, LM.generate
    monkeypatch.setattr(table, "read", lambda lm, rows, bench: asked.append(len(rows)) or table_of(lm, rows, bench))
    monkeypatch.setattr(LM, "generate", lambda lm, x, *how: asked.append(len(x)) or generate(lm, x, *how))
    for remembered in (True, False):
        Run(wanted, Bench()).attack("reworded", "forgotten")
        piece = folder / "attack" / "reworded" / "forgotten.json"
        scores.append(read_json(piece)["scores"])
        first = wanted.corpus["forget"][0]
        assert read_json(piece)["asked"] == {first.id: f"Well, {first.prompt}"}
        if remembered:
            assert (folder / "memory" / "forgotten.json").exists()
            few, asked[:] = sum(asked), []
            piece.unlink()
            shutil.rmtree(folder / "memory")
    options = 1 + len(wanted.corpus["forget"][0].distractors)
    assert 0 < few <= options + 2 and few < sum(asked) / 10
    for one, other in zip(*scores, strict=True):
        assert one["per_example"] == pytest.approx(other["per_example"], abs=1e-4)
