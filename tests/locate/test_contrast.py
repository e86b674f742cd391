"""Contrast: cosines by hand, what a pair is, gradients against one plain forward a row, and what must never be chosen."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadModel
from unremember.locate.contrast import Contrast, Pairs, difference, gradient, opposition, tables
from unremember.locate.ranking import Budget, Ranking, select
from unremember.tokens import lanes, pack

A = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
B = torch.tensor([[-3.0, -4.0], [0.0, 5.0], [0.0, 1.0]])


def test_cosines_by_hand():
    found = opposition({"w": A, "b": A[:, 0]}, {"w": B, "b": B[:, 0]}, "row", 1e-6)
    torch.testing.assert_close(found["w"], torch.tensor([1.0, 0.0, -1.0]))
    torch.testing.assert_close(found["b"], torch.tensor([9 / (10**0.5 * 3)]))  # a vector is one unit
    found = opposition({"w": A, "b": A[:, 0]}, {"w": B, "b": B[:, 0]}, "column", 1e-6)
    first, second = 9 / (10**0.5 * 3), -(-16 + 2) / (20**0.5 * 42**0.5)
    torch.testing.assert_close(found["w"], torch.tensor([first, second]))
    torch.testing.assert_close(found["b"], torch.tensor([first]))


def test_a_unit_that_is_not_reached_is_never_chosen():
    """Bug in the released code: the cosine of nothing is 0, below every likeness, and such rows fill the budget."""
    adv, dis = torch.ones(4, 3), torch.ones(4, 3) + torch.eye(4, 3)
    adv[1], dis[2] = 0, 0
    released = F.cosine_similarity(adv, dis, dim=-1)
    assert set(released.argsort()[:2].tolist()) == {1, 2}
    found = opposition({"w": adv}, {"w": dis}, "row", 1e-6)["w"]
    assert found[[1, 2]].tolist() == [-torch.inf] * 2 and found[[0, 3]].isfinite().all()
    assert [i for _, i in Ranking({"w": found}, "row").best(4)] == [0, 3]  # effective k is 2, not 4


def test_the_floor_is_a_share_of_the_longest():
    adv = {"w": torch.tensor([[1.0, 0.0], [1e-3, 0.0]])}
    reached = {f: opposition(adv, adv, "row", f)["w"].isfinite().tolist() for f in (1e-4, 1e-2)}
    assert reached == {1e-4: [True, True], 1e-2: [True, False]}
    torch.testing.assert_close(  # so that neither size nor unit of a loss decides, and small squares do not vanish
        opposition({"w": A * 1e-30}, {"w": B * 1e-25}, "row", 1e-4)["w"], torch.tensor([1.0, 0.0, -1.0])
    )


def test_cosines_are_taken_in_float32():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 4096, generator=generator).bfloat16()
    b = (a.float() + torch.randn(1, 4096, generator=generator)).bfloat16()
    exact = float(F.cosine_similarity(a.double(), b.double()))
    assert float(-opposition({"w": a}, {"w": b}, "row", 1e-6)["w"]) == pytest.approx(exact, abs=1e-5)


def test_other_shapes_are_refused_together():
    odd = {"scale": torch.tensor(1.0), "experts": torch.ones(2, 2, 2), "w": A}
    with pytest.raises(BadModel) as raised:
        opposition(odd, odd, "row", 1e-6)
    assert len(raised.value.problems) == 2 and "'scale' has 0 dimensions" in raised.value.problems[0]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((1, 2, 3, 4), (1, 9, 3, 4), (1, 2, 2)),
        ((1, 2, 3), (1, 8, 9, 3), (1, 2, 3)),
        ((1, 2, 2), (1, 3, 2, 2), (1, 2, 3)),
        ((1, 2), (9, 2), (0, 1, 1)),
        ((5, 7, 5), (5, 7, 7, 5), (2, 3, 4)),  # each side keeps a token, or there would be nothing to pull at
        ((1, 2), (1, 2), None),
        ((1, 2), (1, 2, 3), None),
    ],
)
def test_the_differing_tokens_are_found_not_the_last(a, b, expected):
    """Bug in the released CrowS loader: it returns the loop's last index."""
    assert difference(a, b) == expected


# ── pairs ──


def test_a_pair_marks_what_differs(tiny, corpus):
    pairs = Pairs.of(tiny, corpus["forget"], 0)
    for x, row in zip(corpus["forget"], pairs.answers, strict=True):
        other = pairs.decoys[x.id]
        assert row.ids[: row.start] == other.ids[: other.start]
        said, wrong = (
            tiny.tokenizer.decode([i for i, hit in zip(r.ids[r.start : r.stop], r.span, strict=True) if hit]).strip()
            for r in (row, other)
        )
        assert said and wrong and said in x.values()[0] and any(wrong in d for d in x.distractors) and said != wrong
    assert Pairs.of(tiny, corpus["forget"], 0) == pairs and Pairs.of(tiny, corpus["forget"], 1) != pairs


def ask(prompt: str, answer: str, wrong: str) -> tuple[Example]:
    return (Example("x", prompt, answer, distractors=(wrong,)),)


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        (ask("Who?", "The cat", "The cat ran"), "one begins the other"),
        (ask("Who?", "The cat ran", "The cat"), "one begins the other"),
        (ask("", "He sat here.", "She sat here."), "nothing predicts"),
        (ask("Who?", "The cat", "The <unk>"), "does not know"),
    ],
)
def test_pairs_that_cannot_be_set_against_each_other_are_refused(tiny, example, problem):
    with pytest.raises(BadCorpus, match=problem):
        Pairs.of(tiny, example, 0)


def test_all_bad_pairs_are_told_at_once(tiny):
    many = [replace(ask("Who?", "The cat", "The cat ran")[0], id=f"x{i}") for i in range(25)]
    with pytest.raises(BadCorpus) as raised:
        Pairs.of(tiny, many, 0)
    assert len(raised.value.problems) == 21 and "5 more" in raised.value.problems[-1]


def test_no_distractor_and_no_role_are_refused(corpus):
    with pytest.raises(BadCorpus, match="1 forget examples have none"):
        Contrast().check(Corpus({"forget": (Example("x", "Who?", "Me."),)}))
    with pytest.raises(BadCorpus, match="needs examples in the role 'forget'"):
        Contrast().check(corpus.with_roles(forget=()))


# ── gradients ──


def slow(lm, row, value):
    """v of one row, from one plain forward pass over it alone."""
    logits = lm.model(input_ids=torch.tensor([row.ids])).logits[0].float()
    places = [place for place, hit in zip(range(row.start, row.stop), row.span, strict=True) if hit]
    if value == "logit":
        return logits[places[0] - 1, row.ids[places[0]]]
    return sum(logits.log_softmax(-1)[place - 1, row.ids[place]] for place in places)


@pytest.mark.parametrize("value", ["logp", "logit"])
@pytest.mark.parametrize("decoy", [False, True])
def test_values_and_gradients_are_those_of_one_forward_a_row(moved, corpus, value, decoy):
    lm, few = moved.copy(), corpus["forget"][:5]
    pairs = Pairs.of(lm, few, 0)
    rows = [pairs.decoys[x.id] if decoy else row for x, row in zip(few, pairs.answers, strict=True)]
    tokens = pack(lanes(pairs.answers, 256), "forget")
    total = sum(slow(lm, row, value) for row in rows)
    assert pairs.side(lm, tokens, value, decoy).sum().item() == pytest.approx(total.item(), rel=1e-4)
    total.backward()
    expected = {name: w.grad.clone() for name, w in lm.model.named_parameters()}
    for w in lm.model.parameters():
        w.grad = torch.full_like(w, 7.0)
    found = gradient(lm, [tokens], lambda lm, t: pairs.side(lm, t, value, decoy))
    for name, w in lm.model.named_parameters():
        torch.testing.assert_close(found[name], expected[name], rtol=2e-3, atol=2e-4)
        assert (w.grad == 7).all(), "a gradient that stood there is left as it was"
    silent = pairs.side(lm, tokens.silent(), value, decoy)
    assert not silent.any() and silent.shape == (5,)


def test_dropout_is_refused(taught, corpus):
    """The released code calls model.train() and draws dropout twice, once for each gradient of a cosine."""
    lm = taught.copy()
    lm.model.train()
    with pytest.raises(BadModel, match="training mode"):
        Contrast()(lm, corpus)


# ── the locator ──


def test_the_ranking_is_that_of_the_slow_way(moved, corpus):
    lm = moved.copy()
    asked = corpus.with_roles(forget=corpus["forget"][:4])
    pairs = Pairs.of(lm, asked["forget"], 0)
    sides = []
    for rows in (pairs.answers, pairs.decoys.values()):
        lm.model.zero_grad()
        sum(slow(lm, row, "logp") for row in rows).backward()
        sides.append({name: w.grad.clone() for name, w in lm.model.named_parameters()})
    lm.model.zero_grad()
    before = {name: w.clone() for name, w in lm.model.named_parameters()}
    for unit, dim in (("row", 1), ("column", 0)):
        ranking = Contrast(unit=unit)(lm, asked, Bench(budget=60))
        assert ranking.unit == unit
        for name, scores in ranking.scores.items():
            a, b = sides[0][name], sides[1][name]
            cosine = F.cosine_similarity(a, b, dim=dim) if a.dim() == 2 else F.cosine_similarity(a, b, dim=0)[None]
            torch.testing.assert_close(scores, -cosine, rtol=1e-3, atol=2e-3)
    assert all(torch.equal(w, before[name]) and w.grad is None for name, w in lm.model.named_parameters())


def test_the_word_table_takes_part_when_asked_and_counts_once(taught, corpus):
    """Tied: the head and the table are one tensor, and rows of words that do not occur have gradient from the head alone."""
    assert tables(taught.model) == {"model.embed_tokens.weight"}
    without, whole = (Contrast(embeddings=flag, value="logit")(taught, corpus) for flag in (False, True))
    assert set(whole.scores) - set(without.scores) == {"model.embed_tokens.weight"}
    words = whole.scores["model.embed_tokens.weight"]
    never = (words == -torch.inf).sum()
    assert never > 0.5 * len(words), "logits of two words reach few rows, and the others can never be chosen"
    assert all(words[i] > -torch.inf for name, i in whole.best(10**6) if name == "model.embed_tokens.weight")
    eligible = sum(int((s > -torch.inf).sum()) for s in whole.scores.values())
    assert len(whole.best(10**6)) == eligible < sum(s.numel() for s in whole.scores.values())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_of_an_adapter_only_the_adapter_is_cut(taught, corpus):
    lm = taught.adapted(rank=2, alpha=4)
    with torch.no_grad():
        for name, w in lm.model.named_parameters():
            if "lora_B" in name:
                w.fill_(0.01)
    assert all("lora_" in name for name in Contrast()(lm, corpus).scores)


def test_a_ranking_and_a_budget_make_sites(taught, corpus):
    sites = select(Contrast()(taught, corpus), taught.model, Budget(units=7))
    weights = dict(taught.model.named_parameters())
    rows = [(n, i) for n, m in sites.masks.items() for i in ([0] if m is None else m.any(1).nonzero()[:, 0].tolist())]
    assert len(rows) == 7 and all(m is None or m.shape == weights[n].shape for n, m in sites.masks.items())
