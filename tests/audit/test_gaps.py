"""Comparisons of two models: Jensen-Shannon as in the textbook, perplexities that rose and by how much."""

from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unremember.audit.gaps import divergence, jsd, perplexities, shifts
from unremember.bench import Bench
from unremember.errors import BadModel
from unremember.table import Reading, read


def reading(*probabilities: float) -> Reading:
    p = np.array(probabilities)
    return Reading(np.log(p), p > 1, p * 0, p * 0, np.array([True] * len(p)))


# ── Jensen-Shannon ──


def test_jsd_by_hand():
    """p = (1/2, 1/2), q = (1, 0), m = (3/4, 1/4): half of ½ log(2/3) + ½ log 2, and half of log(4/3)."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    expected = 0.5 * (0.5 * log(2 / 3) + 0.5 * log(2)) + 0.5 * log(4 / 3)
    assert jsd(p, q).item() == pytest.approx(expected, rel=1e-6)


def test_jsd_has_known_ends():
    sure, other = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    assert jsd(sure, other).item() == pytest.approx(log(2))
    assert jsd(sure, sure).item() == 0


def test_the_arguments_are_not_swapped():
    """The published code takes ½ KL(m ‖ p) + ½ KL(m ‖ q), which grows without end where one model is sure."""
    p, q = torch.tensor([[0.0, -50.0]]).log_softmax(-1), torch.tensor([[-50.0, 0.0]]).log_softmax(-1)
    middle = torch.logaddexp(p, q) - log(2)
    swapped = 0.5 * sum((middle.exp() * (middle - x)).sum(-1) for x in (p, q))
    assert swapped.item() > 20 and jsd(p, q).item() == pytest.approx(log(2), abs=1e-5)


@given(st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=2, max_size=8))
def test_jsd_is_symmetric_and_bounded(pairs):
    p, q = torch.tensor(pairs, dtype=torch.float64).T.log_softmax(-1)[:, None]
    assert jsd(p, q).item() == pytest.approx(jsd(q, p).item(), abs=1e-12)
    assert -1e-12 <= jsd(p, q).item() <= log(2) + 1e-12


def test_the_divergence_of_two_models_the_slow_way(taught, never, corpus):
    rows = taught.template.rows(corpus["forget"][:5])
    found = divergence(taught, never, rows, Bench(budget=60))
    for row in rows:
        with torch.no_grad():
            p, q = (
                lm.model(input_ids=torch.tensor([row.ids])).logits[0].double().softmax(-1)[row.start - 1 : row.stop - 1]
                for lm in (taught, never)
            )
        middle = (p + q) / 2
        slow = 0.5 * ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1))
        assert found[row.key] == pytest.approx(slow.mean().item(), rel=1e-3)
    assert divergence(never, taught, rows) == {key: pytest.approx(x, rel=1e-4) for key, x in found.items()}
    assert max(divergence(taught, taught, rows).values()) < 1e-6 < 0.05 < min(found.values())


def test_other_vocabularies_are_refused(tiny, corpus):
    class Longer:
        def __len__(self):
            return len(tiny.tokenizer) + 1

    other = replace(tiny, template=replace(tiny.template, tokenizer=Longer()), name="other")
    with pytest.raises(BadModel, match=r"'tiny' and 'other' have vocabularies of \d+ and \d+ .* the same tokenizer"):
        divergence(tiny, other, tiny.template.rows(corpus["forget"][:1]))


# ── perplexities ──


def test_shifts_by_hand():
    """Perplexities 2, 4, 10 and 4, 3, 10: apart by 2, 1, 0; over the baseline's 1, ¼, 0; one of three rose."""
    baseline = [reading(0.5, 0.5), reading(0.25), reading(0.1)]
    unlearned = [reading(0.5, 0.125), reading(1 / 3), reading(0.1)]
    np.testing.assert_allclose(perplexities(baseline), [2, 4, 10])
    found = shifts(baseline, unlearned)
    assert found == {
        "n": 3.0,
        "Diff1": pytest.approx(1.0),
        "LPD": pytest.approx(1.25 / 3),
        "PDLP": pytest.approx(1 / 3),
    }


def test_shifts_have_a_direction():
    """LPD divides by the baseline, and PDLP counts what became less likely."""
    known, unknown = [reading(0.5)], [reading(0.25)]
    assert shifts(known, unknown) == {"n": 1.0, "Diff1": 2.0, "LPD": 1.0, "PDLP": 1.0}
    assert shifts(unknown, known) == {"n": 1.0, "Diff1": 2.0, "LPD": 0.5, "PDLP": 0.0}


def test_a_perplexity_is_that_of_the_mean_token_and_may_be_infinite():
    assert perplexities([reading(0.5, 0.02)])[0] == pytest.approx(exp(-(log(0.5) + log(0.02)) / 2))
    beyond = Reading(np.array([-800.0]), *[np.array([False])] * 3, np.array([True]))
    assert perplexities([beyond])[0] == np.inf and shifts([reading(0.5)], [beyond])["PDLP"] == 1


def test_forgetting_what_was_known_shows(taught, never, corpus):
    """The oracle as the unlearned model: every forget answer is less likely to it, and far; what both know is near."""
    forget, retain = (
        shifts(*(read(lm, lm.template.rows(corpus[role])) for lm in (taught, never))) for role in ("forget", "retain")
    )
    assert forget["PDLP"] == 1 and forget["LPD"] > 10 > 0.5 > retain["LPD"]
    same = read(taught, taught.template.rows(corpus["forget"]))
    assert shifts(same, same) == {"n": len(same), "Diff1": 0.0, "LPD": 0.0, "PDLP": 0.0}


@pytest.mark.parametrize(("one", "other"), [(1, 2), (2, 1), (0, 0)])
def test_readings_of_other_rows_are_refused(one, other):
    with pytest.raises(ValueError, match=f"{one} readings against {other}"):
        shifts([reading(0.5)] * one, [reading(0.5)] * other)
