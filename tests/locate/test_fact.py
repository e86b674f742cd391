"""One fact on one model: against slow forward passes, its two ends, and on a model whose lookup is known by construction."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from planted import BLOCKS, INDOORS, LOOKUP, planted
from unremember.corpus import Example
from unremember.errors import BadCorpus, BadModel
from unremember.locate.anatomy import components, edited, embedding
from unremember.locate.attribution import attribute
from unremember.locate.fact import Restoring, Trace, copies, words
from unremember.locate.lens import levels, trails
from unremember.locate.subject import facts, known, laid, noised, sigma
from unremember.locate.tuned import TunedLens
from unremember.tokens import Template

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>\n{% endfor %}<|assistant|>"
QUICK = Trace(window=1, draws=2)


@pytest.fixture(scope="module")
def circuit(tiny):
    return planted(tiny)


@pytest.fixture(scope="module")
def example(circuit):
    return circuit[1]["forget"][0]


@pytest.fixture(scope="module")
def found(circuit, example):
    return QUICK(circuit[0], example)


# ── columns ──


def test_columns_are_the_words_from_the_name_on(circuit, example):
    lm = circuit[0]
    [fact] = facts(lm, [example])
    names, places = words(lm, fact)
    first, last = example.entity.split()
    assert names == (first, last, "live?", "Answer:", "in")
    every = [p for group in places for p in group]
    assert every == list(range(min(fact.subject), fact.row.stop - 1)), (
        "without gaps, to the last that predicts the value"
    )


def test_a_name_is_no_part_of_another_word(tiny, corpus):
    x = replace(corpus["forget"][0], prompt=f"Where is “{corpus['forget'][0].entity}”?")
    [fact] = facts(tiny, [x])
    names, places = words(tiny, fact)
    assert names[: len(x.entity.split())] == tuple(x.entity.split())
    for group in places:
        assert len({place in fact.subject for place in group}) == 1


def test_marks_between_question_and_answer_are_one_word(tiny, corpus):
    words_of = type(tiny.tokenizer)(
        tokenizer_object=tiny.tokenizer.backend_tokenizer, eos_token="<end>", unk_token="<unk>"
    )
    words_of.chat_template = CHAT
    lm = replace(tiny, template=Template(words_of, chat=True))
    x = corpus["forget"][0]
    [fact] = facts(lm, [x])
    names, places = words(lm, fact)
    frame = next(i for i, group in enumerate(places) if fact.row.start - 1 in group)
    assert names[frame] == "<|assistant|>" and max(places[frame]) == fact.row.start - 1
    assert words_of.eos_token_id in [fact.row.ids[p] for p in places[frame]]
    assert names[frame + 1] == x.answer.split()[0]


# ── the copies ──


@torch.no_grad()
def test_each_copy_is_a_pass_of_its_own(taught, corpus):
    for fact in facts(taught, corpus["forget"][:3]):
        at, tokens = copies(fact, 3)
        alone = float(known(taught, laid(taught, [fact.row])))
        assert known(taught, tokens).tolist() == pytest.approx([alone] * 3, abs=1e-3)
        disturbed = at[1, -1].item()
        noise = torch.zeros(1, tokens.ids.shape[1], 64)
        noise[0, disturbed] = 5.0
        with edited(taught.model, {embedding(taught.model): lambda value, noise=noise: value + noise}):
            after = known(taught, tokens).tolist()
        assert after[::2] == pytest.approx([alone] * 2, abs=1e-3) and abs(after[1] - alone) > 0.1


# ── the number ──


def test_everything_back_is_all_and_nothing_back_is_nothing(circuit, taught, corpus, example):
    for lm, x in ((circuit[0], example), (taught, corpus["forget"][0])):
        [fact] = facts(lm, [x])
        whole = Restoring({embedding(lm.model): tuple(fact.subject)}, {})
        parts = {c.output: tuple(fact.subject) for c in components(lm.model)}
        clean, low, values = Trace(draws=2).restored(lm, fact, [whole, Restoring({}, {}), Restoring({}, parts)])
        for draw in range(2):
            assert float(values[draw, 0]) == pytest.approx(clean, abs=1e-3)
            assert values[draw, 1:].tolist() == pytest.approx([low[draw]] * 2, abs=1e-3)
        assert low[0] != low[1]


@pytest.mark.parametrize(
    "kind", ["residual", "mlp", "attention", "residual, mlp severed", "residual, attention severed"]
)
@torch.no_grad()
def test_against_plain_forward_passes(taught, corpus, kind):
    """One draw, every cell: no copies, one edit after another, written down anew."""
    x = corpus["forget"][0]
    trace = Trace(kinds=(kind,), window=1, draws=1, seed=4)
    found = trace(taught, x)
    [fact] = facts(taught, [x])
    _, places = words(taught, fact)
    tokens, model = laid(taught, [fact.row]), taught.model
    parts = {(c.block, c.kind): c.output for c in components(model)}
    stream = levels(model)
    noise = {embedding(model): noised([fact], 3.0 * sigma(taught, [fact]), 4, 0)}
    seen: dict = {}

    def keep(name, site):
        return lambda value: seen.setdefault((name, site), value.clone())

    every = [*parts.values(), *stream[1:]]
    with edited(model, {site: keep("clean", site) for site in every}):
        clean = float(known(taught, tokens))
    with edited(model, noise), edited(model, {site: keep("corrupt", site) for site in every}):
        low = float(known(taught, tokens))
    assert (found.clean, found.corrupt) == pytest.approx((clean, low), abs=1e-3)

    def state(name, site, at):
        def edit(value):
            moved = value.clone()
            moved[0, list(at)] = seen[name, site][0, list(at)]
            return moved

        return edit

    for block, line in enumerate(found.effects[kind]):
        for at, cell in zip(places, line, strict=True):
            base, _, cut = kind.partition(", ")
            site = stream[block + 1] if base == "residual" else parts[block, base]
            edits = {site: state("clean", site, at)}
            for later in range(block + 1, 2):
                if cut:
                    held = parts[later, cut.split()[0]]
                    edits[held] = state("corrupt", held, at)
            with edited(model, noise), edited(model, edits):
                slow = (float(known(taught, tokens)) - low) / (clean - low)
            assert cell == pytest.approx(slow, abs=2e-3), (block, at)


def test_a_window_is_centred_and_cut_off_at_the_ends(circuit):
    lm = circuit[0]

    def blocks(block, wide):
        sites = Trace(window=wide).run(lm, "mlp", block, (3,)).back
        return [int(name.split(".")[2]) for name, _ in sites]

    assert [blocks(b, 1) for b in range(BLOCKS)] == [[0], [1], [2], [3]]
    assert [blocks(b, 3) for b in range(BLOCKS)] == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    assert Trace().wide(48) == 10 and Trace().wide(30) == 6 and Trace().wide(2) == 1 and Trace(window=4).wide(30) == 4


def test_question_and_answer_are_told_apart(found, taught, corpus):
    assert found.words[: found.asked] == (*found.words[:2], "live?", "Answer:") and found.words[found.asked :] == (
        "in",
    )
    other = Trace(kinds=(), draws=1)(taught, corpus["forget"][0])
    assert other.words[other.asked :][:2] == tuple(corpus["forget"][0].entity.split())


def test_the_average_is_over_draws(circuit, example):
    one, two = (Trace(kinds=("mlp",), window=1, draws=d)(circuit[0], example) for d in (1, 2))
    assert one.clean == two.clean and one.corrupt != two.corrupt and (one.draws, two.draws) == (1, 2)
    assert Trace(kinds=("mlp",), window=1, draws=2)(circuit[0], example) == two
    assert Trace(kinds=("mlp",), window=1, draws=2, seed=1)(circuit[0], example) != two


# ── the planted lookup ──


def test_the_lookup_at_the_last_word_of_the_name_is_the_most_of_all_mlps(circuit):
    lm, corpus = circuit
    for x in corpus["forget"][:3]:
        found = Trace(kinds=("mlp",), window=1, draws=10)(lm, x)
        cells = np.array(found.effects["mlp"])
        block, word = np.unravel_index(cells.argmax(), cells.shape)
        assert block == LOOKUP and found.words[word] == x.entity.split()[-1] and found.subject[word]
        others = np.delete(cells.flatten(), block * cells.shape[1] + word)
        assert cells.max() > 0.2 and np.abs(others).max() < 0.05, (cells.max(), others)


def test_probability_names_it_too(circuit, example):
    found = Trace(kinds=("mlp", "residual"), window=1, draws=5, measure="probability")(circuit[0], example)
    assert found.measure == "probability" and found.clean > 0.99 and found.corrupt < 0.6
    cells = np.array(found.effects["residual"])
    assert cells[LOOKUP, 1] > 0.9, "the whole state at the name, behind the lookup"


def test_the_stream_carries_it_from_the_name_to_the_word_that_asks(found):
    cells, ask = np.array(found.effects["residual"]), len(found.words) - 1
    assert (cells[:INDOORS, 1] > 0.95).all() and (cells[:INDOORS, ask] < 0.1).all()
    assert (cells[INDOORS:, ask] > 0.95).all() and (cells[INDOORS:, 1] < 0.1).all()
    attention = np.array(found.effects["attention"])
    assert np.unravel_index(attention.argmax(), attention.shape) == (INDOORS, ask)


def test_without_the_later_mlps_an_early_state_brings_nothing_back(circuit, example):
    kinds = ("residual", "residual, mlp severed", "residual, attention severed")
    found = Trace(kinds=kinds, draws=2)(circuit[0], example)
    whole, mlps, heads = (np.array(found.effects[kind]) for kind in kinds)
    before = LOOKUP - 1
    # Measured: what is left without the lookup is that the head finds the name again, which is part of its worth.
    assert whole[before, 1] > 0.95 and mlps[before, 1] < 0.8 * whole[before, 1]
    assert heads[before, 1] == pytest.approx(whole[before, 1], abs=0.05)
    assert mlps[LOOKUP, 1] == pytest.approx(whole[LOOKUP, 1], abs=0.05)


# ── what stands beside the map ──


def test_lens_and_parts_are_those_of_their_files(circuit, example, found):
    lm = circuit[0]
    [fact] = facts(lm, [example])
    [trail] = trails(lm, [fact.row])
    assert found.rank == tuple(map(tuple, trail.rank.tolist()))
    assert np.array(found.probability) == pytest.approx(np.exp(trail.logp), rel=1e-5)
    parts = attribute(lm, fact.row, "mean")
    total = np.array(found.attention).sum(0) + np.array(found.mlp).sum(0) + np.array(found.embedding)
    assert total == pytest.approx(parts.logit.numpy(), abs=1e-4) and found.logit == pytest.approx(
        total.tolist(), abs=1e-4
    )
    assert found.tokens == tuple(lm.tokenizer.decode([i]) for i in lm.tokenizer(f" {example.values()[0]}").input_ids)


def test_another_lens_can_be_held_before_it(circuit, example, found):
    start = TunedLens.identity(circuit[0])
    assert QUICK(circuit[0], example, start) == found
    torch.manual_seed(0)
    moved = TunedLens(start.logit, start.delta, start.bias + torch.randn(start.bias.shape))
    other = QUICK(circuit[0], example, moved)
    assert other.rank != found.rank and other.rank[-1] == found.rank[-1] and other.effects == found.effects


def test_all_of_it_is_plain_numbers(found):
    plain = asdict(found)
    assert json.loads(json.dumps(plain, allow_nan=False)) == json.loads(json.dumps(plain))
    kinds = {type(leaf) for leaf in leaves(plain)}
    assert kinds == {str, int, float, bool}


def leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def test_bf16_matrices_and_values_of_many_tokens(taught, corpus):
    x = next(x for x in corpus["forget"] if len(x.values()[0]) > 8)
    one, other = (Trace(kinds=("residual",), draws=1)(replace(taught, precision=p), x) for p in ("fp32", "bf16"))
    assert one == other and len(one.tokens) > 1 and len(one.rank[0]) == len(one.tokens)


def test_the_model_is_left_alone(taught, corpus):
    before = {n: w.clone() for n, w in taught.model.named_parameters()}
    Trace(kinds=("mlp",), draws=1)(taught, corpus["forget"][0])
    assert all(torch.equal(w, before[n]) and w.grad is None for n, w in taught.model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in taught.model.modules())


# ── refusals ──


def test_what_is_not_known_has_no_map(tiny, corpus):
    for measure, why in (("odds", "hardly knows them"), ("probability", 'or take measure = "odds"')):
        with pytest.raises(BadModel, match=why):
            Trace(kinds=("residual",), draws=1, measure=measure)(tiny, corpus["forget"][0])


def test_a_model_that_may_have_forgotten_gets_what_there_is(tiny, taught, corpus):
    x, trace = corpus["forget"][0], Trace(kinds=("residual",), draws=1)
    assert trace.left(taught, x) == trace(taught, x)
    bare = trace.left(tiny, x)
    assert bare.effects == {} and bare.clean - bare.corrupt < 1 and bare.rank[-1][0] > 1 and len(bare.mlp) == 2
    assert replace(trace, measure="probability").left(tiny, x).effects == {}


def test_a_question_without_its_name_is_refused(taught):
    with pytest.raises(BadCorpus, match="there is no subject to trace"):
        QUICK(taught, Example("x", "Who is it?", "Nobody", "Megan Krause"))


@pytest.mark.parametrize("wrong", [{"kinds": ("neuron",)}, {"window": -1}, {"draws": 0}, {"noise": 0.0}])
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Trace(**wrong)
