"""Many looks: what speaks by luck is counted, what was planted stands out, and the order of things does not matter."""

import numpy as np
import pytest

from unremember.chance import Look, luck, speaks
from unremember.score import RULE, Rule, evidence

NAMES, FACTS, ATTACKS = 4, 6, 8


def looks(rng: np.random.Generator, planted: int = 0, attacks: int = ATTACKS, shared: float = 0.0) -> list[Look]:
    """A guessing score of each name under each attack: models without knowledge lie about .3, the original knows.

    planted: of so many names the forgotten model has kept everything.  shared: deviation that all facts of one name have in
    common in one model.
    """
    found = []
    for name in range(NAMES):
        keys = [f"{name}/{fact}" for fact in range(FACTS)]
        tilt = 0.3 + shared * rng.standard_normal(2)
        own = {k: (tilt + 0.15 * rng.standard_normal(2)).clip(0, 1) for k in keys}  # an attack changes little
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
    assert speaks(o, f, n) == pytest.approx([0.3, 0, 0])
    assert speaks(o, f, n, Rule(tolerance=0.1)) == pytest.approx([0.3, 0, 0.2])
    assert not speaks(o, f, n + 0.9).any()  # the never-taught model knows it, too


def test_it_is_the_rule_of_the_verdict():
    """The same looks speak here and by the intervals that verdicts rest on, in every one of 400."""
    rng, spoke = np.random.default_rng(0), 0
    for _ in range(400):
        o, f, n = rng.uniform(0.5, 1, 6), rng.uniform(0, 0.9, 6), rng.uniform(0, 0.6, 6)
        found = evidence("choice", *(dict(enumerate(x)) for x in (o, f, n)))
        r = found.r if found.r is not None and found.r > RULE.tolerance and found.low > 0 else 0.0
        assert speaks(o, f[None], n[None]) == pytest.approx([r])
        spoke += r > 0
    assert 50 < spoke < 350


@pytest.mark.parametrize("planted", [1, 2])
def test_what_is_left_of_whole_people_is_more_than_luck(planted):
    """With one name of six facts p is hardly below 1 in 64, the chance that none changes places."""
    found = luck(looks(np.random.default_rng(0), planted))
    assert found.looks == NAMES * ATTACKS and found.seen >= planted * ATTACKS
    assert found.p < (0.04 if planted == 1 else 0.005) and found.mean < 2 * planted


def small(count: int, **how: float) -> float:
    """How often p is at most .05 where nothing is left."""
    found = [luck(looks(np.random.default_rng(seed), attacks=3, **how), draws=200, seed=seed) for seed in range(count)]
    return float(np.mean([x.p <= 0.05 for x in found]))


def test_where_nothing_is_left_p_is_rarely_small():
    """At most one time in twenty, as it says (120 pairs of models; measured .03, since most have nothing that speaks)."""
    assert small(120) <= 0.06


def test_models_that_differ_by_the_person_make_p_too_small():
    """What the docstring warns of: here facts of one person are alike, which no exchange of single facts can know (.39)."""
    assert small(120, shared=0.15) > 0.08


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
