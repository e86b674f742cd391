"""Generated text: its ceiling, its streams, and what counts as a context."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from unremember.dynamics import text
from unremember.errors import BadCorpus


def test_the_best_guess_on_the_chain_is_right_six_times_in_ten():
    ids = text.markov(400, 32, 0).ids.numpy()
    counts = np.zeros((96, 96))
    np.add.at(counts, (ids[:, :-1].ravel(), ids[:, 1:].ravel()), 1)
    assert ((counts > 0).sum(1) <= 4).all()
    assert counts.max(1).sum() / counts.sum() == pytest.approx(0.6, abs=0.02)


def test_parts_share_the_chain_and_no_sequence():
    parts = [text.markov(50, 32, 0, part) for part in text.PARTS]
    follow = [{(a, b) for row in p.rows() for a, b in pairwise(row)} for p in parts]
    assert len(follow[1] - follow[0]) < 0.2 * len(follow[1])
    assert not text.near_duplicates(parts[2], parts[0])
    assert torch.equal(text.markov(50, 32, 0).ids, parts[0].ids)
    assert not torch.equal(text.markov(50, 32, 1).ids, parts[0].ids)


def test_sequences_of_one_token_are_refused_by_number():
    with pytest.raises(BadCorpus, match=r"sequence 1 has 1 token.*\nsequence 2 has 0 token"):
        text.sequences([[1, 2], [3], []])
    with pytest.raises(BadCorpus, match="no sequence"):
        text.sequences([])


def test_contexts_leave_out_the_first_token_padding_and_identifiers():
    plain = text.sequences([[5, 6, 7], [8, 9]])
    assert plain.contexts().tolist() == [[False, True, True], [False, True, False]]
    marked = text.identified(plain, 100)
    assert marked.ids.tolist() == [[100, 5, 6, 7], [101, 8, 9, 0]]
    assert marked.contexts().tolist() == [[False, False, True, True], [False, False, True, False]]
    assert int(marked.contexts().sum()) == int(plain.contexts().sum())
    assert marked.rows() == plain.rows()


def test_an_overlap_of_special_and_training_sequences_is_refused():
    train = text.sequences([[1, 2, 3, 4, 5, 6], [9, 9, 9, 9]])
    near = text.sequences([[7, 2, 3, 4, 5, 8], [2, 3, 4, 0, 0, 0]])  # 4 of 6 in a row; 3 of 6 are no more than half
    assert text.near_duplicates(near, train) == [0]
    with pytest.raises(BadCorpus, match=r"1 of 2 special sequences \(0\)"):
        text.apart(near, train)
    text.apart(near.some([1]), train)


def test_planted_digits_stand_in_the_middle_and_are_the_sequences_own():
    found, where = text.planted(64, 32, 8, 0)
    digits = found.ids[where].view(64, 8)
    assert digits.min() >= 96 and digits.max() < 106 and len({tuple(d.tolist()) for d in digits}) == 64
    assert found.ids[~where].max() < 96 and where.sum(1).eq(8).all() and not where[:, :12].any()
