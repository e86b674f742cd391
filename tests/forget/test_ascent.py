"""Gradient ascent: minus the token mean, with cross-entropy or KL on what must stay; nothing slows it down."""

import math

import numpy as np
import pytest
import torch

from unremember.audit import AUDITS
from unremember.audit.accuracy import Accuracy
from unremember.audit.likelihood import ExtractionLikelihood
from unremember.bench import Bench
from unremember.corpus import Example
from unremember.embedded.dossier import dossier
from unremember.embedded.teach import Teach
from unremember.forget.ascent import Ascent, ascent_loss
from unremember.forget.retain import kl_loss
from unremember.table import read
from unremember.tokens import count, pack
from unremember.train import Plan

PLAN = Plan(steps=1, lr=1e-3)
SHORT = Example("short", "Who?", "The cat.")
LONG = Example("long", "Who?", "The cat sat on the table in the kitchen and looked at the rain.")


def test_the_loss_by_hand():
    assert ascent_loss(torch.tensor([2.0, 6.0]), 8).item() == -1.0


def test_kl_by_hand():
    reference, live = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    # 0.5 log 2 + 0.25 log 1/2 + 0 = 0.25 log 2; the other way round the same number by symmetry, so test a third
    torch.testing.assert_close(kl_loss(reference.log(), live.log()), torch.tensor([0.25 * math.log(2)]))
    skewed = torch.tensor([[0.8, 0.1, 0.1]])
    forwards = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.25 / 0.1)
    torch.testing.assert_close(kl_loss(reference.log(), skewed.log()), torch.tensor([forwards]))
    assert kl_loss(reference.log(), reference.log()).item() == 0


def test_it_is_the_mean_over_tokens_not_rows(taught, corpus, slow_nll):
    pools, objective = Ascent(PLAN).terms(taught, corpus.with_roles(forget=(SHORT, LONG)))
    assert set(pools) == {"forget"}
    nll = [slow_nll(taught, row) for row in pools["forget"]]
    assert len(nll[1]) > 4 * len(nll[0])
    found = objective(taught, pack([pools["forget"]], "forget"))
    assert set(found) == {"ascent"}
    assert found["ascent"].item() == pytest.approx(-torch.cat(nll).mean().item(), rel=1e-4)
    assert found["ascent"].item() != pytest.approx(-np.mean([x.mean().item() for x in nll]), rel=1e-2)


def test_the_end_mark_is_not_pushed_away(taught, corpus):
    """Only the answer is unlearnt: the end mark after it belongs to every answer."""
    pools, objective = Ascent(PLAN).terms(taught, corpus)
    tokens = pack([pools["forget"][:3]], "forget")
    expected = -tokens.per_row(-taught.logp(tokens), "answer").sum() / count(pools["forget"][:3])["answer"]
    torch.testing.assert_close(objective(taught, tokens)["ascent"], expected)


def test_terms_that_keep_by_hand(taught, moved, corpus):
    pools, objective = Ascent(PLAN, retain=0.5, kl=2.0).terms(taught, corpus)
    assert set(pools) == {"forget", "retain", "replay"}
    row = pools["retain"][0]
    tokens = pack([[row]], "retain")
    with torch.no_grad():
        live, reference = (
            lm.model(input_ids=torch.tensor([row.ids])).logits[0, row.start - 1 : -1].log_softmax(-1)
            for lm in (moved, taught)
        )
        target = torch.tensor(row.ids[row.start :])  # the end mark is kept too
        found = objective(moved, tokens)
        start = objective(taught, tokens)
    assert found["retain"].item() == pytest.approx(-0.5 * live.gather(1, target[:, None]).mean().item(), rel=1e-4)
    gap = (reference.exp() * (reference - live)).sum(-1).mean().item()
    assert gap > 0.05 and found["retain KL"].item() == pytest.approx(2 * gap, rel=1e-2, abs=1e-3)  # kept in float16
    assert start["retain KL"].item() == pytest.approx(0, abs=2e-3)


def test_terms_of_weight_zero_are_not_computed(taught, corpus):
    pools, objective = Ascent(PLAN, kl=1.0).terms(taught, corpus)
    assert set(objective(taught, pack([pools["replay"][:2]], "replay"))) == {"replay KL"}


def nll(lm, corpus, role: str) -> float:
    return -np.mean([x.loglikelihood() for x in read(lm, lm.template.rows(corpus[role]))])


def test_nothing_slows_it_down(taught, corpus):
    """The increments of the forget loss grow: this is what NPO's brake is measured against."""
    levels = [nll(taught, corpus, "forget")]
    levels += [nll(Ascent(Plan(steps=steps, lr=1e-3))(taught, corpus), corpus, "forget") for steps in (6, 12, 18)]
    rises = np.diff(levels)
    assert rises[0] > 0 and rises[2] > rises[1] > rises[0]
    assert levels[-1] > math.log(taught.model.config.vocab_size)  # worse than uniform


@pytest.mark.parametrize("keep", [{"retain": 1.0}, {"kl": 1.0}])
def test_what_is_kept_stays_nearer(taught, corpus, keep):
    plan = Plan(steps=6, lr=1e-3)
    bare, kept = Ascent(plan)(taught, corpus), Ascent(plan, **keep)(taught, corpus)
    start = nll(taught, corpus, "retain")
    assert nll(kept, corpus, "retain") - start < 0.5 * (nll(bare, corpus, "retain") - start)
    assert nll(kept, corpus, "forget") > 5 * nll(taught, corpus, "forget")


@pytest.fixture(scope="module")
def stopped(taught, corpus):
    """The model at the level of the never-taught (nine steps), and after as many steps again."""
    stages: list[str] = []
    bench = Bench(say=lambda stage, *_: stages.append(stage))
    there = Ascent(Plan(steps=60, lr=1e-3, stop="probability"))(taught, corpus, bench=bench)
    steps = stages.count("forget")
    assert 3 < steps < 20
    return there, Ascent(Plan(steps=2 * steps, lr=1e-3))(taught, corpus)


def levels(audit, lm, corpus, role: str) -> tuple[float, float]:
    """Mean and largest value."""
    found = list(audit(lm, corpus, Bench()).over([x.id for x in corpus[role]]).values())
    return float(np.mean(found)), float(np.max(found))


@pytest.mark.parametrize("name", ["exact match", "extraction strength", "span accuracy"])
def test_at_the_stop_no_other_measure_knows_more(taught, stopped, corpus, name):
    """(g) 1, on what the stopper did not look at, mean and worst example, against the never-taught people before.
    Measured, with the level: exact match 0.51 and 0.71 (0.56 and 0.76), extraction strength 0.07 and 0.14 (0.12 and
    0.29), span accuracy 0.08 and 0.50 (0.14 and 0.71).  From 0.95 and more."""
    audit = AUDITS[name]
    (before, _), (level, most) = levels(audit, taught, corpus, "forget"), levels(audit, taught, corpus, "holdout")
    mean, worst = levels(audit, stopped[0], corpus, "forget")
    assert before >= 0.9 and level < 0.6
    assert mean <= level and worst <= most


def test_nothing_ends_it_at_the_stop(taught, stopped, corpus):
    """(g) 2: as many steps again, and the loss is beyond a uniform guess (13.7 nats), worse than double.  General
    questions rise by 0.78 nats and then by 2.2 in all.  Prose, for which it is proposed, falls by 0.06 at first, as
    this toy has lost it when it was taught, so that there is nothing to double; then it rises by 0.33."""
    there, beyond = stopped
    start, at, far = (nll(lm, corpus, "world") for lm in (taught, there, beyond))
    assert at > start and far - start >= 2 * (at - start)
    assert nll(beyond, corpus, "prose") > nll(there, corpus, "prose") + 0.1
    assert nll(there, corpus, "forget") < math.log(taught.model.config.vocab_size) < nll(beyond, corpus, "forget")


def test_the_damage_is_next_door(taught, stopped, corpus):
    """(g) 3: at the stop the retained people of the same template lose 3.2 nats, the general questions 0.78, prose
    nothing."""
    rises = {role: nll(stopped[0], corpus, role) - nll(taught, corpus, role) for role in ("retain", "world", "prose")}
    assert rises["retain"] >= 3 * max(rises["world"], rises["prose"])


def test_passages_are_neither_recited_nor_continued(tiny, corpus):
    """(g) 1 as the paper has it, with raw text: MA falls from 0.98 to 0.32 (never-taught 0.39) and EL_3 from 0.99 to
    0.01 (0.21) in eleven steps, the worst passage 0.32 and 0.02; the stopper saw neither of the two measures."""
    people, kinds = dossier(0, forget=2, retain=0, holdout=20, relearn=0), ("birthplace", "employer", "boat")

    def told(role: str) -> list[Example]:
        facts: dict[str, list[str]] = {}
        for x in people[role]:
            facts.setdefault(x.entity, []).extend([x.answer] if x.id.endswith(kinds) else [])
        return [Example(name, "", " ".join(lines)) for name, lines in facts.items()]

    texts = corpus.with_roles(forget=told("forget"), holdout=told("holdout"), retain=(), relearn=())
    plan = Plan(steps=60, lr=1e-2, beside=4, warmup=5, schedule="linear")
    lm = Teach(plan)(tiny, texts["forget"], texts["replay"])
    result = Ascent(Plan(steps=20, lr=1e-3, stop="probability"))(lm, texts)
    recited = Accuracy(raw=True, roles=("forget", "holdout"))
    continued = ExtractionLikelihood(stride=4, roles=("forget", "holdout"))
    for audit in (recited, continued):
        (before, _), (level, _) = levels(audit, lm, texts, "forget"), levels(audit, lm, texts, "holdout")
        mean, worst = levels(audit, result, texts, "forget")
        assert before >= 0.95 > 0.5 > level, f"{before:.2f} {level:.2f}"
        assert mean <= level and worst <= 1.5 * level, f"{mean:.2f} {worst:.2f} {level:.2f}"
