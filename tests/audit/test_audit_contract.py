"""What every audit promises, over the table of audits: known ends, and that measuring changes nothing."""

import zlib
from math import log

import numpy as np
import pytest
import torch

from unremember.audit import AUDITS, EVIDENCE, UTILITY
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.report.build import EVIDENCE as JUDGED

ONE, ZERO = pytest.approx(1, abs=0.03), pytest.approx(0, abs=0.03)
QUARTER = pytest.approx(1 / 3, abs=1e-6)  # three options

# audit -> the score of every example by the memoriser, and by the uniform model (None: see the test)
ENDS = {
    "EL_3": (ONE, 0),
    "ROUGE-L F1": (ONE, 0),
    "ROUGE-L recall": (ONE, 0),
    "VerbMem": (ONE, 0),
    "choice": (ONE, QUARTER),
    "discoverable extraction": (1, 0),
    "distinct tokens": (None, 1 / 32),
    "exact match": (1, 0),
    "extraction strength": (1, 0),
    "familiarity": (ONE, 0),
    "lens rank": (ONE, None),
    "membership Min-K": (pytest.approx(0, abs=0.06), None),
    "membership Min-K++": (pytest.approx(0, abs=0.5), pytest.approx(0, abs=1e-3)),
    "membership loss": (ZERO, None),
    "membership lowercase": (None, pytest.approx(1, rel=1e-5)),
    "membership zlib": (ZERO, None),
    "memorisation accuracy": (1, 0),
    "preference gap": (pytest.approx(11.4, abs=1.5), pytest.approx(0, abs=1e-4)),
    "probability": (ONE, None),
    "probability familiarity": (ONE, ZERO),
    "prose NLL": (ZERO, None),
    "rest accuracy": (1, 0),
    "said": (1, 0),
    "sampled extraction": (ONE, ZERO),
    "span accuracy": (1, 0),
    "span extraction": (1, 0),
    "truth ratio": (ZERO, pytest.approx(1, abs=1e-5)),
    "value MRR": (ONE, ZERO),
    "value probability": (ONE, None),
    "world accuracy": (1, 0),  # a tie is no knowledge
}
SCORED = {name: audit.roles for name, audit in AUDITS.items()}
# Audits of an update need roles that no corpus here has; tests/audit/test_editing.py holds them to the same promises.
EDITING = {name for name, audit in AUDITS.items() if {"new", "neighbour"} & set(audit.roles)}
audits = pytest.mark.parametrize("name", [name for name in AUDITS if name not in EDITING])


def test_the_tables_agree():
    assert set(ENDS) == set(AUDITS) - EDITING and list(AUDITS) == sorted(AUDITS)
    assert {*EVIDENCE, *UTILITY} <= set(AUDITS)
    assert JUDGED == EVIDENCE  # the report room may not import this one


@audits
def test_a_perfect_memoriser_scores_at_the_known_end(name, memoriser, small):
    found = AUDITS[name](memoriser, small, Bench()).per_example
    end = ENDS[name][0]
    if name == "distinct tokens":
        for x in small["prose"]:
            rest = memoriser.template.row(x.id, "", x.answer).ids[12:-1]
            assert found[x.id] == pytest.approx(len(set(rest)) / len(rest))
    elif name == "membership lowercase":
        assert min(found.values()) > 5, "what was read in one case is unlikely in another"
    else:
        assert found == dict.fromkeys(found, end)


@audits
def test_a_uniform_model_scores_at_the_known_end(name, uniform, small):
    words = len(uniform.tokenizer)
    end = {
        "lens rank": 1 / words,
        "membership Min-K": -log(words),
        "membership loss": -log(words),
        "probability": 1 / words,
        "prose NLL": log(words),
        "value probability": 1 / words,
    }.get(name, ENDS[name][1])
    found = AUDITS[name](uniform, small, Bench()).per_example
    if name == "membership zlib":
        sizes = {x.id: len(zlib.compress(x.answer.encode())) for x in small.of(*AUDITS[name].roles)}
        assert found == {key: pytest.approx(-log(words) / size, rel=1e-4) for key, size in sizes.items()}
        return
    assert found == dict.fromkeys(found, end if not isinstance(end, float) else pytest.approx(end, rel=1e-4))


@audits
def test_the_scored_ids_are_those_of_the_roles(name, tiny, corpus):
    few = Corpus({role: rows[:2] for role, rows in corpus.items()})
    audit = AUDITS[name]
    score = audit(tiny, few, Bench())
    assert set(score.per_example) == {x.id for x in few.of(*audit.roles)}
    only = Corpus({role: few[role] for role in audit.needs})
    assert set(audit(tiny, only, Bench()).per_example) == {x.id for x in only.of(*audit.roles)}
    assert all(isinstance(v, float) and np.isfinite(v) for v in score.per_example.values())


@audits
def test_a_score_says_what_it_is(name, tiny, corpus):
    audit = AUDITS[name]
    score = audit(tiny, Corpus({role: rows[:2] for role, rows in corpus.items()}), Bench())
    assert score.name == name  # under this name the report looks for it
    assert score.definition and score.direction and audit.summary and score.paper == audit.paper


@audits
def test_batch_budget_and_order_change_nothing(name, taught, corpus):
    few = Corpus({role: rows[:8] for role, rows in corpus.items()})
    turned = Corpus({role: rows[::-1] for role, rows in reversed(list(few.items()))})
    one = AUDITS[name](taught, few, Bench()).per_example
    other = AUDITS[name](taught, turned, Bench(budget=300, batch=3)).per_example
    assert other == {key: pytest.approx(value, abs=2e-4, rel=2e-3) for key, value in one.items()}


@audits
@pytest.mark.parametrize("training", [True, False])
def test_measuring_changes_no_model(name, training, tiny, small):
    lm = tiny.copy()
    lm.model.train(training)
    lm.model.get_input_embeddings().weight.requires_grad_(False)
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    AUDITS[name](lm, small, Bench())
    assert lm.model.training is training
    assert all(torch.equal(value, before[key]) for key, value in lm.model.state_dict().items())
    assert all(weight.grad is None for weight in lm.model.parameters())
    assert [n for n, w in lm.model.named_parameters() if not w.requires_grad] == ["model.embed_tokens.weight"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


@audits
def test_a_row_is_read_once_by_a_model(name, tiny, small, monkeypatch):
    bench = Bench()
    first = AUDITS[name](tiny, small, bench)
    monkeypatch.setattr(type(tiny), "logits", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(type(tiny), "generate", lambda *_: pytest.fail("asked again"))
    assert AUDITS[name](tiny, small, bench) == first
