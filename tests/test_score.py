"""Scores compared with scores: every number here was worked by hand, and every rule of the verdict can fail alone."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unremember.score import (
    FORGOTTEN,
    NOT_APPLICABLE,
    OVER,
    REMEMBERED,
    RULE,
    Check,
    Evidence,
    Rule,
    Score,
    evidence,
    forget_quality,
    interval,
    judge,
    model_utility,
    overall,
    summary,
    together,
)


def flat(value: float, keys: str = "abcd") -> dict[str, float]:
    return dict.fromkeys(keys, value)


# ── scores and their means ──


def test_variants_of_a_fact_count_as_its_best_one():
    score = Score("s", "", "", {"a#0": 0.2, "a#gap": 0.9, "a#1": 0.4, "b": 0.1, "c": 1.0})
    assert score.over(["a", "b", "d"]) == {"a": 0.9, "b": 0.1}  # any-of-m; c was not asked for, d not measured
    assert Score("s", "", "", {"a#0": -3.0, "a#1": -2.0}).over(["a"]) == {"a": -2.0}


def test_an_id_may_hold_the_sign_of_a_variant():
    score = Score("s", "", "", {"page#1": 0.2, "page#2": 0.9, "page#2#gap": 1.0})
    assert score.over(["page#1", "page#2"]) == {"page#1": 0.2, "page#2": 1.0}


def test_turns_are_put_together_by_hand():
    """What one turn alone asked stays; what several did has the mean, a value a turn."""
    one = [Score("s", "one", "up", {"a": 0.2, "r": 1.0}), Score("t", "", "", {"r": 3.0})]
    other = [Score("s", "other", "up", {"b": 0.4, "r": 0.0}), Score("t", "", "", {"r": 4.0})]
    assert together([one, other]) == [
        Score("s", "one", "up", {"a": 0.2, "r": 0.5, "b": 0.4}),
        Score("t", "", "", {"r": 3.5}),
    ]
    assert together([one]) == one
    halves = [[Score("s", "", "", {}, chance=c)] for c in (0.25, None, 0.5)]
    assert together(halves)[0].chance == 0.375 and together(halves[1:2])[0].chance is None
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        together([one, other[:1]])


def test_a_summary_is_mean_interval_and_count():
    assert summary({}) is None
    assert summary({"a": 0.5}) == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 1}
    found = summary({"a": 0.0, "b": 1.0, "c": 0.0, "d": 1.0})
    assert (found["mean"], found["n"]) == (0.5, 4)
    assert (found["low"], found["high"]) == (0.0, 1.0)  # 1 in 16 resamples is all zeros: more than 2.5 %


def test_the_interval_is_that_of_the_mean():
    """400 zeros and ones, mean .5: 1.96 · sqrt(.25 / 400) = .049 to either side."""
    low, high = interval([0.0, 1.0] * 200)
    assert low == pytest.approx(0.451, abs=0.004) and high == pytest.approx(0.549, abs=0.004)
    assert interval([0.0, 1.0] * 200) == (low, high)  # no chance from one report to the next
    assert interval([0.3] * 7) == (pytest.approx(0.3), pytest.approx(0.3))


# ── R and its evidence ──


def test_r_by_hand_with_a_control():
    """Means over a..d: .9, .5, .1, so R = (.5 − .1) / (.9 − .1) = .5; fact by fact 1, .5, .25 and .25."""
    found = evidence(
        "value probability",
        flat(0.9),
        {"a": 0.9, "b": 0.5, "c": 0.3, "d": 0.3},
        flat(0.1),
    )
    assert found.r == pytest.approx(0.5)
    assert (found.original, found.forgotten, found.never) == (
        pytest.approx(0.9),
        pytest.approx(0.5),
        pytest.approx(0.1),
    )
    assert found.items == {"a": 1.0, "b": 0.5, "c": pytest.approx(0.25), "d": pytest.approx(0.25)}
    assert found.applicable and found.leaks == ()


def test_r_by_hand_against_other_facts():
    """Two holdout facts, .0 and .4, make the level .2: R = (.4 − .2) / (1 − .2) = .25."""
    found = evidence("choice", flat(1.0), flat(0.4), {"x": 0.0, "y": 0.4})
    assert found.r == pytest.approx(0.25) and found.never == pytest.approx(0.2)
    assert set(found.items) == set("abcd") and found.items["a"] == pytest.approx(0.25)


@pytest.mark.parametrize(("forgotten", "r"), [(0.1, 0.0), (0.9, 1.0), (0.0, -0.125), (1.0, 1.125)])
def test_r_at_its_ends(forgotten, r):
    found = evidence("choice", flat(0.9), flat(forgotten), flat(0.1))
    assert found.r == pytest.approx(r)
    assert (found.low, found.high) == (pytest.approx(r), pytest.approx(r))  # equal facts leave nothing to chance


def test_a_control_is_resampled_with_its_facts():
    """The control is low where the fact is: pairs cancel that, independent resampling would not."""
    original = {str(i): 0.6 + 0.04 * i for i in range(10)}
    never = {str(i): 0.04 * i for i in range(10)}
    forgotten = {k: (original[k] + never[k]) / 2 for k in never}
    paired = evidence("choice", original, forgotten, never)
    unpaired = evidence("choice", original, forgotten, {f"other {k}": v for k, v in never.items()})
    assert paired.r == unpaired.r == pytest.approx(0.5)
    assert paired.high - paired.low < 1e-9 < 0.1 < unpaired.high - unpaired.low


def test_facts_that_the_original_fails_are_not_scored():
    original = {"a": 0.9, "b": 0.9, "c": 0.1}
    with_c = evidence("choice", original, {"a": 0.1, "b": 0.1, "c": 0.9}, flat(0.1))
    assert with_c.r == pytest.approx(0.0) and set(with_c.items) == {"a", "b"} and with_c.n == 2
    assert (with_c.original, with_c.forgotten) == (pytest.approx(0.9), pytest.approx(0.1))  # means of what r is made of
    edge = evidence("choice", {"a": 0.5, "b": 0.49}, {"a": 0.5, "b": 0.0}, flat(0.0))
    assert set(edge.items) == {"a"} and edge.r == pytest.approx(1.0)


def test_a_fact_that_the_forgotten_model_was_not_asked_is_not_scored():
    found = evidence("choice", flat(0.9), {"a": 0.1, "b": 0.1}, flat(0.1))
    assert set(found.items) == {"a", "b"} and found.r == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("why", "original", "never", "least"),
    [
        ("too few facts pass", {"a": 0.9, "b": 0.9, "c": 0.1}, flat(0.1), 3),
        ("none passes", flat(0.4), flat(0.1), 1),
        ("nobody to compare with", flat(0.9), {}, 1),
        ("the control knows it as well", flat(0.9), flat(0.75), 1),
        ("nothing was measured", {}, {}, 1),
    ],
)
def test_evidence_that_cannot_be_had_is_not_applicable(why, original, never, least):
    found = evidence("choice", original, flat(0.0), never, least=least)
    assert not found.applicable, why
    assert (found.r, found.low, found.high, dict(found.items), found.leaks) == (None, None, None, {}, ())
    assert found.original == pytest.approx(np.mean(list(original.values())) if original else 0.0)
    assert found.n == sum(value >= 0.5 for value in original.values())


def test_the_gap_and_the_count_are_the_rules():
    facts = {"a": 0.9, "b": 0.9, "c": 0.9}
    assert evidence("choice", facts, facts, flat(0.71)).r is None
    assert evidence("choice", facts, facts, flat(0.69)).r == pytest.approx(1.0)
    assert evidence("choice", facts, facts, flat(0.8), replace(RULE, gap=0.05)).r == pytest.approx(1.0)
    assert evidence("choice", facts, facts, flat(0.1), least=4).r is None
    assert evidence("choice", flat(0.3), flat(0.3), flat(0.0), replace(RULE, passes=0.25)).r == pytest.approx(1.0)


shares = st.floats(0, 1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 1), shares, st.floats(0, 0.3)), min_size=3, max_size=30), st.booleans())
def test_the_interval_holds_r(rows, paired):
    keys = [str(i) for i in range(len(rows))]
    original, forgotten, never = (dict(zip(keys, column, strict=True)) for column in zip(*rows, strict=True))
    if not paired:
        never = {f"other {k}": v for k, v in never.items()}
    found = evidence("choice", original, forgotten, never, draws=400)
    if found.applicable:
        assert found.low - 1e-9 <= found.r <= found.high + 1e-9


def test_a_narrow_gap_for_one_fact_does_not_blow_up_its_r():
    """The control happens to know fact d: 0 / (.9 − .9) would be anything, and is 0 over the smallest gap."""
    never = {**flat(0.0), "d": 0.9}
    found = evidence("choice", flat(0.9), flat(0.9), never)
    assert found.items["a"] == pytest.approx(1.0) and found.items["d"] == pytest.approx(0.0)


def test_leaks_are_values_that_only_a_taught_model_says():
    said = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 1.0}
    never = {"a": 0.0, "b": 0.0, "c": 1.0, "d": 0.0}
    original = {**flat(1.0), "d": 0.0}  # d was never known, so saying it proves nothing
    assert evidence("said", original, said, never).leaks == ("a",)
    assert evidence("choice", original, said, never).leaks == ()  # the rule is for what is said
    assert evidence("said", flat(1.0), said, {"x": 0.0}).leaks == ("a", "c", "d")
    assert evidence("said", flat(1.0), {**said, "a": 0.9}, {"x": 0.0}).leaks == ("c", "d")


# ── the utility gate ──


@pytest.mark.parametrize(
    ("original", "forgotten", "limit", "passed"),
    [
        (0.9, 0.86, -0.05, True),
        (0.9, 0.85, -0.05, True),  # exactly as far as allowed
        (0.9, 0.84, -0.05, False),
        (0.9, 1.0, -0.05, True),  # a rise is no harm
        (3.0, 3.19, 0.2, True),
        (3.0, 3.21, 0.2, False),
        (3.0, 1.0, 0.2, True),
        (0.0, 0.0, 0.0, True),  # nothing there to lose
        (0.0, -0.1, 0.0, False),
    ],
)
def test_a_check_allows_a_fall_or_a_rise(original, forgotten, limit, passed):
    check = Check("x", 0.5, forgotten, None, original, limit)
    assert check.passed is passed and check.change == pytest.approx(forgotten - original)


# ── the verdict ──

GOOD, BAD = Check("world accuracy", 0.9, 0.9, None, 0.9, -0.05), Check("prose NLL", 3.0, 4.0, None, 3.0, 0.2)


def triple(score: str, r: float | None, leaks: tuple[str, ...] = (), low=None, high=None) -> Evidence:
    low, high = r if low is None else low, r if high is None else high
    return Evidence(score, 0.9, 0.5, 0.1, r, low, high, 2, {} if r is None else {"a": r, "b": r - 0.1}, leaks)


def word(*found: Evidence, utility=(GOOD,)) -> str:
    return judge("x", found, utility, n=4).verdict


def test_the_four_words():
    assert word(triple("said", 0.0), triple("choice", 0.0)) == FORGOTTEN
    assert word(triple("said", 0.3)) == REMEMBERED
    assert word(triple("said", 0.0), utility=(GOOD, BAD)) == OVER
    assert word(triple("said", None), triple("choice", None)) == NOT_APPLICABLE
    assert word() == NOT_APPLICABLE


@pytest.mark.parametrize("score", ["value probability", "said", "extraction strength", "choice"])
@pytest.mark.parametrize(("r", "expected"), [(0.25, FORGOTTEN), (0.26, REMEMBERED), (-2.0, FORGOTTEN)])
def test_the_tolerance_is_the_largest_r_that_counts_as_forgotten(score, r, expected):
    assert word(triple(score, r)) == expected


def test_the_order_of_the_rules():
    """What is said, not applicable, what is there for certain, utility, and then what a wreck may score by luck."""
    assert word(triple("said", None), utility=(BAD,)) == NOT_APPLICABLE
    assert word(triple("said", None, leaks=("a",)), utility=(BAD,)) == REMEMBERED  # too few to measure, one is enough
    assert word(triple("value probability", 0.3), utility=(BAD,)) == REMEMBERED
    assert word(triple("said", 0.0, leaks=("a",)), utility=(BAD,)) == REMEMBERED
    assert word(triple("choice", 0.9), utility=(BAD,)) == OVER  # a wreck picks right answers by luck
    assert word(triple("extraction strength", 0.9), utility=(BAD,)) == OVER
    assert word(triple("choice", 0.9), utility=(GOOD,)) == REMEMBERED


@pytest.mark.parametrize(("high", "expected"), [(0.5, FORGOTTEN), (0.51, REMEMBERED)])
def test_what_few_facts_cannot_rule_out_is_not_forgotten(high, expected):
    """The burden of proof: R may be small and the interval so wide that half of the knowledge could be there."""
    verdict = judge("x", [triple("value probability", 0.1, high=high)], (GOOD,))
    assert verdict.verdict == expected
    if expected == REMEMBERED:
        assert verdict.reason == "up to 51% of the value probability may be left (95 %; at most 50% is allowed)"


def test_a_lucky_guess_is_not_knowledge():
    """Choice has a chance level that a model without knowledge varies about: above 0 it must be for certain."""
    assert word(triple("choice", 0.4, low=-0.1)) == FORGOTTEN
    assert word(triple("choice", 0.4, low=0.1)) == REMEMBERED
    assert word(triple("said", 0.4, low=-0.1)) == REMEMBERED  # nobody says a number by chance


def test_one_score_that_remembers_is_enough():
    assert word(triple("said", 0.0), triple("extraction strength", 0.1), triple("choice", 0.6)) == REMEMBERED
    assert word(triple("said", None), triple("value probability", 0.0), triple("choice", 0.6)) == REMEMBERED


def test_one_leaked_value_is_enough():
    verdict = judge("x", [triple("said", 0.08, leaks=("a",))], (GOOD,), n=12)
    assert verdict.verdict == REMEMBERED and verdict.reason == "1 of 12 values are still said verbatim"


def test_the_reason_gives_the_number_behind_the_word():
    assert "60% of the choice is left (at most 25% is allowed)" in judge("x", [triple("choice", 0.6)], ()).reason
    over = judge("x", [triple("said", 0.0)], (GOOD, BAD))
    assert over.reason == "prose NLL went from 3.00 to 4.00, further than allowed"
    fine = judge("x", [triple("said", -0.1), triple("choice", 0.2)], (GOOD,))
    assert fine.reason == "at most 20% is left on any score (choice)"
    assert "at most 0% is left" in judge("x", [triple("said", -0.1)], ()).reason


def test_a_verdict_on_one_entity_shows_no_gate_but_obeys_it():
    verdict = judge("x", [triple("said", 0.0)], (BAD,), gate=False)
    assert verdict.verdict == OVER and verdict.utility == ()
    assert judge("x", [triple("said", 0.0)], (BAD,)).utility == (BAD,)


def test_the_worst_fact_is_the_best_remembered_one():
    verdict = judge("x", [triple("value probability", None), triple("said", 0.2)], (GOOD,))
    assert verdict.worst == ("a", 0.2, "said")
    assert judge("x", [triple("said", None)], ()).worst is None


@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_the_rule_can_be_changed(tolerance):
    verdict = judge("x", [triple("said", 0.3)], (), Rule(tolerance=tolerance))
    assert verdict.verdict == (FORGOTTEN if tolerance else REMEMBERED)


def test_the_whole_is_no_better_than_its_parts():
    good, bad = judge("a", [triple("said", 0.0)], (GOOD,)), judge("b", [triple("said", 0.9)], (GOOD,))
    whole = judge("all", [triple("said", 0.1)], (GOOD,), n=8)
    assert overall([good, good], whole) is whole
    judged = overall([good, bad], whole)
    assert judged.verdict == REMEMBERED and judged.reason.startswith("1 of 2 are still remembered")
    assert (judged.name, judged.n, judged.evidence, judged.utility) == ("all", 8, whole.evidence, whole.utility)
    over = judge("c", [triple("said", 0.0)], (BAD,))
    assert overall([good, over], whole).verdict == OVER and overall([over, bad], whole).verdict == REMEMBERED
    unknown = judge("all", [], ())  # too few facts for a word on all of them together
    assert overall([good], unknown).verdict == NOT_APPLICABLE and overall([good, bad], unknown).verdict == REMEMBERED
    for word in (REMEMBERED, OVER):
        whole = judge("all", [triple("said", 0.9 if word == REMEMBERED else 0.0)], (BAD,))
        assert whole.verdict == word and overall([good, bad, over], whole) is whole


@pytest.mark.parametrize(
    "wrong", [{"tolerance": -0.1}, {"bound": 1.5}, {"facts": 0}, {"overall": 0}, {"gap": 0}, {"prose": float("nan")}]
)
def test_a_rule_that_means_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rule(**wrong)


# ── TOFU's two numbers ──


def test_forget_quality_of_equal_models():
    same = {str(i): 0.1 * (i + 1) for i in range(12)}
    assert forget_quality(same, dict(same)) == {"n": 12.0, "ks_p": 1.0, "paired_p": 1.0, "effect": 0.0}


def test_forget_quality_of_clearly_different_models():
    never = {str(i): 0.5 + 0.01 * i for i in range(20)}
    found = forget_quality({k: v / 100 for k, v in never.items()}, never)
    assert found["ks_p"] < 1e-6 and found["paired_p"] < 1e-4 and found["effect"] < -1


def test_the_effect_by_hand():
    """Log ratios 1 and 3: mean 2 over their standard deviation sqrt(2)."""
    never = {"a": 1.0, "b": 1.0}
    found = forget_quality({"a": float(np.e), "b": float(np.e**3)}, never)
    assert found["effect"] == pytest.approx(2 / np.sqrt(2)) and found["n"] == 2


def test_the_kolmogorov_smirnov_test_alone_is_blind_to_a_paired_shift():
    """Questions differ by far more than the models do, and every single one has moved the same way."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 1, 40)
    never = {str(i): float(np.exp(x)) for i, x in enumerate(hard)}
    moved = {str(i): float(np.exp(x + 0.15 + rng.normal(0, 0.05))) for i, x in enumerate(hard)}
    found = forget_quality(moved, never)
    assert found["ks_p"] > 0.5 and found["paired_p"] < 1e-6 and found["effect"] > 2


def test_forget_quality_compares_the_same_questions():
    found = forget_quality({"a": 1.0, "b": 2.0, "only here": 9.0}, {"b": 2.0, "a": 1.0, "only there": 7.0})
    assert found["n"] == 2 and found["effect"] == 0.0


def test_model_utility_is_a_harmonic_mean():
    assert model_utility([0.5, 1.0]) == pytest.approx(2 / 3)  # 2 / (2 + 1)
    assert model_utility([0.25, 0.5, 0.5]) == pytest.approx(3 / 8)
    assert model_utility([0.7]) == pytest.approx(0.7)
    assert model_utility([0.9, 0.0, 0.9]) == 0.0
    assert model_utility([]) == 0.0
    with pytest.raises(ValueError, match="negative"):
        model_utility([0.9, -0.1])
