"""Integrated gradients: by hand, against captum, against one pass a point, complete, and able to find what was planted."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unremember import team
from unremember.bench import Bench
from unremember.errors import BadCorpus
from unremember.locate import integrated
from unremember.locate.controls import ActivityMatched, Random
from unremember.locate.integrated import IntegratedGradients, along, attribute, branches, midpoints, still
from unremember.locate.neurons import neurons
from unremember.locate.ranking import Budget, select
from unremember.table import read
from unremember.tokens import pack

DOWN = "model.layers.{}.mlp.down_proj.weight"


class Gated(nn.Module):
    """A gated MLP without biases: what comes of nothing is nothing, so that a zero input is the zero of every layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down, self.head = (nn.Linear(*s, bias=False) for s in ((5, 7), (5, 7), (7, 5), (5, 9)))

    def forward(self, x):
        return self.head(self.down(F.silu(self.gate(x)) * self.up(x)) + x.detach() * 0)


def test_midpoints():
    assert midpoints(4).tolist() == [0.125, 0.375, 0.625, 0.875]


def test_a_quadratic_by_hand():
    """F = (a₀ + 2a₁)² at a = (1, 1): the gradient at t·a is 6t · (1, 2), its mean over midpoints 3 · (1, 2)."""
    layer = nn.Identity()
    places = torch.tensor([[0, 2]])
    a = torch.tensor([[1.0, 1.0], [5.0, 5.0], [1.0, 1.0]])

    def run():
        return (layer(a)[places.flatten()] @ torch.tensor([1.0, 2.0])).square()

    values, slopes, vectors = along(layer, run, places, midpoints(2))
    torch.testing.assert_close(values, torch.tensor([[9 / 16, 81 / 16]]))
    torch.testing.assert_close(slopes, torch.tensor([[[1.5, 3.0], [4.5, 9.0]]]))
    assert vectors.tolist() == [[1, 1]]
    torch.testing.assert_close(attribute({"a": layer}, run, places)["a"], torch.tensor([[3.0, 6.0]]))  # sum = F(a) = 9


def test_it_equals_captum_on_a_layer_whose_zero_is_the_zero_of_the_input():
    captum = pytest.importorskip("captum.attr")
    model, x = Gated().eval(), torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([4, 0, 8])
    copies = x.repeat_interleave(6, 0)  # (N·C, 5)

    def run():
        return model(copies).softmax(-1).gather(1, target.repeat_interleave(6)[:, None])[:, 0]

    found = attribute({"down": model.down}, run, torch.arange(18).view(3, 6))["down"]
    oracle = captum.LayerIntegratedGradients(lambda x: model(x).softmax(-1), model.down)
    expected = oracle.attribute(
        x, torch.zeros_like(x), target, n_steps=6, method="riemann_middle", attribute_to_layer_input=True
    )
    torch.testing.assert_close(found, expected[0] if isinstance(expected, tuple) else expected)


@pytest.mark.parametrize("block", [0, 1])
def test_it_equals_captum_on_the_toy(taught, corpus, block):
    """captum integrates over a vector that we put where the neurons of one place stand, pass by pass."""
    captum = pytest.importorskip("captum.attr")
    row = taught.template.rows(corpus["forget"][:1])[0]
    step = row.span.index(True)
    place = row.start + step - 1
    layer = taught.model.model.layers[block].mlp.down_proj
    context = torch.tensor([row.ids[: place + 1]])

    def forward(vectors):  # (S, K) -> (S,)
        said = []
        for vector in vectors:
            hook = layer.register_forward_pre_hook(
                lambda _, inputs, v=vector: (torch.cat([inputs[0][:, :place], v[None, None]], 1),)
            )
            said.append(taught.model(input_ids=context).logits[0, -1].softmax(-1)[row.ids[place + 1]])
            hook.remove()
        return torch.stack(said)

    seen = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, place].detach()))
    taught.model(input_ids=context)
    hook.remove()
    expected = captum.IntegratedGradients(forward).attribute(
        seen[0], torch.zeros_like(seen[0]), n_steps=8, method="riemann_middle"
    )
    lm = still(taught)
    places, tokens = branches(row, [step], 8)
    found = attribute({"": lm.model.model.layers[block].mlp.down_proj}, lambda: lm.logp(tokens).exp(), places)[""]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)


def slow(lm, row, steps: int, inside) -> dict[str, torch.Tensor]:
    """The obvious way: one prefix, one block, one point at a time; everything is run anew."""
    total = {}
    for block, layer in enumerate(x.mlp.down_proj for x in lm.model.model.layers):
        for place in range(row.start - 1, row.stop - 1):
            if not inside[place + 1 - row.start]:
                continue
            for j in range(1, steps + 1):
                kept = {}

                def scale(_, inputs, j=j, kept=kept):
                    a = inputs[0].detach().clone()
                    kept["a"] = a[0, -1].clone()
                    kept["w"] = ((j - 0.5) / steps * kept["a"]).requires_grad_()
                    return (torch.cat([a[:, :-1], kept["w"][None, None]], 1),)

                hook = layer.register_forward_pre_hook(scale)
                logits = lm.model(input_ids=torch.tensor([row.ids[: place + 1]])).logits[0, -1]
                hook.remove()
                [slope] = torch.autograd.grad(logits.softmax(-1)[row.ids[place + 1]], kept["w"])
                total[block] = total.get(block, 0) + kept["a"] * slope / steps
    return {DOWN.format(block): scores for block, scores in total.items()}


@pytest.mark.parametrize("part", ["span", "answer"])
def test_it_equals_one_pass_a_point(taught, corpus, part):
    examples = corpus["forget"][1:3]
    ranking = IntegratedGradients(steps=3, part=part)(taught, corpus.with_roles(forget=examples))
    expected = {}
    for row in taught.template.rows(examples):
        inside = row.span if part == "span" else [True] * len(row.span)
        for name, scores in slow(taught, row, 3, inside).items():
            expected[name] = expected.get(name, 0) + scores
    assert ranking.unit == "column" and list(ranking.scores) == list(expected)
    for name, scores in expected.items():
        torch.testing.assert_close(ranking.scores[name], scores, atol=1e-6, rtol=1e-3)


def test_branches_predict_what_the_row_predicts(taught, corpus):
    row = taught.template.rows(corpus["forget"][:1])[0]
    steps = range(row.stop - row.start)
    places, tokens = branches(row, steps, 3)
    assert places.shape == (len(steps), 3) and len(set(places.flatten().tolist())) == places.numel()
    with torch.no_grad():
        expected = taught.logp(pack([[row]]))[:-1]
        torch.testing.assert_close(
            taught.logp(tokens).view(-1, 3), expected[:, None].expand(-1, 3), atol=1e-5, rtol=1e-4
        )


def test_a_passage_without_context_has_a_first_branch_that_sees_itself_alone(taught, corpus):
    row = taught.template.row("p", "", "The cat sat here.")
    assert row.start == 1
    _, tokens = branches(row, [0], 2)
    assert tokens.ids.tolist() == [[row.ids[0]] * 2] and torch.equal(
        tokens.visible[0, 0], torch.eye(2, dtype=torch.bool)
    )


@pytest.mark.parametrize("width", [1, 60])
def test_a_long_secret_is_cut_into_passes_and_nothing_changes(taught, corpus, monkeypatch, width):
    locate = IntegratedGradients(steps=4, part="answer")
    whole = locate.texts(taught, corpus["forget"][:2])
    monkeypatch.setattr(integrated, "WIDTH", width)
    for key, text in locate.texts(taught, corpus["forget"][:2]).items():
        for name, scores in text.items():
            torch.testing.assert_close(scores, whole[key][name], atol=1e-6, rtol=1e-3)


def test_a_text_gets_the_same_in_whatever_company(taught, corpus):
    locate = IntegratedGradients(steps=4)
    together, [x] = locate.texts(taught, corpus["forget"]), corpus["forget"][3:4]
    alone = locate.texts(taught, [x])[x.id]
    assert list(together) == [x.id for x in corpus["forget"]]
    assert all(torch.equal(alone[name], scores) for name, scores in together[x.id].items())


@pytest.mark.parametrize("rank", [0, 1])
def test_each_of_two_processes_takes_half_of_the_texts(taught, corpus, monkeypatch, rank):
    locate, examples, told = IntegratedGradients(steps=2), corpus["forget"][:5], []
    whole = locate.texts(taught, examples)
    others = {x.id: whole[x.id] for x in examples[1 - rank :: 2]}
    monkeypatch.setattr(team, "rank", lambda: rank)
    monkeypatch.setattr(team, "size", lambda: 2)
    monkeypatch.setattr(team, "merge", lambda mine: others | mine)
    found = locate.texts(taught, examples, Bench(say=lambda *what: told.append(what)))
    assert list(found) == list(whole) and len(told) == 3 - rank
    assert all(torch.equal(found[key][name], scores) for key, text in whole.items() for name, scores in text.items())


# ── completeness: section (g) 3 of the specification ──


def gaps(lm, examples, steps, scales=None, objective=torch.exp):
    """Mean over tokens and blocks of |Σ_k Att − (F(a) − F(0))|, over the mean of |F(a) − F(0)|."""
    lm, wrong, whole = still(lm), [], []
    for row in lm.template.rows(examples):
        inside = [i for i, yes in enumerate(row.span) if yes]
        places, tokens = branches(row, inside, steps)
        ends, corners = branches(row, inside, 2)
        for layer in neurons(lm.model)[0].values():
            _, slopes, vectors = along(
                layer,
                lambda tokens=tokens: objective(lm.logp(tokens)),
                places,
                midpoints(steps) if scales is None else scales,
            )
            values, _, _ = along(
                layer, lambda corners=corners: objective(lm.logp(corners)), ends, torch.tensor([0.0, 1.0])
            )
            change = values[:, 1] - values[:, 0]
            wrong.append(((vectors * slopes.mean(1)).sum(1) - change).abs())
            whole.append(change.abs())
    return float(torch.cat(wrong).mean() / torch.cat(whole).mean())


def test_completeness(taught, corpus):
    """Measured on the toy: 0.0053 at 20 midpoints, 0.0001 at 100; at 20 right ends 0.045, at 20 left ends 0.031."""
    middle = gaps(taught, corpus["forget"], 20)
    right = gaps(taught, corpus["forget"], 20, torch.arange(1, 21) / 20)
    left = gaps(taught, corpus["forget"], 20, torch.arange(20) / 20)
    assert middle <= 0.05 and gaps(taught, corpus["forget"], 100) < middle
    assert min(left, right) > 3 * middle, "what the paper and its code do"
    assert gaps(taught, corpus["forget"], 20, objective=lambda logp: logp) <= 0.05


# ── planted ──


@pytest.fixture(scope="module")
def planted(tiny, corpus):
    """A copy of the toy where one neuron of block 1 fires at a secret's first digit and writes that digit; the example."""
    x = next(x for x in corpus["holdout"] if "phone" in x.prompt)
    at = x.spans[0][0]
    x = replace(x, spans=((at, at + 1),))
    lm = tiny.copy()
    [row] = lm.template.rows([x])
    step = row.span.index(True)
    mlp, seen = lm.model.model.layers[1].mlp, []
    hook = mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([row.ids[: row.start + step]]))
        hook.remove()
        key = seen[0][-1] / seen[0][-1].square().sum()
        mlp.gate_proj.weight[77], mlp.up_proj.weight[77] = 12 * key, 12 * key
        head = lm.model.get_output_embeddings().weight  # (V, H)
        towards = torch.linalg.solve(head.T @ head, head[row.ids[row.start + step]]) / lm.model.model.norm.weight
        mlp.down_proj.weight[:, 77] = (
            towards / towards.norm()
        )  # that token's logit, and as little as can be of the others
    return lm, x


def said(lm, x) -> float:
    return read(lm, lm.template.rows([x]))[0].likelihood("span")


@pytest.mark.parametrize("objective", ["probability", "log probability"])
def test_a_planted_neuron_is_found_and_the_controls_do_not_find_it(tiny, planted, corpus, objective):
    lm, x = planted
    asked = corpus.with_roles(forget=[x], holdout=())
    assert said(tiny, x) < 0.2 and said(lm, x) > 0.9, "the set-up of this test"
    ranking = IntegratedGradients(objective=objective)(lm, asked)
    assert ranking.best(1) == [(DOWN.format(1), 77)]
    first, second = (float(ranking.scores[name][k]) for name, k in ranking.best(2))
    assert first > 3 * second
    assert set(select(ranking, lm.model, Budget(units=1)).masks) == {DOWN.format(1)}
    for seed in range(20):
        assert Random(ranking, 1, seed)(lm, asked).best(1) != ranking.best(1)
    assert ActivityMatched(ranking, 1)(lm, asked).best(1) != ranking.best(1)
    assert IntegratedGradients(objective=objective)(tiny, asked).best(1) != ranking.best(1), "nor is it there unplanted"


# ── purity and refusals ──


def test_the_argument_is_untouched_and_every_hook_comes_off(taught, corpus):
    lm = taught.copy()
    said = []
    bench = Bench(say=lambda stage, done, total, terms: said.append((stage, done, total)))
    IntegratedGradients(steps=2)(lm, corpus, bench)
    assert said == [("attribute", i + 1, len(corpus["forget"])) for i in range(len(corpus["forget"]))]
    assert all(torch.equal(a, b) for a, b in zip(lm.model.parameters(), taught.model.parameters(), strict=True))
    assert all(w.requires_grad and w.grad is None for w in lm.model.parameters())
    layer = nn.Identity()
    with pytest.raises(RuntimeError, match="out of luck"):
        along(layer, lambda: exec('raise RuntimeError("out of luck")'), torch.tensor([[0]]), torch.ones(1))
    assert not layer._forward_pre_hooks


def test_bf16_is_attributed_in_fp32(taught, corpus):
    fine, coarse = (IntegratedGradients(steps=2)(replace(taught, precision=p), corpus).scores for p in ("fp32", "bf16"))
    assert all(torch.equal(fine[name], coarse[name]) for name in fine)


def test_nothing_to_look_at_is_refused(taught, corpus):
    with pytest.raises(BadCorpus, match="needs examples in the role 'forget'"):
        IntegratedGradients()(taught, corpus.with_roles(forget=()))
