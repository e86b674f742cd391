"""Membership scores: by hand, the slow obvious way, and with every known mistake of published code made impossible."""

from dataclasses import replace
from math import log, sqrt

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from unremember.audit.membership import (
    GradientNorm,
    Membership,
    Neighbourhood,
    ReCaLL,
    Reference,
    frame,
    gradient_norms,
    lowest,
    prefixed,
    quotient,
    surprise,
)
from unremember.audit.separation import separation
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.embedded.dossier import dossier
from unremember.errors import BadCorpus, BadModel
from unremember.lm import LM
from unremember.tokens import Template
from unremember.train import Plan, train

TABLE = {name: Membership(name) for name in ("loss", "zlib", "lowercase", "Min-K", "Min-K++")}
EVERY = {
    **TABLE,
    "ReCaLL": ReCaLL(shots=2),
    "neighbourhood": Neighbourhood(neighbours=4),
    "gradient": GradientNorm(),
}
# Least AUC after training.  Four neighbours with one word each, drawn by the model that learnt the texts, reach .79.
SEEN = dict.fromkeys(EVERY, 0.9) | {"neighbourhood": 0.7}
table_attacks = pytest.mark.parametrize("name", TABLE)
every_attack = pytest.mark.parametrize("name", EVERY)


@pytest.fixture
def few(corpus) -> Corpus:
    return Corpus({role: corpus[role][:5] for role in ("forget", "holdout")})


@torch.no_grad()
def plainly(lm, ids: tuple[int, ...], start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """(T,) log-probabilities of ids[start:stop] and (T, V) whole distributions, by one ordinary forward pass in float64."""
    logp = lm.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)[start - 1 : stop - 1]
    return logp[range(stop - start), list(ids[start:stop])].numpy(), logp.numpy()


def rows_of(lm, corpus, *roles):
    return lm.template.rows(corpus.of(*(roles or ("forget", "holdout"))))


# ── the formulas ──


def test_the_lowest_by_hand():
    values = np.array([-1.0, -5, -2, -3, -4, -0.5, -0.1, -0.2, -0.3, -0.4])
    assert (
        lowest(values, 0.2) == -4.5
        and lowest(values, 0.29) == -4.5
        and lowest(values, 1) == pytest.approx(values.mean())
    )
    assert lowest(np.arange(100.0), 0.29) == 14  # 0.29 · 100 = 28.999…, and 29 tokens are meant


def test_a_short_text_has_a_lowest_token():
    """floor(0.2 · 3) = 0 tokens, whose mean is NaN, in codes without the 1."""
    assert lowest(np.array([-1.0, -2, -3]), 0.2) == -3
    assert np.isfinite(lowest(np.array([-1.0]), 0.01))


def test_of_a_single_token_min_k_is_the_loss():
    assert lowest(np.array([-1.25]), 0.2) == -1.25


def moments(logits: list[float], target: int) -> tuple[float, float, float]:
    p = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    mean = (p.exp() * p).sum()
    return p[target].item(), mean.item(), (p.exp() * (p - mean).square()).sum().sqrt().item()


def test_the_surprise_by_hand():
    """p = (3/4, 1/4): μ = ¾ log ¾ + ¼ log ¼ and σ = √(¾ · ¼) · log 3, so z is √⅓ or −√3."""
    for target, z in ((0, sqrt(1 / 3)), (1, -sqrt(3))):
        found = surprise(*(np.array([x]) for x in moments([log(3), 0.0], target)))
        assert found[0] == pytest.approx(z)


def test_the_deviation_is_not_clamped():
    """open-unlearning lets no variance be below 1e-6.  Two tokens that are almost alike: z is −1 and not −0.05."""
    logp, mean, sd = moments([1e-4, 0.0], 1)
    assert surprise(*map(np.array, ([logp], [mean], [sd])))[0] == pytest.approx(-1, abs=1e-3)
    assert (logp - mean) / sqrt(max(sd**2, 1e-6)) == pytest.approx(-0.05, abs=1e-3)
    logp, mean, sd = moments([0.0, -27.0], 1)  # sure, and wrong: −1/√p
    assert surprise(*map(np.array, ([logp], [mean], [sd])))[0] == pytest.approx(-np.exp(13.5), rel=0.01)
    assert (logp - mean) / sqrt(max(sd**2, 1e-6)) > -3e4


def test_a_certain_token_has_no_surprise():
    """σ = 0: no division by it, and z is what it tends to."""
    assert surprise(np.zeros(3), np.zeros(3), np.zeros(3)).tolist() == [0, 0, 0]
    assert surprise(*(np.array([x]) for x in moments([0.0, -200.0], 0)))[0] == pytest.approx(0, abs=1e-6)


def test_zlib_counts_bytes_and_its_frame_rules_short_texts():
    assert frame("") == (8, False)
    assert frame("Lyon") == (12, False)  # two thirds frame
    assert frame("été")[0] == 8 + 5  # utf-8
    size, smaller = frame("a word and a word and a word and a word and a word and a word")
    assert smaller and size < 30


def test_quotients_stay_finite():
    """A perfect memoriser has a loss of 0: the ratio is large, and where both are 0 it is 1."""
    assert quotient(-3.0, -1.5) == 2
    assert quotient(-3.0, 0.0) == pytest.approx(3e6) and quotient(0.0, -0.0) == 1 and quotient(0.0, -2.0) < 1e-6


# ── from the score table ──


def test_the_likelihood_suite_the_slow_way(taught, few):
    found = {name: audit(taught, few, Bench()).per_example for name, audit in TABLE.items()}
    for x, row in zip(few.of("forget", "holdout"), rows_of(taught, few), strict=True):
        logp, whole = plainly(taught, row.ids, row.start, row.stop)
        p = np.exp(whole)
        mean = (p * whole).sum(-1)
        sd = np.sqrt((p * (whole - mean[:, None]) ** 2).sum(-1))
        count = max(1, int(0.2 * len(logp)))
        small = taught.template.row("", x.prompt.lower(), x.answer.lower())
        lower = plainly(taught, small.ids, small.start, small.stop)[0].mean()
        close = {"rel": 2e-3, "abs": 2e-4}
        assert found["loss"][x.id] == pytest.approx(logp.mean(), **close)
        assert found["zlib"][x.id] == pytest.approx(logp.mean() / frame(x.answer)[0], **close)
        assert found["lowercase"][x.id] == pytest.approx(lower / logp.mean(), **close)
        assert found["Min-K"][x.id] == pytest.approx(np.sort(logp)[:count].mean(), **close)
        assert found["Min-K++"][x.id] == pytest.approx(np.sort((logp - mean) / sd)[:count].mean(), rel=0.01, abs=1e-3)


def test_the_last_token_counts(tiny, slow_nll):
    """open-unlearning drops the last labelled token; two texts that differ there alone would score the same."""
    texts = ("Where the road ends we sleep", "Where the road ends we walked")
    corpus = Corpus({"forget": [Example(str(i), "", x) for i, x in enumerate(texts)]})
    found = TABLE["loss"](tiny, corpus, Bench()).per_example
    for key, row in zip("01", rows_of(tiny, corpus), strict=True):
        assert found[key] == pytest.approx(-slow_nll(tiny, row).mean().item(), rel=1e-4)
    assert found["0"] != pytest.approx(found["1"], abs=1e-3)


def test_the_end_mark_and_the_prompt_do_not_count(uniform, small):
    words = len(uniform.tokenizer)
    assert TABLE["loss"](uniform, small, Bench()).per_example == dict.fromkeys(
        ["f1", "f2", "f3", "h1"], pytest.approx(-log(words), rel=1e-5)
    )


def test_the_suite_costs_one_reading_an_example(tiny, few, monkeypatch):
    bench, asked = Bench(), []
    plain = type(tiny).logits
    monkeypatch.setattr(type(tiny), "logits", lambda lm, tokens: asked.extend(tokens.keys) or plain(lm, tokens))
    for name in ("loss", "zlib", "Min-K", "Min-K++"):
        TABLE[name](tiny, few, bench)
    assert len(asked) == 10
    TABLE["lowercase"](tiny, few, bench)
    assert len(asked) == 20


def test_the_two_ends(memoriser, uniform, small):
    known, unknown = (
        {k: a(lm, small, Bench()).per_example["f1"] for k, a in TABLE.items()} for lm in (memoriser, uniform)
    )
    assert known["loss"] == pytest.approx(0, abs=0.03) and known["Min-K"] == pytest.approx(0, abs=0.06)
    assert known["lowercase"] > 20 and abs(known["Min-K++"]) < 0.5
    assert unknown["lowercase"] == pytest.approx(1, rel=1e-5) and unknown["Min-K++"] == pytest.approx(0, abs=1e-3)
    assert unknown["Min-K"] == pytest.approx(unknown["loss"], rel=1e-5)


def test_zlib_says_where_it_counts_its_frame(tiny, small):
    assert "4 of 4 texts are too short to compress" in TABLE["zlib"](tiny, small, Bench()).definition
    long = Corpus({"forget": [Example("a", "", "the road and the rain and the road and the rain and the road")]})
    assert "too short" not in TABLE["zlib"](tiny, long, Bench()).definition


def test_the_share_is_in_the_definition(tiny, small):
    assert "lowest 40%" in Membership("Min-K", 0.4)(tiny, small, Bench()).definition


@pytest.mark.parametrize(
    "wrong", [{"attack": "los"}, {"share": 0.0}, {"share": 1.1}, {"share": float("nan")}, {"k": 20}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Membership(**({"attack": "Min-K"} | wrong))


# ── what every attack promises ──


@every_attack
def test_broken_weights_fail_and_do_not_score(name, tiny, few):
    lm = tiny.copy()
    with torch.no_grad():
        lm.model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        EVERY[name](lm, few, Bench())


@table_attacks
def test_a_word_that_can_never_be_said_leaves_all_finite(name, tiny, few):
    """−inf in the logits, as masking gives, is no NaN: 0 · log 0 = 0."""
    taken = tiny.tokenizer(" Coimbra", add_special_tokens=False).input_ids[0]

    def masked(logits):
        logits = logits.clone()
        logits[..., taken] = -torch.inf
        return logits

    with tiny.at("lm_head", masked) as lm:
        assert np.isfinite(list(EVERY[name](lm, few, Bench()).per_example.values())).all()


@every_attack
def test_taught_texts_in_the_holdout_are_refused(name, tiny, few):
    """The corpus itself refuses the same letters; here other case, signs and spaces are the same text, too."""
    x = few["forget"][0]
    twin = replace(x, id="twin", prompt=x.prompt.upper(), answer=f"{x.answer[:-1]} !", spans=())
    with pytest.raises(BadCorpus, match=f"'twin' of the holdout has the text of '{x.id}'"):
        EVERY[name](tiny, few.with_roles(holdout=(*few["holdout"], twin)), Bench())
    with pytest.raises(BadCorpus, match="in holdout and in forget"):
        few.with_roles(holdout=(*few["holdout"], replace(x, id="twin")))


@every_attack
def test_a_text_longer_than_the_window_is_refused(name, tiny, few):
    long = Example("long", "", "rain and " * 200)
    with pytest.raises(BadCorpus, match=r"'long' is .* tokens long and the model's context is 256"):
        EVERY[name](tiny, few.with_roles(forget=(long,)), Bench())


@every_attack
def test_measuring_changes_no_model(name, tiny, few):
    lm = tiny.copy()
    lm.model.train()
    lm.model.model.norm.eval()
    lm.model.get_input_embeddings().weight.requires_grad_(False)
    for weight in lm.model.parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    score = EVERY[name](lm, few, Bench())
    assert all(torch.equal(value, before[key]) for key, value in lm.model.state_dict().items())
    assert lm.model.training and not lm.model.model.norm.training
    assert all((w.grad == 1).all() for w in lm.model.parameters() if w.requires_grad)
    assert [n for n, w in lm.model.named_parameters() if not w.requires_grad] == ["model.embed_tokens.weight"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    assert score.name == f"membership {name}" and score.paper == EVERY[name].paper and EVERY[name].summary
    assert score.direction == "higher = more likely a member" and score.definition


@every_attack
def test_batch_budget_and_order_change_nothing(name, taught, few):
    turned = Corpus({role: few[role][::-1] for role in reversed(list(few))})
    bench = Bench()
    one = EVERY[name](taught, few, bench)
    other = EVERY[name](taught, turned, Bench(budget=60, batch=3)).per_example
    assert other == {key: pytest.approx(value, abs=2e-4, rel=2e-3) for key, value in one.per_example.items()}


@every_attack
def test_nothing_is_read_twice(name, tiny, few, monkeypatch):
    bench = Bench()
    first = EVERY[name](tiny, few, bench)
    monkeypatch.setattr(type(tiny), "logits", lambda *_: pytest.fail("read again"))
    assert EVERY[name](tiny, few, bench) == first


# ── do they see membership? ──


@pytest.fixture(scope="module")
def drawn() -> Corpus:
    """96 facts, dealt at random to members and strangers: the split is fair by construction."""
    people = dossier(0, forget=16, retain=0, holdout=0, relearn=0)["forget"]
    mixed = [people[i] for i in np.random.default_rng(0).permutation(len(people))]
    return Corpus({"forget": mixed[:48], "holdout": mixed[48:]})


@pytest.fixture(scope="module")
def member(tiny, drawn):
    """Taught the members alone."""

    def objective(lm, tokens):
        return {"all": tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}

    plan = Plan(steps=60, lr=1e-2, batch=16, warmup=5, schedule="linear")
    return train(tiny, objective, {"all": tiny.template.rows(drawn["forget"])}, plan)


def measured(audit, lm, corpus, tried=1):
    score = audit(lm, corpus, Bench())
    held = [x.id for x in corpus["holdout"] if x.id in score.per_example]
    return separation(score, [x.id for x in corpus["forget"]], held, tried=tried)["AUC"]


@every_attack
def test_on_a_model_that_saw_neither_every_attack_is_at_chance(name, tiny, drawn):
    found = measured(EVERY[name], tiny, drawn, tried=len(EVERY))
    assert not found.beyond, found


@pytest.mark.parametrize(("name", "least"), SEEN.items())
def test_after_training_they_see_it(name, least, member, drawn):
    assert measured(EVERY[name], member, drawn).value >= least


def test_the_members_were_learnt(member, drawn):
    found = TABLE["loss"](member, drawn, Bench()).per_example
    inside, outside = (-np.mean([found[x.id] for x in drawn[role]]) for role in ("forget", "holdout"))
    assert inside < outside / 2


def test_a_reference_sees_it_and_is_no_lira(tiny, member, drawn):
    audit = Reference(tiny)
    found = audit(member, drawn, Bench())
    assert "LiRA" not in found.name + found.definition + audit.summary
    one, other = (TABLE["loss"](lm, drawn, Bench()).per_example for lm in (member, tiny))
    assert found.per_example == {key: pytest.approx(one[key] - other[key]) for key in one}
    assert (
        measured(audit, member, drawn).value >= 0.8
    )  # .85: the toy never saw such sentences, and adds noise of its own


# ── reference ──


def test_a_reference_is_loaded_by_name_when_it_is_asked(tiny, member, few, monkeypatch):
    loaded = []
    from unremember.audit import membership

    membership._loaded.cache_clear()
    monkeypatch.setattr(membership, "load", lambda name, **_: loaded.append(name) or replace(tiny, name=name))
    audit = Reference("tiny")
    assert loaded == []
    named = [audit(member, few, Bench()).per_example for _ in range(2)]
    membership._loaded.cache_clear()
    assert loaded == ["tiny"] and named == [Reference(tiny)(member, few, Bench()).per_example] * 2


def test_a_reference_that_tells_nothing_is_refused(tiny, taught, few):
    with pytest.raises(BadModel, match="no alias, folder"):
        Reference("tinny")
    with pytest.raises(BadModel, match="is the model itself"):
        Reference(tiny)(tiny, few, Bench())

    class Other:
        def get_vocab(self):
            return {"a": 0}

    strange = replace(taught, template=replace(taught.template, tokenizer=Other()), name="strange")
    with pytest.raises(BadModel, match="'strange' has other tokens than"):
        Reference(strange)(tiny, few, Bench())


# ── ReCaLL ──


def test_recall_the_slow_way_and_the_prefix_is_not_scored(taught, few):
    audit = EVERY["ReCaLL"]
    shown = audit.prefix(few)
    assert len(shown) == 2 and {x.id for x in shown} < {x.id for x in few["holdout"]}
    found = audit(taught, few, Bench()).per_example
    assert set(found) == {x.id for x in few.of("forget", "holdout")} - {x.id for x in shown}
    gap = taught.tokenizer("\n\n", add_special_tokens=False).input_ids
    front = [i for x in shown for i in (*taught.template.row("", x.prompt, x.answer).ids[:-1], *gap)]
    for row in rows_of(taught, few):
        if row.key in found:
            alone = plainly(taught, row.ids, row.start, row.stop)[0].mean()
            more = len(front)
            behind = plainly(taught, (*front, *row.ids), row.start + more, row.stop + more)[0].mean()
            assert found[row.key] == pytest.approx(behind / alone, rel=2e-3)


def test_the_prefix_is_the_same_for_every_text_and_order(few):
    turned = few.with_roles(holdout=few["holdout"][::-1])
    assert ReCaLL(shots=2).prefix(few) == ReCaLL(shots=2).prefix(turned)
    assert len({tuple(x.id for x in ReCaLL(shots=2, seed=s).prefix(few)) for s in range(6)}) > 1


def test_a_passage_scores_the_same_tokens_with_and_without_a_prefix(tiny):
    row, shown = (
        tiny.template.row(k, "", text) for k, text in (("a", "When the rain had stopped"), ("b", "Birds sing"))
    )
    behind = prefixed(tiny, [shown], row)
    assert behind.ids[behind.start : behind.stop] == row.ids[row.start : row.stop]
    assert behind.ids[: shown.stop] == shown.ids[:-1] and behind.ids[-1] == row.ids[-1]


def test_a_begin_mark_stands_in_front_once(tiny):
    from tokenizers.processors import TemplateProcessing

    from unremember.embedded.tiny import tokenizer

    coder = tokenizer()
    coder._tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 0)])
    lm = replace(tiny, template=Template(coder, chat=False))
    for prompt in ("", "Who has the key?"):
        row = lm.template.row("a", prompt, "The cat sat here.")
        assert row.ids[0] == 0
        behind = prefixed(lm, [row, row], row)
        assert behind.ids[0] == 0 and behind.ids.count(0) == 1
        assert behind.ids[behind.start : behind.stop] == row.ids[row.start : row.stop]


def test_a_prefix_that_leaves_too_few_or_is_too_long_is_refused(tiny, corpus, few):
    with pytest.raises(
        BadCorpus, match=r"takes 4 examples of the holdout as its prefix and needs 2 more.* there are 5"
    ):
        ReCaLL(shots=4)(tiny, few, Bench())
    with pytest.raises(BadCorpus, match=r"with 20 texts in front \d+ examples are longer than the model's 256 tokens"):
        ReCaLL(shots=20)(tiny, corpus, Bench())
    with pytest.raises(BadCorpus, match="'holdout' and there are none"):
        ReCaLL()(tiny, Corpus({"forget": few["forget"]}), Bench())


# ── neighbourhood ──


def changed(old: str, new: str) -> list[tuple[str, str]]:
    """The words in which two texts differ."""
    import re

    parts = r"[^\W\d_]{2,}|\d+|."
    a, b = re.findall(parts, old), re.findall(parts, new)
    assert len(a) == len(b), (old, new)
    return [(x, y) for x, y in zip(a, b, strict=True) if x != y]


@pytest.mark.parametrize("words", [1, 2])
def test_neighbours_differ_in_some_words_and_never_keep_them(words, taught, few):
    audit = Neighbourhood(neighbours=12, words=words)
    for x in few.of("forget", "holdout"):
        near = audit.around(taught, [x])[x.id]
        assert 0 < len(near) <= 12 and len(set(near)) == len(near) and x.answer not in near
        for text in near:
            differ = changed(x.answer, text)
            assert len(differ) == words
            for old, new in differ:
                assert old.casefold() != new.casefold()
                assert old.isdigit() == new.isdigit() and old.istitle() == new.istitle()


def test_neighbours_hang_on_the_text_and_the_seed_alone(taught, few):
    audit = Neighbourhood(neighbours=6)
    x, *others = few.of("forget", "holdout")
    alone = audit.around(taught, [x], Bench())[x.id]
    assert audit.around(taught, [*others, replace(x, id="renamed")], Bench(budget=50))["renamed"] == alone
    assert replace(audit, seed=1).around(taught, [x])[x.id] != alone


def test_neighbours_come_from_the_model(taught, few):
    """What it proposes is likelier to it than other words of the same form in the same places."""
    x = few["holdout"][0]
    near = Neighbourhood(neighbours=20).around(taught, [x])[x.id]
    rng = np.random.default_rng(0)
    lower = ["rain", "road", "money", "water", "beds", "people", "nobody", "sunrise"]
    random = Neighbourhood(neighbours=20, fill=lambda *_: list(rng.permutation(lower)))
    far = random.around(taught, [x])[x.id]
    means = [
        np.mean(
            [
                plainly(taught, r.ids, r.start, r.stop)[0].mean()
                for r in (taught.template.row("", x.prompt, t) for t in texts)
            ]
        )
        for texts in (near, far)
    ]
    assert means[0] > means[1]


def test_a_masked_model_may_propose_and_the_original_is_thrown_away(tiny):
    asked = []

    def fill(text, place, count):
        asked.append((text[slice(*place)], count))
        return [text[slice(*place)], text[slice(*place)].upper(), "", "rain", "Rain", " road "]

    x = Example("a", "Who?", "Her uncle has 42 keys")
    audit = Neighbourhood(neighbours=50, fill=fill)
    near = audit.around(tiny, [x])["a"]
    assert [word for word, _ in asked] == ["Her", "uncle", "has", "42", "keys"] and min(c for _, c in asked) >= 10
    assert len(near) == 10 and {w for text in near for _, w in changed(x.answer, text)} == {"rain", "road"}


def test_the_neighbourhood_score_the_slow_way(taught, few):
    audit = EVERY["neighbourhood"]
    found = audit(taught, few, Bench()).per_example
    for x in few["forget"][:3]:
        near = audit.around(taught, [x])[x.id]
        rows = [taught.template.row("", x.prompt, text) for text in (x.answer, *near)]
        own, *others = (plainly(taught, r.ids, r.start, r.stop)[0].mean() for r in rows)
        assert found[x.id] == pytest.approx(own - np.mean(others), rel=2e-3, abs=2e-4)


def test_texts_without_neighbours_are_refused(tiny):
    short = Corpus({"forget": [Example("a", "Who?", "Uncle Tom"), Example("b", "", "Uncle Tom")]})
    with pytest.raises(BadCorpus, match=r"replaces 2 words, and b \(1 in all\)"):
        Neighbourhood(words=2)(tiny, short, Bench())
    with pytest.raises(BadCorpus, match=r"no other words for a, b \(2 in all\)"):
        Neighbourhood(fill=lambda text, place, count: [text[slice(*place)]])(tiny, short, Bench())
    with pytest.raises(ValidationError):
        Neighbourhood(neighbours=0)


# ── gradients ──


def architectures():
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    small = {"vocab_size": 3200, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    gpt2 = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=256, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5, **small
    )
    qwen = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=False, **small,
    )  # fmt: skip
    return {"gpt2": GPT2LMHeadModel(gpt2).eval(), "qwen2": Qwen2ForCausalLM(qwen).eval()}


@pytest.fixture(scope="module")
def kinds(tiny, taught):
    """Tied Llama; GPT-2 with dropout, transposed layers, biases and position embeddings; untied Qwen with biases."""
    return {name: LM(model, tiny.template, "fp32", name) for name, model in architectures().items()} | {"llama": taught}


def one_by_one(lm, row) -> float:
    """The norm over all weights, each one's gradient made and kept, on a copy."""
    model = lm.copy().model.eval()
    for weight in model.parameters():
        weight.requires_grad_(True)
    logp = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    torch.stack([logp[t - 1, row.ids[t]] for t in range(row.start, row.stop)]).mean().backward()
    grads = [w.grad for w in model.parameters() if w.grad is not None]
    return torch.stack([g.double().square().sum() for g in grads]).sum().sqrt().item()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_norms_of_many_rows_are_those_of_one_by_one(kind, kinds, few):
    """Rows of unequal length, a passage among them.  On SmolLM2-135M they agreed within 3e-8."""
    lm = kinds[kind]
    rows = [*rows_of(lm, few), lm.template.row("p", "", "When the rain had stopped we walked home")]
    found = gradient_norms(lm, rows)
    assert found == [pytest.approx(one_by_one(lm, row), rel=1e-4) for row in rows]
    assert len(set(found)) == len(found) and min(found) > 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_norms_of_an_adapted_model_count_adapter_and_base(tiny, few):
    lm = tiny.adapted(4, 8)
    for name, weight in lm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.02, generator=torch.Generator().manual_seed(1))
    rows = rows_of(lm, few)
    assert gradient_norms(lm, rows) == [pytest.approx(one_by_one(lm, row), rel=1e-4) for row in rows]


def test_dropout_stays_off_whatever_mode_the_model_is_in(kinds, few):
    """open-unlearning's attack switches to train mode: its norms are those of a model with half of its units missing."""
    lm = kinds["gpt2"].copy()
    expected = gradient_norms(lm, rows_of(lm, few))
    lm.model.train()
    assert gradient_norms(lm, rows_of(lm, few)) == pytest.approx(expected, rel=1e-6)
    assert lm.model.training and lm.model.transformer.drop.training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_them_all_the_same(context, tiny, few):
    rows = rows_of(tiny, few)[:3]
    expected = gradient_norms(tiny, rows)
    with context():
        assert gradient_norms(tiny, rows) == pytest.approx(expected, rel=1e-6)


def test_norms_do_not_hang_on_the_precision_of_reading(tiny, few):
    lower = replace(tiny, precision="bf16")
    assert gradient_norms(lower, rows_of(tiny, few)) == gradient_norms(tiny, rows_of(tiny, few))


def test_a_text_that_was_learnt_has_a_smaller_gradient(memoriser, tiny, small):
    known, unknown = (GradientNorm()(lm, small, Bench()).per_example["f1"] for lm in (memoriser, tiny))
    assert unknown < known < 0


@pytest.mark.parametrize("name", TABLE)
def test_bf16_is_near_fp32(name, taught, few):
    one, other = (EVERY[name](lm, few, Bench()).per_example for lm in (taught, replace(taught, precision="bf16")))
    a, b = (np.argsort([x[key] for key in one]) for x in (one, other))
    assert np.corrcoef(np.argsort(a), np.argsort(b))[0, 1] > 0.9
