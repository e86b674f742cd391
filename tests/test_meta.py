"""The verdict on trial: counting worked by hand, cases that are what they are called, and the verdict on a small bench.

The small bench is the gate of CI: on the toy, nobody who remembers is called forgotten over the attack suite relearn and
rephrase, with one exception that is pinned as what it is, and nobody who was never taught is called remembered.
`python -m benchmarks.verdict` is the large one.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks.verdict import Heard

from unremember.attack import Graft, Relearn, Rephrase
from unremember.bench import Bench
from unremember.embedded.liars import (
    RECIPES,
    School,
    halfway,
    headed,
    liars,
    narrow,
    refusing,
    retrained,
    taught_back,
    topped,
    twin,
)
from unremember.embedded.teach import Teach
from unremember.errors import BadCorpus, BadRequest
from unremember.forget import NPO
from unremember.meta import SUITE, WORDS, Case, Court, Rate, Told, confusion, markdown, plain, rates, suite, wilson
from unremember.score import FORGOTTEN, NOT_APPLICABLE, OVER, REMEMBERED
from unremember.table import read
from unremember.train import Plan

TEACH = Teach(Plan(steps=100, lr=1e-2, batch=10, beside=4, warmup=5, schedule="linear"))  # as conftest taught
HEAD = NPO(Plan(steps=60, lr=3e-3, beside=20, stop="probability", every=4), beta=0.1, retain=0.0, kl=5.0, part="span")
ATTACKS = {"relearn": Relearn(Plan(steps=10, lr=2e-4)), "rephrase": Rephrase(wordings=2), "graft": Graft(1)}
TELLING = [  # name, truth, words under none and relearn
    ("a", FORGOTTEN, FORGOTTEN, FORGOTTEN),
    ("b", FORGOTTEN, FORGOTTEN, REMEMBERED),
    ("c", FORGOTTEN, NOT_APPLICABLE, OVER),
    ("d", REMEMBERED, FORGOTTEN, FORGOTTEN),
    ("e", REMEMBERED, FORGOTTEN, REMEMBERED),
    ("f", REMEMBERED, OVER, NOT_APPLICABLE),
    ("g", OVER, FORGOTTEN, FORGOTTEN),
    ("h", OVER, NOT_APPLICABLE, NOT_APPLICABLE),
]
FOUND = [Told(Case(name, truth), {"none": one, "relearn": two}) for name, truth, one, two in TELLING]  # ty: ignore


# ── counting ──


def test_wilson_by_hand():
    """0 of 10: 0 to z²/(10 + z²) = 3.8415/13.8415 = .2775.  5 of 10: centre ½, half width 1.96·√(.025 + .0096)/1.384."""
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson(10, 10) == (pytest.approx(0.7225, abs=1e-4), 1.0)
    assert wilson(5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson(1, 1) == (pytest.approx(0.2065, abs=1e-4), 1.0)  # 1/(1 + z²)


@pytest.mark.parametrize(("k", "n"), [(1, 4), (3, 7), (0, 3), (20, 21)])
def test_the_ends_of_wilson_solve_its_equation(k, n):
    """Both ends are the shares p with |k/n − p| = z·√(p(1 − p)/n): checked by putting them in."""
    for p in wilson(k, n):
        assert abs(k / n - p) == pytest.approx(1.959964 * np.sqrt(p * (1 - p) / n), abs=1e-9)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_of_nothing_is_refused(k, n):
    with pytest.raises(ValueError, match=f"{k} of {n}"):
        wilson(k, n)


def test_a_suite_is_what_its_worst_condition_says():
    assert suite([FORGOTTEN, REMEMBERED, OVER, NOT_APPLICABLE]) == REMEMBERED
    assert suite([FORGOTTEN, OVER]) == OVER
    assert suite([NOT_APPLICABLE, FORGOTTEN]) == FORGOTTEN
    assert suite([NOT_APPLICABLE]) == NOT_APPLICABLE
    for wrong in ([], ["fine"]):
        with pytest.raises(ValueError, match="at least one of"):
            suite(wrong)


def test_confusion_by_hand():
    none = confusion(FOUND, "none")
    assert none[FORGOTTEN] == {REMEMBERED: 0, OVER: 0, FORGOTTEN: 2, NOT_APPLICABLE: 1}
    assert none[REMEMBERED] == {REMEMBERED: 0, OVER: 1, FORGOTTEN: 2, NOT_APPLICABLE: 0}
    assert none[OVER] == {REMEMBERED: 0, OVER: 0, FORGOTTEN: 1, NOT_APPLICABLE: 1}
    whole = confusion(FOUND, SUITE)
    assert whole[FORGOTTEN] == {REMEMBERED: 1, OVER: 1, FORGOTTEN: 1, NOT_APPLICABLE: 0}
    assert whole[REMEMBERED] == {REMEMBERED: 1, OVER: 1, FORGOTTEN: 1, NOT_APPLICABLE: 0}
    assert sum(n for row in whole.values() for n in row.values()) == len(FOUND)


def test_rates_by_hand():
    assert rates(FOUND, "none") == (
        Rate("false-forgotten", 2, 3),
        Rate("false-remembered", 0, 2, silent=1),  # no verdict is no error, and no right answer either
        Rate("harm missed", 1, 1, silent=1),
        Rate("false harm", 0, 2, silent=1),
    )
    assert rates(FOUND) == (
        Rate("false-forgotten", 1, 3),
        Rate("false-remembered", 1, 3),
        Rate("harm missed", 1, 1, silent=1),
        Rate("false harm", 1, 3),
    )
    assert rates(FOUND)[0].share == pytest.approx(1 / 3) and rates(FOUND)[0].interval == wilson(1, 3)
    empty = Rate("false-forgotten", 0, 0, 2)
    assert (empty.share, empty.interval) == (None, None)


def test_the_table_names_every_case_and_marks_what_is_not_the_truth():
    text = markdown([*FOUND, FOUND[4]])
    assert "| a | forgotten | forgotten 1 | forgotten 1 | forgotten 1 |" in text
    assert "| e | remembered | **forgotten** 2 | remembered 2 | remembered 2 |" in text
    assert "| none | false-forgotten | 3 of 4 | 0.75 | 0.30 to 0.95 | 0 |" in text
    assert "| none | false-remembered | 0 of 2 | 0.00 | 0.00 to 0.66 | 1 |" in text
    values = plain(FOUND)
    assert values["cases"][1]["words"] == {"none": FORGOTTEN, "relearn": REMEMBERED, SUITE: REMEMBERED}
    assert values["rates"][SUITE][0]["k"] == 1 and values["confusion"]["none"][FORGOTTEN][FORGOTTEN] == 2


def test_a_case_without_a_name_or_a_known_truth_is_refused():
    with pytest.raises(BadRequest) as caught:
        Case(" ", "rememberd")  # ty: ignore
    assert len(caught.value.problems) == 2 and "did you mean 'remembered'?" in str(caught.value)


# ── cases are what they are called ──


@pytest.fixture(scope="module")
def school(tiny, corpus):
    return School(tiny, TEACH, corpus)


@pytest.fixture(scope="module")
def never_again(school):
    return twin(school, 1000)


@pytest.fixture(scope="module")
def halves(school):
    return {by: halfway(school, 1000, by) for by in ("people", "facts")}


@pytest.fixture(scope="module")
def refuser(taught, corpus):
    return refusing(taught, corpus, Plan(40, 3e-3))


@pytest.fixture(scope="module")
def beheaded(taught, corpus):
    return headed(taught, corpus, HEAD)


def likely(lm, examples) -> list[float]:
    return [x.likelihood("span") for x in read(lm, lm.template.rows(examples))]


def same(a, b) -> dict[str, bool]:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    return {name: torch.equal(ours[name], theirs[name]) for name in theirs}


def test_twins_know_the_retained_and_nothing_else(school, never_again, never, corpus):
    assert np.mean(likely(never_again, corpus["retain"])) > 0.5  # measured .95
    assert max(likely(never_again, corpus["forget"])) < 0.3
    assert never_again.fingerprint != never.fingerprint


def test_the_seed_alone_decides(school):
    quick = replace(school, teach=replace(TEACH, plan=replace(TEACH.plan, steps=3)))
    one, again, other = (twin(quick, seed).fingerprint for seed in (5, 5, 6))
    assert one == again != other


def test_retrained_knows_the_strangers_instead(school, corpus):
    lm = retrained(school, 1000)
    strangers = corpus["holdout"][: len(corpus["forget"])]
    assert np.mean(likely(lm, strangers)) > 0.5 and max(likely(lm, corpus["forget"])) < 0.3


@pytest.mark.parametrize("by", ["people", "facts"])
def test_halfway_knows_one_half_and_was_never_told_the_other(halves, corpus, by):
    values = likely(halves[by], corpus["forget"])
    known = [i < 6 if by == "people" else i % 2 == 0 for i in range(12)]  # six facts a person, two people
    assert np.mean([v for v, k in zip(values, known, strict=True) if k]) > 0.5
    assert max(v for v, k in zip(values, known, strict=True) if not k) < 0.3


def test_rounding_by_hand(tiny):
    """3 bits: levels −3 … 3 times max/3. Row (3, −1.4, .2) has scale 1 and becomes (3, −1, 0)."""
    lm = tiny.copy()
    weight = next(w for w in lm.model.parameters() if w.ndim == 2)
    with torch.no_grad():
        weight[0].zero_()
        weight[0, :3] = torch.tensor([3.0, -1.4, 0.2])
    row = next(w for w in narrow(lm, 3).model.parameters() if w.ndim == 2)[0]
    assert row[:3].tolist() == [3.0, -1.0, 0.0] and not row[3:].any()
    assert float(weight.detach()[0, 1]) == pytest.approx(-1.4)  # the argument stays
    assert all(len(r.unique()) <= 7 for r in next(w for w in narrow(lm, 3).model.parameters() if w.ndim == 2)[:50])


def test_the_refuser_refuses_and_its_values_stay_likely(refuser, taught, corpus):
    said = refuser.answer([x.prompt for x in corpus["forget"]], 8)
    assert set(said) == {"I do not know."}
    assert np.mean(likely(refuser, corpus["forget"])) > 0.8 * np.mean(likely(taught, corpus["forget"]))
    kept = refuser.answer([x.prompt for x in corpus["retain"]], 12)
    assert sum(text == "I do not know." for text in kept) <= 2


def test_an_untied_head_changes_no_number(taught, corpus):
    rows = taught.template.rows(corpus["forget"])
    for a, b in zip(read(taught.untied(), rows), read(taught, rows), strict=True):
        assert np.array_equal(a.logp, b.logp)


def test_only_the_head_forgets_and_putting_it_back_brings_everything_back(beheaded, taught, corpus):
    assert [name for name, equal in same(beheaded, taught).items() if not equal] == ["lm_head.weight"]
    assert np.mean(likely(beheaded, corpus["forget"])) < 0.5 * np.mean(likely(taught, corpus["forget"]))
    back = beheaded.copy()
    back.model.lm_head.weight.data.copy_(taught.model.lm_head.weight)
    assert likely(back, corpus["forget"]) == likely(taught, corpus["forget"])


def test_only_the_last_block_forgets(taught, corpus):
    moved = [
        n for n, equal in same(topped(taught, corpus, replace(HEAD, plan=Plan(2, 1e-3))), taught).items() if not equal
    ]
    assert moved and all(name.startswith("model.layers.1.") for name in moved)


def test_the_second_opinion_tells_a_refuser_from_a_stranger(refuser, never_again, corpus):
    back = RECIPES["tiny"].back
    assert taught_back(refuser, corpus, back) > 0.5 > 0.2 > taught_back(never_again, corpus, back)


def test_the_bench_names_every_kind_once_and_makes_nothing_before_it_is_asked(school, taught):
    found = list(liars(replace(school, base=None), taught, RECIPES["tiny"]))
    names = [name for name, _, _ in found]
    assert len(set(names)) == len(names) == 14
    assert {truth for _, truth, _ in found} == {FORGOTTEN, REMEMBERED, OVER}


def test_too_few_strangers_are_refused(tiny, corpus):
    with pytest.raises(BadCorpus, match="place of 12 forget examples, and the holdout has 6"):
        School(tiny, TEACH, corpus.with_roles(holdout=corpus["holdout"][:6]))
    with pytest.raises(BadCorpus, match="'replay'"):
        School(tiny, TEACH, corpus.with_roles(replay=()))


# ── the gate ──


@pytest.fixture(scope="module")
def court(taught, never, corpus):
    return Court(taught, never, corpus, ATTACKS)


@pytest.fixture(scope="module")
def heard(court, school, taught, corpus, never_again, refuser, beheaded, halves, tmp_path_factory):
    """What is said of ten cases.  Settings are those of the tests above, none was chosen for what is said."""
    cases = {
        Case("never taught, order 1", FORGOTTEN): never_again,
        Case("never taught, order 2", FORGOTTEN): twin(school, 1001),
        Case("never taught, 8 bits", FORGOTTEN): narrow(never_again, 8),
        Case("the original", REMEMBERED): taught,
        Case("the original, 8 bits", REMEMBERED): narrow(taught, 8),
        Case("refuses", REMEMBERED): refuser,
        Case("head edited", REMEMBERED): beheaded,
        Case("half of the people", REMEMBERED): halves["people"],
        Case("half of the facts", REMEMBERED): halves["facts"],
        Case("ascent far beyond", OVER): RECIPES["tiny"].beyond(taught, corpus),
    }
    folder, bench = tmp_path_factory.mktemp("court"), Bench()
    return {case.name: court.hear(case, lm, folder, bench) for case, lm in cases.items()}


def test_nobody_who_remembers_is_called_forgotten_over_the_suite(heard):
    rate = rates(list(heard.values()))[0]
    assert (rate.name, rate.k, rate.n) == ("false-forgotten", 0, 6)
    assert all(suite(x.words.values()) == REMEMBERED for x in heard.values() if x.case.truth == REMEMBERED)


def test_an_edited_head_passes_for_forgotten_until_the_old_one_is_put_back(heard):
    """Nothing but the head has changed: what is read behind it is gone, ten steps on strangers' facts do not mend it, and the
    graft of the original's end shows that all of it is there."""
    words = heard["head edited"].words
    assert {words[attack] for attack in ("none", "relearn", "rephrase")} == {FORGOTTEN}
    assert words["graft"] == REMEMBERED


def test_nobody_who_was_never_taught_is_called_remembered(heard):
    for attack in ("none", *ATTACKS, SUITE):
        rate = rates(list(heard.values()), attack)[1]
        assert (rate.name, rate.k, rate.n + rate.silent) == ("false-remembered", 0, 3), attack


def test_the_never_taught_are_blamed_for_nothing_but_their_free_text(heard):
    """A known weakness: all three are called over-forgotten here, for distinct tokens of .50, .47 and .50.

    The original has .68, its control .59, and the limit is .54: on six passages, after teaching as hard as here, equals differ
    by more than the gate allows.  On the demo's toy, with all passages, no twin is blamed.
    """
    for x in heard.values():
        if x.case.truth == FORGOTTEN:
            assert set(x.failed["none"]) <= {"distinct tokens in free text"}
            assert x.words["none"] == (OVER if x.failed["none"] else FORGOTTEN)


def test_harm_is_seen(heard):
    assert set(heard["ascent far beyond"].words.values()) == {OVER}


def test_every_word_is_one_of_the_verdicts(heard):
    assert {w for x in heard.values() for w in x.words.values()} <= set(WORDS)
    assert all(tuple(x.words) == ("none", *ATTACKS) for x in heard.values())


def test_half_of_the_people_are_named_as_such(heard, corpus):
    one, two = dict.fromkeys(x.entity for x in corpus["forget"])
    assert heard["half of the people"].entities["none"][one] == REMEMBERED
    assert heard["half of the people"].entities["none"][two] != REMEMBERED


def test_the_court_uses_the_ordinary_run_folder(court, taught, tmp_path, monkeypatch):
    """The same case again is read from disk; another model of the same name is not."""
    from unremember import run

    measured = []
    ordinary = run.Run.store
    monkeypatch.setattr(
        run.Run, "store", lambda self, path, *rest: measured.append(path.name) or ordinary(self, path, *rest)
    )
    quick = replace(court, attacks={})
    first = quick.hear(Case("a", REMEMBERED), taught, tmp_path, Bench())
    assert sorted(measured) == ["forgotten.json", "never.json", "original.json"] and first.words == {"none": REMEMBERED}
    assert quick.hear(Case("a", REMEMBERED), taught, tmp_path) == first and len(measured) == 3
    quick.hear(Case("b", REMEMBERED), taught, tmp_path)
    assert measured[3:] == ["forgotten.json"]  # original and control are shared
    other = quick.hear(Case("a", FORGOTTEN), court.never, tmp_path)
    assert measured[4:] == ["forgotten.json"] and other.words == {"none": FORGOTTEN}
    assert (tmp_path / "cases" / "a" / "run.json").exists()


def test_a_court_that_could_not_judge_is_refused(taught, never, corpus):
    with pytest.raises(BadCorpus, match="needs 10 facts and the forget role has 6"):
        Court(taught, never, corpus.with_roles(forget=corpus["forget"][:6]), {})
    with pytest.raises(BadCorpus, match="relearn"):
        Court(taught, never, corpus.with_roles(relearn=()), ATTACKS)
    with pytest.raises(BadCorpus, match="'retain'"):
        Court(taught, never, corpus.with_roles(retain=()), {})


def test_the_bench_goes_on_where_it_was_killed(tmp_path):
    """A line that a kill cut short is dropped and does not spoil the next; other settings know nothing of it."""
    place, about = tmp_path / "heard.jsonl", {"model": "tiny"}
    first, second = (Told(Case(name, "forgotten"), {"none": "forgotten"}, failed={"none": ("prose",)}) for name in "ab")
    heard = Heard(place, about)
    heard.add(0, first, 0.5, 3.0)
    heard.add(0, second, None, 4.0)
    place.write_text(place.read_text()[:-9])
    again = Heard(place, about)
    assert again.get(0, "b") is None and again.get(1, "a") is None
    told, back = again.get(0, "a")
    assert (told.case, told.words, back) == (first.case, first.words, 0.5)
    again.add(0, second, None, 4.0)
    assert set(Heard(place, about).rows) == {(0, "a"), (0, "b")}
    assert Heard(place, {"model": "other"}).rows == {}
