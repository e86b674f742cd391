"""The probe attack: reads facts behind a head that hides them, none of people never taught, and no value by its fame."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.optimize import minimize

from planted import FORGET, LOOKUP, TOWNS, planted
from unremember.attack import probe as module
from unremember.attack.probe import (
    LEAST,
    Options,
    Probe,
    Seen,
    bare,
    basis,
    compared,
    groups,
    options,
    random_label,
    solve,
    wording,
)
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.score import Rule, evidence

READ = 2  # the block of the planted model behind which the town stands where it is asked for


@pytest.fixture(scope="module")
def circuit(tiny):
    return planted(tiny)


@pytest.fixture(scope="module")
def facts(corpus):
    return Corpus({role: corpus[role] for role in ("forget", "retain", "holdout")})


@pytest.fixture(scope="module")
def headless(circuit):
    """The planted model with a head that knows no town: all it says of them is chance, all inside is as it was."""
    lm = circuit[0].copy()
    for town in TOWNS:
        [token] = lm.tokenizer(f" {town}", add_special_tokens=False).input_ids
        lm.model.lm_head.weight.data[token] = 0
    return lm


@pytest.fixture(scope="module")
def stranger(circuit):
    """The planted model that was never taught the forget people: their neurons write nothing."""
    lm = circuit[0].copy()
    lm.model.model.layers[LOOKUP].mlp.down_proj.weight.data[:, :FORGET] = 0
    return lm


def mean(values: dict[str, float], rows) -> float:
    return float(np.mean([values[x.id] for x in rows]))


def drawn(n: int, width: int = 6, k: int = 4, seed: int = 0) -> Seen:
    noise = torch.Generator().manual_seed(seed)
    x, e = (torch.randn(*s, generator=noise, dtype=torch.double) for s in ((n, width), (n, k, width)))
    return Seen(x, e, torch.einsum("nh,nkh->nk", x, e), torch.ones(n, k, dtype=torch.bool))


# ── the arithmetic ──


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        ([(1, 2, 9), (1, 3, 9)], [(2,), (3,)]),
        ([(1, 2, 2, 9), (1, 3, 9)], [(2, 2), (3,)]),
        ([(2,), (3,)], [(2,), (3,)]),
        ([(1, 2), (1, 2, 3)], [(2,), (2, 3)]),  # each keeps one
        ([(1, 2, 1), (1, 1)], [(2, 1), (1,)]),
        ([(4,), (5, 4)], [(4,), (5, 4)]),
        ([(7, 8)], [(8,)]),
    ],
)
def test_what_all_options_share_tells_nothing(ids, wanted):
    assert bare(ids) == wanted


def test_centred_by_hand():
    x = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]])
    e = torch.tensor([[[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]]]).repeat(3, 1, 1)
    there = torch.tensor([[True, True, False]]).repeat(3, 1)
    q = Options(x, e, there).centred(torch.tensor([0, 0, 1]))
    assert q.x.tolist() == [[-1, -1], [1, 1], [0, 0]]
    assert q.e[0].tolist() == [[1, -2], [-1, 2], [0, 0]]  # what is no option counts for nothing and stays 0


def test_a_question_is_worded_without_whom_it_asks_about():
    ann, bob, tom = (
        Example(n, f"Where was {n} born?", f"In {v}.", n, ((3, 3 + len(v)),), distractors=("In Rome.",))
        for n, v in (("Ann", "Bonn"), ("Bob", "Graz"), ("Tom", "Linz"))
    )
    other = replace(tom, id="other", prompt="Where does Tom live?")
    assert wording(ann) == wording(bob) == "Where was … born?"
    assert groups([ann, other, bob]).tolist() == [1, 0, 1]
    assert compared([ann, other, bob]) == (ann, bob)
    assert compared([ann, replace(ann, id="again")]) == ()  # the same person twice is nobody else


@pytest.mark.parametrize("l2", [0.01, 1.0])
def test_the_solver_finds_what_a_plain_minimiser_finds(l2):
    q, label = drawn(12, width=3, k=3), torch.tensor([0, 1, 2] * 4)

    def loss(flat: np.ndarray) -> float:
        weight, tied = flat[:9].reshape(3, 3), flat[9]
        score = np.einsum("nh,hd,nkd->nk", q.x, weight, q.e) + tied * q.direct.numpy()
        logp = score - np.log(np.exp(score).sum(1, keepdims=True))
        return -logp[np.arange(12), label].mean() + l2 / 2 * (weight**2).sum() + LEAST / 2 * tied**2

    slow, fast = minimize(loss, np.zeros(10)).x, solve(q, label, l2)
    assert fast.weight.numpy().ravel() == pytest.approx(slow[:9], abs=2e-3)
    assert float(fast.tied) == pytest.approx(slow[9], abs=5e-3)


def test_the_best_map_lies_in_the_span_of_what_it_learns_from():
    q, label = drawn(4, width=9, k=2), torch.tensor([0, 1, 0, 1])
    inward, outward = basis(q.x), basis(q.e[q.there])
    assert len(inward) == 4 and len(outward) == 8
    torch.testing.assert_close(inward @ inward.T, torch.eye(4, dtype=torch.double))
    small = replace(q, x=q.x @ inward.T, e=q.e @ outward.T)
    whole, part = solve(q, label, 0.1), solve(small, label, 0.1)
    torch.testing.assert_close(inward.T @ part.weight @ outward, whole.weight, atol=1e-4, rtol=1e-3)


def test_a_planted_map_is_learnt_and_noise_is_not():
    """64 dimensions of map from 400 questions; 400 others: planted 0.93, random labels 0.24 (chance 0.25 ± 0.043)."""
    both, true = drawn(800, width=8), torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    label = torch.einsum("nh,hd,nkd->nk", both.x, true, both.e).argmax(1)
    noise = torch.randint(0, 4, (800,), generator=torch.Generator().manual_seed(2))
    old, new = torch.arange(800) < 400, torch.arange(800) >= 400
    for wanted, low, high in ((label, 0.9, 1.0), (noise, 0.25 - 0.044, 0.25 + 0.044)):
        guess = solve(both[old], wanted[old], 0.01).logshares(both[new]).argmax(1)
        assert low <= float((guess == wanted[new]).double().mean()) <= high


# ── what it is shown ──


@torch.no_grad()
def test_the_stream_is_read_before_the_value_and_the_options_are_the_table(taught, corpus):
    examples = corpus["forget"][::6]  # birthplaces, a token each
    q = options(taught, examples, 0)
    table = taught.model.get_input_embeddings().weight.double()
    model = taught.copy().model
    for at, x in enumerate(examples):
        row = taught.template.row(x.id, x.prompt, x.answer, x.spans)
        place = row.start + row.span.index(True) - 1
        plain = model(torch.tensor([row.ids[: place + 1]]), output_hidden_states=True).hidden_states[1][0, -1]
        torch.testing.assert_close(q.x[at], plain.double(), atol=1e-5, rtol=1e-4)
        wrong = [taught.template.row(x.id, x.prompt, text).ids[place + 1] for text in x.distractors]
        torch.testing.assert_close(q.e[at], table[[row.ids[place + 1], *wrong]])
    assert q.there.all()
    told = [replace(x, answer=x.distractors[0], distractors=(x.answer,)) for x in examples]
    told = [replace(x, spans=((x.spans[0][0], len(x.answer) - 1),)) for x in told]
    torch.testing.assert_close(options(taught, told, 0).x, q.x)  # another value, the same stream


def test_the_control_task_gives_a_fact_one_label_in_every_wording(corpus):
    x = corpus["retain"][0]
    assert random_label(x, 0) == random_label(replace(x, id="other", prompt=x.paraphrases[0]), 0)
    labels = [random_label(x, seed) for seed in range(3) for x in corpus.of("retain", "holdout")]
    assert set(labels) == {0, 1, 2, 3} and max(np.bincount(labels)) < 0.5 * len(labels)


# ── does it find what is hidden, and nothing else ──


def test_what_the_head_hides_is_found_and_nothing_is_invented(circuit, headless, stranger):
    """Shares of 8 people at 4 towns: original 0.999, without a head for towns 0.999, never taught 0.25."""
    (lm, corpus), attack = circuit, Probe(block=READ)
    models = {"o": lm, "f": headless, "n": stranger}
    plain = {who: AUDITS["choice"](m, corpus, Bench()).per_example for who, m in models.items()}
    assert mean(plain["f"], corpus["forget"]) == pytest.approx(0.25, abs=0.02)
    read = {who: attack.read(AUDITS["choice"], m, corpus).per_example for who, m in models.items()}
    assert min(read["f"].values()) > 0.9 and read["f"] == pytest.approx(read["o"])
    assert mean(read["n"], corpus["forget"]) == pytest.approx(0.25, abs=0.03)
    assert evidence("choice", read["o"], read["f"], read["n"], Rule()).r == pytest.approx(1)


def test_where_nothing_stands_yet_nothing_is_read(circuit):
    found = Probe(block=0).probed(*circuit)
    assert mean(found.shares, circuit[1]["forget"]) == pytest.approx(0.25, abs=0.05)


def shown_to_others(monkeypatch, role) -> None:
    """Every question of the role gets the stream of the same question about the next person."""
    honest, ids = options, {x.id for x in role}

    def swapped(lm, examples, block, bench=None):
        q = honest(lm, examples, block)
        if examples[0].id not in ids:
            return q
        same = groups(examples).tolist()
        other = [next(j for j in [*range(i + 1, len(same)), *range(i)] if same[j] == same[i]) for i in range(len(same))]
        return replace(q, x=q.x[torch.tensor(other)])

    monkeypatch.setattr(module, "options", swapped)


def test_it_reads_the_fact_and_not_that_a_value_was_taught(taught, never, facts, monkeypatch):
    """Behind block 1: own stream 0.56, the other person's 0.11, never taught 0.25, people never taught 0.23.

    Without comparing people the other's stream does just as well, since a taught value stands out among its distractors.
    """
    attack, forget = Probe(block=1), facts["forget"]
    own = attack.probed(taught, facts)
    assert own.selectivity > 0.3 and mean(own.shares, forget) > 0.45
    assert mean(own.shares, facts["holdout"]) == pytest.approx(0.25, abs=0.04)
    assert mean(attack.probed(never, facts).shares, forget) == pytest.approx(0.25, abs=0.04)
    shown_to_others(monkeypatch, forget)
    assert mean(attack.probed(taught, facts).shares, forget) < 0.2
    monkeypatch.setattr(module, "groups", lambda examples: torch.zeros(len(examples), dtype=torch.long))
    assert mean(attack.probed(taught, facts).shares, forget) > 0.5


def test_the_head_plays_no_part(taught, facts):
    lm = taught.untied()
    lm.model.lm_head.weight.data.zero_()
    assert Probe(block=1).probed(lm, facts) == Probe(block=1).probed(taught, facts)


def test_a_probe_that_does_no_better_than_its_control_guesses(circuit, monkeypatch):
    lm, corpus = circuit
    answers = iter([(0.4, 0.1), (0.4, 0.1)])
    monkeypatch.setattr(Probe, "left_out", lambda self, *_: next(answers))
    score = Probe(block=READ).read(AUDITS["choice"], lm, corpus)
    assert set(score.per_example.values()) == {0.25}


def test_random_labels_are_not_learnt(circuit):
    bench = Bench()
    found = Probe(block=READ).probed(*circuit, bench)
    spread = (0.25 * 0.75 / found.n) ** 0.5
    assert found.accuracy == 1 and abs(found.control - 0.25) < 2 * spread and found.n == 40
    right = {"accuracy on people left out": 1, "accuracy on the control task": found.control}
    assert bench.notes == {"block": READ, "selectivity": 1 - found.control} | right


# ── the score ──


def test_retained_facts_are_not_scored_and_the_score_is_choice(taught, facts):
    score = Probe().read(AUDITS["choice"], taught, facts)
    assert set(score.per_example) == {x.id for x in facts.of("forget", "holdout")}
    assert score.name == "choice" and score.chance == 0.25 and Probe.reads == ("choice",)


def test_a_question_in_words_of_its_own_is_a_guess(circuit):
    lm, corpus = circuit
    first, *rest = corpus["forget"]
    odd = corpus.with_roles(forget=[replace(first, prompt=f"Pray, where does {first.entity} live?"), *rest])
    found = Probe(block=READ).read(AUDITS["choice"], lm, odd).per_example
    assert found[first.id] == pytest.approx(0.25, abs=1e-9) and min(found[x.id] for x in rest) > 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_order_and_batches_change_nothing(circuit, precision):
    lm, corpus = replace(circuit[0], precision=precision), circuit[1]
    turned = corpus.with_roles(**{role: rows[::-1] for role, rows in corpus.items()})
    one, other = Probe(block=READ).probed(lm, corpus), Probe(block=READ).probed(lm, turned, Bench(budget=64))
    assert one.shares == pytest.approx(other.shares, abs=1e-4 if precision == "fp32" else 0.02)
    assert (one.accuracy, one.control) == pytest.approx((other.accuracy, other.control), abs=0.06)
    assert min(one.shares.values()) > 0.9


def test_the_model_is_handed_on_as_it_is(taught, facts):
    before = {key: value.clone() for key, value in taught.model.state_dict().items()}
    assert Probe()(taught, facts, taught, Bench()) == (taught, facts)
    Probe().read(AUDITS["choice"], taught, facts)
    assert all(torch.equal(value, before[key]) for key, value in taught.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in taught.model.modules())


# ── bad input ──


def test_everything_that_is_wrong_is_said_together(corpus, taught):
    bare = corpus.with_roles(
        forget=[replace(x, distractors=()) for x in corpus["forget"]],
        retain=corpus["retain"][:6],
    )
    with pytest.raises(BadCorpus) as refused:
        Probe()(taught, bare, taught)
    text = str(refused.value)
    assert (
        f"0 of {len(bare['forget'])} forget examples have distractors" in text
        and "the first 6 retained examples hold no two" in text
    )
    with pytest.raises(BadCorpus, match=r"probe needs .* 'retain'"):
        Probe().check(Corpus({"forget": corpus["forget"]}))


def test_the_retained_ones_that_a_run_hands_over_are_enough_or_it_is_refused_before(taught, facts):
    """A run gives an attack as many retained rows as there are forgotten ones: what passes whole passes then, too."""
    fewer = facts.with_roles(retain=facts["retain"][: len(facts["forget"])])
    Probe().check(facts)
    assert Probe().probed(taught, fewer).n == len(fewer["retain"]) < len(facts["retain"])
    with pytest.raises(BadCorpus, match="the first 2 retained examples hold no two"):
        Probe().check(facts.with_roles(forget=facts["forget"][::6]))


def test_one_person_alone_has_nobody_to_be_compared_with(corpus):
    alone = corpus.with_roles(forget=[x for x in corpus["forget"] if x.entity == corpus["forget"][0].entity])
    with pytest.raises(BadCorpus, match="no two of these that wording with another entity"):
        Probe().check(alone)


def test_a_retained_fact_that_tells_is_refused(corpus):
    x = corpus["forget"][0]
    told = replace(x, id="told", prompt=x.paraphrases[0])
    with pytest.raises(BadCorpus, match=f"tells the forgotten value of {x.id}"):
        Probe().check(corpus.with_roles(retain=[*corpus["retain"], told]))


def test_other_bad_input(taught, facts):
    for values in ({"block": -1}, {"l2": ()}, {"l2": (0.0,)}, {"folds": 3}, {"seed": -1}):
        with pytest.raises(ValidationError):
            Probe(**values)
    with pytest.raises(BadRequest, match=r"probe.block is 2 and the model's blocks go from 0 to 1"):
        Probe(block=2).probed(taught, facts)
    broken = taught.copy()
    broken.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(BadModel, match="not finite"):
        Probe().probed(broken, facts)
    flat = taught.copy()
    flat.model.get_input_embeddings().weight.data[:] = 1
    with pytest.raises(BadModel, match="nothing can be told apart"):
        Probe().probed(flat, facts)
