"""Curves from checkpoints of somebody else's training."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from unremember.corpus import Example
from unremember.dynamics import models, write_curves
from unremember.dynamics.checkpoints import coded, follow, place, times
from unremember.dynamics.forgetting import Insertion
from unremember.dynamics.loop import Regime
from unremember.dynamics.own import own
from unremember.embedded.prose import prose
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.table import read
from unremember.tokens import PLAIN

TEXT = prose()[:3]


@pytest.fixture(scope="module")
def folders(tiny, taught, tmp_path_factory):
    """Two steps of a training: before and after somebody's facts were taught."""
    root = tmp_path_factory.mktemp("steps")
    tiny.save(root / "step-100")
    taught.save(root / "step-200")
    return [root / "step-200", root / "step-100"]


def test_the_curve_follows_the_steps_and_knows_when_the_facts_came(folders, corpus):
    facts = corpus.of("forget", "retain")
    asked = [Example(x.id, "", f"{PLAIN.format(prompt=x.prompt)} {x.answer}") for x in facts]
    found = follow(folders, {"facts": asked, "prose": TEXT})
    assert found["facts"]["at"] == [100, 200] and found["facts"]["m"][1] > found["facts"]["m"][0] + 0.1
    assert found["prose"]["n"][0] == found["prose"]["n"][1] > 100
    middle = float(np.mean(found["facts"]["m"]))
    assert str(times(found["facts"], [middle])[middle]) == "(100, 200]"
    assert str(times(found["facts"], [1.0])[1.0]) == "> 200"


def test_m_equals_the_score_table_where_nothing_ties(folders, tiny):
    found = follow(folders[1:], {"prose": TEXT})["prose"]
    hit = np.concatenate([x.hit for x in read(tiny, tiny.template.rows(TEXT))])
    assert found["m"][0] == pytest.approx(hit.mean()) and found["n"][0] == len(hit)


def test_a_step_is_read_from_the_name():
    assert [place(Path(n), 7) for n in ("checkpoint-500", "step_010", "final")] == [500, 10, 7]


def test_bad_lists_are_refused_all_together(folders, tmp_path):
    with pytest.raises(BadRequest, match="no checkpoint"):
        follow([], {"t": TEXT})
    with pytest.raises(BadRequest, match=r"of step 100(.|\n)*no alias"):
        follow([folders[1], folders[1], tmp_path / "none-3"], {"t": TEXT})
    with pytest.raises(BadModel, match=r"cannot be loaded|no mask"):
        follow(folders[1:], {"t": TEXT}, kind="masked")


def test_passages_of_one_token_are_refused(tiny):
    with pytest.raises(BadCorpus, match=r"one token|no token"):
        coded(tiny.template, [Example("a", "", ".")])


def test_a_masked_checkpoint_is_read_with_fixed_masks(tiny, tmp_path):
    words = tiny.tokenizer
    model = models.encoder(len(words), 32, 256, 0)
    folder = tmp_path / "step-1"
    model.save_pretrained(folder)
    words = type(words)(
        tokenizer_object=words.backend_tokenizer, eos_token="<end>", unk_token="<unk>", mask_token="<mask>"
    )
    words.save_pretrained(folder)
    one, two = (follow([folder], {"t": TEXT}, kind="masked", seed=3)["t"] for _ in range(2))
    assert one == two and one["m"][0] < 0.1 and one["unit"] == [None] and 10 < one["n"][0] < 100


def test_a_training_of_ones_own_is_followed_from_before_its_first_epoch(tiny, corpus, tmp_path):
    facts = [Example(x.id, "", x.answer) for x in corpus.of("forget", "holdout", "relearn")]
    train, held, special = facts[:12], facts[12:20], facts[-4:]
    before = tiny.fingerprint
    found = own(tiny, train, held, Regime(5e-3, batch=12), 6, special, Insertion(10, until=0.9), 3)
    m = found["texts"]["train"]["m"]
    assert found["texts"]["train"]["at"] == list(range(7)) and m[-1] > m[0] + 0.3
    assert replace(tiny).fingerprint == before
    assert found["forgetting"]["special"]["excess"][0] > 0.2
    page = write_curves("Facts", found["texts"], found["forgetting"], "here", tmp_path).read_text(encoding="utf-8")
    assert page.count("<svg") == 3 and page.count("n = 1 run; here") == 3 and (tmp_path / "curves.json").exists()
    with pytest.raises(BadCorpus, match="in one training sequence"):
        own(tiny, train, train[:1], Regime(5e-3), 1)
    with pytest.raises(BadRequest, match="epochs = 0"):
        own(tiny, train, held, Regime(5e-3), 0)
