"""Mechanistic unlearning: −log(1 − p) at both ends, what may move, and section (g) on a model whose lookup is known.

It does not hold on toys that were taught in the ordinary way (48 people's towns and trades, chance .25).  Two blocks: a probe at
the name reads .33, .36, .36.  Four blocks: .71 at the embedding already, each name being a token of its own; with frozen
embeddings .29, .40, .46, .44, .45.  In all three, heads of the first block carry the answers out, so that path patching refuses;
the probe refuses the first two, whose climb is below .15.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from planted import FORGET, LOOKUP, TOWNS, outdoors, planted
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus
from unremember.forget.mechanistic import Mechanistic, denial, false
from unremember.locate.anatomy import components
from unremember.locate.lookup import logistic, streams
from unremember.locate.path import PathPatching
from unremember.sites import EVERYWHERE, Sites
from unremember.table import read
from unremember.tokens import lanes, pack
from unremember.train import Plan, train

PLAN = Plan(steps=3, lr=1e-3, clip=1.0)


def weights(lm) -> dict[str, torch.Tensor]:
    return {name: w.detach() for name, w in lm.model.named_parameters()}


def changed(before, after) -> set[str]:
    return {n for n, w in weights(before).items() if not torch.equal(w, weights(after)[n])}


# ── the loss ──


def test_denial_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.05, 0.05]])
    loss, active = denial(p.log() + 7, torch.tensor([0, 2]), -5.0)  # logits are free to shift
    torch.testing.assert_close(loss, torch.tensor([np.log(2), -np.log(0.95)]).float())
    assert active.all()


@pytest.mark.parametrize("gap", [40.0, 20.0, -3.0, -20.0, -40.0])
def test_denial_is_exact_where_p_is_all_and_where_it_is_nothing(gap):
    """Against float64; in float32 the naive form is infinite at the one end and zero at the other."""
    logits = torch.tensor([[gap, 0.0, 0.0]], requires_grad=True)
    loss, _ = denial(logits, torch.tensor([0]), -100.0)
    rest = np.log(2.0)
    exact = np.log1p(np.exp(gap - rest))  # −log(1 − p) = log(1 + p / (1 − p))
    assert loss.item() == pytest.approx(exact, rel=1e-6)
    [slope] = torch.autograd.grad(loss.sum(), logits)
    p = 1 / (1 + np.exp(rest - gap))
    np.testing.assert_allclose(slope[0].numpy(), [p, -p / 2, -p / 2], rtol=1e-5)  # ∂/∂z = p (e_y − q), q without y
    naive = -torch.log(1 - logits.detach().softmax(1)[0, 0])
    assert abs(gap) < 20 or abs(naive.item() - exact) > 1e-3 * exact, "what makes the care necessary"


def test_below_the_cut_off_there_is_neither_loss_nor_slope():
    logits = torch.tensor([[-4.0, 0.0, 0.0], [-4.5, 0.0, 0.0]], requires_grad=True)  # log p = −4.70 and −5.20
    loss, active = denial(logits, torch.zeros(2, dtype=torch.long), -5.0)
    assert active.tolist() == [True, False] and loss[0] > 0 and loss[1] == 0
    [slope] = torch.autograd.grad(loss.sum(), logits)
    assert slope[0].any() and not slope[1].any() and slope.isfinite().all()


@pytest.mark.parametrize("part", ["answer", "span"])
def test_terms_by_hand_with_answers_of_many_tokens(taught, moved, corpus, slow_nll, part):
    method = Mechanistic(PLAN, "mlps", forget=2.0, retain=3.0, text=0.5, part=part)
    pools, objective = method.terms(taught, corpus)
    assert list(pools) == ["forget", "retain", "replay"]
    losses, active = [], []
    for row in pools["forget"]:
        with torch.no_grad():
            p = (-slow_nll(moved, row).double()).exp()
        p = p[torch.tensor(row.span)] if part == "span" else p
        active += (p.log() >= -5).tolist()
        losses += torch.where(p.log() >= -5, -(1 - p).log(), 0.0).tolist()
    assert len(losses) > 2 * len(pools["forget"]) and 0 < np.mean(active) < 1, "the set-up of this test"
    with torch.no_grad():
        terms = objective(moved, pack(lanes(pools["forget"], 256), "forget"))
        assert set(terms) == {"mechanistic", "active"}
        assert terms["mechanistic"].item() == pytest.approx(2 * np.mean(losses), rel=1e-3)
        assert terms["active"].item() == pytest.approx(np.mean(active))
        for role, weight in (("retain", 3.0), ("replay", 0.5)):
            tokens = pack(lanes(pools[role], 256), role)
            nll = -moved.logp(tokens)[tokens.mask("train")].mean()
            assert objective(moved, tokens) == {role: pytest.approx(weight * nll.item(), rel=1e-4)}


def test_the_active_share_has_no_slope(taught, corpus):
    lm = taught.copy()
    pools, objective = Mechanistic(PLAN, "mlps").terms(lm, corpus)
    terms = objective(lm, pack([pools["forget"][:3]], "forget"))
    assert not terms["active"].requires_grad and terms["mechanistic"].requires_grad


def test_a_weight_of_nothing_is_no_pool(taught, corpus):
    pools, _ = Mechanistic(PLAN, "mlps", retain=0.0, text=0.0).terms(taught, corpus)
    assert list(pools) == ["forget"] and Mechanistic(PLAN, "mlps", retain=0.0).needs == ("forget",)
    assert Mechanistic(PLAN, "lookup", retain=0.0).needs == ("forget", "retain")
    pools, _ = Mechanistic(PLAN, "mlps").terms(taught, corpus.with_roles(replay=()))
    assert list(pools) == ["forget", "retain"]


# ── injecting ──


def test_every_question_gets_a_distractor_of_its_own(taught, moved, corpus, slow_nll):
    made = false(corpus, 0)
    assert made == false(corpus, 0) != false(corpus, 1)
    for x, wrong in zip(corpus["forget"], made, strict=True):
        assert wrong.answer in x.distractors and (wrong.id, wrong.prompt) == (x.id, x.prompt)
    assert len({x.answer for x in made}) == len(made), "not one constant for all"
    pools, objective = Mechanistic(PLAN, "mlps", loss="inject", forget=2.0).terms(taught, corpus)
    assert taught.tokenizer.decode(pools["forget"][0].ids).find(made[0].answer) > 0
    tokens = pack(lanes(pools["forget"], 256), "forget")
    with torch.no_grad():
        nll = -moved.logp(tokens)[tokens.mask("train")].mean()
        assert objective(moved, tokens) == {"inject": pytest.approx(2 * nll.item(), rel=1e-4)}
        content = torch.cat([slow_nll(moved, row) for row in pools["forget"]])
    assert len(content) < int(tokens.mask("train").sum()), "the end mark is taught, too"


def test_nothing_to_inject_and_one_constant_are_refused(corpus):
    bare = [replace(x, distractors=()) if i < 2 else x for i, x in enumerate(corpus["forget"])]
    method = Mechanistic(PLAN, "mlps", loss="inject")
    with pytest.raises(BadCorpus, match=r"2 forget examples have none \(megan-krause/birthplace"):
        method.check(corpus.with_roles(forget=bare))
    constant = [replace(x, distractors=("Golf.",)) for x in corpus["forget"]]
    with pytest.raises(BadCorpus, match=r"would teach 'Golf\.' for all 12 forget examples"):
        method.check(corpus.with_roles(forget=constant))
    method.check(corpus)


# ── what may move ──


@pytest.fixture(scope="module")
def circuit(tiny):
    return planted(tiny)


@pytest.fixture(scope="module")
def size(circuit):
    """Weights in the lookup."""
    return sum(weights(circuit[0])[name].numel() for name in lookup(circuit[0]))


def lookup(lm) -> set[str]:
    return {n for x in components(lm.model) if (x.block, x.kind) == (LOOKUP, "mlp") for n in x.weights}


@pytest.mark.parametrize("locator", ["lookup", "path"])
def test_lookup_and_path_open_the_lookup_alone(circuit, locator):
    lm, corpus = circuit
    assert set(Mechanistic(PLAN, locator).sites(lm, corpus).masks) == lookup(lm)


def test_an_mlp_that_path_patching_finds_working_against_the_answer_is_open_all_the_same(circuit, monkeypatch):
    lm, corpus = circuit
    real = PathPatching._effects
    monkeypatch.setattr(PathPatching, "_effects", lambda *args: [-effect for effect in real(*args)])
    first, effects = PathPatching().lookup(lm, corpus)
    assert first > LOOKUP and min(effects.values()) < -0.1
    assert set(Mechanistic(PLAN, "path").sites(lm, corpus).masks) == lookup(lm)


@pytest.mark.parametrize("locator", ["tracing", "patching", "random"])
def test_others_are_filled_to_as_many_weights_and_no_more(circuit, size, locator):
    lm, corpus = circuit
    sites = Mechanistic(PLAN, locator, parameters=size).sites(lm, corpus)
    opened = sum(weights(lm)[name].numel() for name in sites.masks)
    assert size - 128 * 128 < opened <= size  # 128²: the smallest matrix
    assert set(sites.masks) == set(Mechanistic(PLAN, locator, parameters=size).sites(lm, corpus).masks)
    total = sum(weights(lm)[n].numel() for x in components(lm.model) for n in x.weights)
    share = Mechanistic(PLAN, locator, share=size / total * 1.0001).sites(lm, corpus)
    assert set(share.masks) == set(sites.masks)


def test_mlps_and_everything(circuit):
    lm, corpus = circuit
    assert set(Mechanistic(PLAN, "mlps").sites(lm, corpus).masks) == {n for n in weights(lm) if ".mlp." in n}
    assert Mechanistic(PLAN, "everything").sites(lm, corpus) is EVERYWHERE


@pytest.mark.parametrize("loss", ["forget", "inject"])
def test_nothing_else_moves_a_bit_whatever_decays(circuit, loss):
    lm, corpus = circuit
    plan = replace(PLAN, weight_decay=0.1)
    assert changed(lm, Mechanistic(plan, "lookup", loss=loss)(lm, corpus)) == lookup(lm)


def test_named_sites_are_taken_and_nobody_is_asked(circuit, monkeypatch):
    lm, corpus = circuit
    monkeypatch.setattr(Mechanistic, "ranking", lambda *_: pytest.fail("a locator ran"))
    named = Sites.named(lm.model, ["model.layers.0.mlp.*"])
    assert changed(lm, Mechanistic(PLAN, "lookup")(lm, corpus, sites=named)) == set(named.masks)


def test_a_locator_is_not_asked_where_nothing_is_known(tiny, corpus):
    """The tracing would refuse; there is simply nothing to do."""
    result = Mechanistic(replace(PLAN, stop="probability"), "path", retain=0.0)(tiny, replace_holdout(tiny, corpus))
    assert not changed(tiny, result) and result.model is not tiny.model


def replace_holdout(lm, corpus: Corpus) -> Corpus:
    """The better known half of the never-taught facts stands as the level."""
    people = (*corpus["holdout"], *corpus["relearn"])
    level = [x.likelihood("span") for x in read(lm, lm.template.rows(people))]
    order = [people[i] for i in np.argsort(level)]
    return corpus.with_roles(forget=order[:3], holdout=order[3:], relearn=())


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"locator": "tracing"}, "ranks every attention and MLP; give a share"),
        ({"locator": "random"}, "ranks every attention and MLP; give a share"),
        ({"locator": "mlps", "share": 0.1}, "has no order to fill a budget in"),
        ({"locator": "everything", "parameters": 10}, "has no order to fill a budget in"),
        ({"locator": "path", "share": 0.1, "parameters": 10}, "give one of them"),
        ({"locator": "probe"}, "Input should be 'lookup'"),
        ({"locator": "mlps", "cutoff": 0.0}, "less than 0"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(wrong, said):
    with pytest.raises(ValidationError, match=said):
        Mechanistic(PLAN, **wrong)


def test_check_says_all_at_once_and_before_any_weight(corpus):
    bare = [replace(x, distractors=(), entity="") for x in corpus["forget"]]
    with pytest.raises(BadCorpus) as raised:
        Mechanistic(PLAN, "path", loss="inject").check(corpus.with_roles(forget=bare))
    assert len(raised.value.problems) == 2 and "do not have it there" in raised.value.problems[1]
    with pytest.raises(BadCorpus, match="no question has two values with 3 people"):
        Mechanistic(PLAN, "lookup").check(corpus)
    with pytest.raises(BadCorpus, match="needs examples in the role 'retain'"):
        Mechanistic(PLAN, "mlps").check(corpus.with_roles(retain=()))


# ── section (g), on the planted model: same steps, same rate, as many weights; asked in the other format, too ──


def known(lm, examples) -> float:
    return float(np.mean([x.likelihood("span") for x in read(lm, lm.template.rows(examples), Bench())]))


def relearnt(lm, corpus: Corpus):
    """Half of the forgotten people are taught again."""

    def objective(lm, tokens):
        return {"facts": tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}

    rows = lm.template.rows(corpus["forget"][: FORGET // 2])
    return train(lm, objective, {"facts": rows}, Plan(steps=20, lr=1e-3))


def latent(lm, corpus: Corpus) -> list[float]:
    """Behind each block: share of the forgotten people whose town a probe for retained people of *this* model still reads."""
    kept, gone = streams(lm, corpus["retain"]).double(), streams(lm, corpus["forget"]).double()
    label = {role: torch.tensor([TOWNS.index(x.answer[3:]) for x in corpus[role]]) for role in ("retain", "forget")}
    right = []
    for x, asked in zip(kept, gone, strict=True):
        mean, sd = x.mean(0), x.std(0)
        weight, bias = logistic((x - mean) / sd, label["retain"], len(TOWNS))
        said = (((asked - mean) / sd) @ weight.T + bias).argmax(1)
        right.append(float((said == label["forget"]).double().mean()))
    return right


@pytest.fixture(scope="module")
def results(circuit, size):
    lm, corpus = circuit
    plan = Plan(steps=60, lr=3e-3, clip=1.0)
    budgets = {"lookup": {}, "patching": {"parameters": size}, "tracing": {"parameters": size}}
    return {name: Mechanistic(plan, name, part="span", **kw)(lm, corpus) for name, kw in budgets.items()}


def test_the_planted_model_knows_everybody_in_both_formats(circuit):
    lm, corpus = circuit
    for role in ("forget", "retain"):
        assert known(lm, corpus[role]) > 0.99 and known(lm, [outdoors(x) for x in corpus[role]]) > 0.99
    assert min(latent(lm, corpus)[LOOKUP + 1 :]) == 1.0 and max(latent(lm, corpus)[: LOOKUP + 1]) <= 0.5


@pytest.mark.parametrize("name", ["lookup", "patching", "tracing"])
def test_all_forget_alike_in_the_format_they_trained_on(circuit, results, name):
    _, corpus = circuit
    assert known(results[name], corpus["forget"]) < 0.05 and known(results[name], corpus["retain"]) > 0.98


def test_only_the_lookup_is_selective_in_the_other_format(circuit, results):
    """(g) 2.  Retained minus forgotten: 1.00 for the lookup; 0.00 for the others, which broke the format for everybody: so a low
    forget score alone would have flattered them.
    """
    _, corpus = circuit
    kept, gone = ([outdoors(x) for x in corpus[role]] for role in ("retain", "forget"))
    selective = {name: known(lm, kept) - known(lm, gone) for name, lm in results.items()}
    assert selective["lookup"] > 0.9
    assert max(selective["patching"], selective["tracing"]) < selective["lookup"] - 0.15
    assert known(results["patching"], kept) < 0.1


def test_relearning_half_brings_the_other_half_back_where_the_read_out_was_edited(circuit, results):
    """(g) 3.  On people who were not shown again: 0.00 for the lookup, 0.45 for patching.  All learn those who were
    shown (1.00), so that it is not for want of steps; a model whose lookup never held the forgotten comes to 0.11 on
    the others.
    """
    lm, corpus = circuit
    never = lm.copy()
    with torch.no_grad():
        never.model.model.layers[LOOKUP].mlp.down_proj.weight[:, :FORGET] = 0  # what their neurons would write
    shown, other = corpus["forget"][: FORGET // 2], corpus["forget"][FORGET // 2 :]
    assert known(never, corpus["forget"]) < 0.05 and known(never, corpus["retain"]) > 0.98, "the set-up of this control"
    again = {name: relearnt(x, corpus) for name, x in {**results, "never": never}.items() if name != "tracing"}
    assert min(known(x, shown) for x in again.values()) > 0.9
    back = {name: known(x, other) for name, x in again.items()}
    assert back["lookup"] <= back["patching"] - 0.1 and back["lookup"] <= 0.1
    assert back["lookup"] <= back["never"] + 0.1 < back["patching"]


def test_a_probe_still_reads_the_town_where_the_read_out_was_edited(circuit, results):
    """(g) 4.  Behind every block from the lookup on: 1.0 for patching and tracing, 0.0 for the lookup."""
    _, corpus = circuit
    for name in ("patching", "tracing"):
        assert min(latent(results[name], corpus)[LOOKUP + 1 :]) >= 0.8
    assert max(latent(results["lookup"], corpus)[LOOKUP + 1 :]) <= 0.5


def test_an_injected_town_is_said_in_the_other_format_too(circuit):
    lm, corpus = circuit
    result = Mechanistic(Plan(steps=60, lr=3e-3, clip=1.0), "lookup", loss="inject")(lm, corpus)
    wrong = [replace(x, spans=((3, len(x.answer)),)) for x in false(corpus, 0)]
    other = [replace(outdoors(x), answer=f"at {x.answer[3:]}") for x in wrong]
    assert known(result, wrong) > 0.9 and known(result, other) > 0.9 and known(result, corpus["retain"]) > 0.9
