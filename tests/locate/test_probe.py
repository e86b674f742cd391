"""Linear probe: a planted direction is found, noise is not, no entity leaks, and what is read is not thereby used."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import norm

pytest.importorskip("sklearn")

from planted import LOOKUP, planted
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.locate.anatomy import edited
from unremember.locate.lookup import logistic, streams
from unremember.locate.probe import Probe, balanced, solve
from unremember.locate.subject import facts, known, laid


def gaussian(n: int, d: int, v: np.ndarray, away: float, seed: int):
    """Two classes, `away` standard deviations on either side along v. -> x, labels"""
    rng = np.random.default_rng(seed)
    label = rng.permutation(n) % 2
    return rng.standard_normal((n, d)) + away * np.outer(2 * label - 1, v), label.tolist()


# ── the parts ──


def test_balanced_accuracy_by_hand():
    right, label = np.array([1, 1, 1, 0, 1]), np.array([0, 0, 0, 0, 1])
    assert balanced(right, label) == pytest.approx((0.75 + 1) / 2)


def test_the_solver_minimises_what_is_written():
    """Against the house's own in torch, which takes a sum and a penalty n times as large."""
    rng = np.random.default_rng(0)
    x, label = rng.standard_normal((90, 5)), rng.integers(0, 3, 90)
    weight, bias = solve(x, label, 3, 0.1)
    slow, shift = logistic(torch.from_numpy(x), torch.from_numpy(label), 3, 0.1 * 90)
    assert weight == pytest.approx(slow.numpy(), abs=1e-3)
    assert bias - bias.mean() == pytest.approx(shift.numpy() - shift.numpy().mean(), abs=1e-3)


def test_two_classes_give_two_planes_that_predict_as_one():
    x, label = gaussian(200, 4, np.eye(4)[0], 1.0, 0)
    weight, bias = solve(x, np.array(label), 2, 0.1)
    assert weight.shape == (2, 4) and weight.sum() == pytest.approx(0) and bias.sum() == pytest.approx(0)
    assert balanced((x @ weight.T + bias).argmax(1) == label, np.array(label)) > 0.75


# ── a planted direction, and none ──


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_direction_is_found(seed):
    d, away = 32, 1.5
    v = np.random.default_rng(100 + seed).standard_normal(d)
    v /= np.linalg.norm(v)
    x, label = gaussian(20 * d, d, v, away, seed)
    fitted = Probe(seed=seed).fit(x, label, range(len(x)))
    w = fitted.weight[1] - fitted.weight[0]
    assert abs(w @ v) / np.linalg.norm(w) >= 0.95
    fresh, truth = gaussian(20_000, d, v, away, 50 + seed)
    found = balanced(fitted.predict(fresh) == truth, np.array(truth))
    assert found == pytest.approx(norm.cdf(away), abs=0.02)  # Bayes


def test_the_scale_of_a_dimension_does_not_matter():
    v = np.eye(8)[0]
    x, label = gaussian(160, 8, v, 1.5, 0)
    scale = np.array([1e-3, 1e3, 1, 1, 1, 1, 50, 1])
    one, other = (Probe().fit(y, label, range(160)) for y in (x, x * scale + 7))
    assert one.l2 == other.l2 and (one.predict(x) == other.predict(x * scale + 7)).all()


def test_a_dimension_that_stands_still_does_no_harm():
    x, label = gaussian(160, 8, np.eye(8)[0], 1.5, 0)
    still = np.concatenate([x, np.full((160, 1), 1e4) + 1e-9 * x[:, 1:2], np.zeros((160, 1))], 1)
    assert (Probe().fit(still, label, range(160)).predict(still) == Probe().fit(x, label, range(160)).predict(x)).all()


@pytest.mark.parametrize("d", [20, 400])
def test_labels_that_are_noise_stay_at_chance(d):
    """Also with more dimensions than rows, where anything can be fitted."""
    rng = np.random.default_rng(1)
    n, classes = 300, 3
    label = (rng.permutation(n) % classes).tolist()
    found = Probe(draws=200)(rng.standard_normal((n, d)), label, range(n))
    assert found.chance == pytest.approx(1 / 3) and found.n == n
    error = np.sqrt(found.chance * (1 - found.chance) / n)
    assert abs(found.accuracy - found.chance) < 2 * error
    assert abs(found.selectivity) < 3 * error and found.low < found.chance < found.high


def test_an_entity_is_never_on_both_sides():
    """Rows of one entity look alike and labels are random: whoever splits by row reads the entity and calls it the label."""
    rng = np.random.default_rng(0)
    owners, each, d = 60, 8, 60
    label = rng.permutation(owners) % 2
    centre = 3 * rng.standard_normal((owners, d))
    x = np.repeat(centre, each, 0) + 0.3 * rng.standard_normal((owners * each, d))
    z, who = np.repeat(label, each).tolist(), np.repeat(np.arange(owners), each).tolist()
    by_entity, by_row = Probe(draws=200)(x, z, who), Probe(draws=200)(x, z, range(len(z)))
    assert by_row.accuracy > 0.85 and by_entity.accuracy < 0.7
    assert by_entity.low < 0.5 < by_entity.high, "the interval counts entities, not rows"
    assert by_entity.high - by_entity.low > 2 * (by_row.high - by_row.low)


def test_a_shared_label_is_selective_and_its_interval_holds_the_truth():
    v = np.eye(16)[3]
    x, label = gaussian(320, 16, v, 1.0, 2)
    found = Probe(draws=300)(x, label, range(320))
    assert found.low < norm.cdf(1.0) + 0.02 and found.high > norm.cdf(1.0) - 0.04
    assert found.selectivity > 0.25 and found.control == pytest.approx(0.5, abs=0.1)
    assert len(found.l2) == 5 and Probe(draws=300)(x, label, range(320)) == found


def test_chance_is_that_of_balanced_classes():
    """Nine in ten are of one class: always to say so is no knowledge."""
    rng = np.random.default_rng(3)
    label = ["many"] * 180 + ["few"] * 20
    found = Probe(draws=100)(rng.standard_normal((200, 10)), label, range(200))
    assert found.chance == 0.5 and found.accuracy < 0.65


# ── read, and yet not used ──


@pytest.fixture(scope="module")
def marked(tiny):
    """The planted model with a mark ±u on the last word of every name, which nothing in it reads. -> model, corpus, u, marks"""
    lm, corpus = planted(tiny)
    u = torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(5)), dim=0)
    people = [x.entity for x in corpus.of("forget", "retain")]
    sign = np.random.default_rng(7).permutation(len(people)) % 2 * 2 - 1
    with torch.no_grad():
        for name, weight in lm.model.named_parameters():
            if "norm" in name:
                continue
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight -= torch.outer(u, u @ weight)  # nothing writes it
            else:
                weight -= torch.outer(weight @ u, u)  # nothing reads it, and no word has it
        for name, s in zip(people, sign.tolist(), strict=True):
            [token] = lm.tokenizer(f" {name.split()[1]}", add_special_tokens=False).input_ids
            lm.model.model.embed_tokens.weight[token] += 2.0 * s * u
    return lm, corpus, u, dict(zip(people, sign.tolist(), strict=True))


def test_what_nothing_reads_is_probed_as_well_as_anything(marked):
    lm, corpus, u, sign = marked
    examples = list(corpus.of("forget", "retain"))
    level = streams(lm, examples)[LOOKUP + 1].numpy()
    who = [x.entity for x in examples]
    mark = Probe(draws=100)(level, [sign[name] for name in who], who)
    town = Probe(draws=100)(level, [x.values()[0] for x in examples], who)
    assert mark.accuracy > 0.95 and mark.selectivity > 0.3
    assert town.accuracy > 0.95

    fitted = Probe().fit(level, [sign[name] for name in who], who)
    w = fitted.weight[1] - fitted.weight[0]
    assert abs(w @ u.numpy()) / np.linalg.norm(w) > 0.5  # people differ much more along other directions

    found = facts(lm, examples)
    tokens = laid(lm, [fact.row for fact in found])

    def turned(direction: torch.Tensor):
        def edit(value):  # (L, T, H): the other label at the last word of the name
            moved = value.clone()
            for lane, fact in enumerate(found):
                moved[lane, fact.last] -= 2 * (moved[lane, fact.last] @ direction) * direction
            return moved

        return edit

    site = (f"model.layers.{LOOKUP}", "out")
    towns = [lm.model.model.layers[LOOKUP].mlp.down_proj.weight[:, i] for i in (0, 1)]
    with torch.no_grad():
        whole = known(lm, tokens)
        with edited(lm.model, {site: turned(u)}):
            unused = known(lm, tokens) - whole
        with edited(lm.model, {site: turned(torch.nn.functional.normalize(towns[0], dim=0))}):
            used = known(lm, tokens) - whole
    assert unused.abs().max() < 1e-3 and used.abs().max() > 5, (unused.abs().max(), used.abs().max())


# ── what is left after unlearning ──


def people(n: int, d: int, v: np.ndarray, away: float, seed: int):
    x, label = gaussian(n, d, v, away, seed)
    return x, label, [f"{seed}/{i}" for i in range(n)]


def test_residual_decodability_at_its_ends():
    d, v, w = 12, np.eye(12)[0], np.eye(12)[5]
    kept, z, who = people(200, d, v, 2.0, 0)
    gone, wanted, them = people(100, d, v, 2.0, 1)
    lost = np.random.default_rng(2).standard_normal(gone.shape)
    moved = gone @ (np.eye(d) - np.outer(v, v) - np.outer(w, w) + np.outer(v, w) + np.outer(w, v))
    turned = kept @ (np.eye(d) - np.outer(v, v) - np.outer(w, w) + np.outer(v, w) + np.outer(w, v))
    probe, sides = Probe(draws=200), ((z, who), (wanted, them))
    same = probe.decodability((kept, gone), (kept, gone), *sides)
    none = probe.decodability((kept, gone), (kept, lost), *sides)
    again = probe.decodability((kept, gone), (turned, moved), *sides)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0) and same.before > 0.9
    assert none.low < 0 < none.high and abs(none.value) < 0.25
    assert again.value > 0.95, "hidden along another direction: the probe learns it from those who stay"
    stale = balanced(probe.fit(kept, z, who).predict(moved) == wanted, np.array(wanted))
    assert stale < 0.65, "a probe of the model as it was would have said: forgotten"
    assert same.n == 100 and same.chance == 0.5


def test_decodability_refuses_leaks_strangers_and_nothing_to_lose():
    d, v = 6, np.eye(6)[0]
    kept, z, who = people(60, d, v, 2.0, 0)
    gone, wanted, them = people(20, d, v, 2.0, 1)
    probe = Probe(draws=20)
    with pytest.raises(BadCorpus, match="0/0 is both retained and forgotten"):
        probe.decodability((kept, gone), (kept, gone), (z, who), (wanted, [who[0], *them[1:]]))
    with pytest.raises(BadCorpus, match="no retained entity has the label new"):
        probe.decodability((kept, gone), (kept, gone), (z, who), (["new", *wanted[1:]], them))
    noise = np.random.default_rng(3).standard_normal(gone.shape)
    with pytest.raises(BadModel, match="too little to have lost"):
        probe.decodability((kept, noise), (kept, gone), (z, who), (wanted, them))


# ── refusals ──


def test_all_that_is_wrong_is_said_together():
    x = np.random.default_rng(0).standard_normal((8, 20))
    label = ["a", "a", "a", "a", "a", "b", "a", "b"]
    who = [0, 1, 2, 3, 4, 5, 5, 6]
    with pytest.raises(BadCorpus) as raised:
        Probe(l2=(0.0, 1.0))(x, label, who)
    text = str(raised.value)
    assert "entity 5 has 2 labels (a, b)" in text
    assert "the label 'b' has 2 of 7 entities, so a side of the split would lack it" in text
    assert "λ = 0 with 8 rows of 20 dimensions: any labels can be fitted" in text


def test_constant_labels_are_refused():
    with pytest.raises(BadCorpus, match="all 9 rows have the label 'a'; there is nothing to tell apart"):
        Probe()(np.zeros((9, 2)), ["a"] * 9, range(9))


def test_a_class_that_the_split_would_lose_is_refused():
    x = np.random.default_rng(0).standard_normal((12, 2))
    with pytest.raises(BadCorpus, match="the label 'b' has 1 of 12 entities"):
        Probe().fit(x, ["a"] * 11 + ["b"], range(12))
    three = Probe(draws=20)(x, ["a"] * 9 + ["b"] * 3, range(12))  # three entities are enough, one a side
    assert three.n == 12


def test_without_a_penalty_there_must_be_more_rows_than_dimensions():
    x, label = gaussian(400, 4, np.eye(4)[0], 1.0, 0)
    assert Probe(l2=(0.0,)).fit(x, label, range(400)).l2 == 0.0
    with pytest.raises(BadCorpus, match="take 0 out of l2"):
        Probe(l2=(0.0,)).fit(x[:4], [0, 1, 0, 1], range(4))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_no_numbers_are_refused(bad):
    x, label = gaussian(40, 3, np.eye(3)[0], 1.0, 0)
    x[7, 2] = bad
    with pytest.raises(BadModel, match="activation 7, dimension 2 is"):
        Probe()(x, label, range(40))
    fine, _ = gaussian(40, 3, np.eye(3)[0], 1.0, 0)
    other = [f"x{i}" for i in range(40)]
    with pytest.raises(BadModel, match="activation 7, dimension 2 is"):
        Probe().decodability((fine, x), (fine, fine), (label, range(40)), (label, other))


def test_lengths_must_agree():
    with pytest.raises(BadRequest, match=r"given: activations \(3, 2\), 2 labels, 3 entities"):
        Probe()(np.zeros((3, 2)), ["a", "b"], range(3))


@pytest.mark.parametrize("wrong", [{"l2": ()}, {"l2": (-1.0,)}, {"folds": 2}, {"draws": 0}, {"seed": -1}, {"c": 1.0}])
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Probe(**wrong)
