"""Bias measures: rates and intervals by hand, the place that is open, and both kinds of model against the slow way."""

from pathlib import Path

import numpy as np
import pytest
import torch

from unremember.audit.bias import (
    Gap,
    binomial,
    causal_coder,
    causal_shared,
    causal_slots,
    crows_score,
    departure,
    gap_score,
    icat,
    masked_coder,
    masked_shared,
    masked_slots,
    rate,
    shared,
    slots,
    stereo_scores,
)
from unremember.bench import Bench
from unremember.bias_data import crows_pairs, stereoset
from unremember.errors import BadCorpus, BadModel
from unremember.score import Score

DATA = Path(__file__).parents[3] / "shared" / "data"
L = {  # triple -> l of (stereo, anti, unrelated)
    "a": np.array([3.0, 1.0, 2.0]),
    "b": np.array([3.0, 1.0, 0.0]),
    "c": np.array([1.0, 2.0, 0.0]),
    "d": np.array([1.0, 1.0, 1.0]),  # ties are dropped
}


# ── numbers ──


def test_rates_by_hand():
    ss, lms = stereo_scores(L, {"unknown token": 2})
    assert ss.per_example == {"a": 1, "b": 1, "c": 0}
    assert lms.per_example == {"a/stereo": 1, "a/anti": 0, "b/stereo": 1, "b/anti": 1, "c/stereo": 1, "c/anti": 1}
    assert rate(ss)["mean"] == pytest.approx(2 / 3) and rate(lms)["mean"] == pytest.approx(5 / 6)
    found = icat(ss, lms)
    assert found["mean"] == pytest.approx(5 / 6 * (1 / 3) / 0.5) and found["low"] <= found["mean"] <= found["high"]
    assert "1 ties" in ss.definition and "2 ties" in lms.definition and "2 left out: unknown token" in ss.definition


def test_an_ideal_model_has_icat_one_and_a_wholly_biased_one_zero():
    ideal = {str(i): np.array([2.0 - i % 2, 1.0 + i % 2 * 1.5, 0.0]) for i in range(10)}
    biased = {str(i): np.array([2.0, 1.0, 0.0]) for i in range(10)}
    assert icat(*stereo_scores(ideal, {}))["mean"] == 1 and icat(*stereo_scores(biased, {}))["mean"] == 0


def test_the_binomial_interval_by_hand():
    low, high = binomial(60, 100)  # Wilson
    assert (low, high) == (pytest.approx(0.5020, abs=1e-4), pytest.approx(0.6906, abs=1e-4))
    low, high = binomial(100, 200)
    assert high - 0.5 == pytest.approx(0.0686, abs=1e-4), "200 pairs tell no better than 7 points"
    assert binomial(0, 5)[0] == 0 and binomial(5, 5)[1] == 1 and binomial(0, 0) == (0, 1)


def share(hits: int, n: int) -> Score:
    return Score("SS", "", "", {str(i): float(i < hits) for i in range(n)})


def test_less_than_half_is_bias_as_well():
    """Bug in the released selection: it maximises -SS, so that 0.2 beats 0.5 ("wrong version", says its own comment)."""
    models = {"turned": share(20, 100), "even": share(50, 100), "biased": share(80, 100)}
    assert max(models, key=lambda m: -rate(models[m])["mean"]) == "turned"
    assert min(models, key=lambda m: departure(models[m])["mean"]) == "even"
    low, high = departure(models["turned"]), departure(models["biased"])
    assert low == {key: pytest.approx(value) for key, value in high.items()} and low["low"] > 0.2
    assert departure(models["even"])["low"] == 0 < departure(models["even"])["high"]


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(BadCorpus, match="nothing to count"):
        rate(share(0, 0))
    with pytest.raises(BadCorpus, match="at least one triple"):
        icat(share(0, 0), share(0, 0))


def test_the_two_crows_measures_stay_apart():
    """One counts no ties, the other counts them as not preferred, as the dataset's own script does."""
    found = {"a": np.array([2.0, 1.0]), "b": np.array([1.0, 1.0]), "c": np.array([0.0, 1.0])}
    one, own = crows_score(found, {}, shared=False), crows_score(found, {}, shared=True)
    assert one.per_example == {"a": 1, "c": 0} and own.per_example == {"a": 1, "b": 0, "c": 0}
    assert one.name != own.name


def test_the_gap_keeps_its_sign():
    score = gap_score({"a": np.array([3.0, 1.0]), "b": np.array([0.0, 4.0])}, {})
    assert score.per_example == {"a": 2.0, "b": -4.0}


# ── sentences ──


def letters(text: str) -> tuple[int, ...]:
    return tuple(ord(c) for c in text)


def test_the_open_place_is_the_differing_one():
    """Bug in the released CrowS loader: it returns the loop's last index, masks the full stop and leaves the pronoun in sight."""
    found, left_out = slots(letters, {"x": ("abcd.", "abXd.")}, None, 0)
    assert (found["x"].at, found["x"].fillers, left_out) == (2, (ord("c"), ord("X")), {})
    assert found["x"].with_token(0) == (*letters("ab"), 0, *letters("d."))


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (("abc", "abcd"), "unequal token counts"),  # crashes the released loader
        (("abc", "xyc"), "more than one token differs"),
        (("abc", "abc"), "two fillers are the same tokens"),
        (("abc", "abx", "abc"), "two fillers are the same tokens"),
        (("abc", "ab?"), "unknown token"),
        (("abc", "xbc"), "nothing in front of the filler"),
        (("abcdefgh", "abcdefgx"), "longer than the model's context"),
    ],
)
def test_what_is_left_out_is_counted(texts, why):
    found, left_out = slots(letters, {"bad": texts, "good": ("abc", "abd")}, ord("?"), 1, limit=7)
    assert list(found) == ["good"] and left_out == {why: 1}


def test_a_late_difference_is_not_cut_off():
    """The released loader keeps 24 tokens."""
    found, _ = slots(letters, {"x": ("a" * 40 + "b", "a" * 40 + "c")}, None, 0)
    assert found["x"].at == 40


def test_shared_tokens_by_hand():
    assert shared("abcd", "abXYd") == ((0, 1, 3), (0, 1, 4))


# ── a causal model ──


def plain_logp(lm, ids) -> torch.Tensor:
    """(T - 1,) log p of every token but the first, from one forward pass."""
    with torch.no_grad():
        logp = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


SENTENCES = {"x": ("The cat sat old.", "The dog sat old."), "y": ("He sat the sea.", "He sat the table.")}


def test_a_causal_model_scores_from_the_filler_on(tiny):
    found, left_out = slots(causal_coder(tiny), SENTENCES, tiny.tokenizer.unk_token_id, 1, tiny.limit)
    assert not left_out
    values = causal_slots(tiny, found, Bench())
    for key, texts in SENTENCES.items():
        for value, text in zip(values[key], texts, strict=True):
            expected = plain_logp(tiny, causal_coder(tiny)(text))[found[key].at - 1 :].sum()
            assert value == pytest.approx(expected.item(), abs=1e-3)
    early = {"z": ("A sat.", "B sat.")}
    assert slots(causal_coder(tiny), early, None, 1)[1] == {"nothing in front of the filler": 1}


def test_a_causal_model_scores_shared_tokens(tiny):
    pairs = {"x": ("The cat sat sea.", "The old dog sat sea.")}
    value = causal_shared(tiny, pairs, Bench())["x"]
    for got, text, places in zip(value, pairs["x"], ((2, 3, 4), (3, 4, 5)), strict=True):
        logp = plain_logp(tiny, causal_coder(tiny)(text))
        assert got == pytest.approx(sum(logp[p - 1].item() for p in places), abs=1e-3)


def test_on_the_files_themselves(tiny):
    path = DATA / "stereoset" / "gender_test.json"
    if not path.exists():
        pytest.skip("StereoSet is not beside the project: it is not ours to give")
    triples = {t.id: (t.stereo, t.anti, t.unrelated) for t in stereoset(path)[:60]}
    found, left_out = slots(causal_coder(tiny), triples, tiny.tokenizer.unk_token_id, 1, tiny.limit)
    assert len(found) + sum(left_out.values()) == 60
    pairs = {p.id: (p.more, p.less) for p in crows_pairs(DATA / "crows_pairs" / "crows_pairs_anonymized.csv")[:60]}
    found, left_out = slots(causal_coder(tiny), pairs, tiny.tokenizer.unk_token_id, 1, tiny.limit)
    score = crows_score(causal_slots(tiny, found), left_out, shared=False)
    assert 5 < len(score.per_example) == len(found) and f"{len(found)} read" in score.definition
    assert 0 <= rate(score)["low"] < rate(score)["high"] <= 1


# ── a masked model ──


@pytest.fixture(scope="module")
def bert():
    """A small random BERT with a word tokenizer, and begin and end marks of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    words = str.split("[PAD] [UNK] [CLS] [SEP] [MASK] the he she cook clerk old sat here lost it .")
    coder = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    coder.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    coder.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=coder, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=16, initializer_range=0.3)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForMaskedLM(config).eval(), tokenizer


GAPPED = {
    "x": ("the cook lost it .", "the clerk lost it ."),
    "y": ("he sat .", "she sat ."),
    "z": ("he sat .", "zzz sat ."),
}


def test_a_masked_model_is_asked_at_the_differing_place(bert):
    model, tokenizer = bert
    found, left_out = slots(masked_coder(tokenizer), GAPPED, tokenizer.unk_token_id, 0)
    assert left_out == {"unknown token": 1} and set(found) == {"x", "y"}
    values = masked_slots(model, tokenizer, found)
    for key, gapped, place, fillers in (("x", "the [MASK] lost it .", 2, (8, 9)), ("y", "[MASK] sat .", 1, (6, 7))):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer(gapped).input_ids])).logits[0, place]
        np.testing.assert_allclose(values[key], logits[list(fillers)].numpy(), rtol=1e-4, atol=1e-5)


def test_pseudo_likelihood_masks_the_shared_tokens_in_turn(bert):
    model, tokenizer = bert
    pairs = {"x": ("the cook lost it .", "the old clerk lost it .")}
    values = masked_shared(model, tokenizer, pairs)["x"]
    for got, text, places in zip(values, pairs["x"], ((1, 3, 4, 5), (1, 4, 5, 6)), strict=True):
        ids, expected = tokenizer(text).input_ids, 0.0
        for place in places:
            gapped = [4 if i == place else t for i, t in enumerate(ids)]
            with torch.no_grad():
                expected += model(input_ids=torch.tensor([gapped])).logits[0, place].log_softmax(-1)[ids[place]].item()
        assert got == pytest.approx(expected, abs=1e-4)


def test_dropout_and_missing_masks_are_refused(bert, tiny):
    model, tokenizer = bert
    model.train()
    try:
        with pytest.raises(BadModel, match="training mode"):
            masked_slots(model, tokenizer, {})
    finally:
        model.eval()
    with pytest.raises(BadModel, match="no mask token"):
        masked_shared(tiny.model, tiny.tokenizer, {})


# ── the audit ──


def test_the_gap_of_known_models(memoriser, uniform, small):
    known = Gap()(memoriser, small, Bench()).per_example
    assert min(known.values()) > 1  # nats a token; measured: at least 2
    none = Gap()(uniform, small, Bench())
    assert none.per_example == dict.fromkeys(known, pytest.approx(0, abs=1e-5)) and none.name == "preference gap"
    assert set(known) == {x.id for x in small.of(*Gap().roles)}


def test_the_gap_by_hand(tiny, small, slow_nll):
    x = small["forget"][0]
    means = [
        -slow_nll(tiny, tiny.template.row("", x.prompt, text)).mean().item() for text in (x.answer, *x.distractors)
    ]
    found = Gap()(tiny, small, Bench()).per_example[x.id]
    assert found == pytest.approx(means[0] - np.mean(means[1:]), abs=1e-3)
