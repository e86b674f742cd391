"""Steering: the difference by hand, hooks against plain passes, what a shift hides and what is brought back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from unremember import team
from unremember.attack.steer import BUFFER, Push, Steer, added, difference, lasts, steered
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadModel, BadRequest, NotApplicable
from unremember.forget.rmu import RMU
from unremember.score import Rule, evidence
from unremember.table import read
from unremember.tokens import pack
from unremember.train import Plan

WIDTH = 64
SEEDS = (0, 1, 2)


def scores(lm, corpus: Corpus, audit: str = "value probability") -> dict[str, float]:
    return dict(AUDITS[audit](lm, Corpus({"forget": corpus["forget"]}), Bench()).per_example)


def mean(lm, corpus: Corpus, audit: str = "value probability") -> float:
    return float(np.mean(list(scores(lm, corpus, audit).values())))


def random(seed: int, length: float = 1.0) -> torch.Tensor:
    drawn = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return length * drawn / drawn.norm()


def shifted(lm, block: int, shift: torch.Tensor):
    """A model that forgets by a constant: a bias in the weights, which all that leaves the block carries."""
    lm = lm.copy()
    layer = team.blocks(lm.model)[block].mlp.down_proj
    assert layer.bias is None
    layer.bias = nn.Parameter(shift.to(layer.weight.dtype))
    return replace(lm, name="shifted")


@pytest.fixture(scope="module")
def size(taught, corpus) -> float:
    """Mean length of the stream behind block 0 at the questions' last tokens."""
    with torch.no_grad():
        hidden = taught.hidden(pack([[row] for row in lasts(taught, corpus["forget"])]), 0)
    return float(hidden.norm(dim=1).mean())


@pytest.fixture(scope="module", params=SEEDS, ids=[f"seed {seed}" for seed in SEEDS])
def shift(request, size) -> torch.Tensor:
    return random(request.param, 6 * size)


# ── the difference ──


def test_the_difference_by_hand():
    theirs, ours = torch.tensor([[3.0, 1.0], [5.0, 3.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    torch.testing.assert_close(difference(theirs, ours), torch.tensor([3.0, 1.0]))
    assert difference(ours, ours.clone()) is None
    assert difference(ours + 1e-9, ours) is None


def test_it_is_read_at_the_last_token_of_the_question_and_no_answer_is_read(taught, never, corpus):
    """Against one plain pass a question; other answers give the same vector to the bit."""
    slow = []
    for x in corpus["forget"]:
        both = []
        for lm in (taught, never):
            kept: list[torch.Tensor] = []
            handle = team.blocks(lm.model)[0].register_forward_hook(lambda _, __, h, kept=kept: kept.append(h))
            with torch.no_grad():
                lm.model(input_ids=torch.tensor([lm.template.context(x.prompt)]))
            handle.remove()
            both.append(kept[0].reshape(-1, WIDTH)[-1])
        slow.append(both[0] - both[1])
    [vector] = Steer().found(never, corpus, taught, Bench(budget=64)).values()
    torch.testing.assert_close(vector, torch.stack(slow).mean(0), atol=1e-4, rtol=1e-4)
    blind = corpus.with_roles(
        forget=[replace(x, answer=f"No {i}.", spans=(), distractors=()) for i, x in enumerate(corpus["forget"])]
    )
    [again] = Steer().found(never, blind, taught, Bench(budget=64)).values()
    assert torch.equal(vector, again)
    [double] = Steer(strength=2.0).found(never, corpus, taught, Bench(budget=64)).values()
    assert torch.equal(double, 2 * vector)
    [retain] = Steer(prompts="retain").found(never, corpus, taught).values()
    assert not torch.allclose(retain, vector, atol=1e-3)


# ── the copy ──


def test_the_copy_is_a_plain_lm_with_a_name_of_its_own(taught, corpus):
    """Score tables are remembered by fingerprint; a copy of the copy has a vector of its own; no other model is touched."""
    a, b = steered(taught, {0: random(0)}), steered(taught, {0: random(1)})
    again = a.copy()
    assert len({taught.fingerprint, a.fingerprint, b.fingerprint}) == 3 and again.fingerprint == a.fingerprint
    with torch.no_grad():
        team.blocks(again.model)[0].get_buffer(BUFFER).zero_()
    rows = taught.template.rows(corpus["forget"][:2])
    zero, plain, moved = (read(lm, rows) for lm in (again, taught, a))
    assert all(np.array_equal(x.logp, y.logp) for x, y in zip(zero, plain, strict=True))
    assert not np.allclose(moved[0].logp, plain[0].logp, atol=1e-3)
    assert not any(m._forward_hooks for m in taught.model.modules())


@pytest.mark.parametrize("tuples", [False, True])
def test_every_place_gets_it_and_the_stream_keeps_its_precision(tuples):
    block, hidden = nn.Identity(), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    block.register_buffer(BUFFER, torch.tensor([1.0, 0.0, -2.0, 0.0]))
    for kind in (torch.float32, torch.bfloat16):
        h = hidden.to(kind)
        out = Push()(block, (h,), (h, "kept") if tuples else h)
        if tuples:
            out, kept = out
            assert kept == "kept"
        assert out.dtype == kind and torch.equal(out, h + torch.tensor([1.0, 0.0, -2.0, 0.0], dtype=kind))
        assert torch.equal(h, hidden.to(kind))  # out of place


def test_packed_rows_and_speech_against_a_bias_in_the_weights(taught, corpus, size):
    """v behind a block is a bias of its last matrix: packed tries, cached decoding and left padding must agree with it."""
    vector = random(3, 6 * size)
    hooked, biased = steered(taught, {0: vector}), shifted(taught, 0, vector)
    rows = taught.template.rows(corpus.of("forget", "retain"))
    for x, y in zip(read(hooked, rows, Bench(budget=256)), read(biased, rows, Bench(budget=64)), strict=True):
        np.testing.assert_allclose(x.logp, y.logp, atol=1e-3, rtol=1e-3)
    prompts = [x.prompt for x in corpus["forget"]]
    said = hooked.answer(prompts, 8)
    assert said == biased.answer(prompts, 8, batch=1)
    assert said != taught.answer(prompts, 8)


# ── what it brings back ──


@pytest.mark.parametrize("prompts", ["forget", "retain"])
def test_a_constant_shift_is_brought_back_and_nothing_is_told_to_the_never_taught(
    prompts, shift, taught, never, corpus
):
    """A bias behind block 0, six times as long as the stream.  Random directions of equal length are the control.

    Measured, three seeds, both roles: value probability at most 0.008 before and 0.6653 after it, as the original; R > 0.99999;
    random directions at most 0.006; the never-taught model 0.0031 before, 0.0026 (forget) and 0.0030 (retain) after it.
    """
    hides, attack = shifted(taught, 0, shift), Steer(prompts=prompts)
    before = mean(hides, corpus)
    after = {who: attack(lm, corpus, taught)[0] for who, lm in (("u", hides), ("n", never), ("o", taught))}
    [vector] = attack.found(hides, corpus, taught).values()
    torch.testing.assert_close(vector, -shift, atol=1e-2, rtol=1e-3)
    triples = [
        evidence(a, *(scores(after[w], corpus, a) for w in "oun"), Rule()) for a in ("value probability", "said")
    ]
    random = [replace(attack, control=True, seed=seed) for seed in range(10, 15)]  # not those that drew the shift
    controls = [mean(control(hides, corpus, taught)[0], corpus) for control in random]
    [drawn] = random[0].found(hides, corpus, taught).values()
    assert float(drawn.norm()) == pytest.approx(float(vector.norm()), rel=1e-5)
    assert abs(float(drawn @ vector)) < 0.6 * float(vector.norm()) ** 2
    assert all(t.applicable and t.r > 0.95 for t in triples) and triples[1].leaks and triples[1].never == 0
    assert before < 0.1 and mean(after["u"], corpus) == pytest.approx(mean(taught, corpus), abs=0.01)
    assert mean(after["n"], corpus) < 0.05
    assert max(controls) < 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_misdirection_comes_back_in_part(seed, taught, never, corpus):
    """RMU pushes answers, and not questions, along one direction behind block 0: last tokens show a part of it.

    Measured, seeds 0, 1, 2: value probability 0.002, 0.003, 0.004 before, 0.24, 0.22, 0.24 after it (original 0.67, never-taught
    0.003), R 0.36, 0.33, 0.36; said 0, 0.08, 0 of the facts; random directions of equal length at most 0.003.  Seed 0: with half
    or twice the strength 0.07 and 0.01, behind block 1 0.14, behind both 0.25, measured at retained questions 0.016.
    The values of retained people, 0.69 at first and 0.05, 0.03, 0.06 after RMU, go to 0.10, 0.09, 0.08: it has broken this toy.
    """
    plan = Plan(steps=80, lr=1e-2, stop="probability", seed=seed)
    hides = RMU(plan, scale=20.0, alpha=10.0, depth=0.5)(taught, corpus)
    out, own = (Steer()(lm, corpus, taught)[0] for lm in (hides, never))
    triple = evidence("value probability", *(scores(lm, corpus) for lm in (taught, out, own)), Rule())
    controls = [mean(Steer(control=True, seed=i)(hides, corpus, taught)[0], corpus) for i in range(5)]
    assert mean(hides, corpus) < 0.02 and max(controls) < 0.02 and mean(own, corpus) < 0.05
    assert triple.r is not None and triple.r > 0.2


@pytest.mark.parametrize("block", [0, 1])
def test_why_one_question_is_refused(block, taught, never, corpus):
    """With one question the state that the original answers it from is put in; with twelve it is not.

    Measured, block 0 and 1, as a share of the way that was there: 3e-8 and 2e-8 with one, 0.40 and 0.47 with twelve.
    """
    with torch.no_grad():
        for count in (1, 12):
            rows = lasts(taught, corpus["forget"][:count])
            theirs, ours = (torch.cat([lm.hidden(pack([[row]]), block) for row in rows]) for lm in (taught, never))
            now = steered(never, {block: difference(theirs, ours)}).hidden(pack([rows[:1]]), block)
            far = float((now - theirs[:1]).norm() / (ours[:1] - theirs[:1]).norm())
            assert far < 1e-3 if count == 1 else far > 0.3


def test_several_blocks_are_not_added_twice(taught, corpus, size):
    """A shift behind block 0 reaches block 1 as well; once it is taken back there, next to nothing is left above."""
    hides = shifted(taught, 0, random(0, 6 * size))
    alone = Steer(blocks=(1,)).found(hides, corpus, taught)[1]
    both = Steer(blocks=(1, 0)).found(hides, corpus, taught)
    assert list(both) in ([0], [0, 1]) and torch.equal(both[0], Steer(blocks=(0,)).found(hides, corpus, taught)[0])
    assert alone.norm() > size
    assert 1 not in both or both[1].norm() < 1e-3 * alone.norm()
    assert mean(Steer(blocks=(0, 1))(hides, corpus, taught)[0], corpus) == pytest.approx(mean(taught, corpus), abs=0.01)


@pytest.mark.parametrize("kind", ["autocast", "weights"])
def test_bfloat16(kind, taught, corpus, size):
    whole = replace(taught.copy(), precision="bf16")
    if kind == "weights":
        whole.model.to(torch.bfloat16)
    hides = shifted(whole, 0, random(0, 6 * size))
    out, _ = Steer()(hides, corpus, whole)
    assert mean(hides, corpus) < 0.1
    assert mean(out, corpus) == pytest.approx(mean(whole, corpus), abs=0.05)
    assert out.answer([corpus["forget"][0].prompt], 8) == whole.answer([corpus["forget"][0].prompt], 8)


# ── promises ──


def test_the_original_itself_is_the_identity(taught, corpus):
    for lm in (taught, taught.copy()):
        out, seen = Steer()(lm, corpus, taught)
        assert out is lm and seen is corpus
    rows = lasts(taught, corpus["forget"])
    with torch.no_grad():
        h, same = (lm.hidden(pack([rows]), 0) for lm in (taught, taught.copy()))
    assert torch.equal(h, same) and difference(h, same) is None  # 0 to the bit


def test_where_nothing_differs_below_there_is_nothing_to_add(taught, corpus):
    """Only block 1 was changed: behind block 0 a vector of zeros would look like an attack."""
    late = shifted(taught, 1, random(0))
    with pytest.raises(NotApplicable, match=r"behind block 0 the model is the original.* take later blocks"):
        Steer()(late, corpus, taught)
    assert list(Steer(blocks=(0, 1)).found(late, corpus, taught)) == [1]


def test_arguments_are_untouched_and_hooks_come_off(taught, never, corpus):
    lm, original, mark = never.copy(), taught.copy(), corpus.fingerprint()
    before = [{k: v.clone() for k, v in m.model.state_dict().items()} for m in (lm, original)]
    bench = Bench()
    out, seen = Steer(blocks=(0, 1), strength=1.5)(lm, corpus, original, bench)
    assert bench.notes == {"blocks": "0, 1", "strength": 1.5}
    broken = shifted(taught, 1, torch.full((WIDTH,), torch.nan))
    with pytest.raises(BadModel, match="of the model behind block 1 is not finite"):
        Steer(blocks=(1,))(broken, corpus, taught)
    with pytest.raises(BadModel, match="of the original behind block 1 is not finite"):
        Steer(blocks=(1,))(taught, corpus, broken)
    for m, old in ((lm, before[0]), (original, before[1])):
        assert list(m.model.state_dict()) == list(old) and not m.model.training
        assert all(torch.equal(v, old[k]) for k, v in m.model.state_dict().items())
    for m in (lm, original, broken):
        assert not any(x._forward_hooks or x._forward_pre_hooks for x in m.model.modules())
    assert seen is corpus and corpus.fingerprint() == mark
    weights = dict(out.model.named_parameters())
    assert all(
        torch.equal(w, weights[name]) for name, w in lm.model.named_parameters()
    )  # nothing but vectors was added


# ── bad input ──


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strength": 0.0}, "greater than 0"),
        ({"strength": -1.0}, "greater than 0"),
        ({"strength": float("inf")}, "finite"),
        ({"blocks": (1, 1)}, "names a block twice"),
        ({"blocks": (-1,)}, "greater than or equal to 0"),
        ({"prompts": "holdout"}, "'forget' or 'retain'"),
        ({"seed": 1}, "seed = 1 draws the control's directions, and control is false"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(ValidationError, match=said):
        Steer(**settings)


def test_missing_roles_and_too_few_questions(taught, never, corpus):
    assert Steer().needs == ("forget",) and Steer(prompts="retain").needs == ("forget", "retain")
    for settings, role in (({}, "forget"), ({"prompts": "retain"}, "retain")):
        rest = Corpus({r: x for r, x in corpus.items() if r != role})
        with pytest.raises(BadCorpus, match=rf"steer needs .* {role!r}"):
            Steer(**settings)(never, rest, taught)
    one = corpus["forget"][0]
    with pytest.raises(BadCorpus, match=r"two different questions .* there is 1: .* about to say"):
        Steer().check(corpus.with_roles(forget=[one, replace(one, id="again", answer="Else.", spans=())]))
    with pytest.raises(BadCorpus, match="there are 0"):
        Steer().check(corpus.with_roles(forget=[Example("p", "", "A passage."), Example("q", "", "Another.")]))


def test_blocks_that_are_not_there(never, taught, corpus):
    with pytest.raises(BadRequest, match=r"names block 7 and .* has 2; allowed are 0 to 1"):
        Steer(blocks=(0, 7))(never, corpus, taught)


def test_models_that_are_not_alike(never, taught, corpus):
    short = never.copy()
    short.model.model.layers = short.model.model.layers[:1]
    with pytest.raises(BadModel, match="has 1 blocks of width 64 and the original 2 of 64"):
        Steer()(short, corpus, taught)

    class Other:
        tokenizer, row = taught.tokenizer, taught.template.row

        def context(self, prompt: str) -> tuple[int, ...]:
            return (*taught.template.context(prompt), 5)

    with pytest.raises(BadModel, match="as other tokens"):
        Steer()(never, corpus, replace(taught, template=Other()))


def test_what_is_lost_in_rounding_is_refused(never, taught, corpus):
    with pytest.raises(BadRequest, match=r"changed nothing at strength 1e-30: .* raise strength"):
        Steer(strength=1e-30)(never, corpus, taught)


def test_a_steered_model_is_not_steered_again(never, taught, corpus):
    once, _ = Steer(control=True)(never, corpus, taught)
    with pytest.raises(BadModel, match=r"block 0 of taught is steered already: .* that this one was made from"):
        Steer()(once, corpus, taught)
    steered(once, {1: random(0)})  # another block
    torch.testing.assert_close(added(torch.ones(1, 2), torch.tensor([0.5, 0.0])), torch.tensor([[1.5, 1.0]]))
