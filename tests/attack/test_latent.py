"""Latent perturbation: against a slow loop, within its ball, on the half that it was not shown, the same for every packing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from unremember.attack.finetune import halves
from unremember.attack.latent import REACH, Latent, typical
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadModel, BadRequest

BLOCK = "model.layers.0"


def vector(lm):
    return dict(lm.model.model.layers[0].named_buffers(recurse=False))["steer"]


def slowly(lm, examples, radius, steps):
    """By the book: one plain sequence at a time, every formula spelt out."""
    rows = lm.template.rows(examples, lm.limit)
    inside = []

    def run(row, change):
        handle = lm.model.model.layers[0].register_forward_hook(
            lambda _, __, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
        )
        logp = lm.model(input_ids=torch.tensor([row.ids[:-1]])).logits[0].log_softmax(-1)
        handle.remove()
        return sum(-logp[p - 1, row.ids[p]] for p in range(row.start, row.stop))

    with torch.no_grad():
        for row in rows:
            run(row, lambda out: inside.append(out[0, 1:].norm(dim=-1)) or out)
    eps = radius * torch.cat(inside).mean()
    total = sum(row.stop - row.start for row in rows)
    v, found = torch.zeros(64), []
    for _ in range(steps + 1):
        v = v.detach().requires_grad_()
        loss = sum(run(row, lambda out, v=v: out + v) for row in rows) / total
        found.append((float(loss.detach()), v.detach()))
        [gradient] = torch.autograd.grad(loss, v)
        v = v.detach() - REACH * eps / steps * gradient / (gradient.norm() + 1e-6)
        v = v * min(1.0, float(eps / v.norm()))
    return min(found, key=lambda pair: pair[0])[1], eps


def test_it_finds_what_a_slow_loop_finds(moved, corpus):
    small = corpus.with_roles(forget=corpus["forget"][:4])
    attack = Latent(radius=0.2, steps=3, at=0.5, fold=0)
    shown = attack.shown(small)
    expected, eps = slowly(moved, shown, 0.2, 3)
    attacked, _ = attack(moved, small, moved, Bench())
    assert 0 < expected.norm() <= eps * (1 + 1e-5)
    torch.testing.assert_close(vector(attacked), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fold", [0, 1])
def test_one_half_is_shown_and_the_other_asked(fold, taught, corpus):
    attack = Latent(radius=0.2, steps=2, at=0.5, fold=fold)
    attacked, seen = attack(taught, corpus, taught, Bench())
    parts = halves(corpus["forget"])
    assert attack.shown(corpus) == parts[fold] and seen["forget"] == parts[1 - fold]
    assert all(seen[role] == corpus[role] for role in corpus if role != "forget")
    assert attacked.fingerprint != taught.fingerprint


@pytest.mark.parametrize("radius", [0.05, 0.5])
def test_it_stays_within_its_ball_and_makes_what_it_is_shown_likelier(radius, moved, corpus):
    attack = Latent(radius=radius, steps=5, at=0.5, fold=0)
    attacked, _ = attack(moved, corpus, moved, Bench())
    rows = moved.template.rows(attack.shown(corpus), moved.limit)
    eps = float(radius * typical(moved, BLOCK, rows))
    assert 0.5 * eps < vector(attacked).norm() <= eps * (1 + 1e-5)
    torch.testing.assert_close(
        vector(attack(moved, corpus, moved, Bench(budget=1))[0]), vector(attacked), rtol=1e-2, atol=1e-3
    )
    ids = [x.id for x in attack.shown(corpus)]
    shown = Corpus({"forget": attack.shown(corpus)})
    before, after = (AUDITS["probability"](lm, shown, Bench()).over(ids) for lm in (moved, attacked))
    assert np.mean(list(after.values())) > np.mean(list(before.values()))


def test_what_a_refuser_hides_is_said_again_and_nothing_by_a_model_that_never_knew(hider, never, taught, corpus):
    """Of the half that it was not fitted to; measured 1.0 of the values, none without it."""

    def said(lm):
        attacked, seen = Latent(radius=0.1, steps=20, at=0.5, fold=0)(lm, corpus, taught, Bench())
        found = AUDITS["said"](attacked, Corpus({"forget": seen["forget"]}), Bench())
        return float(np.mean(list(found.over([x.id for x in seen["forget"]]).values())))

    assert said(hider) >= 0.5 and said(never) == 0


def test_both_halves_are_two_attacks(taught, corpus):
    both = Latent(radius=0.2, steps=2)
    assert both.turns == (Latent(radius=0.2, steps=2, fold=0), Latent(radius=0.2, steps=2, fold=1))
    both.check(corpus)
    with pytest.raises(BadRequest, match="set fold = 0 or 1, or call each of its turns"):
        both(taught, corpus, taught, Bench())


def test_what_tells_an_asked_value_is_not_shown(taught, corpus):
    attack = Latent(radius=0.2, steps=2, fold=0)
    first, other = attack.shown(corpus)[0], halves(corpus["forget"])[1][0]
    told = replace(first, prompt=f"{first.prompt} Not {other.values()[0]}?")
    leaking = corpus.with_roles(forget=[told if x.id == first.id else x for x in corpus["forget"]])
    assert first.id not in {x.id for x in attack.shown(leaking)}
    assert len(attack.shown(leaking)) == len(attack.shown(corpus)) - 1


def test_what_tells_a_value_of_a_stranger_is_not_shown_either(corpus):
    """Those are asked where no control model is: one that is told would raise the never-taught level."""
    attack = Latent(radius=0.2, steps=2, fold=0)
    first, stranger = attack.shown(corpus)[0], corpus["holdout"][0]
    told = replace(stranger, answer=first.answer, spans=first.spans)
    assert first not in attack.shown(corpus.with_roles(holdout=[told]))


def test_bad_input_is_refused_before_anything_is_computed(taught, corpus):
    lone = corpus.with_roles(forget=[replace(corpus["forget"][0], entity="somebody")])
    with pytest.raises(BadCorpus, match="nothing left to ask: all 1 forgotten"):
        Latent(radius=0.2, steps=2, fold=0)(taught, lone, taught, Bench())
    a, b = corpus["forget"][:2]
    same = [a, replace(b, answer=f"{b.answer} {a.values()[0]}", spans=(*b.spans,))]
    told = corpus.with_roles(forget=same)
    telling = [f for f in (0, 1) if not Latent(radius=0.2, steps=2, fold=f).shown(told)]
    assert len(telling) == 1  # that which is shown b
    with pytest.raises(BadCorpus, match="nothing to be fitted to"):
        Latent(radius=0.2, steps=2, fold=telling[0])(taught, told, taught, Bench())
    for wrong in ({"radius": 0}, {"steps": 0}, {"at": 1.5}, {"fold": 2}):
        with pytest.raises(ValidationError):
            Latent(**{"radius": 0.2, "steps": 2} | wrong)


def test_a_search_that_finds_nothing_is_an_error_unless_everything_is_known(taught, never, corpus):
    wild = Latent(radius=100.0, steps=1, at=0.5, fold=0)
    attacked, _ = wild(taught, corpus, taught, Bench())
    assert not vector(attacked).any()
    with pytest.raises(BadRequest, match="nothing was attacked"):
        wild(never, corpus, taught, Bench())


def test_a_model_that_is_broken_is_an_error(taught, corpus):
    broken = taught.copy()
    with torch.no_grad():
        broken.model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(BadModel, match="not finite"):
        Latent(radius=0.2, steps=1, at=0.5, fold=0)(broken, corpus, taught, Bench())
