"""The universal prefix: edits and buffer by hand, the loss against plain forward passes, and what may be asked afterwards."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from unremember.attack.gcg import Entry, Found, Victim, started, survives, tells
from unremember.attack.prefix import (
    FLOOR,
    Aim,
    Prefix,
    bred,
    breed,
    distance,
    edited,
    forced,
    kinds,
    targets,
)
from unremember.attack.suffix import bar
from unremember.bench import Bench
from unremember.displace import block_name, share_of
from unremember.errors import BadCorpus, BadModel, BadRequest, NotApplicable

SMALL = {"steps": 2, "least": 3, "most": 6, "children": 6, "questions": 2}


@pytest.fixture(scope="module")
def aim(hider, taught, corpus) -> Aim:
    """The hider against the original, on three questions."""
    start = started(hider.template, " !", 3)
    found = targets(hider, taught, corpus["forget"][:3], start, 12)
    blocks = (block_name(hider, share_of(hider, 0.5)),)
    return Aim(Victim(hider, found, forced=5, watched=blocks), Victim(taught, found, forced=1, watched=blocks), 2.0)


def test_edits_by_hand():
    assert edited((1, 2, 3), "insert", 0, 9) == (9, 1, 2, 3)
    assert edited((1, 2, 3), "insert", 3, 9) == (1, 2, 3, 9)
    assert edited((1, 2, 3), "gradient", 1, 9) == edited((1, 2, 3), "expected", 1, 9) == (1, 9, 3)
    assert edited((1, 2, 3), "delete", 1) == (1, 3)


def test_the_length_stays_within_its_bounds():
    assert kinds(5, 3, 8) == pytest.approx({"gradient": 0.7, "expected": 0.1, "insert": 0.1, "delete": 0.1})
    assert "delete" not in kinds(3, 3, 8) and "insert" not in kinds(8, 3, 8)
    assert kinds(3, 3, 3) == pytest.approx({"gradient": 0.875, "expected": 0.125})


def test_the_parent_leaves_the_buffer_by_hand():
    a, b, c, d = (Entry(loss, (i,)) for i, loss in enumerate((1.0, 4.0, 3.0, 2.0)))
    assert bred((a, b), (c, d), 2) == (d, c)  # a was the best, and goes all the same
    assert bred((a, b), (c, d), 9) == (d, c, b)
    assert bred((a,), (b,), 1) == (b,)  # even if it is worse


def test_a_token_that_is_likely_enough_is_forced_no_further():
    """−log 0.6 = 0.5108: probabilities 0.9 and 0.6 count alike. Mean of (0.5108, 0.5108) and of (0.5108, 2)."""
    nll = torch.tensor([[-np.log(0.9), -np.log(0.6)], [-np.log(0.9), 2.0]])
    assert forced(nll).tolist() == pytest.approx([0.5108, 1.2554], abs=1e-4)
    assert pytest.approx(0.5108, abs=1e-4) == FLOOR


def test_distances_are_shares_of_the_originals_length():
    wanted = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])  # lengths 5 and 2
    hidden = torch.tensor([[[3.0, 5.0], [0.0, 2.0]]])  # off by 1 and 0
    assert distance((hidden,), (wanted,)).tolist() == pytest.approx([0.1])
    assert distance((hidden, wanted), (wanted, wanted)).tolist() == pytest.approx([0.05])


def test_the_loss_against_plain_forward_passes(aim, hider, taught):
    ids = (*started(hider.template, " !", 2), *started(hider.template, " ?", 2))
    block = int(aim.victim.watched[0].rpartition(".")[2])
    expected = []
    for b in aim.victim.behaviours:
        whole = torch.tensor([(*b.before, *ids, *b.after, *b.target)])
        mine, original = (lm.copy().model(input_ids=whole, output_hidden_states=True) for lm in (hider, taught))
        first, scored = whole.shape[1] - len(b.target), b.target[:5]
        logp = mine.logits[0].log_softmax(-1)
        nll = torch.stack([-logp[first - 1 + t, token] for t, token in enumerate(scored)]).clamp(min=FLOOR)
        h, o = (out.hidden_states[block + 1][0, len(b.before) : -1] for out in (mine, original))
        expected.append((nll.mean() + 2.0 * ((h - o).norm(dim=-1) / o.norm(dim=-1)).mean()).item())
    [entry] = aim.losses([ids])
    assert entry.loss == pytest.approx(np.mean(expected), abs=1e-4)


def test_the_original_itself_is_as_like_itself_as_can_be(aim, taught):
    same = Aim(replace(aim.victim, lm=taught), aim.original, 2.0)
    alone = Aim(replace(aim.victim, lm=taught), aim.original, 0.0)
    ids = started(taught.template, " !", 3)
    assert same.losses([ids])[0].loss == pytest.approx(alone.losses([ids])[0].loss, abs=1e-5)


def test_targets_are_what_the_original_says_to_the_plain_question(aim, taught, corpus):
    for b, x in zip(aim.victim.behaviours, corpus["forget"], strict=False):
        assert taught.generate([taught.template.context(x.prompt)], 12) == [b.target]


def test_the_models_own_expectation_of_each_place(aim, hider):
    b = aim.victim.behaviours[0]
    ids = started(hider.template, " !", 3)
    with torch.no_grad():
        logits = hider.model(input_ids=torch.tensor([(*b.before, *ids)])).logits[0]
    assert torch.allclose(aim.expected(ids), logits[len(b.before) - 1 :].softmax(-1), atol=1e-5)


def test_the_search_lowers_the_loss_and_returns_the_best_of_all_steps(aim, hider, corpus):
    how = Prefix(steps=12, least=3, most=6, seed=0)
    mask, _ = bar(hider, corpus)
    start = started(hider.template, " !", 3)

    def keep(ids):
        return survives(hider.template, aim.victim.behaviours, ids)

    found = breed(how, aim, start, mask, keep)
    assert found.loss == min(found.curve) < 0.9 * found.curve[0]
    assert 3 <= len(found.ids) <= 6 and mask[list(found.ids)].all() and keep(found.ids)
    assert breed(how, aim, start, mask, keep) == found


def test_if_nothing_survives_that_is_said(aim, hider, corpus):
    mask, _ = bar(hider, corpus)
    with pytest.raises(BadRequest, match=r"none of 4 x 16 prefixes of step 1 comes back"):
        breed(Prefix(steps=1), aim, started(hider.template, " !", 8), mask, lambda ids: False)


def test_each_half_is_asked_with_what_the_other_half_taught(hider, taught, corpus):
    lm, seen = Prefix(**SMALL)(hider, corpus, taught, Bench())
    assert lm is hider
    _, values = bar(hider, corpus)
    for role in ("forget", "holdout"):
        told = [s.prompt.removesuffix(f" {x.prompt}") for s, x in zip(seen[role], corpus[role], strict=True)]
        assert len(set(told[::2])) == len(set(told[1::2])) == 1 and told[0] != told[1]
        assert all(s.prompt == f"{t} {x.prompt}" for s, t, x in zip(seen[role], told, corpus[role], strict=True))
        assert not any(tells(t, values) for t in told)
    assert seen["retain"] == corpus["retain"] and seen["world"] == corpus["world"]


@pytest.mark.parametrize(("loss", "refused"), [(FLOOR, False), (FLOOR + 0.005, False), (2.0, True)])
def test_a_search_in_vain_is_an_error_unless_nothing_was_left_to_look_for(loss, refused, taught, corpus, monkeypatch):
    """The original says its own answers at the floor already, and a run must not end there."""
    start = started(taught.template, " !", 3)
    held = Found(start, " ! ! !", loss, False, (loss, loss), 0, loss)
    monkeypatch.setattr("unremember.attack.prefix.breed", lambda *_: held)
    attack = Prefix(steps=1, least=3, most=3)
    if refused:
        with pytest.raises(BadRequest, match="nothing was attacked"):
            attack(taught, corpus, taught, Bench())
    else:
        assert attack(taught, corpus, taught, Bench())[1]["forget"][0].prompt.startswith(" ! ! !")


def test_an_original_that_says_nothing_is_refused(hider, taught, corpus):
    silent = taught.copy()
    silent.model.generation_config.eos_token_id = list(range(len(taught.tokenizer)))
    with pytest.raises(NotApplicable, match="answers none of the questions"):
        Prefix(**SMALL)(hider, corpus, silent, Bench())


def test_another_tokenizer_is_refused(hider, taught, corpus):
    other = replace(taught, template=replace(taught.template, chat=True))
    other.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    try:
        with pytest.raises(BadModel, match="share a tokenizer"):
            Prefix(**SMALL)(hider, corpus, other, Bench())
    finally:
        other.tokenizer.chat_template = None


def test_what_is_remembered_was_found_for_the_same_values(hider, taught, corpus, monkeypatch):
    """A value of one letter bars no token, and a prefix that says it all the same."""
    from unremember.attack import prefix as module

    bred, real, bench = [], module.breed, Bench()
    monkeypatch.setattr(module, "breed", lambda *given: bred.append(1) or real(*given))
    attack, x = Prefix(**SMALL), corpus["retain"][0]
    other = corpus.with_roles(retain=[replace(x, id="letter", spans=((0, 1),), distractors=()), *corpus["retain"]])
    assert torch.equal(bar(hider, corpus)[0], bar(hider, other)[0]) and bar(hider, corpus)[1] != bar(hider, other)[1]
    for seen, count in ((corpus, 4), (corpus, 4), (other, 8)):  # two roles, two halves
        attack(hider, seen, taught, bench)
        assert len(bred) == count


def test_what_it_found_is_noted(hider, taught, corpus):
    bench = Bench()
    _, seen = Prefix(**SMALL)(hider, corpus, taught, bench)
    unit = "nats a token and unlikeness"
    assert set(bench.notes) == {
        "prefixes found", "prefix with the least loss", f"loss before, {unit}", f"loss after, {unit}"
    }  # fmt: skip
    assert (
        bench.notes["prefixes found"] == 2 and bench.notes[f"loss after, {unit}"] <= bench.notes[f"loss before, {unit}"]
    )
    assert any(x.prompt.startswith(bench.notes["prefix with the least loss"]) for x in seen["forget"])


def test_one_lone_question_is_refused(hider, taught, corpus):
    lone = corpus.with_roles(forget=corpus["forget"][:1])
    with pytest.raises(BadCorpus, match="stand alone"):
        Prefix(**SMALL)(hider, lone, taught, Bench())


def test_a_question_without_room_is_refused(hider, taught, corpus):
    x = corpus["forget"][0]
    long = corpus.with_roles(forget=[replace(x, prompt=x.prompt + " on" * 230), *corpus["forget"][1:]])
    with pytest.raises(BadCorpus, match=r"the model's context is 256; take fewer tokens or shorten it"):
        Prefix(**SMALL | {"least": 20, "most": 24})(hider, long, taught, Bench())


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"least": 9}, {"match": -1.0}, {"depths": ()}, {"depths": (1.5,)}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        Prefix(**(SMALL | wrong))


def test_bf16_and_nothing_left_behind(hider, taught, corpus):
    lm, original = replace(hider, precision="bf16"), replace(taught, precision="bf16")
    before = {name: value.clone() for name, value in hider.model.state_dict().items()}
    _, seen = Prefix(**SMALL)(lm, corpus, original, Bench())
    assert len(seen["forget"]) == len(corpus["forget"])
    assert all(torch.equal(value, before[name]) for name, value in hider.model.state_dict().items())
    for model in (hider.model, taught.model):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(w.dtype == torch.float32 and w.grad is None for w in model.parameters())
