"""The tree of errors: codes, collected problems, and the nearest known name."""

import pytest

from unremember import errors
from unremember.errors import BadCorpus, BadFolder, BadInput, BadModel, BadRequest, Diverged, Interrupted, nearest


def test_every_error_is_one_of_ours():
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(found) == 9
    assert all(issubclass(error, errors.UnrememberError) for error in found)


@pytest.mark.parametrize("error", [BadRequest, BadCorpus, BadModel, BadFolder])
def test_bad_input_keeps_every_problem(error):
    raised = error(problem for problem in ["first", "second"])
    assert isinstance(raised, BadInput)
    assert raised.problems == ("first", "second")
    assert str(raised) == "first\nsecond"
    assert raised.code == 2


def test_one_problem_may_be_given_as_text():
    assert BadCorpus("only").problems == ("only",)


def test_diverged_says_where_and_what_to_try():
    raised = Diverged(7, {"forget": float("nan"), "retain": 1.5})
    assert (raised.step, raised.terms["retain"], raised.code) == (7, 1.5, 3)
    assert "step 7 (forget = nan, retain = 1.5)" in str(raised)
    assert "learning rate ten times smaller" in str(raised) and "retain term" in str(raised)


def test_interrupted_exits_like_ctrl_c():
    assert Interrupted.code == 130


@pytest.mark.parametrize(
    ("given", "known", "said"),
    [
        ("forgt", ["retain", "forget"], "did you mean 'forget'?"),
        ("forget", ["forget", "forget2"], "did you mean 'forget'?"),
        ("zzz", ["retain", "forget"], "known: forget, retain"),  # sorted
        ("", ["b", "a"], "known: a, b"),
    ],
)
def test_nearest(given, known, said):
    assert nearest(given, known) == said
    assert nearest(given, iter(known)) == said
