"""Many looks: what speaks by luck is counted, what was planted stands out, and the order of things does not matter."""

import numpy as np
import pytest

from unremember.chance import Look, luck, speaks
from unremember.score import Rule

NAMES, FACTS, ATTACKS = 4, 6, 8


def looks(rng: np.random.Generator, planted: int = 0, attacks: int = ATTACKS) -> list[Look]:
    """A guessing score of each name under each attack: models without knowledge lie about .3, the original knows.

    planted: of so many names the forgotten model has kept everything.
    """
    found = []
    for name in range(NAMES):
        keys = [f"{name}/{fact}" for fact in range(FACTS)]
        own = {k: (0.3 + 0.15 * rng.standard_normal(2)).clip(0, 1) for k in keys}  # an attack changes little
        for _ in range(attacks):
            f, n = (
                {k: float(np.clip(v[i] + 0.03 * rng.standard_normal(), 0, 1)) for k, v in own.items()} for i in (0, 1)
            )
            o = dict.fromkeys(keys, 0.9)
            found.append(Look(o, dict(o) if name < planted else f, n))
    return found


def test_what_speaks_by_hand():
    """R of .3 on every fact speaks; the same mean from one fact alone does not, nor less than the tolerance."""
    o, n = np.ones(6), np.zeros((3, 6))
    f = np.array([[0.3] * 6, [1.8, 0, 0, 0, 0, 0], [0.2] * 6])
    assert speaks(o, f, n).tolist() == [True, False, False]
    assert speaks(o, f, n, Rule(tolerance=0.1)).tolist() == [True, False, True]
    assert not speaks(o, f, n + 0.9).any()  # the never-taught model knows it, too


@pytest.mark.parametrize("planted", [1, 2])
def test_what_is_left_of_whole_people_is_more_than_luck(planted):
    """Of one name's six facts none or one changes places in 7 of 64 draws, and it still speaks: p cannot be much smaller."""
    found = luck(looks(np.random.default_rng(0), planted))
    assert found.looks == NAMES * ATTACKS and found.seen >= planted * ATTACKS
    assert found.p < (0.12 if planted == 1 else 0.03) and found.mean < 2 * planted


def test_models_that_are_alike_are_rarely_told_apart():
    """Over 60 pairs of models without knowledge p is below .05 in about one of twenty, as it says."""
    found = [luck(looks(np.random.default_rng(seed), attacks=3), draws=100, seed=seed) for seed in range(60)]
    assert sum(x.p <= 0.05 for x in found) <= 7
    seen = [x.seen for x in found]
    assert np.mean(seen) == pytest.approx(np.mean([x.mean for x in found]), abs=0.5) and max(seen) > 0


def test_order_and_seed_change_little():
    made = looks(np.random.default_rng(1), planted=1)
    assert luck(made) == luck(made[::-1])
    one, other = luck(made, seed=0), luck(made, seed=1)
    assert one.seen == other.seen and one.p == pytest.approx(other.p, abs=0.03)


def test_looks_without_enough_facts_are_no_looks():
    few = {"a": 0.9, "b": 0.9}
    assert luck([Look(few, few, few)]) is None and luck([]) is None
    unknown = dict.fromkeys("abcdef", 0.1)  # the original does not know them either
    assert luck([Look(unknown, unknown, unknown)]) is None
