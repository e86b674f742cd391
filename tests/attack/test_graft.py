"""Graft: the original's end on another model's body."""

from dataclasses import replace

import pytest
import torch

from unremember import team
from unremember.attack.graft import Graft, end
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.errors import BadModel, NotApplicable
from unremember.table import read


def test_a_model_gets_itself_back_from_itself(taught, corpus):
    lm, seen = Graft(1)(taught, corpus, taught, Bench())
    rows = taught.template.rows(corpus["forget"])
    for a, b in zip(read(lm, rows), read(taught, rows), strict=True):
        assert (a.logp == b.logp).all()
    assert seen is corpus


@pytest.mark.parametrize("blocks", [0, 1])
def test_the_end_is_the_originals_and_the_rest_is_not(blocks, taught, moved, corpus):
    lm, _ = Graft(blocks)(moved, corpus, taught, Bench())
    for mine, theirs in zip(end(lm.model, blocks), end(taught.model, blocks), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    first, own = team.blocks(lm.model)[0], team.blocks(moved.model)[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), own.parameters(), strict=True))
    tokens, table = lm.model.get_input_embeddings().weight, moved.model.get_input_embeddings().weight
    assert torch.equal(tokens, table), "the token table stays, though the head was tied to it"


def test_a_broken_head_gives_everything_back_and_the_never_taught_nothing(taught, never, corpus):
    broken = taught.untied()
    with torch.no_grad():
        broken.model.get_output_embeddings().weight.neg_()
    asked = Corpus({"forget": corpus["forget"]})

    def said(lm) -> float:
        return sum(AUDITS["said"](lm, asked, Bench()).per_example.values()) / len(asked["forget"])

    assert said(broken) == 0 and said(taught) > 0.8
    assert said(Graft(0)(broken, corpus, taught, Bench())[0]) == said(taught)
    assert said(Graft(1)(never, corpus, taught, Bench())[0]) == 0


def test_where_the_end_is_the_originals_already_there_is_nothing_to_give_back(taught, corpus):
    """Only block 0 was changed: the model as it is would pass for one that was attacked."""
    early = replace(taught.copy(), name="early")
    with torch.no_grad():
        team.blocks(early.model)[0].mlp.down_proj.weight.mul_(1.5)
    for blocks in (0, 1):
        with pytest.raises(NotApplicable, match=rf"last {blocks} blocks? of early are .* raise graft.blocks"):
            Graft(blocks)(early, corpus, taught, Bench())


def test_two_architectures_and_too_many_blocks_are_refused(taught, corpus):
    with pytest.raises(BadModel, match="blocks is 2 and the model has 2 blocks"):
        Graft(2)(taught, corpus, taught, Bench())
    other = taught.copy()
    other.model.lm_head = torch.nn.Linear(8, 8, bias=False)
    with pytest.raises(BadModel, match="other weights or shapes"):
        Graft(0)(taught, corpus, replace(other, name="other"), Bench())
    bare = taught.copy()
    del bare.model.model.norm
    with pytest.raises(BadModel, match="no `norm` beside its blocks"):
        Graft(0)(bare, corpus, taught, Bench())
