"""The lens attack: a model cut off behind a block says what a lens shows there, and the level is chosen without the forgotten."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from planted import planted
from unremember.attack.lens import Lens, candidates, clearest, cut, known
from unremember.audit import AUDITS, EVIDENCE
from unremember.audit.choice import Choice
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.embedded.liars import topped
from unremember.errors import BadCorpus, BadModel
from unremember.forget.npo import NPO
from unremember.locate.lens import LogitLens, Trail, stream
from unremember.locate.tuned import Tune, TunedLens
from unremember.score import Rule, evidence
from unremember.tokens import pack
from unremember.train import Plan

ACCURACY = Choice(accuracy=True, roles=("forget", "retain"))


@pytest.fixture(scope="module")
def circuit(tiny):
    return planted(tiny)


@pytest.fixture(scope="module")
def facts(corpus):
    return Corpus({role: corpus[role] for role in ("forget", "retain", "prose")})


@pytest.fixture(scope="module")
def late(taught, corpus):
    """Forgets in its last block alone: the stream below it is the original's, bit for bit."""
    method = NPO(Plan(40, 3e-3, beside=12), beta=0.1, retain=5.0, part="span")
    return replace(topped(taught, corpus, method), name="late")


def mean(score, rows) -> float:
    return float(np.mean(list(score.over([x.id for x in rows]).values())))


def trail(*logp: list[float]) -> Trail:
    return Trail(np.ones((len(logp), len(logp[0]))), np.log(np.array(logp)))


# ── which level ──


@pytest.mark.parametrize(
    ("blocks", "levels"), [(1, []), (2, [1]), (3, [2]), (4, [2, 3]), (5, [3, 4]), (30, list(range(15, 30)))]
)
def test_the_upper_half_without_the_last(blocks, levels):
    assert list(candidates(blocks)) == levels


def test_the_clearest_level_by_hand():
    """Level 1: √(.4 · .1) = .2 and .2; level 2: .3 and .1, the same mean; level 3: .2 and .1; level 0 is no candidate."""
    rows = [
        trail([0.9, 0.9], [0.4, 0.1], [0.3, 0.3], [0.2, 0.2]),
        trail([0.9, 0.9], [0.2, 0.2], [0.1, 0.1], [0.1, 0.1]),
    ]
    assert known(rows) == pytest.approx([0.9, 0.2, 0.2, 0.15])
    assert clearest(known(rows), range(2, 4)) == 2
    assert clearest(known([rows[1], rows[1]]), range(1, 4)) == 1
    assert clearest([0.1, 0.3, 0.3], range(1, 3)) == 1  # a tie goes to the one further from the end


def test_the_level_is_that_of_a_slow_search_and_asks_no_forgotten_answer(circuit):
    lm, corpus = circuit
    level, turn, shift = Lens().level(lm, corpus)
    kept = Corpus({"forget": corpus["forget"][:1], "retain": corpus["retain"]})
    slow = [mean(AUDITS["value probability"](cut(lm, at), kept, Bench()), corpus["retain"]) for at in (2, 3)]
    assert level == 2 + int(np.argmax(slow)) == 3 and turn is shift is None and slow[1] > slow[0] + 0.5
    wrong = [replace(x, answer=x.distractors[0], distractors=(x.answer,), spans=((3, 8),)) for x in corpus["forget"]]
    assert Lens().level(lm, corpus.with_roles(forget=wrong))[0] == level


def test_notes_say_what_every_level_makes_of_the_retained_values(circuit):
    """By a model that was cut there, and at the last level by the model itself; also where the level was known already."""
    lm, corpus = circuit
    bench = Bench()
    level, _, _ = Lens().level(lm, corpus, bench)
    kept = Corpus({"forget": corpus["forget"][:1], "retain": corpus["retain"]})
    slow = {
        f"retained values at level {at:02}": mean(
            AUDITS["value probability"](cut(lm, at) if at < 4 else lm, kept, Bench()), corpus["retain"]
        )
        for at in (1, 2, 3, 4)
    }
    assert bench.notes.pop("read at level") == level and set(bench.notes) == {"retained values at level 00", *slow}
    assert {name: bench.notes[name] for name in slow} == pytest.approx(slow, abs=1e-5)
    bench.notes.clear()
    Lens().read(AUDITS["choice"], lm, corpus, bench)
    assert bench.notes["read at level"] == level and len(bench.notes) == 6


# ── what is read there ──


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_was_cut_says_what_the_lens_shows(circuit, precision):
    lm, corpus = replace(circuit[0], precision=precision), circuit[1]
    tokens = pack([[row] for row in lm.template.rows(corpus["forget"])])
    lens, hidden = LogitLens.of(lm.model), stream(lm, tokens)
    slack = 1e-5 if precision == "fp32" else 3e-2
    for level in (1, 2, 3):
        said = cut(lm, level).logits(tokens).float()
        torch.testing.assert_close(said, lens(level, hidden[level]), atol=slack, rtol=slack)
        assert not torch.allclose(said, lens(level + 1, hidden[level + 1]), atol=1e-3)


@torch.no_grad()
def test_with_a_tuned_lens_it_says_what_that_shows(taught, corpus):
    tokens = pack([[row] for row in taught.template.rows(corpus["forget"])])
    start, noise = TunedLens.identity(taught), torch.Generator().manual_seed(0)
    delta, bias = (0.1 * torch.randn(part.shape, generator=noise) for part in (start.delta, start.bias))
    lens = TunedLens(start.logit, delta, bias)
    said = cut(taught, 1, delta[1], bias[1]).logits(tokens)
    torch.testing.assert_close(said, lens(1, stream(taught, tokens)[1]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(said, cut(taught, 1).logits(tokens), atol=0.1)


def test_it_speaks_as_it_reads(taught, corpus):
    """Greedy decoding, cache and all, takes what the lens shows first."""
    early = cut(taught, 1)
    prompts = [taught.template.context(x.prompt) for x in corpus["forget"]]
    with torch.inference_mode():
        first = [int(early.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) for ids in prompts]
    assert [list(said)[:1] for said in early.generate(prompts, 3)] == [[token] for token in first]


def test_the_model_itself_stays_as_it_is(taught, facts):
    before = {key: value.clone() for key, value in taught.model.state_dict().items()}
    early, seen = Lens(tune=Tune(steps=2, every=1))(taught, facts, taught, Bench())
    assert seen == facts and early.fingerprint != taught.fingerprint != cut(taught, 1).fingerprint
    assert len(early.model.model.layers) == early.model.config.num_hidden_layers == 1
    assert taught.model.config.num_hidden_layers == len(taught.model.model.layers) == 2
    for weight in early.model.parameters():
        weight.data.zero_()
    assert all(torch.equal(value, before[key]) for key, value in taught.model.state_dict().items())
    assert not any(block._forward_hooks for block in taught.model.model.layers)


def test_a_tuned_lens_is_made_once_for_a_bench(taught, facts):
    told: list[str] = []
    bench = Bench(say=lambda stage, *_: told.append(stage))
    attack = Lens(tune=Tune(steps=3, every=1))
    one = attack.read(AUDITS["value probability"], taught, facts, bench)
    other = attack.read(AUDITS["choice"], taught, facts, bench)
    assert told.count("tune") == 3 and one.name == "value probability" and other.name == "choice"


# ── does it find what is hidden, and nothing else ──


def test_what_the_last_block_hides_is_found_and_nothing_is_invented(late, taught, never, facts):
    """Measured: told from its distractors 0.17 at the end and 1.00 at the lens; never taught 0.25 of chance 0.25."""
    forget, attack = facts["forget"], Lens()
    end, inside = (
        mean(score, forget) for score in (ACCURACY(late, facts, Bench()), attack.read(ACCURACY, late, facts))
    )
    assert inside >= end + 0.15 and inside >= 0.9
    assert mean(attack.read(ACCURACY, never, facts), forget) <= 0.25 + 2 * (0.25 * 0.75 / len(forget)) ** 0.5
    ids = [x.id for x in forget]
    read = {
        n: attack.read(AUDITS["choice"], lm, facts).over(ids) for n, lm in (("o", taught), ("f", late), ("n", never))
    }
    assert read["f"] == pytest.approx(read["o"])  # below its last block it is the original
    found = evidence("choice", read["o"], read["f"], read["n"], Rule())
    assert found.applicable and found.r == pytest.approx(1) and found.n >= 8
    plain = {n: AUDITS["choice"](lm, facts, Bench()).over(ids) for n, lm in (("o", taught), ("f", late), ("n", never))}
    assert evidence("choice", plain["o"], plain["f"], plain["n"], Rule()).r < 0.1  # without the attack it had forgotten


def test_an_edited_head_stays_closed(taught, facts):
    """The lens reads through it at every level; `graft` and `probe` are the attacks on it."""
    lm = taught.untied()
    with torch.no_grad():
        lm.model.lm_head.weight.zero_()
    assert mean(Lens().read(AUDITS["choice"], lm, facts), facts["forget"]) == pytest.approx(0.25, abs=0.02)


def test_it_reads_likelihoods_of_the_evidence_and_no_speech():
    assert set(Lens.reads) < set(EVIDENCE) and "said" not in Lens.reads


# ── bad input ──


def test_bad_input_is_refused(taught, circuit, facts):
    with pytest.raises(BadCorpus, match=r"lens needs .* 'retain'"):
        Lens()(taught, Corpus({"forget": facts["forget"]}), taught)
    with pytest.raises(BadCorpus, match=r"lens needs .* 'prose'"):
        Lens(tune=Tune()).read(AUDITS["choice"], circuit[0], circuit[1])
    with pytest.raises(BadModel, match=r"has 1 block, and .* needs 2 or more"):
        Lens().level(cut(taught, 1), facts)
    broken = taught.copy()
    broken.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(BadModel, match="not finite"):
        Lens().level(broken, facts)
    with pytest.raises(ValidationError):
        Lens(level=3)
