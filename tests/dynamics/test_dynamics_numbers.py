"""Memorised, shares, runs, thresholds, baselines: arithmetic worked by hand."""

import numpy as np
import pytest
import torch

from unremember.dynamics import curves
from unremember.dynamics.memorise import Recall, hits, recall, runs, share, unit_length


def test_a_token_is_memorised_where_it_alone_is_on_top():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 1.0], [0.5, 0.5, 0.5], [1.0, 0.0, 2.0]])
    assert hits(logits, torch.tensor([1, 0, 0, 0])).tolist() == [True, False, False, False]


def test_a_model_whose_logits_are_all_equal_has_memorised_nothing_whatever_the_text():
    """argmax says 0 for a tie: an all-zero text would be known by heart to a model of zeros."""
    target = torch.zeros(200, dtype=torch.long)
    logits = torch.zeros(200, 50)
    assert (logits.argmax(-1) == target).all() and not hits(logits, target).any()


def test_hits_equal_a_slow_reading_over_more_rows_than_a_piece():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (150, 7), generator=draw).float()
    target = torch.randint(0, 7, (150,), generator=draw)
    slow = [all(z[t] > z[v] for v in range(7) if v != t) for z, t in zip(logits, target, strict=True)]
    assert hits(logits, target).tolist() == slow and any(slow)


def test_logits_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="not numbers"):
        hits(torch.tensor([[0.0, float("nan")]]), torch.tensor([0]))


def test_m_is_over_contexts_and_not_a_mean_of_sequences():
    hit = np.array([[True, False, False, False], [True, True, True, True]])
    counted = np.array([[True, False, False, False], [True, True, True, False]])
    assert share(hit, counted) == 1.0
    assert share(hit[:, 1:]) == 0.5
    hit = np.array([[True, False, False], [False, False, False]])
    counted = np.array([[True, False, False], [True, True, True]])
    assert share(hit, counted) == 0.25  # by sequence it would be (1 + 0) / 2
    assert share(hit, np.zeros_like(hit)) is None


def test_runs_and_their_mean():
    assert runs([True, True, False, True, False, False]) == [2, 1]
    assert runs([]) == runs([False]) == [] and runs([True]) == [1]
    assert unit_length([[True, True, False, True], [True] * 5]) == (2 + 1 + 5) / 3
    assert unit_length([[False], []]) is None


def test_recall_by_class_and_undefined_where_the_class_is_empty():
    true = ["NOUN", "NOUN", "VERB", ""]
    said = ["NOUN", "VERB", "VERB", "NOUN"]
    found = recall(true, said, [True, False, False, True], ("NOUN", "VERB", "NUM"))
    assert found == {"NOUN": Recall(2, 0.5, 0.5), "VERB": Recall(1, 1.0, 0.0), "NUM": Recall(0, None, None)}


def test_time_is_the_first_reading_at_the_threshold_and_never_interpolated():
    m = [0.2, 0.5, 0.45, 0.9]
    assert curves.time([1, 2, 3, 4], m, 0.5) == curves.Time(1, 2)
    assert str(curves.time([1, 2, 3, 4], m, 0.9)) == "4"
    assert str(curves.time([1, 5, 10, 20], m, 0.9)) == "(10, 20]"
    assert str(curves.time([100], [0.95], 0.9)) == "(0, 100]"


def test_a_threshold_that_was_not_reached_is_censored():
    found = curves.time([1, 2], [0.1, 0.2], 0.9)
    assert found.censored and found.at is None and str(found) == "> 2"


def test_times_never_fall_with_the_threshold():
    draw = np.random.default_rng(0)
    for _ in range(20):
        m = draw.random(30)
        at = [curves.time(range(1, 31), m, tau).at or 99 for tau in np.linspace(0, 1, 40)]
        assert at == sorted(at)


def test_a_curve_needs_rising_places():
    for at in ([2, 1], [1, 1], [1]):
        with pytest.raises(ValueError, match="rise"):
            curves.time(at, [0.1, 0.2], 0.5)


def test_rolling_mean():
    assert curves.rolling([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]


def test_m_before_over_fitting_is_that_of_the_epoch_in_front_of_the_first_rise():
    assert curves.before_overfitting([0.1, 0.4, 0.6, 0.8], [3.0, 2.0, 2.0, 2.1]) == (3, 0.6)
    assert curves.before_overfitting([0.1, 0.2], [3.0, 2.0]) is None


def test_the_baseline_is_the_lowest_and_not_the_last_and_the_insertion_itself_does_not_count():
    assert curves.baseline([0.1, 0.6, 0.4, 0.5]) == 0.4
    assert curves.baseline([0.1]) is None


def test_settled_looks_at_the_last_steps():
    assert curves.settled([0.9, 0.5, 0.5, 0.51, 0.5, 0.5, 0.48])
    assert curves.settled([0.9, 0.5, 0.5, 0.51, 0.5, 0.47, 0.47]) is False
    assert curves.settled([0.9, 0.5]) is None


def test_excess_and_half_life():
    over = curves.excess([0.9, 0.7, 0.6, 0.5], [0.5, 0.5, 0.5, 0.5])
    assert over == pytest.approx([0.4, 0.2, 0.1, 0.0])
    assert curves.half_life([0.4, 0.3, 0.2, 0.1]) == curves.Time(1, 2)
    assert curves.half_life([0.4, 0.3]).censored
    assert curves.half_life([0.0, 0.0]) is None
    with pytest.raises(ValueError):
        curves.excess([1.0], [1.0, 1.0])


def test_interval_over_seeds():
    """Mean 2, sd 1, n 3: 2 ± 4.3027 / √3."""
    m = curves.over_seeds([1.0, 2.0, 3.0])
    assert (m.value, m.lowest, m.highest, m.n) == (2.0, 1.0, 3.0, 3)
    assert (m.low, m.high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert curves.over_seeds([1.0]).low is None
    with pytest.raises(ValueError):
        curves.over_seeds([])
