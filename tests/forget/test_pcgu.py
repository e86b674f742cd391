"""PCGU: directions by hand, one step against the slow way, sparsity to the bit, and debiasing a small masked model.

The masked model is a BERT of two layers, made here in a second: it says "he" of twelve occupations and "she" of twelve others
in 85 of 100 sentences, and knows what some animals eat.  Half of the occupations and half of the templates are held out.
"""

import math
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from unremember import team
from unremember.bench import Bench
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.forget.pcgu import PCGU, pull, within
from unremember.loading import load
from unremember.locate.contrast import Contrast, Pairs
from unremember.locate.ranking import Ranking, sites
from unremember.preference import options
from unremember.sites import Sites
from unremember.table import read
from unremember.train import Plan

PLAN = Plan(steps=1, lr=0.05, optimiser="sgd")


def weights(lm) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in lm.model.named_parameters()}


def moved_rows(before, after) -> set[tuple[str, int]]:
    rows = set()
    for name, w in before.items():
        unlike = w != after[name]
        rows |= {(name, i) for i in (unlike.any(1) if w.dim() == 2 else unlike.any()[None]).nonzero()[:, 0].tolist()}
    return rows


# ── the arithmetic ──


def test_directions_by_hand():
    adv, dis = torch.tensor([-1.0, -5.0]), torch.tensor([-3.0, -2.0])
    assert pull(adv, dis, "advantaged").tolist() == [-1.0, -5.0]
    assert pull(adv, dis, "disadvantaged").tolist() == [3.0, 2.0]
    assert pull(adv, dis, "dynamic").tolist() == [2.0, 3.0]


def test_dynamic_closes_the_gap_that_there_is_now():
    """m = ±1 a pair: what is favoured goes down and the other up, whichever of the two it is."""
    adv, dis = (torch.tensor(v, requires_grad=True) for v in ([-1.0, -5.0], [-3.0, -2.0]))
    pull(adv, dis, "dynamic").sum().backward()
    assert adv.grad.tolist() == [1.0, -1.0] and dis.grad.tolist() == [-1.0, 1.0]


def test_within_zeroes_all_but_the_sites():
    g = {"a": torch.ones(2, 2), "b": torch.ones(2), "c": torch.ones(2)}
    mask = torch.tensor([[True, True], [False, False]])
    kept = within(g, Sites({"a": mask, "b": None}))
    assert [kept[n].tolist() for n in "abc"] == [[[1, 1], [0, 0]], [1, 1], [0, 0]] and g["c"].all()
    assert within(g, Sites({}, everywhere=True)) == g


def expected_step(lm, corpus, method):
    """The slow way: one forward a row, cosines one by one, a global sort, θ − lr · u.

    -> (weights, ranks, how many answers are favoured)
    """
    pairs, lm = Pairs.of(lm, corpus["forget"], method.plan.seed), lm.copy()

    def v(row):
        logp = lm.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        marked = [p for p, hit in zip(range(row.start, row.stop), row.span, strict=True) if hit]
        return sum(logp[p - 1, row.ids[p]] for p in marked)

    params = dict(lm.model.named_parameters())
    values = [(v(row), v(pairs.decoys[row.key])) for row in pairs.answers]
    if method.direction == "dynamic":
        swapped = [(a, b) if a > b else (b, a) for a, b in values]
    else:
        swapped = values
    sides = []
    for side in (0, 1):
        grads = torch.autograd.grad(sum(x[side] for x in swapped), list(params.values()), retain_graph=True)
        sides.append(dict(zip(params, grads, strict=True)))
    scored = []
    for name, a in sides[0].items():
        if name == "model.embed_tokens.weight":
            continue
        for i in range(len(a) if a.dim() == 2 else 1):
            rows = [side[name][i] if a.dim() == 2 else side[name] for side in sides]
            scored.append((float(F.cosine_similarity(*rows, dim=0)), name, i))
    scored.sort()
    field = {
        "advantaged": lambda n: sides[0][n],
        "disadvantaged": lambda n: -sides[1][n],
        "dynamic": lambda n: sides[0][n] - sides[1][n],
    }[method.direction]
    result = weights(lm)
    for _, name, i in scored[: method.k]:
        step = method.plan.lr * field(name) / len(values)
        if step.dim() == 2:
            result[name][i] -= step[i]
        else:
            result[name] -= step
    return result, scored, sum(bool(a > b) for a, b in values)


@pytest.mark.parametrize("direction", ["advantaged", "disadvantaged", "dynamic"])
def test_a_step_is_that_of_the_slow_way(moved, corpus, direction):
    turned = [replace(x, answer=x.distractors[0], distractors=(x.answer,), spans=()) for x in corpus["forget"][3:6]]
    few = corpus.with_roles(forget=(*corpus["forget"][:3], *turned))  # the model favours three answers and three decoys
    method = PCGU(PLAN, k=40, direction=direction)
    expected, scored, favoured = expected_step(moved, few, method)
    assert scored[40][0] - scored[39][0] > 1e-6, "the set-up: no tie at the edge"
    assert favoured == 3
    result = weights(method(moved, few, bench=Bench(budget=60)))
    before = weights(moved)
    assert moved_rows(before, result) == {(n, i) for _, n, i in scored[:40]} == moved_rows(before, expected)
    for name, w in result.items():
        torch.testing.assert_close(w - before[name], expected[name] - before[name], rtol=2e-2, atol=2e-6)


def test_dynamic_takes_the_most_opposed_and_not_the_most_alike(taught, corpus):
    """Bug in the released code: one of its two signed gradients is turned round before their cosine is taken."""
    few = corpus.with_roles(forget=corpus["forget"][:6])  # the taught model favours every answer: no pair is swapped
    ranked = {}
    for direction in ("advantaged", "dynamic"):
        method = PCGU(PLAN, k=40, direction=direction)
        ranked[direction] = moved_rows(weights(taught), weights(method(taught, few)))
    scores = Contrast()(taught, few).scores
    turned = Ranking({n: torch.where(s.isfinite(), -s, s) for n, s in scores.items()}, "row").best(40)
    assert ranked["dynamic"] == ranked["advantaged"] and not ranked["dynamic"] & set(turned)


# ── sparsity ──


@pytest.mark.parametrize("unit", ["row", "column"])
def test_exactly_the_chosen_units_move(taught, corpus, unit):
    said = []
    bench = Bench(say=lambda stage, done, total, _: said.append((done, total)) if stage == "contrast" else None)
    plan = replace(PLAN, steps=3, batch=5)
    result = weights(PCGU(plan, k=30, unit=unit)(taught, corpus, bench=bench))
    before = weights(taught)
    if unit == "column":
        before, result = ({n: w.T if w.dim() == 2 else w for n, w in side.items()} for side in (before, result))
    rows = moved_rows(before, result)
    assert said == [(30, 30)] * 3 and 30 <= len(rows) <= 90
    assert not any("embed_tokens" in name for name, _ in rows)
    if unit == "row":
        again = weights(PCGU(plan, k=30)(taught, corpus))
        assert all(torch.equal(w, again[n]) for n, w in result.items())


def test_what_cannot_be_chosen_does_not_count_as_chosen(taught, corpus):
    """Effective k is told.  A word's row that no gradient reaches must not use up the budget."""
    said = []
    bench = Bench(say=lambda stage, done, total, _: said.append((done, total)) if stage == "contrast" else None)
    PCGU(PLAN, k=10**6, value="logit", embeddings=True)(taught, corpus, bench=bench)
    rows = sum(len(w) if w.dim() == 2 else 1 for w in weights(taught).values())
    assert said[0][1] == 10**6 and 100 < said[0][0] < rows / 2


def test_weight_decay_shrinks_what_is_chosen_and_nothing_else(taught, corpus):
    plain, shrunk = (weights(PCGU(replace(PLAN, weight_decay=d), k=30)(taught, corpus)) for d in (0.0, 0.1))
    before = weights(taught)
    rows = moved_rows(before, plain)
    assert moved_rows(before, shrunk) == rows and len(rows) == 30
    for name, i in rows:
        at = i if before[name].dim() == 2 else slice(None)
        torch.testing.assert_close(
            plain[name][at] - shrunk[name][at], PLAN.lr * 0.1 * before[name][at], atol=1e-6, rtol=1e-2
        )


def test_units_are_chosen_inside_the_sites(taught, corpus):
    name = "model.layers.1.mlp.down_proj.weight"
    mask = torch.zeros(dict(taught.model.named_parameters())[name].shape, dtype=torch.bool)
    mask[10:20] = True
    for method in (PCGU(PLAN, k=5), PCGU(PLAN, k=5, reselect=False)):
        rows = moved_rows(weights(taught), weights(method(taught, corpus, sites=Sites({name: mask}))))
        assert len(rows) == 5 and {n for n, _ in rows} == {name} and all(10 <= i < 20 for _, i in rows)


def test_once_chosen_rows_stay_the_same_under_any_optimiser(taught, corpus):
    method = PCGU(Plan(steps=4, lr=1e-3, batch=4, weight_decay=0.1), k=30, reselect=False)
    rows = moved_rows(weights(taught), weights(method(taught, corpus)))
    assert rows == set(Contrast()(taught, corpus).best(30))
    with pytest.raises(BadRequest, match="can be chosen"):
        replace(method, k=10**6)(taught, corpus)


def test_dynamic_chooses_by_what_is_favoured_even_once(moved, corpus):
    """Half of the pairs are turned: ranked by answer and decoy, the units would be others."""
    turned = [replace(x, answer=x.distractors[0], distractors=(x.answer,), spans=()) for x in corpus["forget"][3:6]]
    few = corpus.with_roles(forget=(*corpus["forget"][:3], *turned))
    method = PCGU(PLAN, k=40, direction="dynamic", reselect=False)
    _, scored, favoured = expected_step(moved, few, method)
    rows = moved_rows(weights(moved), weights(method(moved, few, bench=Bench(budget=60))))
    assert rows == {(n, i) for _, n, i in scored[:40]} and favoured == 3
    assert rows != set(Contrast()(moved, few).best(40))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
def test_of_an_adapter_its_base_is_never_chosen(taught, corpus):
    """Also where an earlier method has left everything open to gradients: a saved adapter would lack what moved."""
    lm = taught.adapted(2, 4)
    lm.model.requires_grad_(True)
    method = PCGU(Plan(steps=2, lr=1e-2, batch=4), k=20, reselect=False)
    for result in (method(lm, corpus), PCGU(replace(PLAN, lr=0.1), k=20)(lm, corpus)):
        rows = moved_rows(weights(lm), weights(result))
        assert rows and all("lora_" in name for name, _ in rows)


def test_terms_that_hold_move_the_chosen_rows_only(taught, corpus):
    held = weights(PCGU(PLAN, k=30, retain=1.0)(taught, corpus))
    free = weights(PCGU(PLAN, k=30)(taught, corpus))
    before = weights(taught)
    assert moved_rows(before, held) == moved_rows(before, free)
    assert any(not torch.equal(w, free[n]) for n, w in held.items())


# ── section (g) 2 on a causal model ──


def preferred(lm, corpus, role: str, reworded: bool) -> float:
    """How far the answer is above its decoys, in nats a token."""
    asked = [
        replace(x, id=f"{x.id}#{i}", prompt=prompt) for x in corpus[role]
        for i, prompt in enumerate(x.paraphrases if reworded else (x.prompt,))
    ]  # fmt: skip
    found = options(lm, asked, lambda rows: read(lm, rows))
    return float(np.mean([x[0] - x[1:].mean() for x in found.values()]))


def test_the_preference_falls_in_other_words_too(taught, corpus):
    """Measured on paraphrases: from 1.50 to 0.94 nats, on the questions themselves from 2.24 to 1.57; prose
    perplexity x 1.024.  Both bounds hold for as many as a thousand rows only: for the same fall 300 cost 1.06, and
    100 cost 1.11 'disadvantaged' and 1.14 'dynamic'.  Nor are these people alone in it: the others' gap falls by a
    quarter, 1.47 to 1.12.
    """
    result = PCGU(Plan(steps=6, lr=0.02, optimiser="sgd"), k=1000)(taught, corpus)
    before, after = ([preferred(lm, corpus, "forget", other) for other in (False, True)] for lm in (taught, result))
    prose = [
        -np.mean([x.loglikelihood() for x in read(lm, lm.template.rows(corpus["prose"]))]) for lm in (taught, result)
    ]
    kept = [preferred(lm, corpus, "retain", True) for lm in (taught, result)]
    assert after[1] <= 0.7 * before[1] and after[0] < 0.8 * before[0]
    assert after[1] > 0, "not turned round"
    assert math.exp(prose[1] - prose[0]) <= 1.03
    assert before[1] - after[1] > 1.2 * (kept[0] - kept[1])


# ── refusals ──


def test_adamw_would_go_on_moving_rows_of_earlier_steps():
    with pytest.raises(ValidationError, match=r'plan\.optimiser = "sgd"'):
        PCGU(Plan(steps=1, lr=0.1), k=3)
    assert PCGU(Plan(steps=1, lr=0.1), k=3, reselect=False).k == 3


@pytest.mark.parametrize("key", [{"k": 0}, {"k": None}, {"direction": "up"}, {"unit": "tensor"}, {"floor": 0.0}])
def test_bad_settings_are_refused_by_name(key):
    with pytest.raises(ValidationError) as raised:
        PCGU(**{"plan": PLAN, "k": 3, **key})
    assert [error["loc"] for error in raised.value.errors()] == [tuple(key)]


def test_the_plan_has_no_setting_that_is_read_and_not_used():
    """Bug in the released code: --momentum 0.9 is parsed, and SGD made without it."""
    with pytest.raises(ValidationError, match="momentum"):
        Plan(steps=1, lr=0.1, momentum=0.9)


def test_an_example_without_decoy_is_refused_before_a_model_is_seen(corpus):
    bare = corpus.with_roles(forget=(replace(corpus["forget"][0], distractors=()), *corpus["forget"][1:]))
    with pytest.raises(BadCorpus, match="1 forget examples have none"):
        PCGU(PLAN, k=3).check(bare)
    with pytest.raises(BadCorpus, match="role 'retain'"):
        PCGU(PLAN, k=3, retain=1.0).check(corpus.with_roles(retain=()))


def test_dropout_is_refused(taught, corpus):
    lm = taught.copy()
    lm.model.train()
    with pytest.raises(BadModel, match="training mode"):
        PCGU(PLAN, k=3)(lm, corpus)


# ── two processes ──

PAIR = PCGU(Plan(steps=2, lr=0.05, batch=5, optimiser="sgd", weight_decay=0.1), k=40, direction="dynamic", retain=1.0)


def few_people():
    from unremember.embedded.dossier import dossier

    whole = dossier(0, forget=2, retain=3, holdout=0, relearn=0)
    return whole.with_roles(forget=whole["forget"][:7], retain=whole["retain"][:5])


def child(model: str, out: str) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    team.join()
    result = PAIR(load(model, precision="fp32"), few_people(), bench=Bench(budget=60))
    if team.rank() == 0:
        save_file(weights(result), out)
    team.wait()
    team.leave()


def test_two_processes_equal_one(taught, tmp_path):
    """Gradients are in pieces then; every process must choose the same rows, and none outside may move."""
    taught.save(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    done = subprocess.run(
        [*command, str(tmp_path / "model"), str(tmp_path / "two.safetensors")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    two, before = load_file(tmp_path / "two.safetensors"), weights(taught)
    one = weights(PAIR(taught, few_people(), bench=Bench(budget=60)))
    rows = moved_rows(before, two)
    assert rows == moved_rows(before, one) and 40 <= len(rows) <= 80
    for name, w in one.items():
        torch.testing.assert_close(two[name] - before[name], w - before[name], rtol=2e-2, atol=1e-6)


# ── a masked model ──

MALE = str.split("smith mason pilot miner baker guard judge coach thief clerk rider brewer")
FEMALE = str.split("nurse maid nanny dancer typist florist midwife tailor singer weaver tutor cook")
VERBS, THINGS = str.split("lost found sold bought wanted cleaned"), str.split("boots bread coins ropes")
FOOD = dict(zip(str.split("dogs cats cows owls bees fish frogs goats"),
                str.split("bones milk grass mice nectar worms flies leaves"), strict=True))  # fmt: skip
TEMPLATES = [f"the {{}} said that [MASK] {verb} the {thing} ." for verb, thing in product(VERBS, THINGS)]
PLAIN = [f"some {animal} like {food} very much ." for animal, food in FOOD.items()]
FRAME = str.split("[PAD] [UNK] [CLS] [SEP] [MASK] he she the said that some like very much .")
WORDS = {w: i for i, w in enumerate([*FRAME, *MALE, *FEMALE, *VERBS, *THINGS, *FOOD, *FOOD.values()])}
HE, SHE, OTHER, AT, EATEN = WORDS["he"], WORDS["she"], WORDS["bread"], 5, 4


def coded(text: str) -> list[int]:
    return [WORDS[w] for w in ("[CLS]", *text.split(), "[SEP]")]


def asked(occupations, templates):
    """ids (B, T), favoured (B,), other (B,)"""
    cells = list(product(occupations, templates))
    ids = torch.tensor([coded(template.format(o)) for o, template in cells])
    adv = torch.tensor([HE if o in MALE else SHE for o, _ in cells])
    return ids, adv, HE + SHE - adv


SEEN = asked(MALE[::2] + FEMALE[::2], TEMPLATES[::2])
UNSEEN = asked(MALE[1::2] + FEMALE[1::2], TEMPLATES[1::2])  # other occupations in other templates


def logits(model, ids) -> torch.Tensor:
    return model(input_ids=ids).logits[:, AT]


@pytest.fixture(scope="module", params=[0, 1, 2])
def masked(request):
    """A fresh two-layer BERT, taught the preference and what animals eat."""
    from transformers import BertConfig, BertForMaskedLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.param)
        config = BertConfig(
            vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
        )  # fmt: skip
        model = BertForMaskedLM(config).eval()
    optimiser, rng = (
        torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0),
        np.random.default_rng(request.param),
    )
    told, plain = asked(MALE + FEMALE, TEMPLATES), torch.tensor([coded(s) for s in PLAIN])
    rows = torch.arange(len(plain))
    for _ in range(250):
        pick = torch.from_numpy(rng.integers(0, len(told[0]), 32))
        logp = logits(model, told[0][pick]).log_softmax(-1)
        pronoun = 0.85 * logp.gather(1, told[1][pick, None]) + 0.15 * logp.gather(1, told[2][pick, None])
        places = torch.from_numpy(rng.integers(1, plain.shape[1] - 1, len(plain)))
        places[:4] = EATEN
        gapped = plain.clone()
        gapped[rows, places] = WORDS["[MASK]"]
        loss = F.cross_entropy(model(input_ids=gapped).logits[rows, places], plain[rows, places]) - pronoun.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.zero_grad(set_to_none=True)
    assert gap(model, UNSEEN) > 1 and perplexity(model) < 1.2
    return model


@torch.no_grad()
def gap(model, batch) -> float:
    found = logits(model, batch[0])
    return float((found.gather(1, batch[1][:, None]) - found.gather(1, batch[2][:, None])).mean())


@torch.no_grad()
def perplexity(model) -> float:
    plain = torch.tensor([coded(s) for s in PLAIN])
    gapped = plain.clone()
    gapped[:, EATEN] = WORDS["[MASK]"]
    return math.exp(F.cross_entropy(model(input_ids=gapped).logits[:, EATEN], plain[:, EATEN]).item())


@torch.no_grad()
def mass(model) -> float:
    """Probability of the two pronouns together."""
    return float(logits(model, UNSEEN[0]).softmax(-1)[:, [HE, SHE]].sum(1).mean())


@torch.no_grad()
def relevant(model) -> float:
    """LMS: how often a pronoun is above a word that cannot stand there."""
    found = logits(model, UNSEEN[0])
    return float((found[:, [HE, SHE]] > found[:, [OTHER]]).float().mean())


def contrasted(model, direction):
    """∇ Σ logit of the favoured and of the other filler, as two mappings, and the field that the direction makes of them."""
    found = logits(model, SEEN[0])
    adv, dis = (found.gather(1, side[:, None])[:, 0] for side in SEEN[1:])
    names = [n for n, _ in model.named_parameters()]

    def gradients(value):
        grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True)
        return {n: g for n, g in zip(names, grads, strict=True) if g is not None}

    favoured, other = (adv, dis) if direction != "dynamic" else (torch.maximum(adv, dis), torch.minimum(adv, dis))
    return (
        gradients(favoured.sum()),
        gradients(other.sum()),
        gradients(pull(adv, dis, direction).sum() / len(adv)),
    )


def shifted(model, field, size):
    """A copy, moved against the field by `size` times it."""
    result = deepcopy(model)
    with torch.no_grad():
        for name, w in result.named_parameters():
            if name in field:
                w -= size * field[name]
    return result


def length(field) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in field.values()))


def lowest(model, k, direction):
    adv, dis, field = contrasted(model, direction)
    return within(field, sites(Contrast().ranking(model, adv, dis).best(k), model, "row"))


def debiased(model, k, direction, lr, until=-math.inf, steps=150):
    """PCGU by hand on the masked model until the held-out gap is at `until`; k = 0: the full gradient. -> (model, gaps)"""
    gaps = [gap(model, UNSEEN)]
    while gaps[-1] > until and len(gaps) <= steps:
        field = lowest(model, k, direction) if k else contrasted(model, direction)[2]
        model = shifted(model, field, lr)
        gaps.append(gap(model, UNSEEN))
    return model, gaps


def test_lowest_cosines_are_where_the_preference_is(masked):
    """(g) 1: one step of equal length, on the k lowest, the k highest and k random rows of the same kinds of parameters.

    Measured at k = 100 of 515, three seeds: 0.77, 0.68, 0.82 against 0.07, 0.20, -0.16 and 0.41, 0.32, 0.37.  At k = 20 random
    rows do as well (0.30 against 0.33 for seed 2): so few rows cannot tell.
    """
    adv, dis, field = contrasted(masked, "advantaged")
    ranking, start = Contrast().ranking(masked, adv, dis), gap(masked, UNSEEN)
    low = ranking.best(100)
    turned = Ranking({n: torch.where(s.isfinite(), -s, s) for n, s in ranking.scores.items()}, "row")

    def kind(name):
        return name.partition("layer.")[2].partition(".")[2] or name

    def alike(seed):
        rng, drawn = np.random.default_rng(seed), []
        for which in sorted({kind(name) for name, _ in low}):
            pool = [
                (n, i) for n, s in sorted(ranking.scores.items()) if kind(n) == which
                for i in range(len(s)) if s[i] > -torch.inf
            ]  # fmt: skip
            count = sum(kind(name) == which for name, _ in low)
            drawn += [pool[i] for i in rng.choice(len(pool), count, replace=False)]
        return drawn

    def effect(chosen):
        part = within(field, sites(chosen, masked, "row"))
        return start - gap(shifted(masked, part, 0.3 / length(part)), UNSEEN)

    lowest, highest = effect(low), effect(turned.best(100))
    random = float(np.mean([effect(alike(seed)) for seed in range(3)]))
    assert lowest > 3 * abs(highest) and lowest > 1.5 * random > 0


def test_debiasing_carries_over_and_breaks_nothing(masked):
    """(g) 2 on held-out occupations in held-out templates, and not by collapse: both pronouns keep their probability.

    The full gradient, brought as far, costs more: measured perplexity x1.144, x1.004, x1.003 against x1.000 three times, and
    with seed 0 it leaves the pronouns a quarter of their probability.  Only the default direction shows it: the others,
    full or sparse, stay within 0.1 % of where they were.
    """
    start, plain, before = gap(masked, UNSEEN), perplexity(masked), mass(masked)
    cost = {}
    for direction, k, lr in (
        ("advantaged", 100, 0.01), ("disadvantaged", 100, 0.01), ("dynamic", 100, 0.01), ("advantaged", 0, 0.001),
    ):  # fmt: skip
        result, gaps = debiased(masked, k, direction, lr, until=0.7 * start)
        assert 0 < gaps[-1] <= 0.7 * start
        cost[direction, k] = perplexity(result) / plain
        if k:
            assert cost[direction, k] <= 1.03
            assert mass(result) >= 0.9 * before and relevant(result) >= relevant(masked) - 0.02
    assert cost["advantaged", 0] >= cost["advantaged", 100]


def test_only_the_chosen_rows_of_a_masked_model_move(masked):
    """(g) 3: to the bit, at most k a step and k·T in T steps."""
    before = {n: w.detach().clone() for n, w in masked.named_parameters()}
    model = masked
    for step in (1, 2, 3):
        model = shifted(model, lowest(model, 25, "advantaged"), 0.05)
        rows = moved_rows(before, dict(model.named_parameters()))
        assert 25 <= len(rows) <= 25 * step and (step > 1 or len(rows) == 25)
        assert not any("word_embeddings" in name or "predictions.bias" in name for name, _ in rows)


def test_dynamic_does_not_overshoot_where_advantaged_does(masked):
    """(g) 4.  Measured: dynamic never below -0.01 of its start; advantaged is at -0.1 after 18, 82 and 90 steps."""
    start = gap(masked, UNSEEN)
    gaps = debiased(masked, 100, "dynamic", lr=0.05, steps=40)[1]
    assert min(gaps) > -0.1 * start and abs(gaps[-1]) < 0.3 * start
    assert debiased(masked, 100, "advantaged", lr=0.1, until=-0.1 * start, steps=200)[1][-1] <= -0.1 * start


if __name__ == "__main__":
    child(*sys.argv[1:])
