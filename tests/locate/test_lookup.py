"""Fact lookup: probes against known answers, the band, path patching, and what neither must find."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from planted import BLOCKS, INDOORS, LOOKUP, TOWNS, outdoors, planted
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadModel
from unremember.locate.anatomy import components
from unremember.locate.lookup import FOLDS, FactLookup, accuracy, band, classes, folds, logistic, streams
from unremember.locate.patching import AttributionPatching
from unremember.locate.path import PathPatching


@pytest.fixture(scope="module")
def circuit(tiny):
    return planted(tiny)


@pytest.fixture(scope="module")
def curve(circuit):
    return FactLookup().curve(*circuit)


def chosen(lm, ranking) -> set[tuple[int, str]]:
    return {(x.block, x.kind) for x in components(lm.model) if float(ranking.scores[x.weights[0]]) > -torch.inf}


# ── the probe ──


def test_the_fit_is_the_minimum():
    draw = np.random.default_rng(0)
    x, label = torch.from_numpy(draw.standard_normal((30, 50))), torch.from_numpy(draw.integers(0, 3, 30))
    weight, bias = logistic(x, label, 3, penalty=0.7)
    gap = (x @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(label, 3)
    torch.testing.assert_close(gap.T @ x + 0.7 * weight, torch.zeros(3, 50).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(gap.sum(0), torch.zeros(3).double(), atol=1e-4, rtol=0)


def test_it_finds_a_planted_direction_and_nothing_in_noise():
    draw = np.random.default_rng(1)
    d = 10
    x, direction = torch.from_numpy(draw.standard_normal((20 * d, d))), torch.from_numpy(draw.standard_normal(d))
    label = (x @ direction > 0).long()
    weight, _ = logistic(x, label, 2)
    assert torch.cosine_similarity(weight[1] - weight[0], direction, dim=0) >= 0.95
    assert accuracy(x, label.tolist(), folds(label.tolist(), 0)) >= 0.9
    noise = draw.integers(0, 2, len(x)).tolist()
    assert abs(accuracy(x, noise, folds(noise, 0)) - 0.5) <= 2 * np.sqrt(0.25 / len(x))


def test_classes_count_alike():
    """All in the large class is half right, not nine tenths."""
    label = [0] * 90 + [1] * 10
    assert accuracy(torch.zeros(100, 4), label, folds(label, 0)) == 0.5


def test_folds_hold_every_class_evenly():
    label = [0] * 12 + [1] * 7 + [2] * 3
    fold = np.array(folds(label, 0))
    assert fold.tolist() == folds(label, 0) != folds(label, 1)
    for value in range(3):
        sizes = np.bincount(fold[np.array(label) == value], minlength=FOLDS)
        assert sizes.max() - sizes.min() <= 1
    assert np.ptp(np.bincount(fold, minlength=FOLDS)) <= 1


@pytest.mark.parametrize(
    "curve, expected",
    [
        ((0.25, 0.25, 1.0, 1.0), (1, 1)),
        ((0.25, 1.0, 1.0, 1.0), (0, 0)),
        ((0.25, 0.25, 0.5, 0.8, 1.0, 1.0), (1, 3)),
        ((0.44, 0.48, 0.63, 0.85, 0.97, 0.97, 1.0), (1, 3)),  # the published curve of Gemma-7B, every level once
        ((0.42, 0.63, 0.92, 1.0), (0, 2)),  # and of Llama-3-8B
        ((0.3, 0.2, 0.9, 0.95), (1, 1)),
    ],
)
def test_the_band_by_hand(curve, expected):
    assert band(curve) == expected


# ── the planted site ──


def test_the_curve_climbs_over_the_lookup_and_the_control_does_not(curve):
    """Section (g) 1: from at most chance + .15 to at least .9 within the band, selectivity at least .3."""
    before, after = curve.accuracy[: LOOKUP + 1], curve.accuracy[LOOKUP + 1 :]
    assert len(curve.accuracy) == BLOCKS + 1 and curve.chance == 0.25 and curve.band == (LOOKUP, LOOKUP)
    assert max(before) <= curve.chance + 0.15 and min(after) >= 0.9  # .10 and 1.0
    assert min(np.subtract(after, curve.control[LOOKUP + 1 :])) >= 0.3  # the control reaches .40 of 40 people


def test_only_the_mlp_of_the_lookup_is_chosen_and_patching_looks_higher(circuit):
    lm, corpus = circuit
    assert chosen(lm, FactLookup()(lm, corpus)) == {(LOOKUP, "mlp")}
    scores = AttributionPatching()(lm, corpus).scores
    sums = [(x.block, float(scores[x.weights[0]])) for x in components(lm.model)]
    mean = sum(block * s for block, s in sums) / sum(s for _, s in sums)
    assert mean > LOOKUP + 0.3  # 1.5: half of it is the read-out


def test_the_stream_is_that_of_the_last_word_of_the_name(circuit):
    lm, corpus = circuit
    examples = [*corpus["forget"][:2], outdoors(corpus["forget"][2])]
    found = streams(lm, examples)
    for at, x in enumerate(examples):
        row = lm.template.row(x.id, x.prompt, x.answer)
        [last] = lm.tokenizer(f" {x.entity.split()[1]}", add_special_tokens=False).input_ids
        place = max(i for i, token in enumerate(row.ids) if token == last)
        with torch.no_grad():
            states = lm.model(input_ids=torch.tensor([row.ids]), output_hidden_states=True).hidden_states
        for level in range(BLOCKS):  # the last of theirs is behind the final norm
            torch.testing.assert_close(found[level, at], states[level][0, place], atol=1e-4, rtol=1e-4)


def test_a_model_that_looks_nothing_up_at_the_name_is_told_so(circuit):
    lm, corpus = circuit
    blank = lm.copy()
    with torch.no_grad():
        blank.model.model.layers[LOOKUP].mlp.down_proj.weight.zero_()
    with pytest.raises(BadModel, match=r"does not look these facts up there.*\"path\""):
        FactLookup()(blank, corpus)


# ── what can be probed ──


def test_values_of_ones_own_cannot_be_probed(taught, corpus):
    with pytest.raises(BadCorpus, match=r'no question has two values with 3 people each .*forget.locator = "path"'):
        FactLookup()(taught, corpus)
    with pytest.raises(BadCorpus, match="needs examples in the role 'retain'"):
        FactLookup().check(Corpus({"forget": corpus["forget"]}))


def test_small_classes_and_the_forgotten_are_left_out(circuit):
    _, corpus = circuit
    [(kind, (examples, values))] = classes(corpus).items()
    assert kind == "Where does … live?" and len(examples) == 40 and set(values) == set(TOWNS)
    kept = [x for x in corpus["retain"] if x.answer != "in Ghent"]
    few = [x for x in corpus["retain"] if x.answer == "in Ghent"][:2]
    [(_, (_, values))] = classes(Corpus({"retain": [*kept, *few]})).items()
    assert set(values) == set(TOWNS) - {"Ghent"}
    both = corpus.with_roles(forget=[*corpus["forget"], *map(outdoors, corpus["retain"][:5])])
    [(_, (examples, _))] = classes(both).items()
    assert not {x.entity for x in examples} & {x.entity for x in both["forget"]} and len(examples) == 35


def test_a_person_with_two_values_is_refused(circuit):
    _, corpus = circuit
    x = corpus["retain"][0]
    other = replace(x, id="again", answer=x.distractors[0], distractors=())
    with pytest.raises(BadCorpus, match="'again' answers 'Where does … live\\?'"):
        FactLookup().check(corpus.with_roles(retain=[*corpus["retain"], other]))
    same = replace(x, id="again")
    assert len(classes(corpus.with_roles(retain=[*corpus["retain"], same]))["Where does … live?"][0]) == 40


# ── path patching ──


def test_path_patching_finds_the_head_and_the_lookup_below(circuit):
    lm, corpus = circuit
    carried = PathPatching().extraction(lm, corpus)
    assert {head for head, effect in carried.items() if abs(effect) > 0.01} == {(INDOORS, 0)}
    assert carried[INDOORS, 0] == pytest.approx(1.0, abs=0.02)  # alone it carries all of it
    first, effects = PathPatching().lookup(lm, corpus)
    assert first == INDOORS and [x.block for x in effects] == [0, 1], "an MLP behind the head is not asked"
    by_block = {x.block: effect for x, effect in effects.items()}
    # .385: put back, the town is there, but the head looks for a name that is another one's
    assert by_block[LOOKUP] > 0.3 and abs(by_block[0]) < 0.01
    assert chosen(lm, PathPatching()(lm, corpus)) == {(LOOKUP, "mlp")}


def test_ten_heads_are_no_quota(circuit):
    """Heads that carry nothing are no extraction heads, however few others there are."""
    lm, corpus = circuit
    assert PathPatching(heads=16).lookup(lm, corpus)[0] == INDOORS
    other = Corpus({role: [outdoors(x) for x in rows] for role, rows in corpus.items()})
    assert PathPatching().lookup(lm, other)[0] == INDOORS + 1


def test_the_direct_path_is_cut_at_other_heads(taught, corpus):
    """Against a slow forward: all attentions held at their corrupt values, one head clean, MLPs running."""
    from unremember.locate.subject import facts, known, laid, swapped

    one = PathPatching(facts=0)
    found = facts(taught, corpus["forget"])
    clean_tokens, corrupt_tokens = laid(taught, [f.row for f in found]), laid(taught, swapped(found, found, 0, 0))
    layers = taught.model.model.layers

    @torch.no_grad()
    def run(tokens, put=None):
        seen, handles = [], []
        for i, layer in enumerate(layers):

            def hook(_, inputs, i=i):
                seen.append(inputs[0].clone())
                return None if put is None else (put[i],)

            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(hook))
        total = float(known(taught, tokens).sum())
        for handle in handles:
            handle.remove()
        return total, seen

    whole, clean = run(clean_tokens)
    low, corrupt = run(corrupt_tokens)
    for (block, head), effect in one.extraction(taught, corpus).items():
        put = [z.clone() for z in corrupt]
        put[block][..., head * 16 : head * 16 + 16] = clean[block][..., head * 16 : head * 16 + 16]
        assert effect == pytest.approx((run(corrupt_tokens, put)[0] - low) / (whole - low), abs=1e-3)


def test_what_cannot_be_found_is_said_with_a_way_on(taught, tiny, circuit, corpus):
    with pytest.raises(BadModel, match=r"no MLP below block 0, .*forget\.locator = \"mlps\""):
        PathPatching()(taught, corpus)  # two blocks: heads of the first one carry the answer out
    with pytest.raises(BadModel, match="hardly knows them"):
        PathPatching()(tiny, corpus)
    with pytest.raises(BadModel, match=r"no head carries 0\.99"):
        PathPatching(least=0.99)(taught, corpus)
