"""The share of the truth among its distractors, worked by hand."""

import numpy as np
import pytest

from unremember.preference import share


def test_share_by_hand():
    assert share(np.log([0.5, 0.25, 0.25])) == pytest.approx(0.5)
    assert share(np.log([0.1, 0.4])) == pytest.approx(0.2)
    assert share(np.array([-1000.0, -1001.0])) == pytest.approx(1 / (1 + np.exp(-1)))  # no underflow
    assert share(np.array([-3.0, -3.0, -3.0, -3.0])) == pytest.approx(0.25)
