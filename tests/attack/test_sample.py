"""Sampling: draws follow the softmax, likelihoods stay as they are, and of n draws the best counts."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from unremember.attack.sample import Sample, best, drawing, gumbel, noised, within
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus
from unremember.score import Score


def test_noise_is_a_function_of_its_key():
    assert torch.equal(gumbel(5, 1, 2), gumbel(5, 1, 2))
    assert not torch.equal(gumbel(5, 1, 2), gumbel(5, 1, 3)) and torch.isfinite(gumbel(100_000, 0)).all()
    assert float(gumbel(200_000, 0).mean()) == pytest.approx(0.5772, abs=0.01)  # Euler's constant


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_arg_max_of_noised_logits_is_a_draw_from_the_softmax(temperature):
    logits, n = torch.tensor([1.0, 0.0, -1.0, 2.0]), 20_000
    noise = torch.stack([gumbel(4, i) for i in range(n)])
    shares = noised(logits.expand(n, 4), temperature, noise).argmax(-1).bincount(minlength=4) / n
    wanted = (logits / temperature).softmax(-1)
    assert torch.allclose(shares, wanted, atol=4 * 0.5 / n**0.5)  # four standard errors of a share


@pytest.mark.parametrize("n", [1, 4, 6])
def test_best_of_k_is_the_share_of_draws_of_k_that_hold_a_hit(n):
    for hits in range(n + 1):
        drawn = [i < hits for i in range(n)]
        for k in range(1, n + 1):
            slow = float(np.mean([any(part) for part in combinations(drawn, k)]))
            assert within(hits, n, k) == pytest.approx(slow)


@pytest.mark.parametrize(("hits", "n", "k"), [(3, 2, 1), (-1, 2, 1), (1, 2, 3), (1, 2, 0)])
def test_impossible_counts_are_refused(hits, n, k):
    with pytest.raises(ValueError, match="allowed are"):
        within(hits, n, k)


def test_the_best_of_each_fact_by_hand():
    draws = [
        Score("said", "", "", {"a": 0.0, "b": 1.0, "c": 0.0}),
        Score("said", "", "", {"a": 0.0, "b": 0.0, "c": 1.0}),
    ]
    assert best(draws).per_example == {"a": 0.0, "b": 1.0, "c": 1.0} and best(draws).name == "said"


def test_draws_of_other_examples_or_scores_are_not_mixed():
    one = Score("said", "", "", {"a": 0.0})
    for other in (Score("said", "", "", {"b": 0.0}), Score("choice", "", "", {"a": 0.0})):
        with pytest.raises(ValueError, match="cannot be compared"):
            best([one, other])


def test_likelihoods_and_the_argument_stay_as_they_are(taught, corpus):
    before = {key: value.clone() for key, value in taught.model.state_dict().items()}
    lm, seen = Sample(temperature=2.0)(taught, corpus, taught, Bench())
    assert seen == corpus
    asked = Corpus({"forget": corpus["forget"]})
    for audit in ("value probability", "extraction strength", "choice"):
        assert AUDITS[audit](lm, asked, Bench()) == AUDITS[audit](taught, asked, Bench())
    assert not taught.model._forward_hooks and set(taught.model.state_dict()) == set(before)
    assert all(torch.equal(value, before[key]) for key, value in taught.model.state_dict().items())


def test_the_noise_was_there_and_greedy_answers_are_not_remembered_for_it(taught, corpus):
    bench, asked = Bench(), Corpus({"forget": corpus["forget"]})
    prompts = [taught.template.context(x.prompt) for x in corpus["forget"]]
    AUDITS["said"](taught, asked, bench)
    hot = drawing(taught, 3.0, 0, 0)
    assert hot.fingerprint != taught.fingerprint
    assert hot.generate(prompts, 8) != taught.generate(prompts, 8)
    AUDITS["said"](hot, asked, bench)
    assert len([key for key in bench.memory if key.endswith("/say")]) == 2


def test_close_to_zero_temperature_is_greedy(taught, corpus):
    prompts = [taught.template.context(x.prompt) for x in corpus["forget"]]
    assert drawing(taught, 1e-4, 0, 0).generate(prompts, 8) == taught.generate(prompts, 8)


def test_a_call_gives_the_first_draw(taught, corpus):
    lm, _ = Sample(temperature=1.5, seed=3)(taught, corpus, taught, Bench())
    assert lm.fingerprint == drawing(taught, 1.5, 3, 0).fingerprint


def test_a_note_says_how_many_answers_are_not_the_greedy_one(taught, corpus):
    """Of what the bench knows: where nobody has asked for the greedy answer, it is not asked for the note's sake."""
    asked, name = Corpus({"forget": corpus["forget"]}), "answers unlike the greedy one"
    fresh, bench = Bench(), Bench()
    Sample(temperature=0.3, n=2).read(AUDITS["said"], taught, asked, fresh)
    assert not fresh.notes and len(fresh.memory) == 2
    AUDITS["said"](taught, asked, bench)
    Sample(temperature=0.3, n=2).read(AUDITS["said"], taught, asked, bench)
    prompts = [taught.template.context(x.prompt) for x in corpus["forget"]]
    said = [drawing(taught, 0.3, 0, draw).generate(prompts, 32) for draw in range(2)]
    differ = [a != b for draw in said for a, b in zip(draw, taught.generate(prompts, 32), strict=True)]
    assert bench.notes == {name: np.mean(differ)} and 0 < np.mean(differ) < 1
    Sample(temperature=1e-4, n=2).read(AUDITS["said"], taught, asked, bench)
    assert bench.notes[name] == "none: a temperature so low asks nothing new, raise it"


def test_a_draw_hangs_on_seed_and_number_and_not_on_the_batch(taught, corpus):
    prompts = [taught.template.context(x.prompt) for x in corpus["forget"]]

    def draw(seed: int, number: int, batch: int) -> list:
        return drawing(taught, 1.5, seed, number).generate(prompts, 8, batch)

    one = draw(0, 0, 64)
    assert one == draw(0, 0, 1) == draw(0, 0, 5)
    assert one != draw(0, 1, 64) and one != draw(1, 0, 64)


def test_draws_follow_the_model_at_the_first_token(taught, corpus):
    """How often each first token comes in 400 draws, against the softmax of one plain forward pass."""
    ids = taught.template.context(corpus["holdout"][0].prompt)
    with torch.inference_mode():
        wanted = (taught.model(input_ids=torch.tensor([ids])).logits[0, -1] / 2).softmax(-1)
    n = 400
    noise = torch.stack([gumbel(len(wanted), 0, i, len(ids) - 1, list(ids)) for i in range(n)])
    chosen = noised(wanted.log().expand(n, -1), 1.0, noise).argmax(-1)
    drawn = [drawing(taught, 2.0, 0, i).generate([ids], 1)[0] for i in range(8)]
    ends = taught.tokenizer.eos_token_id
    assert [list(x) for x in drawn] == [[] if int(t) == ends else [int(t)] for t in chosen[:8]]
    shares, top = chosen.bincount(minlength=len(wanted)) / n, wanted.topk(3).indices
    assert torch.allclose(shares[top], wanted[top], atol=4 * 0.5 / n**0.5)


def test_more_draws_never_find_less(taught, corpus):
    asked = Corpus({"forget": corpus["forget"]})
    one, four = (Sample(temperature=1.5, n=n).read(AUDITS["said"], taught, asked, Bench()) for n in (1, 4))
    assert all(four.per_example[key] >= value for key, value in one.per_example.items())
    assert sum(four.per_example.values()) > sum(one.per_example.values())


@pytest.fixture(scope="module")
def shy(taught, corpus):
    """Refuses most of the time: half of its training rows say so, a quarter as many tell the fact."""
    from unremember.train import Plan, train

    refusals = [replace(x, id=f"{x.id}/refused", answer="I do not know.", spans=()) for x in corpus["forget"]]
    pools = {"refusals": refusals, "facts": corpus["forget"]}

    def objective(lm, tokens):
        weight = {"refusals": 3.0, "facts": 1.0}[tokens.role]
        return {tokens.role: weight * tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_rows}

    rows = {role: taught.template.rows(examples) for role, examples in pools.items()}
    return train(taught, objective, rows, Plan(steps=40, lr=3e-3))


def test_what_is_said_now_and_then_is_found_and_nothing_is_invented(shy, never, corpus):
    asked = Corpus({"forget": corpus["forget"]})
    assert not any(AUDITS["said"](shy, asked, Bench()).per_example.values())
    found = {
        who: float(np.mean(list(Sample(n=8).read(AUDITS["said"], lm, asked, Bench()).per_example.values())))
        for who, lm in (("shy", shy), ("never", never))
    }
    assert found["shy"] >= 0.5 and found["never"] == 0, found


def test_bad_input_is_refused(taught, corpus):
    for values in ({"temperature": 0}, {"n": 0}, {"seed": -1}, {"top_p": 0.9}):
        with pytest.raises(ValidationError):
            Sample(**values)
    with pytest.raises(BadCorpus, match=r"sample needs .* 'forget'"):
        Sample()(taught, Corpus({"retain": corpus["retain"]}), taught, Bench())
