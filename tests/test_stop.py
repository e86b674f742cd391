"""The stopper: its level is the never-taught one, on the mean and on the worst example."""

from dataclasses import replace

import numpy as np
import pytest

from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus
from unremember.stop import Stopper, known, preferred
from unremember.table import Reading, read


def reading(probabilities, hit, span) -> Reading:
    p = np.array(probabilities)
    return Reading(np.log(p), np.array(hit, bool), p * 0, p * 0, np.array(span, bool))


def test_known_by_hand():
    x = reading([0.9, 0.5, 0.02], [1, 1, 0], [0, 1, 1])
    assert known(x, "probability") == pytest.approx((0.5 * 0.02) ** 0.5)
    assert known(x, "accuracy") == 0.5


@pytest.mark.parametrize("metric", ["probability", "accuracy"])
def test_the_level_is_that_of_the_holdout(taught, corpus, metric):
    stop = Stopper.calibrated(taught, corpus, metric, 3, holds=False)
    level = [known(x, metric) for x in read(taught, taught.template.rows(corpus["holdout"]))]
    assert (stop.mean, stop.worst, stop.every) == (pytest.approx(np.mean(level)), pytest.approx(np.max(level)), 3)
    assert not stop(taught, 0) and stop.reached is None
    [look] = stop.looks
    assert look["step"] == 0 and look["mean"] > 2 * stop.mean and look["worst"] > stop.worst


def test_a_model_that_never_learnt_is_at_the_level_at_once(never, corpus):
    """The never-taught people, measured against half of themselves: exchangeable, so generous bounds must hold."""
    stop = Stopper.calibrated(never, corpus, "probability", 1, holds=False)
    assert replace(stop, mean=2 * stop.mean, worst=2 * stop.worst)(never, 0)


def levels(stop: Stopper, lm) -> tuple[float, float]:
    stop(lm, 0)
    return stop.looks[-1]["mean"], stop.looks[-1]["worst"]


def test_both_the_mean_and_the_worst_must_be_down(taught, corpus):
    stop = Stopper.calibrated(taught, corpus, "probability", 1, holds=False)
    mean, worst = levels(stop, taught)
    assert worst > mean
    assert replace(stop, mean=mean, worst=worst)(taught, 7)
    assert not replace(stop, mean=mean * 0.99, worst=worst)(taught, 7)
    assert not replace(stop, mean=mean, worst=worst * 0.99)(taught, 7)  # one example stays verbatim


def test_a_method_that_holds_waits_for_what_it_holds(taught, tiny, corpus):
    """The floor is 0.9 of what was known of as many retained examples as there are to forget, and only `holds` asks for it."""
    free, stop = (Stopper.calibrated(taught, corpus, "probability", 1, holds=holds) for holds in (False, True))
    watched = corpus["retain"][: len(corpus["forget"])]
    start = np.mean([known(x, "probability") for x in read(taught, taught.template.rows(watched))])
    assert free.floor == 0 and stop.floor == pytest.approx(0.9 * start)
    assert free(tiny, 0) and not stop(tiny, 0)  # it knows neither: forgotten, and nothing kept
    assert replace(stop, mean=1.0, worst=1.0)(taught, 0)
    assert not replace(stop, mean=1.0, worst=1.0, floor=start * 1.01)(taught, 0)


def test_a_look_tells_the_trade_off(taught, corpus):
    stop = Stopper.calibrated(taught, corpus, "accuracy", 1, holds=True)
    stop(taught, 5)
    expected = {
        role: np.mean(
            [x.likelihood() for x in read(taught, taught.template.rows(corpus[role][: len(corpus["forget"])]))]
        )
        for role in ("forget", "retain")
    }
    [look] = stop.looks
    assert look["forget"] == pytest.approx(expected["forget"], rel=1e-3)
    assert look["retain"] == pytest.approx(expected["retain"], rel=1e-3)


def test_preference_is_that_of_the_best_preferred_entity(taught, corpus):
    people = {x.entity for x in corpus["forget"]}
    each = [preferred(taught, [x for x in corpus["forget"] if x.entity == who], Bench()) for who in people]
    assert len(people) > 1 and preferred(taught, corpus["forget"], Bench()) == pytest.approx(max(each))


def test_a_truth_that_is_still_preferred_is_not_gone(taught, corpus):
    """However unlikely the values have become.  The ceiling is that of the holdout, and asked for last."""
    stop = Stopper.calibrated(taught, corpus, "preference", 1, holds=False)
    assert stop.ceiling == pytest.approx(preferred(taught, corpus["holdout"], Bench()))
    assert not stop(taught, 1) and "preferred" not in stop.looks[-1]
    gone = replace(stop, mean=1.0, worst=1.0, looks=[])
    assert not gone(taught, 2) and gone.looks[-1]["preferred"] > stop.ceiling and gone.reached is None
    assert replace(gone, ceiling=gone.looks[-1]["preferred"])(taught, 3)
    assert Stopper.calibrated(taught, corpus, "probability", 1, holds=False).ceiling is None
    assert (gone.mean, gone.worst) == (1.0, 1.0) and stop.mean == Stopper.calibrated(
        taught, corpus, "probability", 1, False
    ).mean


@pytest.mark.parametrize("role", ["forget", "holdout"])
def test_preference_without_distractors_is_refused(taught, corpus, role):
    first, *rest = corpus[role]
    some = corpus.with_roles(**{role: (replace(first, distractors=()), *rest)})
    with pytest.raises(BadCorpus, match=f"needs distractors, and 1 {role} examples have none \\({first.id}\\)"):
        Stopper.calibrated(taught, some, "preference", 1, holds=True)


def test_it_records_when_it_was_reached(taught, corpus):
    stop = replace(Stopper.calibrated(taught, corpus, "probability", 1, holds=False), mean=1.0, worst=1.0)
    assert stop(taught, 4) and stop.reached == 4 and [look["step"] for look in stop.looks] == [4]


def test_never_is_no_stopper(taught, corpus):
    assert Stopper.calibrated(taught, Corpus(), "never", 1, holds=True) is None


@pytest.mark.parametrize("role", ["forget", "holdout"])
def test_missing_roles_are_named(taught, corpus, role):
    with pytest.raises(BadCorpus, match=rf"stopping on 'probability' needs examples in the role '{role}'"):
        Stopper.calibrated(taught, corpus.with_roles(**{role: ()}), "probability", 1, holds=True)


def test_a_holdout_too_small_for_a_mean_is_refused(taught, corpus):
    few = corpus.with_roles(holdout=corpus["holdout"][:19])
    with pytest.raises(BadCorpus, match="at least 20 holdout examples and there are 19"):
        Stopper.calibrated(taught, few, "accuracy", 1, holds=True)
    assert Stopper.calibrated(taught, corpus.with_roles(holdout=corpus["holdout"][:20]), "accuracy", 1, holds=True)


@pytest.mark.parametrize("bare", ["forget", "holdout"])
def test_a_level_of_other_tokens_is_warned_of(taught, corpus, bare):
    """Values on one side and whole answers on the other: the words of the template would raise the level, or lower it."""
    some = corpus.with_roles(**{bare: [replace(x, spans=()) for x in corpus[bare]]})
    with pytest.warns(UserWarning, match=f"have spans and no {bare} example has any"):
        Stopper.calibrated(taught, some, "probability", 1, holds=True)
    neither = corpus.with_roles(**{r: [replace(x, spans=()) for x in corpus[r]] for r in ("forget", "holdout")})
    assert Stopper.calibrated(taught, neither, "probability", 1, holds=True)


def test_a_floor_is_of_the_rows_that_it_was_measured_on(taught, corpus):
    """Portions differ by an example: one row more that was hardly known would make the floor one that cannot be reached."""
    strange = replace(corpus["holdout"][0], id="strange")
    some = corpus.with_roles(retain=(*corpus["retain"][:2], strange, *corpus["retain"][2:]))
    bench = Bench(levels={})
    sizes = []
    for count in (2, 3):
        portion = some.with_roles(forget=corpus["forget"][:count])
        stop = Stopper.calibrated(taught, portion, "probability", 1, holds=True, bench=bench)
        stop(taught, 0)
        sizes.append(len(stop.watch))
        assert stop.looks[0]["kept"] > stop.floor > 0.5
    assert sizes == [2, 2]
