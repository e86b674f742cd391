"""Tables: the numbers are those of a slow obvious pass, known ends are hit, nothing is read twice or changed."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from unremember.bench import Bench
from unremember.lm import LM
from unremember.table import Reading, answers, moments, read, recalled, saved, table

FIELDS = ("logp", "hit", "mean", "sd", "span")


@pytest.fixture(scope="module")
def rows(tiny, corpus):
    return tiny.template.rows((*corpus["forget"], *corpus["world"][:8], *corpus["prose"][:3]))


def counted() -> tuple[Bench, list[str]]:
    """A workbench, and the list of what was ever done on it."""
    calls: list[str] = []
    return Bench(say=lambda stage, *_: calls.append(stage)), calls


def close(a: Reading, b: Reading, atol: float = 2e-4) -> None:
    for name in FIELDS:
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=atol, rtol=1e-4, err_msg=name)


# ── the numbers ──


def test_a_reading_equals_a_slow_pass(taught, rows):
    for row, found in zip(rows, read(taught, rows), strict=True):
        with torch.no_grad():
            logits = taught.model(input_ids=torch.tensor([row.ids])).logits[0].double()
        logp = logits.log_softmax(-1)[row.start - 1 : row.stop - 1]  # (T, V): content tokens, no end mark
        target = torch.tensor(row.ids[row.start : row.stop])
        mean = (logp.exp() * logp).sum(-1)
        sd = (logp.exp() * (logp - mean[:, None]) ** 2).sum(-1).sqrt()
        own = logp.gather(1, target[:, None])[:, 0]
        close(
            found,
            Reading(own.numpy(), (logp.argmax(-1) == target).numpy(), mean.numpy(), sd.numpy(), np.array(row.span)),
        )


def test_likelihoods_by_hand():
    half = Reading(np.log([0.5, 0.25, 1.0]), *[np.zeros(3)] * 3, np.array([True, True, False]))
    assert half.likelihood() == pytest.approx((0.5 * 0.25) ** (1 / 3))
    assert half.likelihood("span") == pytest.approx(0.125**0.5)
    assert half.loglikelihood("span") == pytest.approx(math.log(0.125) / 2)
    assert half.total() == half.total("span") == pytest.approx(math.log(0.125))


def test_moments_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    own, hit, mean, sd = moments(p.log(), torch.tensor([0, 2]))
    torch.testing.assert_close(own, torch.tensor([0.5, 1 / 3]).log())
    assert hit.tolist() == [True, False]
    log2 = math.log(2)
    # log p is -log 2 or -2 log 2, each with probability 1/2: mean -1.5 log 2, deviation 0.5 log 2
    torch.testing.assert_close(mean, torch.tensor([-1.5 * log2, -math.log(3)]))
    torch.testing.assert_close(sd, torch.tensor([0.5 * log2, 0.0]), atol=1e-3, rtol=1e-4)


def test_moments_with_zero_probabilities():
    logits = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    _, _, mean, sd = moments(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(mean, torch.tensor([-math.log(2), 0.0]))
    torch.testing.assert_close(sd, torch.tensor([0.0, 0.0]), atol=1e-3, rtol=0)


# ── the known ends ──


def test_a_uniform_model_knows_nothing(tiny, rows):
    flat = tiny.copy()
    with torch.no_grad():
        flat.model.get_output_embeddings().weight.zero_()
    size = flat.model.config.vocab_size
    for x in read(flat, rows):
        np.testing.assert_allclose(x.logp, -math.log(size), rtol=1e-5)
        np.testing.assert_allclose(x.mean, -math.log(size), rtol=1e-5)
        np.testing.assert_allclose(x.sd, 0, atol=5e-3)  # a root of a float32 difference
        assert x.likelihood() == pytest.approx(1 / size, rel=1e-4)


class Memoriser(LM):
    """Says every answer with certainty, and gives everything else no chance at all."""

    def logits(self, tokens):
        certain = torch.full((len(tokens.target), self.model.config.vocab_size), -torch.inf)
        return certain.scatter(1, tokens.target[:, None], 0.0)


def test_a_perfect_memoriser_knows_everything(tiny, rows):
    for x in read(Memoriser(tiny.model, tiny.template), rows):
        assert x.hit.all() and x.likelihood() == x.likelihood("span") == 1
        assert not x.logp.any() and not x.mean.any() and not x.sd.any()


# ── what must not matter ──


@pytest.mark.parametrize("budget", [1, 300, 100_000])
def test_the_budget_changes_only_rounding(taught, rows, budget):
    for a, b in zip(read(taught, rows, Bench(budget=budget)), read(taught, rows, Bench()), strict=True):
        close(a, b)


def test_the_order_of_the_rows_changes_nothing(taught, rows):
    for a, b in zip(read(taught, rows[::-1])[::-1], read(taught, rows), strict=True):
        close(a, b)


def test_two_rows_of_one_key_are_not_confused(taught, rows):
    first, second = (replace(row, key="same") for row in rows[:2])
    for a, b in zip(
        read(taught, [first, second, first]), (*read(taught, rows[:2]), *read(taught, rows[:1])), strict=True
    ):
        close(a, b)


def test_reading_changes_neither_weights_nor_mode(tiny, rows):
    lm = tiny.copy()
    before = lm.fingerprint
    grads = [w.requires_grad for w in lm.model.parameters()]
    read(lm, rows)
    assert lm.copy().fingerprint == before and not lm.model.training
    assert [w.requires_grad for w in lm.model.parameters()] == grads and torch.is_grad_enabled()


def test_no_rows_are_no_readings(tiny, bench):
    assert read(tiny, []) == [] == table(tiny, [], bench)


# ── memory ──


def test_no_row_is_read_twice(taught, rows):
    bench, calls = counted()
    first = table(taught, rows, bench)
    asked = len(calls)
    assert asked and set(calls) == {"read"}
    again = table(taught, [*rows[::-1], *rows], bench)
    assert len(calls) == asked and again == [*first[::-1], *first]  # the very same readings


def test_only_new_rows_are_read(taught, rows):
    bench, calls = counted()
    table(taught, rows[:-1], bench)
    asked = len(calls)
    assert table(taught, rows, bench)[-1].logp.shape == (rows[-1].stop - rows[-1].start,)
    assert len(calls) == asked + 1


def test_another_model_another_span_or_another_end_is_read_anew(taught, tiny, rows):
    bench, calls = counted()
    [known] = table(taught, rows[:1], bench)
    [other] = table(tiny, rows[:1], bench)
    assert len(calls) == 2 and not np.allclose(known.logp, other.logp)
    flipped = replace(rows[0], span=tuple(not x for x in rows[0].span))
    [turned] = table(taught, [flipped], bench)
    assert len(calls) == 3 and (turned.span != known.span).all()


def test_a_model_changed_after_a_copy_is_another_model(tiny, rows):
    bench, calls = counted()
    other = tiny.copy()
    with torch.no_grad():
        other.model.model.norm.weight.mul_(0.5)
    assert table(tiny, rows[:1], bench)[0].logp[0] != table(other, rows[:1], bench)[0].logp[0]
    assert len(calls) == 2


def test_answers_are_decoded_once(taught, corpus):
    bench, calls = counted()
    prompts = [taught.template.context(x.prompt) for x in corpus["forget"]]
    said = answers(taught, prompts, 24, bench)
    assert said == taught.answer([x.prompt for x in corpus["forget"]], 24)
    asked = len(calls)
    assert answers(taught, prompts[::-1], 24, bench) == said[::-1] and len(calls) == asked
    assert (
        answers(taught, prompts[:1], 2, bench) != said[:1] and len(calls) == asked + 1
    )  # another length, another answer


def test_broken_weights_are_reported(tiny, rows):
    broken = tiny.copy()
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="tiny gives probabilities that are not finite"):
        read(broken, rows)


def test_what_is_saved_is_given_back_bit_for_bit(tiny, moved, rows):
    """Through JSON into another bench, where nothing is read or said again; another model gets nothing of it."""
    first, (second, calls), (third, more) = Bench(), counted(), counted()
    prompts = [row.ids[: row.start] for row in rows[:4]]
    found, said = table(tiny, rows, first), answers(tiny, prompts, 5, first)
    for lm, bench in ((tiny, second), (moved, third)):
        recalled(lm, json.loads(json.dumps(saved(tiny, first))), bench)
    again = table(tiny, rows, second)
    assert answers(tiny, prompts, 5, second) == said and not calls
    for a, b in zip(found, again, strict=True):
        for name in FIELDS:
            one, other = getattr(a, name), getattr(b, name)
            assert one.dtype == other.dtype and np.array_equal(one, other)
    table(moved, rows[:2], third)
    assert "read" in more
