"""RMU: the distance by hand, where it looks, what it moves, and that a step ends half-way up."""

import pytest
import torch

from unremember import team
from unremember.errors import BadModel
from unremember.forget.rmu import RMU, distance
from unremember.tokens import lanes, pack
from unremember.train import Plan

PLAN = Plan(steps=3, lr=1e-3)


def test_the_distance_by_hand():
    hidden = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    torch.testing.assert_close(distance(hidden, torch.tensor([1.0, 1.0])), torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize("block", [0, 1])
def test_hidden_is_the_output_of_the_block(tiny, corpus, block):
    """The slow way: all hidden states of one row at a time.  hidden_states[l] is what goes into block l, not out of it."""
    rows = tiny.template.rows(corpus["forget"][:3])
    tokens = pack(lanes(rows, 256))
    with torch.no_grad():
        found = tiny.hidden(tokens, block)
        expected, seen = [], []
        handle = tiny.model.model.layers[block].register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for row in sorted(rows, key=lambda row: tokens.keys.index(row.key)):
            tiny.model(input_ids=torch.tensor([row.ids]))
            expected.append(seen.pop().reshape(len(row.ids), -1)[row.start - 1 : row.stop])
        handle.remove()
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_the_pass_ends_there_and_the_hook_comes_off(tiny, corpus):
    tokens, ran = pack([tiny.template.rows(corpus["forget"][:2])]), []
    handle = tiny.model.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        tiny.hidden(tokens, 0)
        assert not ran
        tiny.logits(tokens)
        assert ran
    handle.remove()
    assert not tiny.model.model.layers[0]._forward_hooks


def test_terms_by_hand(taught, moved, corpus):
    method = RMU(PLAN, scale=4.0, alpha=10.0, depth=0.5)
    pools, objective = method.terms(taught, corpus)
    with torch.no_grad():
        tokens = pack(lanes(pools["forget"], 256), "forget")
        before, now = taught.hidden(tokens, 0), moved.hidden(tokens, 0)
        draw = torch.rand(before.shape[1], generator=torch.Generator().manual_seed(0))
        goal = 4.0 * before.norm(dim=1).median() * draw / draw.norm()
        gap = (now - goal).square().mean(1)[tokens.answer]
        assert objective(moved, tokens)["rmu"].item() == pytest.approx(gap.mean().item(), rel=1e-3)
        kept = pack(lanes(pools["retain"], 256), "retain")
        gap = (moved.hidden(kept, 0) - taught.hidden(kept, 0)).square().mean(1)[kept.answer]
        assert objective(moved, kept)["retain rmu"].item() == pytest.approx(10 * gap.mean().item(), rel=1e-3)
        assert objective(taught, kept)["retain rmu"].item() == pytest.approx(0, abs=1e-9)


def test_only_the_down_projections_below_move(taught, corpus):
    result = RMU(PLAN, scale=4.0, alpha=10.0, depth=1.0)(taught, corpus)
    old = dict(taught.model.named_parameters())
    moved = {n for n, w in result.model.named_parameters() if not torch.equal(w, old[n])}
    assert moved == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(len(team.blocks(taught.model)))}
    one = RMU(PLAN, scale=4.0, alpha=10.0, depth=0.5)
    assert set(one.sites(taught).masks) == {"model.layers.0.mlp.down_proj.weight"}


def test_it_turns_the_forget_text_towards_one_direction_and_leaves_the_rest(taught, corpus):
    """Geometry, section (g) 2 of the specification: the cosine with u rises, and what is retained stays where it was."""
    method = RMU(Plan(steps=60, lr=1e-2), scale=4.0, alpha=30.0, depth=1.0)
    result, block = method(taught, corpus), method.block(taught)

    def hidden(lm, role):
        with torch.no_grad():
            return lm.hidden(pack(lanes(lm.template.rows(corpus[role]), 256)), block)

    before = hidden(taught, "forget")
    draw = torch.rand(before.shape[1], generator=torch.Generator().manual_seed(0))
    towards = torch.cosine_similarity(hidden(result, "forget"), draw[None]).mean()
    assert towards > torch.cosine_similarity(before, draw[None]).mean() + 0.3
    stays = torch.cosine_similarity(hidden(result, "retain"), hidden(taught, "retain")).mean()
    assert stays > 0.9


def test_an_architecture_without_down_projections_is_told_so(taught, monkeypatch):
    monkeypatch.setattr(team, "blocks", lambda model: [model.model.norm, model.model.norm])
    with pytest.raises(BadModel, match="finds no parameter 'down_proj'"):
        RMU(PLAN, scale=4.0, alpha=1.0).sites(taught)
