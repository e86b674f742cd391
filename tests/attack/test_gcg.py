"""The engine: arithmetic by hand, every loss against a plain forward pass, what may stand in a string, and that gradients pay."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import binomtest

from unremember.attack.gcg import (
    Behaviour,
    Entry,
    Search,
    Victim,
    allowed,
    behaviour,
    decoded,
    mellowmax,
    moved,
    pools,
    search,
    started,
    survives,
    swaps,
    tells,
    unit,
)
from unremember.bench import LEAST
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.tokens import Template

N = 12


def targeted(lm, key: str, prompt: str, answer: str, n: int = N, most: int = 8) -> Behaviour:
    row = lm.template.row(key, prompt, answer)
    target = row.ids[row.start : row.stop][:most]
    return behaviour(lm.template, key, prompt, "", target, started(lm.template, " !", n), lm.limit)


def masked(lm, *answers: str) -> torch.Tensor:
    return allowed(lm.tokenizer, lm.model.config.vocab_size, answers, answers)


def anything(_) -> bool:
    return True


@pytest.fixture(scope="module")
def three(taught, corpus) -> tuple[Behaviour, ...]:
    """Prompts and targets of different lengths."""
    rows = corpus["forget"][:3]
    return tuple(targeted(taught, x.id, x.prompt, x.answer, most=5 + i) for i, x in enumerate(rows))


@pytest.fixture(scope="module")
def strings(taught) -> list[tuple[int, ...]]:
    """The start and some random strings of the same length."""
    usable = masked(taught, "nothing").nonzero()[:, 0].numpy()
    rng = np.random.default_rng(0)
    return [
        started(taught.template, " !", N),
        *(tuple(int(i) for i in rng.choice(usable, N)) for _ in range(4)),
    ]


def slow(lm, b: Behaviour, ids) -> torch.Tensor:
    """nll of each target token, from one plain forward over everything."""
    whole = (*b.before, *ids, *b.after, *b.target)
    logp = lm.model(input_ids=torch.tensor([whole])).logits[0].float().log_softmax(-1)
    first = len(whole) - len(b.target)
    return torch.stack([-logp[place - 1, whole[place]] for place in range(first, len(whole))])


# ── by hand ──


def test_mellowmax_by_hand():
    """(1/a) (log Σ e^{ax} − log T): for x = (0, log 3) and a = 1 that is log((1 + 3) / 2) = log 2."""
    x = torch.tensor([[0.0, np.log(3.0)]])
    assert mellowmax(x, 1.0).item() == pytest.approx(np.log(2.0))
    assert mellowmax(x, 1e-4).item() == pytest.approx(x.mean().item(), abs=1e-3)
    assert mellowmax(x, 1e3).item() == pytest.approx(x.max().item(), abs=1e-2)


def test_each_place_is_scaled_to_norm_one_and_nothing_stays_nothing():
    scaled = unit(torch.tensor([[3.0, 4.0], [0.0, 0.0], [-0.5, 0.0]]))
    assert torch.allclose(scaled, torch.tensor([[0.6, 0.8], [0.0, 0.0], [-1.0, 0.0]]))


def test_a_pool_holds_the_most_negative_allowed_tokens():
    gradient = torch.tensor([[-5.0, -1.0, 2.0, -3.0], [0.0, 1.0, -9.0, 4.0]])
    mask = torch.tensor([False, True, True, True])
    assert pools(gradient, mask, 2).tolist() == [[3, 1], [2, 1]]


def test_a_pool_never_holds_a_forbidden_token_even_if_few_are_allowed():
    """nanoGCG fills its k best with tokens at +inf, which are then drawn like any other."""
    gradient = torch.tensor([[-5.0, -1.0, 2.0, -3.0]])
    assert pools(gradient, torch.tensor([False, True, False, True]), 256).tolist() == [[3, 1]]


@pytest.mark.parametrize("replaced", [1, 2, 3])
def test_swaps_change_so_many_places_within_their_pools(replaced):
    ids, pool = (1, 2, 3), torch.tensor([[10, 11, 12], [20, 21, 22], [30, 31, 32]])
    drawn = swaps(ids, pool, 40, replaced, np.random.default_rng(0))
    assert len(set(drawn)) == len(drawn) > 5 and ids not in drawn
    for new in drawn:
        changed = [i for i in range(3) if new[i] != ids[i]]
        assert len(changed) == replaced and all(new[i] in pool[i].tolist() for i in changed)


def test_what_is_held_already_is_not_tried_again():
    assert swaps((1, 2), torch.tensor([[1], [2]]), 10, 1, np.random.default_rng(0)) == []
    assert swaps((1, 2), torch.tensor([[1], [5]]), 50, 1, np.random.default_rng(0)) == [(1, 5)]


def test_the_buffer_by_hand():
    a, b, c, d = (Entry(loss, (i,)) for i, loss in enumerate((3.0, 5.0, 2.0, 9.0)))
    assert moved((a,), b, 0) == (b,)  # even if it is worse
    assert moved((a,), b, 1) == (a,) and moved((a,), c, 1) == (c,)
    assert moved((a,), b, 2) == (a, b)
    assert moved((a, b), c, 2) == (c, a)  # the best first, the worst gone
    assert moved((c, a), d, 2) == (c, a)  # no better than the worst: stays out


# ── the model ──


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("budget", [64, 2048])
def test_losses_against_a_plain_forward_pass(taught, three, strings, cached, budget):
    victim = Victim(taught, three, budget, cached=cached)
    for active in (1, 3):
        found = victim.losses(strings, active)
        total = sum(len(b.target) for b in three[:active])
        for ids, entry in zip(strings, found, strict=True):
            expected = sum(slow(taught, b, ids).sum().item() for b in three[:active]) / total
            assert entry.ids == ids and entry.loss == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_with_and_without_the_cache_losses_are_the_same(taught, three, strings, precision):
    lm = replace(taught, precision=precision)
    tolerance = 1e-4 if precision == "fp32" else 0.1  # bf16 rounds at other places (measured: 0.02)
    cached, bare = (Victim(lm, three, cached=c).losses(strings, 3) for c in (True, False))
    for a, b in zip(cached, bare, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=tolerance)


def test_no_pass_lets_the_kept_cache_grow(taught, three, strings):
    """A cache grows in place: nanoGCG hands one to every pass, and from the second on the loss is of another text."""
    victim = Victim(taught, three)
    first = victim.losses(strings, 3)
    shapes = [k.shape for prefix in victim.prefixes for k, _ in prefix]
    victim.slope(strings[0], 3)
    assert victim.losses(strings, 3) == first
    assert [k.shape for prefix in victim.prefixes for k, _ in prefix] == shapes
    assert all(
        k.shape[-2] == len(b.before) for b, prefix in zip(three, victim.prefixes, strict=True) for k, _ in prefix
    )


def test_a_string_with_nothing_before_it(taught, strings):
    b = Behaviour("x", "", "", (), (5, 6), (7, 8, 9))
    [entry] = Victim(taught, (b,)).losses(strings[:1], 1)
    assert entry.loss == pytest.approx(slow(taught, b, strings[0]).mean().item(), abs=1e-4)


def test_mellowmax_is_taken_over_the_logits_of_the_target(taught, three, strings):
    [entry] = Victim(taught, three, alpha=2.0).losses(strings[:1], 3)
    expected = []
    for b in three:
        whole = (*b.before, *strings[0], *b.after, *b.target)
        logits = taught.model(input_ids=torch.tensor([whole])).logits[0]
        first = len(whole) - len(b.target)
        z = torch.stack([logits[i - 1, whole[i]] for i in range(first, len(whole))])
        expected.append((torch.logsumexp(-2.0 * z, 0).item() - np.log(len(z))) / 2.0)
    assert entry.loss == pytest.approx(np.mean(expected), abs=1e-4)


def test_the_gradient_against_a_one_hot_matrix(taught, three, strings):
    victim, ids = Victim(taught, three), strings[1]
    table = taught.model.get_input_embeddings().weight.detach()
    expected = torch.zeros(N, len(table))
    for b in three:
        one_hot = torch.nn.functional.one_hot(torch.tensor(ids), len(table)).float().requires_grad_()
        around = [table[torch.tensor(part)] for part in (b.before, (*b.after, *b.target))]
        embedded = torch.cat([around[0], one_hot @ table, around[1]])[None]
        logits = taught.model(inputs_embeds=embedded).logits[0]
        loss = torch.nn.functional.cross_entropy(
            logits[-len(b.target) - 1 : -1], torch.tensor(b.target), reduction="sum"
        )
        [gradient] = torch.autograd.grad(loss, one_hot)
        expected += unit(gradient)
    assert torch.allclose(victim.slope(ids, 3), expected, atol=1e-4)


def test_nothing_is_left_in_the_model(taught, three, strings):
    before = {name: value.clone() for name, value in taught.model.state_dict().items()}
    victim = Victim(taught, three, watched=("model.layers.0",))
    victim.losses(strings, 3), victim.slope(strings[0], 3)
    assert all(torch.equal(value, before[name]) for name, value in taught.model.state_dict().items())
    assert all(w.grad is None for w in taught.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in taught.model.modules())


def test_watched_blocks_are_read_from_the_string_on(taught, three, strings):
    read = []
    for cached in (True, False):
        victim = Victim(taught, three[:1], watched=("model.layers.0", "model.layers.1"), cached=cached)
        with torch.no_grad():
            read.append(victim.run([(strings[1], 0)]).hidden)
    b = three[0]
    whole = torch.tensor([(*b.before, *strings[1], *b.after, *b.target[:-1])])
    with torch.no_grad():
        expected = taught.copy().model(input_ids=whole, output_hidden_states=True).hidden_states[1][:, len(b.before) :]
    for hidden in read:
        assert len(hidden) == 2 and torch.allclose(hidden[0], expected, atol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_passes_stay_within_the_budget_and_miss_nothing(taught, three, strings, cached):
    """What stands before the slot counts even where it is cached: every row of a pass holds a copy of its keys and values."""
    victim = Victim(taught, three, budget=100, cached=cached)
    batches = victim.batches(strings, 3)
    assert max(map(len, batches)) > 1
    assert sorted(p for pairs in batches for p in pairs) == sorted((s, j) for s in strings for j in range(3))
    for pairs in batches:
        lengths = {len(three[j].before) + N + len(three[j].after) + len(three[j].target) for _, j in pairs}
        assert len(lengths) == 1 and (len(pairs) == 1 or len(pairs) * lengths.pop() <= 100)


def test_how_pairs_are_grouped_changes_nothing(taught, three, strings):
    whole = Victim(taught, three)
    for budget in (64, 100, 150):
        some = Victim(taught, three, budget=budget)
        assert len(some.batches(strings, 3)) > len(whole.batches(strings, 3))
        for a, b in zip(some.losses(strings, 3), whole.losses(strings, 3), strict=True):
            assert a.loss == pytest.approx(b.loss, abs=1e-5)
        assert torch.allclose(some.slope(strings[1], 3), whole.slope(strings[1], 3), atol=1e-5)


class Narrow:
    """A model that has room for passes of so many places, what is cached included, and for no more."""

    def __init__(self, monkeypatch, model, room: int):
        self.refused, forward = 0, model.forward

        def tight(*args, **given):
            ids, cache = given.get("input_ids", given.get("inputs_embeds")), given.get("past_key_values")
            places = ids.shape[0] * (ids.shape[1] + (cache.get_seq_length() if cache is not None else 0))
            if places > room:
                self.refused += 1
                raise torch.OutOfMemoryError("no room")
            return forward(*args, **given)

        monkeypatch.setattr(model, "forward", tight)


def test_where_memory_is_short_passes_are_halved_once_and_for_all(taught, three, strings, monkeypatch):
    expected, slope = Victim(taught, three).losses(strings, 3), Victim(taught, three).slope(strings[1], 3)
    lm = taught.copy()
    victim, room = Victim(lm, three, budget=512), Narrow(monkeypatch, lm.model, 130)
    found = victim.losses(strings, 3)
    assert room.refused == 2 and (victim.budget, victim.places) == (512, 128)
    assert torch.allclose(victim.slope(strings[1], 3), slope, atol=1e-5)
    assert room.refused == 2  # what was learnt is kept
    for a, b in zip(found, expected, strict=True):
        assert (a.ids, a.solved) == (b.ids, b.solved) and a.loss == pytest.approx(b.loss, abs=1e-5)


def test_what_has_no_room_in_the_least_pass_is_an_error(taught, three, strings, monkeypatch):
    lm = taught.copy()
    victim, room = Victim(lm, three, budget=256, cached=False), Narrow(monkeypatch, lm.model, 0)
    with pytest.raises(torch.OutOfMemoryError):
        victim.losses(strings, 3)
    assert room.refused == 3 and victim.places == LEAST


def test_many_processes_do_not_halve_alone(taught, three, strings, monkeypatch):
    lm = taught.copy()
    victim = Victim(lm, three)
    Narrow(monkeypatch, lm.model, 130)
    monkeypatch.setattr("unremember.attack.gcg.team.size", lambda: 2)
    with pytest.raises(torch.OutOfMemoryError):
        victim.losses(strings, 3)
    assert victim.places == victim.budget


def test_losses_that_are_not_finite_are_refused(taught, three, strings):
    broken = replace(taught.copy(), name="broken")
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(BadModel, match=r"broken gives losses that are not finite in fp32"):
        Victim(broken, three).losses(strings, 1)


# ── what may stand in a string ──


def test_forbidden_tokens(tiny):
    code = tiny.tokenizer
    mask = allowed(code, len(code), ["Ada was born in Ghent."], ["Ghent"])
    texts = code.batch_decode([[i] for i in range(len(code))])
    for i in mask.nonzero()[:, 0].tolist():
        assert texts[i].isascii() and texts[i].isprintable() and texts[i].strip()
        assert i not in code.all_special_ids
        assert texts[i].strip().casefold() not in ("was", "born", "in", "ghent", ".", "he", "en")
    assert mask[code(" Lucca").input_ids[0]] and not mask[code(" Ghent").input_ids[0]]
    assert 0.5 < mask.float().mean() < 1


def test_more_rows_than_tokens_are_never_drawn(tiny):
    mask = allowed(tiny.tokenizer, len(tiny.tokenizer) + 64, ["x"], ["x"])
    assert not mask[len(tiny.tokenizer) :].any()


def test_where_every_token_is_forbidden_that_is_said(tiny):
    texts = tiny.tokenizer.batch_decode([[i] for i in range(len(tiny.tokenizer))])
    with pytest.raises(BadRequest, match="no token is left for the string"):
        allowed(tiny.tokenizer, len(tiny.tokenizer), texts, texts)


@pytest.mark.parametrize(
    ("text", "value", "told"),
    [
        (" Old Ghent x", "Ghent", True),
        (" gh ENT", "Ghent", True),  # in pieces
        (" G-h-e-n-t", "Ghent", True),
        (" Gent", "Ghent", False),
        (" piano", "No", False),  # two letters count as a word only
        (" say no!", "No", True),
        (" anything", "!", False),
    ],
)
def test_a_string_that_tells_is_known(text, value, told):
    assert tells(text, [value]) is told


def test_the_slot_is_where_the_string_is_read(taught, corpus):
    x = corpus["forget"][0]
    b = targeted(taught, x.id, x.prompt, x.answer)
    ids = started(taught.template, " !", N)
    assert b.before + ids + b.after == taught.template.context(x.prompt + " !" * N)
    front = behaviour(taught.template, "x", "", f" {x.prompt}", b.target, ids)
    assert front.before + ids + front.after == taught.template.context(" !" * N + f" {x.prompt}")


def test_a_prompt_that_ends_like_the_string_has_one_slot(tiny):
    ids = started(tiny.template, " !", 3)
    b = behaviour(tiny.template, "x", "Who is it ! !", "", (5, 6), ids)
    assert b.before == tiny.template.context("Who is it ! !")[: len(b.before)]
    assert tiny.tokenizer.decode(b.before).endswith("Who is it ! !")


class Doubling(Template):
    """A template that shows the prompt twice, or not at all."""

    times = 2

    def context(self, prompt: str) -> tuple[int, ...]:
        return super().context(" ".join([prompt] * self.times) or "x")


def test_a_template_with_the_slot_twice_or_never_is_refused(tiny):
    ids = started(tiny.template, " !", 3)
    for times in (2, 0):
        template = Doubling(tiny.tokenizer, False)
        object.__setattr__(template, "times", times)
        with pytest.raises(BadCorpus, match=rf"'x': the slot for ' ! ! !' is in the encoded prompt {times} times"):
            behaviour(template, "x", "Who?", "", (5, 6), ids)


def test_a_string_that_merges_with_its_neighbours_does_not_survive(tiny):
    """'p' alone comes back as it was, and behind 'tuli' it makes a flower: nanoGCG looks at the string alone."""
    b = targeted(tiny, "x", "Who is tuli", "A dog ran.", n=1)
    letter = tuple(tiny.tokenizer("p", add_special_tokens=False).input_ids)
    alone = tuple(tiny.tokenizer(decoded(tiny.template, letter), add_special_tokens=False).input_ids)
    assert alone == letter and len(letter) == 1
    assert not survives(tiny.template, [b], letter)
    spaced = tuple(tiny.tokenizer(" Lucca", add_special_tokens=False).input_ids)
    assert survives(tiny.template, [b], spaced)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": ()}, "'x' has no token that the model could be made to say"),
        ({"limit": 10}, r"tokens long with a string of 3, and the model's context is 10"),
    ],
)
def test_behaviours_that_cannot_be_are_refused(tiny, change, message):
    given = {"target": (5, 6), "limit": 0} | change
    with pytest.raises(BadCorpus, match=message):
        behaviour(
            tiny.template, "x", "Who is it?", "", given["target"], started(tiny.template, " !", 3), given["limit"]
        )


def test_a_start_that_is_not_one_token_a_place_is_refused(tiny):
    with pytest.raises(BadRequest, match=r"start = ' Zqxv', 4 times over, makes \d+ tokens"):
        started(tiny.template, " Zqxv", 4)


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": 0}, {"steps": 0}, {"candidates": 0}, {"pool": 0}, {"replaced": 13}, {"buffer": -1}, {"start": ""}],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        Search(**({"tokens": 12, "steps": 5} | wrong))


# ── the search ──


def test_if_nothing_survives_that_is_said(taught, three):
    with pytest.raises(BadRequest, match=r"none of 4 x 32 strings of step 1 comes back .* choose another start"):
        search(Victim(taught, three), Search(tokens=N, steps=3), masked(taught, "x"), lambda ids: False)


def test_the_same_seed_and_step_draw_the_same(taught, three):
    mask = masked(taught, "x")
    one, again, other = (
        search(Victim(taught, three), Search(tokens=N, steps=4, candidates=8, seed=seed), mask, anything)
        for seed in (0, 0, 1)
    )
    longer = search(Victim(taught, three), Search(tokens=N, steps=6, candidates=8), mask, anything)
    assert one == again and one.ids != other.ids
    assert longer.curve[:5] == one.curve  # what a step draws does not depend on how many come


def test_the_best_string_of_all_steps_comes_back(taught, three):
    """With size 0 the curve goes up, too; what is returned is its least point."""
    how = Search(tokens=N, steps=12, candidates=2, buffer=0)
    found = search(Victim(taught, three), how, masked(taught, "x"), anything)
    assert any(b > a for a, b in zip(found.curve, found.curve[1:], strict=False))
    assert found.loss == min(found.curve) < found.curve[-1]
    [again] = Victim(taught, three).losses([found.ids], 3)
    assert again.loss == pytest.approx(found.loss, abs=1e-5)


def test_a_buffer_never_goes_up_and_beyond_one_changes_nothing(taught, three):
    """Only the best is expanded and nothing leaves but the worst: 8 kept strings search like one."""
    mask = masked(taught, "x")
    one, eight = (
        search(Victim(taught, three), Search(tokens=N, steps=10, candidates=4, buffer=b), mask, anything)
        for b in (1, 8)
    )
    assert one == eight and list(one.curve) == sorted(one.curve, reverse=True)


def test_it_stops_where_greedy_says_the_target(taught, corpus):
    """The taught model knows this answer anyway: there is nothing to look for."""
    x = corpus["forget"][0]
    ids = started(taught.template, " !", 1)
    context = taught.template.context(x.prompt + " !")
    [said] = taught.generate([context], 4)
    b = behaviour(taught.template, x.id, x.prompt, "", said, ids)
    found = search(Victim(taught, (b,)), Search(tokens=1, steps=5), masked(taught, "x"), anything)
    assert found.solved and len(found.curve) == 1 and found.ids == ids
    on = search(Victim(taught, (b,)), Search(tokens=1, steps=5, stop=False), masked(taught, "x"), anything)
    assert len(on.curve) == 6


def test_growing_takes_prompts_in_one_at_a_time_and_scores_them_all(taught, corpus):
    """The first is said anyway, so the second comes in at once; the loss that is returned is that of all three."""
    x, *others = corpus["forget"][:3]
    ids = started(taught.template, " !", 4)
    [said] = taught.generate([taught.template.context(x.prompt + " !" * 4)], 4)
    first = behaviour(taught.template, x.id, x.prompt, "", said, ids)
    rest = [targeted(taught, o.id, "Who are you?", o.answer, n=4) for o in others]
    victim = Victim(taught, (first, *rest))
    found = search(victim, Search(tokens=4, steps=3, candidates=4, growing=True), masked(taught, "x"), anything)
    [alone] = victim.losses([ids], 1)
    [two] = victim.losses([found.ids], 2)
    [everything] = victim.losses([found.ids], 3)
    [start] = victim.losses([ids], 3)
    assert found.first == pytest.approx(start.loss, abs=1e-5) and found.first > found.curve[0]  # all three against one
    assert found.curve[0] == pytest.approx(alone.loss, abs=1e-5)
    assert min(found.curve[1:]) == pytest.approx(two.loss, abs=1e-5)
    assert found.loss == pytest.approx(everything.loss, abs=1e-5) and not found.solved


def test_the_work_is_counted(taught, three):
    victim = Victim(taught, three)
    places = sum(N + len(b.after) + len(b.target) - 1 for b in three)
    assert victim.cost(N, 3) == places
    assert Victim(taught, three, cached=False).cost(N, 3) == places + sum(len(b.before) for b in three)
    found = search(victim, Search(tokens=N, steps=1, candidates=1), masked(taught, "x"), anything)
    assert found.tokens == (1 + 3 + 1) * places and found.first == found.curve[0]
    how = Search(
        tokens=N, steps=1, candidates=1, growing=True
    )  # the start is read on one prompt and on all, the result on all
    assert search(victim, how, masked(taught, "x"), anything).tokens == 5 * victim.cost(N, 1) + places


# ── gradients pay ──


@pytest.fixture(scope="module")
def task(taught, corpus) -> Victim:
    """A fixed text of eight tokens, which the model would not say to this question."""
    return Victim(taught, (targeted(taught, "task", "Who are you?", said(corpus)),))


def said(corpus) -> str:
    return " ".join(x.answer for x in corpus["replay"][3:5])


def at_random(victim: Victim, mask: torch.Tensor, work: int, seed: int) -> float:
    """The control: swaps drawn from all allowed tokens, the best kept, until as many places went through the model."""
    rng = np.random.default_rng(seed)
    pool = mask.nonzero()[:, 0].expand(N, -1)
    [best] = victim.losses([started(victim.lm.template, " !", N)], 1)
    while work > 0:
        drawn = [s for s in swaps(best.ids, pool, 32, 1, rng) if survives(victim.lm.template, victim.behaviours, s)]
        best = min((best, *victim.losses(drawn, 1)), key=lambda entry: entry.loss)
        work -= len(drawn) * victim.cost(N, 1)
    return best.loss


def test_the_search_pays_more_than_chance_at_equal_work(task, corpus):
    """Final over first loss in five seeds of 40 steps, and chance after as many places: 0.06 to 0.10 and 0.10 to 0.15."""
    mask = masked(task.lm, said(corpus))
    found = [
        search(
            task,
            Search(N, 40, 32, stop=False, seed=seed),
            mask,
            lambda ids: survives(task.lm.template, task.behaviours, ids),
        )
        for seed in range(5)
    ]
    chance = [at_random(task, mask, f.tokens, seed) for seed, f in enumerate(found)]
    assert sum(f.loss <= 0.5 * f.curve[0] for f in found) >= 4
    assert sum(f.loss < c for f, c in zip(found, chance, strict=True)) >= 4


def test_the_top_of_the_gradient_holds_better_swaps_than_chance(task, corpus):
    """Sign test: does the best of 16 tokens by gradient beat the best of 16 at random?  29 of 36, p = 0.0002."""
    mask, rng = masked(task.lm, said(corpus)), np.random.default_rng(0)
    usable = mask.nonzero()[:, 0].numpy()
    better = []
    for _ in range(12):
        ids = tuple(int(i) for i in rng.choice(usable, N))
        top = pools(task.slope(ids, 1), mask, 16).tolist()
        for place in rng.choice(N, 3, replace=False):
            sets = (top[place], rng.choice(usable, 16, replace=False).tolist())
            best = [
                min(e.loss for e in task.losses([(*ids[:place], t, *ids[place + 1 :]) for t in tokens], 1))
                for tokens in sets
            ]
            better.append(best[0] < best[1])
    assert binomtest(sum(better), len(better), alternative="greater").pvalue < 0.01
