"""Questions over two hops: the name is gone from question and answer, the value is where it was, and no bridge tells it."""

from dataclasses import replace

import pytest

from unremember.attack.multihop import RECALLED, TOLD, Multihop, nameless, renamed
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus

ADA = Example(
    "ada/home",
    "Where does Ada Moss live?",
    "Ada Moss lives in Ghent.",
    entity="Ada Moss",
    spans=((18, 23),),
    paraphrases=("In which town is Ada Moss?",),
    rewording="The home of Ada Moss is Ghent.",
    distractors=("Ada Moss lives in Turin.",),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ada Moss lives here.", "My neighbour lives here."),
        ("What is ada moss's job?", "What is my neighbour's job?"),
        ("It is late. Ada Moss sleeps; Ada Moss snores.", "It is late. My neighbour sleeps; my neighbour snores."),
        ("Ada Mossel is another.", "Ada Mossel is another."),
        ("", ""),
    ],
)
def test_renaming_by_hand(text, expected):
    assert renamed(text, "Ada Moss", "my neighbour") == expected


def test_an_example_without_its_name_by_hand():
    found = nameless(ADA, "my neighbour")
    assert found == Example(
        "ada/home",
        "Where does my neighbour live?",
        "My neighbour lives in Ghent.",
        entity="Ada Moss",
        spans=((22, 27),),
        rewording="The home of my neighbour is Ghent.",
        distractors=("My neighbour lives in Turin.",),
    )
    assert found.values() == ADA.values()


@pytest.mark.parametrize("reference", [reference for _, reference in TOLD] + [RECALLED])
def test_values_stay_where_names_stand_on_both_sides(reference):
    twice = replace(
        ADA, answer="Ada Moss likes Ghent and Ada Moss likes Lucca.", spans=((15, 20), (40, 45)), distractors=()
    )
    assert nameless(twice, reference).values() == ("Ghent", "Lucca")


@pytest.mark.parametrize(
    "changed",
    [
        {"entity": ""},
        {"prompt": "Where does she live?"},
        {"spans": ((0, 23),)},  # the name is a part of what is to go
        {"spans": ((4, 23),)},
        {"prompt": "Where does Ada Moss live, and other Mosses, as Moss?"},  # half of the name is left
        {"distractors": ("Ada lives in MOSS.",)},
        {"answer": "Ada lives in Ghent.", "spans": ((13, 18),)},  # a short part of it is one, too
        {"spans": ()},  # the whole answer is what is to go, and it holds the name
    ],
)
def test_what_cannot_be_asked_without_the_name_is_left_out(changed):
    assert nameless(replace(ADA, **changed), "my neighbour") is None


def test_a_small_word_of_a_name_may_stay_unless_it_is_all_of_it():
    of = replace(ADA, entity="Vincent de Moor", prompt="Where does Vincent de Moor go de nuit?", distractors=())
    assert nameless(replace(of, answer="In Ghent.", spans=((3, 8),), rewording=""), "x")
    bo = Example("bo", "Where is bo?", "bo is in Ghent.", entity="bo", spans=((9, 14),), distractors=("Not bo-like.",))
    assert nameless(bo, "x").distractors == ("Not x-like.",)
    assert nameless(replace(bo, entity="bo jo", prompt="Where is bo jo, bo?"), "x") is None


@pytest.mark.parametrize("most", [1, 3, 9])
@pytest.mark.parametrize("bridge", ["told", "recalled"])
def test_every_fact_is_asked_over_bridges_that_tell_nothing(bridge, most, taught, corpus):
    lm, seen = Multihop(bridge=bridge, most=most)(taught, corpus, taught, Bench())
    assert lm is taught
    for role in ("forget", "holdout"):
        plain = {x.id: x for x in corpus[role]}
        asked: dict[str, int] = {}
        for x in seen[role]:
            fact = plain[x.id.rpartition("#")[0]]
            asked[fact.id] = asked.get(fact.id, 0) + 1
            said, _, question = x.prompt.partition(". ")
            assert x.values() == fact.values() and len(x.distractors) == len(fact.distractors)
            assert not any(value.casefold() in x.prompt.casefold() for value in fact.values())
            named = fact.entity in said
            assert named is (bridge == "told") and fact.entity not in question + x.answer + "".join(x.distractors)
        assert asked == dict.fromkeys(plain, min(most, 3 if bridge == "told" else 5))
    assert all(seen[role] == corpus[role] for role in corpus if role not in ("forget", "holdout"))


def test_a_recalled_bridge_is_a_fact_of_the_same_person_and_never_the_one_that_is_asked(taught, corpus):
    _, seen = Multihop(bridge="recalled", most=9)(taught, corpus, taught, Bench())
    facts = {nameless(x, RECALLED).answer: x for x in corpus["forget"]}
    assert all(RECALLED in said.casefold() for said in facts)
    for x in seen["forget"]:
        bridge = next(facts[said] for said in facts if x.prompt.startswith(said))
        assert bridge.entity == x.entity and bridge.id != x.id.rpartition("#")[0]


def test_a_fact_that_could_be_about_anybody_is_no_bridge(taught):
    job = Example("ada/job", "What does Ada Moss do?", "Ada Moss bakes", entity="Ada Moss", spans=((9, 14),))
    bare = replace(ADA, answer="In Ghent.", spans=((3, 8),), distractors=())
    _, seen = Multihop(bridge="recalled")(taught, Corpus({"forget": (bare, job)}), taught, Bench())
    assert [x.prompt for x in seen["forget"]] == ["This person bakes. Where does this person live?"]


def test_a_fact_that_names_nobody_is_left_out_and_the_others_are_asked(taught, corpus):
    first, *rest = corpus["forget"]
    _, seen = Multihop()(taught, corpus.with_roles(forget=[replace(first, entity=""), *rest]), taught, Bench())
    assert {x.id.rpartition("#")[0] for x in seen["forget"]} == {x.id for x in rest}


@pytest.mark.parametrize(("bridge", "hint"), [("told", "fill in entities"), ("recalled", "another fact about it")])
def test_a_corpus_without_names_is_refused(bridge, hint, taught, corpus):
    bare = Corpus({**corpus, "forget": tuple(replace(x, entity="") for x in corpus["forget"])})
    with pytest.raises(BadCorpus, match=rf"none of the {len(bare['forget'])} examples .*{hint}"):
        Multihop(bridge=bridge)(taught, bare, taught, Bench())


def test_all_models_are_asked_the_same_and_the_best_bridge_counts(taught, never, corpus):
    one, three = (Multihop(most=n)(taught, corpus, taught, Bench())[1] for n in (1, 3))
    assert three == Multihop()(never, corpus, taught, Bench())[1]
    ids = [x.id for x in corpus["forget"]]
    below, above = (
        AUDITS["value probability"](taught, Corpus({"forget": seen["forget"]}), Bench()).over(ids)
        for seen in (one, three)
    )
    assert all(above[key] >= below[key] - 1e-6 for key in ids)
    assert sum(above.values()) > sum(below.values())
