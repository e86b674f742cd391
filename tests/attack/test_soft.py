"""The soft prompt: vectors come out where their words stand and nowhere else, and the auditor needs to know nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from unremember.attack.fair import KNOWN
from unremember.attack.gcg import Victim, decoded
from unremember.attack.soft import Soft, softened, spare
from unremember.attack.suffix import bar, slots
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadModel, BadRequest

SMALL = {"tokens": 3, "steps": 4}


@pytest.fixture(scope="module")
def words(taught, corpus):
    return spare(taught, corpus, 6, bar(taught, corpus)[0])


def scores(audit, lm, corpus) -> float:
    return float(np.mean(list(AUDITS[audit](lm, Corpus({"forget": corpus["forget"]}), Bench()).per_example.values())))


def test_vectors_stand_where_their_words_stand(taught, words):
    vectors = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    lm = softened(taught, words, vectors)
    ids = torch.tensor([[5, words[2], 7], [words[0], 9, words[5]]])
    plain, soft = (m.model.get_input_embeddings()(ids) for m in (taught, lm))
    expected = plain.clone()
    expected[0, 1], expected[1, 0], expected[1, 2] = vectors[2], vectors[0], vectors[5]
    assert torch.equal(soft, expected)
    assert not taught.model.get_input_embeddings()._forward_hooks  # the argument is as it was


def test_the_copy_is_a_plain_lm_with_a_name_of_its_own(taught, words):
    """Score tables are remembered by fingerprint: vectors outside it would make one attack read another's numbers."""
    a, b = (softened(taught, words, torch.full((6, 64), value)) for value in (0.1, 0.2))
    assert len({taught.fingerprint, a.fingerprint, b.fingerprint, a.copy().fingerprint}) == 3
    again = a.copy()
    ids = torch.tensor([words])
    assert torch.equal(again.model.get_input_embeddings()(ids), a.model.get_input_embeddings()(ids))
    with torch.no_grad():
        again.model.get_input_embeddings().get_buffer("soft_vectors").zero_()
    assert not torch.equal(again.model.get_input_embeddings()(ids), a.model.get_input_embeddings()(ids))


def test_what_holds_no_word_is_read_as_before(taught, corpus, words):
    lm = softened(taught, words, torch.full((6, 64), 3.0))
    for audit in ("value probability", "said", "choice"):
        assert scores(audit, lm, corpus) == scores(audit, taught, corpus)
    kept = Corpus({role: corpus[role] for role in ("prose", "world")})
    for audit in ("prose NLL", "world accuracy"):
        assert AUDITS[audit](lm, kept, Bench()) == AUDITS[audit](taught, kept, Bench())


def test_a_packed_row_equals_a_plain_forward_pass_over_the_vectors(taught, corpus, words, slow_nll):
    """The auditor's tries, positions and masks do not notice."""
    from unremember.table import read

    lm = softened(taught, words, torch.randn(6, 64, generator=torch.Generator().manual_seed(1)))
    text = decoded(lm.template, words)
    rows = lm.template.rows([replace(x, prompt=x.prompt + text) for x in corpus["forget"]])
    for row, reading in zip(rows, read(lm, rows), strict=True):
        assert -reading.logp == pytest.approx(slow_nll(lm, row).detach().numpy(), abs=1e-3)


def test_spare_words_are_in_no_text(taught, corpus, words):
    texts = "\n".join(t for x in corpus.of(*corpus) for t in (x.prompt, x.answer, *x.paraphrases, *x.distractors))
    for i in words:
        word = decoded(taught.template, [i])
        assert word.startswith(" ") and word.strip() not in texts.split()
    with pytest.raises(BadModel, match=r"whole words that the corpus does not use, and the vectors need 99999"):
        spare(taught, corpus, 99_999, bar(taught, corpus)[0])


def test_what_was_fitted_is_what_is_read(taught, corpus, words):
    """The loss of the fit, and that of the words in the finished model, are the same number."""
    attack = Soft(tokens=6, steps=3, generalisation="within")
    shown = corpus["forget"][:3]
    vectors, _, least = attack._fitted(taught, shown, words, Bench())
    places = slots(taught.template, shown, words, lambda x: (x.prompt, ""), taught.limit)
    victim = Victim(taught, places)
    before = attack._loss(victim, words, vectors.requires_grad_())
    [entry] = Victim(softened(taught, words, vectors), places).losses([words], 3)
    assert entry.loss == pytest.approx(before, abs=1e-4) == pytest.approx(least, abs=1e-4)


@pytest.mark.parametrize("generalisation", ["within", "cross", "other"])
def test_every_question_gets_the_words_of_its_half(generalisation, taught, corpus):
    lm, seen = Soft(**SMALL, generalisation=generalisation)(taught, corpus, taught, Bench())
    parts = 4 if generalisation == "other" else 2
    assert len(lm.model.get_input_embeddings().get_buffer("soft_words")) == 3 * parts
    tails = [
        s.prompt.removeprefix(x.prompt)
        for role in ("forget", "holdout")
        for s, x in zip(seen[role], corpus[role], strict=True)
    ]
    assert len(set(tails)) == parts and "" not in tails
    assert seen["retain"] == corpus["retain"] and [x.answer for x in seen["forget"]] == [
        x.answer for x in corpus["forget"]
    ]


def test_the_same_seed_finds_the_same(taught, corpus):
    one, again, other = (Soft(**SMALL, seed=seed)(taught, corpus, taught, Bench())[0].fingerprint for seed in (0, 0, 1))
    assert one == again != other


def test_bf16_and_nothing_left_behind(hider, corpus):
    lm = replace(hider, precision="bf16")
    before = {name: value.clone() for name, value in hider.model.state_dict().items()}
    attacked, seen = Soft(**SMALL)(lm, corpus, lm, Bench())
    assert np.isfinite(scores("value probability", attacked, seen))
    assert all(torch.equal(value, before[name]) for name, value in hider.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hider.model.modules())
    assert all(w.grad is None and w.requires_grad for w in hider.model.parameters())


def test_an_attack_that_only_makes_it_worse_is_refused(taught, corpus):
    with pytest.raises(BadRequest, match=r"2 step\(s\) at lr = 1000000.0 leave the loss at .* take another lr"):
        Soft(tokens=3, steps=2, lr=1e6)(taught, corpus, taught, Bench())


@pytest.mark.parametrize(("loss", "refused"), [(KNOWN - 0.01, False), (KNOWN + 0.01, True)])
def test_what_is_known_by_heart_need_not_become_likelier(loss, refused, taught, corpus, monkeypatch):
    """The original may say its texts with any words behind the question, and a run must not end there."""
    monkeypatch.setattr(Soft, "_loss", lambda *_: loss)
    bench = Bench()
    if refused:
        with pytest.raises(BadRequest, match="nothing was attacked"):
            Soft(**SMALL)(taught, corpus, taught, bench)
    else:
        _, seen = Soft(**SMALL)(taught, corpus, taught, bench)
        assert seen["forget"] != corpus["forget"]
        assert bench.notes == {f"loss {when}, nats a token": pytest.approx(loss) for when in ("before", "after")}


def test_what_it_found_is_noted(hider, corpus):
    bench = Bench()
    Soft(**SMALL)(hider, corpus, hider, bench)
    assert bench.notes["loss after, nats a token"] < bench.notes["loss before, nats a token"]


def test_where_memory_is_short_it_fits_in_smaller_passes(taught, corpus, words, monkeypatch):
    """A pass that is given up must leave nothing in the gradient."""
    attack, places = (
        Soft(tokens=6, steps=1),
        slots(taught.template, corpus["forget"], words, lambda x: (x.prompt, ""), 0),
    )
    expected = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    vectors = expected.detach().clone().requires_grad_()
    loss = attack._loss(Victim(taught, places), words, expected)
    real, passes = Victim.run, []

    def tight(self, pairs, embedded=None):
        passes.append(len(pairs))
        if len(passes) == 3:
            raise torch.OutOfMemoryError("no room")
        return real(self, pairs, embedded)

    monkeypatch.setattr(Victim, "run", tight)
    victim = Victim(taught, places)
    assert attack._loss(victim, words, vectors) == pytest.approx(loss, abs=1e-5) and victim.places == victim.budget // 2
    assert torch.allclose(vectors.grad, expected.grad, atol=1e-6)


def test_the_control_is_no_attack_of_a_run(corpus):
    with pytest.raises(BadCorpus, match=r'soft: target = "wrong" scores false answers, .*excess from Python'):
        Soft(**SMALL, target="wrong").check(corpus)


def test_missing_distractors_and_lone_questions_are_named(taught, corpus):
    bare = corpus.with_roles(forget=[replace(x, distractors=()) for x in corpus["forget"]])
    with pytest.raises(BadCorpus, match=r'target = "wrong" needs distractors, and .* and 7 more have none'):
        Soft(**SMALL, target="wrong")(taught, bare, taught, Bench())
    lone = corpus.with_roles(forget=corpus["forget"][:1])
    with pytest.raises(BadCorpus, match="stand alone"):
        Soft(**SMALL)(taught, lone, taught, Bench())


@pytest.mark.parametrize(
    "wrong", [{"tokens": 0}, {"steps": 0}, {"lr": 0.0}, {"generalisation": "all"}, {"target": "x"}]
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        Soft(**(SMALL | wrong))
