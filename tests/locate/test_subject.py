"""The subject of a fact: where it stands, what takes its place, and how well a fact is known with and without it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from unremember.corpus import Example
from unremember.errors import BadCorpus, BadModel
from unremember.lm import LM
from unremember.locate.subject import (
    Fact,
    facts,
    groups,
    laid,
    log_odds,
    noised,
    places,
    required,
    sigma,
    some,
    swapped,
)
from unremember.tokens import Template

CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"


def said(lm: LM, x: Example) -> str:
    """What the tokens at the subject's places say."""
    row = lm.template.row(x.id, x.prompt, x.answer, x.spans)
    return lm.tokenizer.decode([row.ids[place] for place in places(lm.template, x)])


def chatty(lm: LM) -> LM:
    tokenizer = type(lm.tokenizer)(
        tokenizer_object=lm.tokenizer.backend_tokenizer, eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT
    return replace(lm, template=Template(tokenizer, chat=True))


def test_the_name_is_found_in_question_and_answer_and_nowhere_else(tiny, corpus):
    for x in corpus["forget"]:
        assert said(tiny, x).split() == x.entity.split() * 2


def test_a_chat_template_shifts_the_places_and_not_the_words(tiny, corpus):
    x = corpus["forget"][0]
    lm = chatty(tiny)
    assert said(lm, x).replace(" ", "") == (x.entity * 2).replace(" ", "")
    row, [fact] = lm.template.row(x.id, x.prompt, x.answer, x.spans), facts(lm, [x])
    assert fact.last < row.start and lm.tokenizer.decode([row.ids[fact.last]]).strip() == x.entity.split()[-1]
    assert places(lm.template, x) != places(tiny.template, x)


def test_a_name_that_stands_twice_is_found_twice_and_the_last_one_counts(tiny):
    x = Example("x", "Does Megan Krause know where Megan Krause lives?", "Oulu", "Megan Krause")
    assert said(tiny, x).split() == ["Megan", "Krause"] * 2
    [fact] = facts(tiny, [x])
    assert fact.last == max(fact.subject) and len(fact.subject) == 4


def test_whole_words_only(tiny):
    row = tiny.template.row("x", "Is Bertha not Bert's aunt?", "Yes")
    at = places(tiny.template, Example("x", "Is Bertha not Bert's aunt?", "Yes", "Bert"))
    assert "".join(tiny.tokenizer.decode([row.ids[p]]) for p in at).strip() == "Bert"


def test_places_of_a_packed_lane_are_places_of_the_row(tiny, corpus):
    found = facts(tiny, corpus["forget"])
    tokens = laid(tiny, [fact.row for fact in found])
    for lane, fact in enumerate(found):
        at = list(fact.subject)
        assert tokens.ids[lane, at].tolist() == [fact.row.ids[p] for p in at]
        assert tokens.positions[lane, at].tolist() == at


def test_the_value_is_asked_for_and_the_name_in_it_is_not(tiny, corpus):
    spanned, whole = corpus["forget"][0], replace(corpus["forget"][0], spans=())
    for x in (spanned, whole):
        [fact] = facts(tiny, [x])
        asked = {fact.row.start + i for i, hit in enumerate(fact.row.span) if hit}
        assert asked and not asked & set(fact.subject)
    assert len(asked) > 1


def test_no_name_in_the_question_is_refused_all_together(tiny, corpus):
    a, b, c = corpus["forget"][:3]
    wrong = [replace(a, entity=""), replace(b, entity="Nobody Here"), replace(c, answer=c.entity, spans=())]
    with pytest.raises(BadCorpus) as raised:
        facts(tiny, wrong)
    assert len(raised.value.problems) == 3
    assert "'Nobody Here' does not stand in its question" in raised.value.problems[1]
    assert "only the entity's name" in raised.value.problems[2]


# ── without the subject ──


def test_a_swap_keeps_length_and_all_else_and_nothing_of_the_name(tiny, corpus):
    found = facts(tiny, corpus["forget"])
    for fact, row in zip(found, swapped(found, found, 0, 0), strict=True):
        own = {fact.row.ids[p] for p in fact.subject}
        assert len(row.ids) == len(fact.row.ids) and row.span == fact.row.span
        for place, (before, after) in enumerate(zip(fact.row.ids, row.ids, strict=True)):
            assert (after not in own) if place in fact.subject else before == after
        put = [row.ids[p] for p in fact.subject]
        assert put[: len(put) // 2] == put[len(put) // 2 :], "one name in question and answer"


def test_corruption_hangs_on_seed_draw_and_row_alone(tiny, corpus):
    found = facts(tiny, corpus["forget"])
    assert swapped(found[3:5], found, 0, 0) == swapped(found, found, 0, 0)[3:5]
    assert swapped(found, found, 0, 0) != swapped(found, found, 0, 1) != swapped(found, found, 1, 1)
    embedded = torch.zeros(len(found), 64, 8)
    many, few = (noised(part, 2.0, 0, 0)(torch.zeros(len(part), 64, 8)) for part in (found, found[3:5]))
    assert torch.equal(many[3:5], few) and not torch.equal(many, noised(found, 2.0, 0, 1)(embedded))


def test_noise_sits_on_the_subject_and_has_the_measured_size(tiny, corpus):
    found = facts(tiny, corpus["forget"])
    noise = noised(found, 2.0, 0, 0)(torch.zeros(len(found), 64, 64))
    for lane, fact in enumerate(found):
        assert noise[lane].any(1).nonzero()[:, 0].tolist() == sorted(fact.subject)
    # 12 rows, about 48 places, 64 dimensions: the standard deviation is known to 2 %.
    assert noise[noise != 0].std().item() == pytest.approx(2.0, rel=0.05)
    every = torch.cat([tiny.model.get_input_embeddings()(torch.tensor(fact.row.ids)) for fact in found])
    assert sigma(tiny, found) == pytest.approx(every.std().item(), rel=1e-5)


def test_one_person_alone_cannot_be_swapped(tiny, corpus):
    found = facts(tiny, corpus["forget"][:3])
    with pytest.raises(BadCorpus, match="no other entity has a name"):
        swapped(found, found, 0, 0)


# ── how well it is known ──


def test_log_odds_by_hand_and_exact_at_both_ends():
    logits = torch.tensor([[2.0, 0.0, 0.0], [60.0, 0.0, 0.0], [-60.0, 0.0, 0.0]])
    expected = [2 - np.log(2), 60 - np.log(2), -60 - np.log(2)]
    torch.testing.assert_close(log_odds(logits, torch.zeros(3, dtype=torch.long)), torch.tensor(expected).float())
    p = logits[1].softmax(0)[0]
    assert p == 1.0 and not torch.isfinite((p / (1 - p)).log()), "what the naive form makes of it"


def test_below_the_floor_there_is_nothing_to_share(tiny, corpus):
    required(12.0, 10)
    for gap in (9.0, -50.0, float("nan")):
        with pytest.raises(BadModel, match="hardly knows them"):
            required(gap, 10)


def test_some_facts_and_groups_of_them(tiny, corpus):
    examples = corpus["forget"]
    assert some(examples, 0, 0) == list(examples) == some(examples, 99, 0)
    assert some(examples, 5, 0) == some(examples, 5, 0) != some(examples, 5, 1)
    found = facts(tiny, examples)
    cut = list(groups(found, 60))
    assert len(cut) > 1 and sorted(f.row.key for g in cut for f in g) == sorted(f.row.key for f in found)
    assert all(len(g) == 1 or len(g) * max(len(f.row.ids) for f in g) <= 60 for g in cut)
    assert isinstance(cut[0][0], Fact)
