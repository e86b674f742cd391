"""Training under control and forgetting by itself, on models of seconds; bounds beside what was measured."""

import pytest
import torch

from unremember.dynamics import models, text
from unremember.dynamics.curves import time
from unremember.dynamics.forgetting import NOTHING, Insertion, arm, compared, forget
from unremember.dynamics.loop import FIXED, FRESH, Regime, Training, logits_at, masks, read
from unremember.errors import BadCorpus, BadModel, BadRequest, Diverged

LENGTH = 24


def training(kind="causal", width=32, seed=0, lr=3e-3) -> Training:
    make = models.decoder if kind == "causal" else models.encoder
    return Training(make(text.VOCABULARY, width, LENGTH + 1, seed), Regime(lr, batch=16, kind=kind, seed=seed))


def weights(run: Training) -> list[torch.Tensor]:
    return [w.detach().clone() for w in run.model.parameters()]


def same(a: Training, b: Training) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.fixture(scope="module")
def train():
    return text.markov(64, LENGTH, 0)


@pytest.fixture(scope="module")
def begun(train):
    """A model on its way: 12 epochs; not to be changed, arms fork it."""
    run = training(width=64)
    for _ in range(12):
        run.train(train)
    return run


def test_m_is_next_token_accuracy_by_a_slow_reading(begun, train):
    seen = begun.read(train)
    right, total, loss = 0, 0, 0.0
    for row in train.rows()[:8]:
        for place in range(1, len(row)):
            logits = begun.model(input_ids=torch.tensor([row[:place]])).logits[0, -1]
            right += int(logits.argmax()) == row[place]
            loss -= float(logits.log_softmax(-1)[row[place]].detach())
            total += 1
    first = slice(0, 8)
    assert seen.hit[first].sum() == right and seen.counted[first].sum() == total
    assert seen.nll[first][seen.counted[first]].mean() == pytest.approx(loss / total, rel=1e-4)
    assert (seen.predicted[seen.hit] == train.ids.numpy()[seen.hit]).all()


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_padding_and_batch_change_nothing(kind):
    rows = text.markov(6, 9, 3).rows()
    run = training(kind)
    both = text.sequences([rows[0][:5], *rows[1:]])
    alone = text.sequences([rows[0][:5]])
    chosen = torch.zeros_like(both.ids, dtype=torch.bool)
    chosen[0, 2] = True
    with torch.no_grad():
        a, _ = logits_at(run.model, both, chosen, kind, run.mask_id)
        b, _ = logits_at(run.model, alone, chosen[:1, :5], kind, run.mask_id)
    assert torch.allclose(a, b, atol=1e-4)
    one, two = (read(run.model, both, Regime(1e-3, batch=n, kind=kind), run.mask_id) for n in (1, 6))
    assert (one.hit == two.hit).all() and (one.counted == two.counted).all()


def test_masks_hide_a_share_are_fixed_for_reading_and_fresh_for_training(train):
    regime = Regime(1e-3, kind="masked")
    fixed = masks(train, regime, (FIXED,))
    assert torch.equal(fixed, masks(train, regime, (FIXED,)))
    assert not torch.equal(masks(train, regime, (FRESH, 0, 0)), masks(train, regime, (FRESH, 1, 0)))
    assert fixed.float().mean() == pytest.approx(0.15, abs=0.03)
    short = text.sequences([[1, 2]])
    assert all(masks(short, regime, (FRESH, i, 0)).any() for i in range(20))
    padded = text.sequences([[1, 2], [3] * 40])
    assert not any((masks(padded, regime, (FRESH, i, 0)) & ~padded.real).any() for i in range(20))


def test_a_masked_model_learns_and_never_sees_what_it_predicts(train):
    run = training("masked", lr=5e-3)
    before = run.read(train)
    for _ in range(60):
        run.train(train)
    assert run.read(train).m > before.m + 0.1  # measured 0.00 -> 0.36
    assert run.read(train).unit is None
    hidden = torch.zeros_like(train.ids, dtype=torch.bool)
    hidden[:, 3] = True
    other = text.Sequences(train.ids.clone(), train.length)
    other.ids[:, 3] = (other.ids[:, 3] + 1) % 96
    with torch.no_grad():
        pair = [logits_at(run.model, t, hidden, "masked", run.mask_id)[0] for t in (train, other)]
    assert torch.equal(*pair)


def test_the_model_that_comes_in_is_untouched_and_reading_changes_nothing(train):
    model = models.decoder(96, 32, LENGTH, 0)
    before = [w.detach().clone() for w in model.parameters()]
    run = Training(model.train(), Regime(1e-3))
    run.train(train)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) and model.training
    read(model, train, Regime(1e-3))
    assert model.training


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_fork_goes_on_bit_for_bit_and_takes_the_moments_along(kind, train):
    run = training(kind)
    run.train(train)
    fork = run.fork()
    assert run.train(train) == fork.train(train) and same(run, fork)
    bare = Training(fork.model, fork.regime)  # the same weights without the moments
    bare.epoch, bare.update = fork.epoch, fork.update
    fork.train(train)
    bare.train(train)
    assert not same(fork, bare)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_without_insertion_the_excess_is_exactly_zero(kind, train):
    run = training(kind)
    run.train(train)
    kept = weights(run)
    special = text.markov(8, LENGTH, 0, "special")
    found = forget(run, train, special, {"nothing": Insertion(0), "spaced nothing": Insertion(0, gap=2)}, 3)
    for row in found.values():
        assert row["excess"] == [0.0] * 4 and row["excess baseline"] == 0.0 and row["half-life"] is None
        assert row["inserted loss"] == row["control loss"] and row["updates"] == 0
    assert all(torch.equal(a, b) for a, b in zip(kept, run.model.parameters(), strict=True))


def test_what_was_seen_once_is_forgotten_fast_and_not_wholly(begun, train):
    """Claim 2 in small.  The excess is what the insertion left; the baseline alone holds generalisation too."""
    special = text.markov(8, LENGTH, 0, "special")
    found = forget(begun, train, special, {"once": Insertion(100, until=0.95)}, 20)["once"]
    assert found["inserted"][0] >= 0.95 and 0 < found["updates"] < 100
    assert found["inserted"][0] - found["baseline"] >= 0.1
    assert found["excess baseline"] > 0.05
    assert found["baseline"] - found["excess baseline"] == pytest.approx(found["control baseline"])
    assert found["control baseline"] > 0.15  # part of the raw baseline was never memory
    assert found["rate"] == 3e-3


def test_random_special_sequences_leave_memory_alone(begun, train):
    """Claim 3: a model that never saw them predicts none of them."""
    found = forget(begun, train, text.noise(8, LENGTH, 0), {"once": Insertion(100, until=0.95)}, 12)["once"]
    assert max(found["control"]) <= 0.05  # measured 0.01
    assert found["baseline"] > max(found["control"]) + 0.1


def test_moments_can_be_put_back_behind_the_insertion(begun, train):
    special = text.markov(8, LENGTH, 0, "special")
    kept, restored = (arm(begun, train, special, Insertion(5, moments=m), 1) for m in ("kept", "restored"))
    assert kept.m[0] == restored.m[0] and kept.loss[0] == restored.loss[0]  # the same weights at first …
    assert kept.loss[1] != restored.loss[1]  # … and another step


def test_a_spaced_insertion_is_held_against_the_control_of_the_same_epochs(begun, train):
    special = text.markov(8, LENGTH, 0, "special")
    spaced = arm(begun, train, special, Insertion(3, gap=2), 2)
    control = arm(begun, train, special, NOTHING, 6)
    assert (spaced.offset, spaced.updates, len(spaced.m)) == (4, 3, 3)
    assert compared(spaced, control)["control"] == list(control.m[4:7])


def test_a_special_batch_from_the_training_set_is_refused(begun, train):
    with pytest.raises(BadCorpus, match="in one training sequence"):
        forget(begun, train, train.some([3]), {"once": Insertion(1)}, 1)


def test_larger_models_memorise_in_fewer_epochs():
    """Claim 1 in small, every seed: width 64 needs at most 0.8 of the epochs of width 32."""
    for seed in range(2):
        train = text.markov(64, LENGTH, seed)
        took = []
        for width in (32, 64):
            run, m = training(width=width, seed=seed), []
            while len(m) < 60 and (not m or m[-1] < 0.9):
                run.train(train)
                m.append(run.read(train).m)
            took.append(time(range(1, len(m) + 1), m, 0.9).at)
        assert took[1] is not None and (took[0] is None or took[1] <= 0.8 * took[0]), took


def test_planted_digits_are_memorised_and_never_guessed_better_than_by_chance():
    """Claim 5.  Held-out loss does not stay at log 10 but rises above it: who knows digits by heart is sure of other ones."""
    train, where = text.planted(32, LENGTH, 6, 0)
    held, held_where = text.planted(64, LENGTH, 6, 0, "held")
    run = Training(models.decoder(106, 64, LENGTH, 0), Regime(5e-3, batch=16))
    losses = []
    for _ in range(30):
        run.train(train)
        losses.append(float(run.read(held).nll[held_where.numpy()].mean()))
    assert run.read(train).hit[where.numpy()].mean() - 0.1 >= 0.89
    assert min(losses) >= 0.9 * 2.302585
    assert run.read(held).hit[held_where.numpy()].mean() <= 0.2


def test_bad_settings_are_refused():
    with pytest.raises(BadRequest, match="width 40"):
        models.decoder(96, 40, 8, 0)
    with pytest.raises(BadModel, match="mask_token_id"):
        Training(models.decoder(96, 32, 8, 0), Regime(1e-3, kind="masked"))
    run = training()
    with torch.no_grad():
        next(iter(run.model.parameters())).fill_(float("nan"))
    with pytest.raises((Diverged, ValueError)):
        run.train(text.markov(4, 8, 0))


def test_the_learning_rate_rises_and_falls():
    regime = Regime(1.0e-2, warmup=1, total=4)
    assert [regime.rate(u) for u in range(5)] == pytest.approx([0.5e-2, 0.75e-2, 0.5e-2, 0.25e-2, 0.0])
    assert Regime(1e-2).rate(1000) == 1e-2
