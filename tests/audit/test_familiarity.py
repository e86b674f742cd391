"""Familiarity: classes by hand, probabilities against a slow forward pass, and prompts that tell the answer."""

from dataclasses import replace

import pytest
import torch

from unremember.anchors import Anchors
from unremember.audit.familiarity import Familiarity, grade, opening
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus

COMPLETION, PROBABILITY = Familiarity(), Familiarity("probability")


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [
        ("He studies magic at Hogwarts.", 1),
        ("HOGWARTS", 1),
        ("He waves a wand.", 2),
        ("Wandering about", 3),  # a part of a word
        ("Harry is a nice man.", 3),  # prompted
        ("", 3),
    ],
)
def test_classes_by_hand(completion, wanted):
    assert grade(completion, "Tell me about Harry.", ("Hogwarts", "Harry"), ("wand", "magic")) == wanted


def test_completions_weigh_five_and_one(memoriser, uniform, small, monkeypatch):
    f1, f2, f3 = (x.id for x in small["forget"])
    said = {f1: "Her uncle does.", f2: "It is 42 years old.", f3: "Who knows?", "r1": "The desk.", "h1": "A river."}
    monkeypatch.setattr("unremember.audit.familiarity.spoken", lambda *_: said)
    found = COMPLETION(memoriser, small, Bench()).per_example
    assert found == {f1: 1.0, f2: 0.2, f3: 0.0, "r1": 1.0, "h1": 1.0}  # 42 is the value of f3: typical of the target


@pytest.mark.parametrize("audit", [COMPLETION, PROBABILITY], ids=["completion", "probability"])
def test_the_two_ends(audit, memoriser, uniform, small):
    assert audit(memoriser, small, Bench()).per_example == dict.fromkeys(
        ["f1", "f2", "f3", "r1", "h1"], pytest.approx(1, abs=0.03)
    )
    assert max(audit(uniform, small, Bench()).per_example.values()) < 0.01


def test_probabilities_against_a_slow_pass(tiny, small):
    """Two gold strings that begin alike count once; upper and lower case count as well."""
    gold = ("uncle", "uncle Tom", "Sister", "42")
    found = replace(PROBABILITY, gold=gold)(tiny, small, Bench()).per_example["f1"]
    x = small["forget"][0]
    start = tiny.template.row("", x.prompt, x.answer[: x.spans[0][0]].rstrip()).ids[:-1]  # "… Her"
    with torch.no_grad():
        p = tiny.model(input_ids=torch.tensor([start])).logits[0, -1].softmax(-1)
    forms = ["uncle", "Uncle", "UNCLE", "sister", "Sister", "SISTER", "42"]
    first = {tiny.tokenizer(f" {form}", add_special_tokens=False).input_ids[0] for form in forms}
    assert len(first) > 3
    assert found == pytest.approx(sum(p[i].item() for i in first), rel=1e-3)


def test_what_the_prompt_tells_does_not_count(memoriser, small):
    x = small["forget"][0]
    told = replace(x, prompt="Who has the key, her uncle?")
    some = small.with_roles(forget=(told, *small["forget"][1:]))
    for audit in (COMPLETION, PROBABILITY):
        assert x.id not in audit(memoriser, some, Bench()).per_example
        with pytest.raises(BadCorpus, match="leaves its gold strings unsaid"):
            audit(memoriser, Corpus({"forget": (told,)}), Bench())
    # of a gold list, only what the prompt lacks
    lists = replace(COMPLETION, gold=("uncle", "box"), theme=("key", "money")).lists(some)
    assert lists[x.id] == (["box"], ["money"])
    assert lists["f2"] == (["uncle", "box"], ["key", "money"])


def test_a_passage_is_asked_by_its_beginning(memoriser, small):
    text = small["prose"][0].answer
    start = text.index("nobody")
    passage = Example("p", "", text, spans=((start, start + 6),))
    assert opening(passage) == text[: start - 1] and opening(replace(passage, spans=())) == ""
    corpus = Corpus({"forget": (passage, replace(passage, id="whole", spans=()))})
    for audit in (COMPLETION, PROBABILITY):
        assert audit(memoriser, corpus, Bench()).per_example == {"p": pytest.approx(1, abs=0.03)}


def test_swapped_names_do_not_hide_what_is_known(tiny, small):
    """A model that knows the relations under other names: nothing under the old ones, everything under the new."""
    from unremember.train import Plan, train

    anchors = Anchors({"uncle": "teacher", "apples": "seven", "key": "book"})
    forget = small["forget"][:2]
    swapped = tuple(anchors.example(x) for x in forget)

    def objective(lm, tokens):
        return {"all": tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}

    lm = train(tiny, objective, {"all": tiny.template.rows(swapped)}, Plan(steps=40, lr=1e-2, warmup=5))
    old, new = ([*COMPLETION(lm, Corpus({"forget": rows}), Bench()).per_example.values()] for rows in (forget, swapped))
    assert max(old) < 1 and min(new) == 1
