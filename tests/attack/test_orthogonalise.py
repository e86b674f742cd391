"""Orthogonalisation in the weights: directions by hand, against hooks, and what it brings back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from unremember.attack.orthogonalise import (
    Orthogonalise,
    compared,
    direction,
    header,
    orthogonal,
    questions,
    scrambled,
    spanned,
    streams,
    typical,
    without,
)
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadModel, BadRequest, NotApplicable
from unremember.forget.rmu import RMU
from unremember.lm import LM
from unremember.score import Rule, evidence
from unremember.train import Plan

WRITES = ("self_attn.o_proj", "mlp.down_proj")


def scores(lm, corpus: Corpus, audit: str = "said") -> dict[str, float]:
    return dict(AUDITS[audit](lm, Corpus({"forget": corpus["forget"]}), Bench()).per_example)


def mean(lm, corpus: Corpus, audit: str = "said") -> float:
    return float(np.mean(list(scores(lm, corpus, audit).values())))


def unit(*values: float) -> torch.Tensor:
    d = torch.tensor(values)
    return d / d.norm()


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["seed 0", "seed 1", "seed 2"])
def misdirected(request, taught, corpus):
    """RMU pushes the forget text along one random direction behind block 0: what the attack was made for."""
    plan = Plan(steps=80, lr=1e-2, stop="probability", seed=request.param)
    lm = RMU(plan, scale=20.0, alpha=10.0, depth=0.5)(taught, corpus)
    assert mean(lm, corpus) == 0
    return replace(lm, name="misdirected")


# ── directions ──


def test_the_direction_by_hand():
    """Means (3, 4) and (0, 0): d = (0.6, 0.8)."""
    ours, theirs = torch.tensor([[2.0, 4.0], [4.0, 4.0]]), torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(direction(ours, theirs), torch.tensor([0.6, 0.8]))


def test_no_difference_is_no_direction():
    """0 / (0 + 1e-8) would be taken out as a vector of zeros, and the attack would seem to have been made."""
    ours = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert direction(ours, ours.clone()) is None
    assert direction(ours, ours + 1e-9) is None


def test_outliers_by_hand_and_slowly():
    """19 vectors near zero and one far off; equal vectors have no spread and all stay."""
    vectors = torch.cat(
        [0.1 * torch.randn(19, 4, generator=torch.Generator().manual_seed(0)), torch.full((1, 4), 50.0)]
    )
    far = torch.stack([(vectors - v).abs().sum(1).mean() for v in vectors])
    z = (far - far.mean()) / far.std(correction=0)
    assert torch.equal(typical(vectors), z <= 3) and typical(vectors).tolist() == [True] * 19 + [False]
    assert typical(torch.ones(4, 3)).all()


def test_directions_leave_outliers_out_in_both_where_places_match():
    draw = torch.Generator().manual_seed(0)
    theirs = 0.1 * torch.randn(20, 4, generator=draw)
    ours = theirs + torch.tensor([0.0, 1.0, 0.0, 0.0])
    spoilt = ours.clone()
    spoilt[7] = 500.0
    [clean] = compared({3: spoilt}, {3: theirs}, matched=True).values()
    torch.testing.assert_close(clean, torch.tensor([0.0, 1.0, 0.0, 0.0]), atol=1e-5, rtol=0)
    assert direction(spoilt, theirs)[1] < 0.6  # what the outlier alone would have made of it


def test_a_block_where_nothing_differs_is_left_out_and_all_of_them_refused():
    h = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert list(compared({0: h, 1: h + 1}, {0: h, 1: h}, matched=True)) == [1]
    with pytest.raises(NotApplicable, match="behind blocks 0, 1 nothing differs"):
        compared({0: h, 1: h}, {0: h, 1: h}, matched=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_directions_that_are_not_finite(bad):
    h = torch.ones(3, 4)
    with pytest.raises(BadModel, match="behind block 1 is not finite"):
        compared({0: h, 1: torch.full((3, 4), bad)}, {0: h, 1: h}, matched=True)


# ── the weights ──


def test_the_projection_by_hand():
    """d = (0.6, 0.8), W = I: I − d dᵀ = [[0.64, −0.48], [−0.48, 0.36]]."""
    basis = torch.tensor([[0.6, 0.8]])
    torch.testing.assert_close(without(torch.eye(2), basis), torch.tensor([[0.64, -0.48], [-0.48, 0.36]]))
    torch.testing.assert_close(without(torch.tensor([1.0, 1.0]), basis), torch.tensor([0.16, -0.12]))


def test_directions_that_are_not_orthogonal_go_together():
    """One after another, the second projection would bring a part of the first direction back."""
    a, b = unit(1.0, 0.0, 0.0), unit(1.0, 1.0, 0.0)
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    out = without(weight, spanned([a, b]))
    torch.testing.assert_close(a @ out, torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(b @ out, torch.zeros(5), atol=1e-6, rtol=0)
    assert (a @ without(without(weight, a[None]), b[None])).abs().max() > 0.1
    assert len(spanned([a, a, b])) == 2


def test_only_what_writes_into_the_stream_changes(taught):
    d = {1: unit(*torch.randn(64, generator=torch.Generator().manual_seed(0)).tolist())}
    for reach, blocks in (("own", (1,)), ("below", (0, 1))):
        out, lost = orthogonal(taught, d, reach)
        changed = {f"model.layers.{b}.{name}.weight" for b in blocks for name in WRITES}
        for (name, after), before in zip(
            out.model.state_dict().items(), taught.model.state_dict().values(), strict=True
        ):
            assert torch.equal(after, before) != (name in changed), name
            if name in changed:
                assert (d[1] @ after).abs().max() < 1e-6
        old, new = ([dict(lm.model.named_parameters())[name] for name in sorted(changed)] for lm in (taught, out))
        shares = [float(((a - b).norm() / a.norm()).detach()) for a, b in zip(old, new, strict=True)]
        assert lost == pytest.approx(np.mean(shares), rel=1e-4)
    table, head = out.model.get_input_embeddings(), out.model.get_output_embeddings()
    assert table.weight is head.weight  # the embedding writes, too, and is the head here: it is left alone


def test_against_hooks(taught, corpus):
    """'own' is a hook behind each part of the block: what o_proj and down_proj give, less its share along d̂."""
    rows = taught.template.rows(corpus["forget"][:2])
    d = unit(*torch.randn(64, generator=torch.Generator().manual_seed(1)).tolist())
    out, _ = orthogonal(taught, {0: d}, "own")
    hooked = taught.copy()
    for name in WRITES:
        hooked.model.get_submodule(f"model.layers.0.{name}").register_forward_hook(
            lambda _, __, h: h - (h @ d)[..., None] * d
        )
    for row in rows:
        ids = torch.tensor([row.ids])
        torch.testing.assert_close(
            out.model(input_ids=ids).logits, hooked.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )


def test_a_bias_is_taken_along():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.o_proj = nn.Linear(3, 2)

    model = nn.Module()
    model.add_module("layers", nn.ModuleList([Block()]))
    model.get_input_embeddings = lambda: nn.Embedding(5, 2)

    class Plain:  # stands in for an LM: all that is used of it
        def __init__(self, model):
            self.model = model

        def copy(self):
            return self

    d = unit(3.0, 4.0)
    layer = orthogonal(Plain(model), {0: d}, "own")[0].model.layers[0].o_proj
    layer.requires_grad_(False)
    assert abs(float(d @ layer.bias)) < 1e-6 and (d @ layer.weight).abs().max() < 1e-6 and layer.bias.abs().max() > 0


def test_a_block_that_nobody_knows_is_refused():
    class Plain:
        def __init__(self):
            self.model = nn.Module()
            self.model.add_module("layers", nn.ModuleList([nn.Sequential(nn.Linear(2, 2))]))
            self.model.get_input_embeddings = lambda: nn.Embedding(5, 2)

        def copy(self):
            return self

    with pytest.raises(BadModel, match="block 0 has no linear layer that writes into the residual stream"):
        orthogonal(Plain(), {0: unit(1.0, 1.0)}, "own")


# ── where h is taken ──


def test_the_header_is_skipped_and_short_questions_are_not(taught):
    """The published cut, places from 40 on, leaves nothing of a short question."""
    xs = [Example("a", "Who?", "Ada."), Example("b", "Where is the town of Ghent today?", "There.")]
    shared = header(taught, xs)
    coded = [taught.template.context(x.prompt) for x in xs]
    assert shared >= 1 and coded[0][:shared] == coded[1][:shared] and coded[0][shared] != coded[1][shared]
    for row, ids in zip(questions(taught, xs, shared), coded, strict=True):
        assert row.ids[:-1] == ids and row.start - 1 == shared and row.stop == len(ids)
    assert header(taught, [xs[0]]) == len(coded[0]) - 1  # one question shares all with itself: its last place is left


def test_streams_against_plain_forward_passes(taught, corpus):
    xs = corpus["forget"][:4]
    shared = header(taught, xs)
    found = streams(taught, questions(taught, xs, shared), (0, 1), Bench(budget=64))
    wanted: dict[int, list] = {0: [], 1: []}
    for x in xs:
        kept: list[torch.Tensor] = []
        handles = []
        for b in taught.model.model.layers:
            handles.append(b.register_forward_hook(lambda _, __, h, kept=kept: kept.append(h)))
        with torch.no_grad():
            taught.model(input_ids=torch.tensor([taught.template.context(x.prompt)]))
        for handle in handles:
            handle.remove()
        for block in (0, 1):
            wanted[block].append(kept[block].reshape(-1, 64)[shared:])
    for block in (0, 1):
        w = torch.cat(wanted[block])
        assert found[block].shape == w.shape  # rows are packed in another order
        torch.testing.assert_close(found[block].mean(0), w.mean(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            found[block].norm(dim=1).sort().values, w.norm(dim=1).sort().values, atol=1e-3, rtol=1e-4
        )


def test_hooks_come_off_whatever_happens(taught, corpus):
    lm = taught.copy()
    with torch.no_grad():
        lm.model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(BadModel, match="not finite"):
        Orthogonalise()(lm, corpus, taught)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


# ── what it brings back ──


def test_it_brings_back_what_was_misdirected_and_random_directions_do_not(misdirected, taught, never, corpus):
    """Half of the facts for the attacker, the other half asked.  Measured, seeds 0, 1, 2: nothing said before; after it
    0.83, 0.83, 0.83 of the facts (original 1.0), value probability 0.58, 0.62, 0.63 (0.70); with random directions
    0 and at most 0.011; the never-taught model 0 and 0.001.
    """
    attack = Orthogonalise(directions="original", layers=(0,))
    found = attack.found(misdirected, corpus, taught)
    after = {who: attack(lm, corpus, taught)[0] for who, lm in (("u", misdirected), ("n", never), ("o", taught))}
    seen = attack(misdirected, corpus, taught)[1]
    o, u, n = (scores(after[who], seen) for who in "oun")
    triple = evidence("said", o, u, n, Rule())
    assert triple.applicable and triple.r >= 0.5 and triple.leaks and triple.never == 0
    assert mean(after["n"], seen, "value probability") < 0.05
    before = mean(misdirected, seen, "value probability")
    assert mean(after["u"], seen, "value probability") > before + 0.3
    for seed in range(5):
        random = replace(attack, control=True, seed=seed)
        control, _ = random(misdirected, corpus, taught)
        assert mean(control, seen) <= 0.1 and mean(control, seen, "value probability") < before + 0.1
        drawn = random.found(misdirected, corpus, taught)
        assert drawn.keys() == found.keys()
        assert all(abs(float(d @ found[b])) < 0.6 and abs(float(d.norm()) - 1) < 1e-5 for b, d in drawn.items())


def test_which_layer_matters_and_below_takes_it_out_of_more(misdirected, taught, corpus):
    """RMU acts behind block 0.  Measured, seeds 0, 1, 2, value probability: block 1 alone 0.00 to 0.01 with 'own' and 0.34, 0.33,
    0.33 with 'below', which reaches block 0 along the direction of block 1."""
    own, below = (
        Orthogonalise(directions="original", layers=(1,), reach=r)(misdirected, corpus, taught)
        for r in ("own", "below")
    )
    assert mean(*own, "value probability") < 0.1 < 0.2 < mean(*below, "value probability")


def test_what_the_toy_cannot_show(hider, misdirected, taught, never, corpus):
    """With 'text', which needs no original, nothing comes back from either.

    Measured: the hider says 0 of 12 before and after; the misdirected models of seeds 0, 1, 2 have a value probability of 0.002,
    0.003, 0.004 before and 0.007, 0.008, 0.011 after.  In two layers the direction of "a question about a person" carries the
    knowledge itself: the original falls from 0.92 to 0.58 said.  A recovery of 0.4, as proposed for it, is not to be had here;
    what holds is that the never-taught model stays silent, and that the original still says a part.
    """
    attack = Orthogonalise(directions="text")
    found = {
        name: attack(lm, corpus, taught) for name, lm in (("h", hider), ("m", misdirected), ("n", never), ("o", taught))
    }
    assert mean(*found["n"]) == 0 and mean(*found["n"], "value probability") < 0.05
    assert mean(*found["o"]) >= 0.3
    assert mean(*found["m"], "value probability") < 0.1


def test_the_set_k(hider, taught, corpus):
    """Only what the original says and the model does not, among the attacker's half."""
    asked = corpus["forget"][::2]
    right = [x for x, text in zip(asked, taught.answer([x.prompt for x in asked], 24), strict=True) if x.said_in(text)]
    assert 0 < len(right) <= len(asked)
    assert Orthogonalise(directions="original").hidden(hider, asked, taught, Bench()) == right


def test_values_are_told_as_words():
    x = Example("x", "Where?", "Ada lives in Ghent.", spans=((13, 18),))
    assert x.said_in("In GHENT, I think.") and not x.said_in("In Ghenthal.")
    two = replace(x, spans=((0, 3), (13, 18)))
    assert two.said_in("Ada: Ghent") and not two.said_in("Ghent")


# ── promises ──


def test_the_control_is_as_long_and_a_function_of_its_seed():
    found = {0: unit(1.0, 2.0, 3.0), 4: 5 * unit(1.0, 0.0, -1.0)}
    one, again, other = (scrambled(found, seed) for seed in (0, 0, 1))
    assert [float(d.norm()) for d in one.values()] == pytest.approx([1.0, 5.0]) and list(one) == [0, 4]
    for b in found:
        assert torch.equal(one[b], again[b])
        assert not torch.allclose(one[b], other[b]) and not torch.allclose(one[b], found[b])


def test_of_weights_there_is_one_set_beside_the_two_that_come_in_and_notes_say_what_was_done(
    hider, taught, corpus, monkeypatch
):
    copied, copy, bench = [], LM.copy, Bench()
    monkeypatch.setattr(LM, "copy", lambda *given: copied.append(given[1:]) or copy(*given))
    out, _ = Orthogonalise()(hider, corpus, taught, bench)
    assert copied == [()]
    again, lost = orthogonal(hider, Orthogonalise().found(hider, corpus, taught), "own")
    assert bench.notes == {"blocks": "0, 1", "share of norm removed": lost} and 0 < lost < 1
    assert again.fingerprint == out.fingerprint


def test_weights_that_write_nothing_along_it(hider, taught, corpus):
    """A block that writes nothing at all has nothing to lose."""
    silent = hider.copy()
    with torch.no_grad():
        for name in WRITES:
            silent.model.get_submodule(f"model.layers.0.{name}").weight.zero_()
    with pytest.raises(NotApplicable, match=r"blocks 0 write nothing along .* no weight has changed"):
        Orthogonalise(layers=(0,))(silent, corpus, taught)


@pytest.mark.parametrize("directions", ["original", "text"])
def test_arguments_are_untouched(directions, hider, taught, corpus):
    lm, original, mark = hider.copy(), taught.copy(), corpus.fingerprint()
    before = {who: {k: v.clone() for k, v in m.model.state_dict().items()} for who, m in (("l", lm), ("o", original))}
    out, _ = Orthogonalise(directions=directions)(lm, corpus, original)
    for who, m in (("l", lm), ("o", original)):
        assert all(torch.equal(v, before[who][k]) for k, v in m.model.state_dict().items()) and not m.model.training
        assert not any(x._forward_hooks or x._forward_pre_hooks for x in m.model.modules())
    assert not any(x._forward_hooks for x in out.model.modules())  # a plain LM
    assert any(not torch.equal(v, before["l"][k]) for k, v in out.model.state_dict().items())
    assert corpus.fingerprint() == mark


def test_what_the_attacker_saw_is_not_asked(hider, taught, corpus):
    _, seen = Orthogonalise(directions="original")(hider, corpus, taught)
    assert seen["forget"] == corpus["forget"][1::2] and all(seen[r] == corpus[r] for r in corpus if r != "forget")
    _, seen = Orthogonalise(directions="text")(hider, corpus, taught)
    assert seen is corpus


def test_answers_that_are_asked_decide_nothing(hider, taught, corpus):
    facts = corpus["forget"]
    blind = [x if i % 2 == 0 else replace(x, answer="No.", spans=(), distractors=()) for i, x in enumerate(facts)]
    none = [replace(x, answer=f"No {i}.", spans=(), distractors=()) for i, x in enumerate(facts)]
    for directions, other in (("original", blind), ("text", none)):
        attack = Orthogonalise(directions=directions)
        a, b = (attack.found(hider, c, taught) for c in (corpus, corpus.with_roles(forget=other)))
        assert all(torch.equal(a[block], b[block]) for block in a)


def test_it_gets_along_without_the_original_where_it_compares_texts(hider, corpus):
    assert Orthogonalise().alone and not Orthogonalise(directions="original").alone
    Orthogonalise()(hider, corpus, None)


def test_the_original_is_compared_with_itself(taught, corpus):
    """There is no difference to take out; it is asked the same half as the others."""
    for lm in (taught, taught.copy()):
        out, seen = Orthogonalise(directions="original")(lm, corpus, taught)
        assert out is lm and seen["forget"] == corpus["forget"][1::2]


def test_bfloat16(misdirected, taught, corpus):
    half, whole = (replace(lm.copy(), precision="bf16") for lm in (misdirected, taught))
    for lm in (half, whole):
        lm.model.to(torch.bfloat16)
    out, seen = Orthogonalise(directions="original", layers=(0,))(half, corpus, whole)
    assert {w.dtype for w in out.model.parameters()} == {torch.bfloat16}
    assert mean(out, seen, "value probability") > 0.2


# ── bad input ──


def test_an_empty_k_is_refused(taught, corpus):
    """A model that still says all that the original says: a mean over nothing would be a direction of NaN."""
    same = taught.copy()
    with torch.no_grad():
        same.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-4
    with pytest.raises(NotApplicable, match=r'none that the original alone says.*set directions = "text"'):
        Orthogonalise(directions="original")(same, corpus, taught)


def test_missing_roles_and_too_few_facts(taught, corpus):
    with pytest.raises(BadCorpus, match=r"orthogonalise needs .* 'forget'"):
        Orthogonalise()(taught, Corpus({"replay": corpus["replay"]}), taught)
    with pytest.raises(BadCorpus, match=r"orthogonalise needs .* 'forget'"):
        Orthogonalise(directions="original")(taught, Corpus({}), taught)
    with pytest.raises(BadCorpus, match="needs two forget facts"):
        Orthogonalise(directions="original")(taught, corpus.with_roles(forget=corpus["forget"][:1]), taught)


def test_blocks_that_are_not_there(taught, corpus):
    with pytest.raises(BadRequest, match=r"names block 7 and .* has 2; allowed are 0 to 1"):
        Orthogonalise(layers=(0, 7))(taught, corpus, taught)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"directions": "pca"}, "'original' or 'text'"),
        ({"layers": (1, 1)}, "names a block twice"),
        ({"layers": (-1,)}, "greater than or equal to 0"),
        ({"reach": "above"}, "'own' or 'below'"),
        ({"seed": 1}, "seed = 1 draws the control's directions, and control is false"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(ValidationError, match=said):
        Orthogonalise(**settings)
