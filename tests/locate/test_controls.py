"""Controls: as many units a layer as what they are the control of, none of the same, and matched in what they write."""

import itertools

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from unremember.bench import Bench
from unremember.errors import BadCorpus, BadRequest
from unremember.locate.controls import ActivityMatched, Random, matched, writing
from unremember.locate.gradients import Gradients
from unremember.locate.integrated import IntegratedGradients
from unremember.locate.neurons import neurons
from unremember.locate.ranking import Budget, Ranking, select

DOWN = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]


@pytest.fixture(scope="module")
def ranking(taught, corpus):
    return IntegratedGradients(steps=4)(taught, corpus)


def by_layer(best) -> dict[str, int]:
    return {name: sum(n == name for n, _ in best) for name in sorted({n for n, _ in best})}


@pytest.mark.parametrize("kind", [Random, ActivityMatched])
@pytest.mark.parametrize("units", [1, 26, 51])
def test_as_many_in_every_layer_and_none_of_the_same(taught, corpus, ranking, kind, units):
    control, chosen = kind(ranking, units)(taught, corpus), ranking.best(units)
    others = control.best(units)
    assert len(others) == len(set(others)) == units and not set(others) & set(chosen)
    assert by_layer(others) == by_layer(chosen) and control.unit == ranking.unit
    assert len(control.best(999)) == units, "nothing but these can be chosen"
    same = [
        sum(int(m.sum()) for m in select(r, taught.model, Budget(units=units)).masks.values())
        for r in (ranking, control)
    ]
    assert same[0] == same[1], "an equal budget"
    share = units / 256
    assert set(select(control, taught.model, Budget(share=share)).masks) == set(by_layer(chosen))
    with pytest.raises(BadRequest, match=f"{units + 1} units were asked for and {units} can be chosen"):
        select(control, taught.model, Budget(units=units + 1))


def test_a_seed_draws_a_control_and_another_one_another(taught, corpus, ranking):
    first, again, other = (Random(ranking, 26, seed)(taught, corpus).best(26) for seed in (0, 0, 1))
    assert first == again and set(first) != set(other)
    drawn = {unit for seed in range(300) for unit in Random(ranking, 26, seed)(taught, corpus).best(26)}
    assert len(drawn) == 256 - 26, "every other unit is drawn at some time"


def test_random_units_may_be_of_any_kind(taught, corpus):
    rows = Gradients("gradient", "row")(taught, corpus)
    assert by_layer(Random(rows, 40)(taught, corpus).best(40)) == by_layer(rows.best(40))
    with pytest.raises(BadRequest, match="needs a ranking of neurons, which are the columns of"):
        ActivityMatched(rows, 40)(taught, corpus)
    columns = Gradients("gradient", "column")(taught, corpus)
    with pytest.raises(BadRequest, match="needs a ranking of neurons"):
        ActivityMatched(columns, 4)(taught, corpus)


def test_the_match_by_hand_and_against_every_assignment():
    strength = torch.tensor([1.0, 1.1, 5.0, 0.9, 9.0, 4.0])
    found = matched(strength, torch.tensor([0, 2]), torch.tensor([1, 3, 4, 5]))
    assert found.tolist()[1] == 5 and found.tolist()[0] in (1, 3)
    noise = torch.rand(9, generator=torch.Generator().manual_seed(0))
    chosen, free = torch.tensor([0, 4, 7]), torch.tensor([1, 2, 3, 5, 6, 8])
    cost = (noise[chosen] - noise[matched(noise, chosen, free)]).abs().sum()
    best = min(float((noise[chosen] - noise[list(o)]).abs().sum()) for o in itertools.permutations(free.tolist(), 3))
    assert float(cost) == pytest.approx(best), "greedy matching would do worse here"


@pytest.mark.parametrize("part", ["span", "answer"])
def test_what_a_neuron_writes_the_slow_way(taught, corpus, part):
    examples = corpus["forget"][:4]
    found = writing(taught, examples, part, Bench(budget=100))
    for name, layer in neurons(taught.model)[0].items():
        seen = []
        hook = layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][0]))
        spots = []
        with torch.no_grad():
            for row in taught.template.rows(examples):
                taught.model(input_ids=torch.tensor([row.ids]))
                inside = row.span if part == "span" else [True] * len(row.span)
                spots += [seen[-1][row.start - 1 + i] for i, yes in enumerate(inside) if yes]
        hook.remove()
        expected = torch.stack(spots).abs().mean(0) * torch.stack([w.norm() for w in layer.weight.detach().T])
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-3)


def test_matched_neurons_write_as_strongly_and_random_ones_do_not(taught, corpus, ranking):
    strength = writing(taught, corpus["forget"], "span")

    def mean(best) -> float:
        return sum(float(strength[name][k]) for name, k in best) / len(best)

    chosen = mean(ranking.best(26))
    drawn = [mean(Random(ranking, 26, seed)(taught, corpus).best(26)) for seed in range(5)]
    alike = mean(ActivityMatched(ranking, 26)(taught, corpus).best(26))
    assert abs(alike - chosen) < min(abs(value - chosen) for value in drawn) / 2


def test_a_match_stands_where_the_matched_one_stood(taught, corpus):
    scores = {name: torch.full((128,), -torch.inf) for name in DOWN}
    scores[DOWN[1]][5], scores[DOWN[0]][9], scores[DOWN[1]][2] = 3.0, 2.0, 1.0
    found = ActivityMatched(Ranking(scores, "column"), 3)(taught, corpus).best(3)
    assert [name for name, _ in found] == [DOWN[1], DOWN[0], DOWN[1]]


def test_a_control_can_be_asked_for_in_plain_values(taught, corpus, ranking):
    """As a request does: the settings of the locator stand where a ranking could."""
    for kind in (Random, ActivityMatched):
        asked = TypeAdapter(kind).validate_python({"like": {"steps": 4}, "units": 26})
        assert asked.needs == ("forget",) and asked.paper and asked.summary
        assert asked(taught, corpus).best(26) == kind(ranking, 26)(taught, corpus).best(26)
    asked = TypeAdapter(Random).validate_python({"like": {"kind": "weight", "unit": "row"}, "units": 5, "seed": 3})
    assert asked == Random(Gradients("weight", "row"), 5, 3) and Random(ranking, 5).needs == ()


def test_a_control_can_be_kept_on_disk(taught, corpus, ranking, tmp_path):
    control = Random(ranking, 26)(taught, corpus)
    control.save(tmp_path / "sites.safetensors")
    assert Ranking.load(tmp_path / "sites.safetensors").best(99) == control.best(99)


def test_bad_requests_are_refused(taught, corpus, ranking):
    few = Ranking({DOWN[0]: torch.tensor([1.0] * 65 + [-torch.inf] * 63)}, "column")
    for kind in (Random, ActivityMatched):
        with pytest.raises(BadRequest, match="66 units were asked for and the ranking holds 65"):
            kind(few, 66)(taught, corpus)
        with pytest.raises(BadRequest, match=r"65 of the 128 units .* 63 are left"):
            kind(few, 65)(taught, corpus)
        with pytest.raises(ValidationError):
            kind(ranking, 0)
    with pytest.raises(BadCorpus, match="needs examples in the role 'forget'"):
        ActivityMatched(ranking, 3)(taught, corpus.with_roles(forget=()))
