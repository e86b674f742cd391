"""LiRA: its statistics by hand and under the null, shadows that go on where they were stopped, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import kstest, norm

from unremember.audit import shadows
from unremember.audit.separation import separation
from unremember.audit.shadows import Shadows, halves, logit, moments, offline, online, standing
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.embedded.dossier import dossier
from unremember.errors import BadCorpus, BadFolder, BadModel, BadRequest
from unremember.table import read
from unremember.train import Plan, train

SHORT = Plan(steps=1, lr=1e-2)


@pytest.fixture(scope="module")
def drawn() -> Corpus:
    """48 facts, dealt at random to members and strangers."""
    people = dossier(0, forget=8, retain=0, holdout=0, relearn=0)["forget"]
    mixed = [people[i] for i in np.random.default_rng(1).permutation(len(people))]
    return Corpus({"forget": mixed[:24], "holdout": mixed[24:]})


@pytest.fixture
def few(drawn) -> Corpus:
    return Corpus({role: drawn[role][:4] for role in ("forget", "holdout")})


# ── statistics ──


def test_the_logit_by_hand_and_at_its_ends():
    assert logit(np.log([0.5, 0.8, 0.2])) == pytest.approx([0, np.log(4), -np.log(4)])
    assert logit(np.array([-700.0]))[0] == pytest.approx(-700)
    high = logit(np.array([0.0, -1e-6]))
    assert np.isfinite(high).all() and high[0] > high[1] > 13  # log(1 − p) keeps its digits


def test_every_text_is_in_half_of_the_shadows():
    seen = halves(8, 11, 3)
    assert (seen.sum(0) == 4).all() and set(seen.sum(1)) == {5, 6}
    assert (seen[0::2] != seen[1::2]).all()  # a pair shares them out
    assert not (seen[0] == seen[2]).all() and (halves(8, 11, 3) == seen).all() and (halves(8, 11, 4) != seen).any()
    assert (halves(10, 11, 3)[:8] == seen).all()  # more shadows change no earlier one


def test_few_shadows_pool_their_variance_by_hand():
    """Texts with out-scores (1, 3) and (10, 16): variances 2 and 18, each of one degree of freedom: σ² = 10."""
    scores = np.array([[1.0, 10], [3, 16], [99, -99], [77, 55]])
    out = np.array([[True, True], [True, True], [False, False], [False, False]])
    mean, sd = moments(scores, out)
    assert mean == pytest.approx([2, 13]) and sd == pytest.approx([np.sqrt(10)] * 2)
    assert standing(np.array([2.0, 13 + np.sqrt(10)]), mean, sd) == pytest.approx([0, 1])


def test_many_shadows_have_a_deviation_each():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(128, 3)) * [1, 5, 25]
    mean, sd = moments(scores, np.ones_like(scores, bool))
    assert sd == pytest.approx(scores.std(0, ddof=1)) and mean == pytest.approx(scores.mean(0))
    with pytest.raises(ValueError, match="1 models on a side"):
        moments(scores[:1], np.ones((1, 3), bool))


def test_the_offline_number_is_one_minus_the_upper_tail():
    z = np.array([-1.0, 0, 2])
    assert (
        offline(z) == pytest.approx(1 - norm.sf(z)) and offline(np.array([40.0]))[0] == 1
    )  # where z still has an order
    assert (np.diff(offline(z)) > 0).all()


def test_the_online_number_by_hand():
    s = np.array([1.0, 0.0])
    inside, outside = (np.array([1.0, 1.0]), np.array([2.0, 0.5])), (np.array([0.0, -1.0]), np.array([1.0, 1.0]))
    wanted = norm.logpdf(s, *inside) - norm.logpdf(s, *outside)
    assert online(s, inside, outside) == pytest.approx(wanted)


def test_strangers_are_uniform_and_members_are_not():
    """Texts of unequal difficulty, four OUT models each of 400: Φ(z) is nearly uniform; members lie 2 σ higher.

    The mean of four models is itself uncertain, which widens z by √(1 + 1/4).
    """
    rng = np.random.default_rng(1)
    hard = rng.normal(size=400) * 5
    scores, seen = hard + rng.normal(size=(8, 400)), halves(8, 400, 0)
    stranger = standing(hard + rng.normal(size=400), *moments(scores, ~seen))
    member = standing(hard + 2 + rng.normal(size=400), *moments(scores, ~seen))
    assert kstest(stranger, norm(0, np.sqrt(1.25)).cdf).pvalue > 0.01
    assert stranger.std() == pytest.approx(np.sqrt(1.25), abs=0.1) and abs(stranger.mean()) < 0.15
    assert member.mean() == pytest.approx(2, abs=0.2)
    # one reference model cannot do this: the difficulty of the texts is all that a bare score tells
    assert np.corrcoef(hard, hard + rng.normal(size=400))[0, 1] > 0.9 > 0.2 > abs(np.corrcoef(hard, stranger)[0, 1])


# ── on the toy model ──


@pytest.fixture(scope="module")
def audit(tiny, tmp_path_factory):
    plan = Plan(steps=12, lr=1e-2, batch=12, warmup=2)
    return Shadows(tiny, plan, count=8, folder=tmp_path_factory.mktemp("shadows") / "kept")


def test_members_stand_out_of_the_shadows(tiny, audit, drawn):
    """Eight shadows of 12 steps, one target taught the members alike."""
    lessons = {"lessons": tiny.template.rows(drawn["forget"])}
    target = train(tiny, shadows._teaching, lessons, replace(audit.plan, seed=99))
    ids = [[x.id for x in drawn[role]] for role in ("forget", "holdout")]
    found = {kind: replace(audit, kind=kind)(target, drawn, Bench()) for kind in ("offline", "online")}
    for kind, score in found.items():
        auc = separation(score, *ids)["AUC"]
        assert auc.value >= 0.9, (kind, auc)
        assert score.name == f"membership LiRA {kind}" and score.direction.startswith("higher")
    inside, outside = ([found["offline"].per_example[x] for x in side] for side in ids)
    assert abs(np.mean(outside)) < 1 and np.mean(inside) > 2
    assert "4 of 8 shadow models" in found["offline"].definition


def test_a_model_that_saw_neither_is_at_chance(tiny, audit, drawn):
    """The folder of the test before is used again; the target is one more shadow, of other people's facts."""
    others = dossier(0, forget=12, retain=0, holdout=0, relearn=0)["forget"][48:]
    stranger = train(tiny, shadows._teaching, {"lessons": tiny.template.rows(others)}, audit.plan)
    score = audit(stranger, drawn, Bench())
    found = separation(score, *([x.id for x in drawn[role]] for role in ("forget", "holdout")))["AUC"]
    assert not found.beyond, found


def test_the_numbers_are_those_of_shadows_made_by_hand(tiny, few):
    """Eight models, one step each, and the formula over them."""
    found = Shadows(tiny, SHORT, count=8, seed=5)(tiny, few, Bench()).per_example
    rows = tiny.template.rows(few.of("forget", "holdout"))
    seen, scores = halves(8, 8, 5), []
    for number, taught in enumerate(seen):
        lessons = {"lessons": [row for row, own in zip(rows, taught, strict=True) if own]}
        shadow = train(tiny, shadows._teaching, lessons, replace(SHORT, seed=number))
        scores.append([r.loglikelihood() for r in read(shadow, rows)])
    mine = np.array([r.loglikelihood() for r in read(tiny, rows)])
    for at, row in enumerate(rows):
        out = [[s[i] for s, t in zip(scores, seen, strict=True) if not t[i]] for i in range(8)]
        pooled = np.sqrt(np.mean([np.var(x, ddof=1) for x in out]))
        assert found[row.key] == pytest.approx((mine[at] - np.mean(out[at])) / pooled, rel=1e-3)


def test_the_logit_is_another_score_of_the_same_shadows(tiny, few, tmp_path, monkeypatch):
    audit = Shadows(tiny, SHORT, count=8, folder=tmp_path / "kept")
    mean = audit(tiny, few, Bench())
    monkeypatch.setattr(shadows, "train", lambda *_, **__: pytest.fail("taught again"))
    other = replace(audit, measure="logit")(tiny, few, Bench())
    assert mean.per_example != other.per_example and "logit" in other.definition


def test_what_is_always_taught_is_in_every_shadow(tiny, drawn, few, monkeypatch):
    taught = []
    monkeypatch.setattr(shadows, "train", lambda lm, objective, pools, *_, **__: taught.append(pools["lessons"]) or lm)
    audit = Shadows(tiny, SHORT, count=8, always=("retain",))
    corpus = few.with_roles(
        retain=[replace(x, id=f"kept {x.id}", prompt=x.prompt + "!") for x in drawn["holdout"][10:12]]
    )
    with pytest.raises(BadRequest, match="do not differ"):  # none was really taught
        audit(tiny, corpus, Bench())
    assert len(taught) == 8 and all({row.key for row in rows if row.key.startswith("kept")} == {
        x.id for x in corpus["retain"]
    } for rows in taught)  # fmt: skip
    assert all(len(rows) == 4 + 2 for rows in taught)


def test_a_run_that_was_stopped_goes_on(tiny, few, tmp_path, monkeypatch):
    """Stopped in the fourth shadow; five are taught by the second run, and no number differs from a run in one go."""
    whole = Shadows(tiny, SHORT, count=8)(tiny, few, Bench())
    audit, made = Shadows(tiny, SHORT, count=8, folder=tmp_path / "kept"), []

    def until(last):
        def teach(*arguments, **more):
            if len(made) == last:
                raise KeyboardInterrupt
            made.append(1)
            return train(*arguments, **more)

        return teach

    monkeypatch.setattr(shadows, "train", until(3))
    with pytest.raises(KeyboardInterrupt):
        audit(tiny, few, Bench())
    assert len(list((tmp_path / "kept").glob("shadow-*.json"))) == 3
    made.clear()
    monkeypatch.setattr(shadows, "train", until(99))
    assert audit(tiny, few, Bench()) == whole and len(made) == 5
    made.clear()
    assert audit(tiny, few, Bench()) == whole and made == []
    assert replace(audit, count=10)(tiny, few, Bench()) != whole and len(made) == 2  # two more, not ten


def test_a_folder_of_other_shadows_is_refused(tiny, few, tmp_path):
    audit = Shadows(tiny, SHORT, count=8, folder=tmp_path / "kept")
    audit(tiny, few, Bench())
    for other in (replace(audit, plan=replace(SHORT, lr=2e-2)), replace(audit, seed=1)):
        with pytest.raises(BadFolder, match=r"shadow-000\.json is of shadows with another base, plan, seed or corpus"):
            other(tiny, few, Bench())
    file = tmp_path / "kept" / "shadow-000.json"
    assert set(json.loads(file.read_text())) == {"made from", "scores"}
    file.write_text("{half")
    with pytest.raises(BadFolder, match=r"no JSON .* made again"):
        audit(tiny, few, Bench())
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "letter.txt").write_text("dear")
    with pytest.raises(BadFolder, match="not ours"):
        replace(audit, folder=tmp_path / "strange")(tiny, few, Bench())


def test_base_and_target_are_not_touched(tiny, taught, few):
    before = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    mark = taught.fingerprint
    Shadows(tiny, SHORT, count=8)(taught, few, Bench())
    assert all((value == before[key]).all() for key, value in tiny.model.state_dict().items())
    assert replace(taught).fingerprint == mark and not any(w.grad is not None for w in tiny.model.parameters())


# ── what is refused ──


@pytest.mark.parametrize("count", [0, 1, 6, 9])
def test_fewer_than_eight_shadows_or_an_odd_number_is_no_lira(tiny, count):
    with pytest.raises(ValidationError, match=f"{count} shadows: at least 8 are needed, in pairs"):
        Shadows(tiny, SHORT, count=count)


def test_what_makes_no_sense_is_refused_before_a_shadow_is_taught(tiny, few, monkeypatch):
    monkeypatch.setattr(shadows, "train", lambda *_, **__: pytest.fail("taught"))
    audit = Shadows(tiny, SHORT, count=8)

    class Other:
        def get_vocab(self):
            return {"a": 0}

    strange = replace(tiny, template=replace(tiny.template, tokenizer=Other()), name="strange")
    x = few["forget"][0]
    twin = replace(x, id="twin", answer=x.answer.upper(), spans=())
    for wrong, corpus, error, text in (
        (replace(audit, base="tiny"), few, BadModel, "the base is str; give an LM"),
        (replace(audit, base=strange), few, BadModel, "'strange' has other tokens"),
        (replace(audit, always=("forget",)), few, BadRequest, "forget is always taught and also shared out"),
        (replace(audit, always=("retain",)), few, BadCorpus, "role 'retain' and there are none"),
        (replace(audit, plan=replace(SHORT, stop="accuracy")), few, BadRequest, "plan.stop is 'accuracy'"),
        (audit, few.with_roles(holdout=(*few["holdout"], twin)), BadCorpus, "'twin' of the holdout has the text of"),
        (audit, Corpus({"forget": few["forget"][:1], "holdout": few["holdout"][:1]}), BadCorpus, "make no halves"),
        (audit, Corpus({"forget": few["forget"]}), BadCorpus, "role 'holdout' and there are none"),
    ):
        with pytest.raises(error, match=text):
            wrong(tiny, corpus, Bench())
