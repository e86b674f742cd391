"""In-context relearning: what stands in front of a question is another fact, and shares no telling word with its answer."""

import re
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from unremember.attack.incontext import InContext, chosen, framed, overlaps, telling, words
from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus

ADA = Example("ada", "Where does Ada work?", "Ada works at Old Mill Bakery.", spans=((13, 28),))


def said(lm, seen, ids) -> float:
    values = AUDITS["said"](lm, Corpus({"forget": seen["forget"]}), Bench()).over(ids)
    return float(np.mean([values[i] for i in ids]))


@pytest.mark.parametrize(
    ("value", "prompt", "expected"),
    [
        ("Old Mill Bakery", "Where?", {"mill", "bakery"}),  # 'old' is short, and there are longer ones
        ("Old Mill Bakery", "Which bakery?", {"mill"}),  # what is asked with tells nothing
        ("Bo", "Who?", {"bo"}),  # it has no other word
        ("012-3456", "Number?", {"012", "3456"}),
        ("may 5", "When?", {"5"}),
    ],
)
def test_telling_words_by_hand(value, prompt, expected):
    assert telling(Example("x", prompt, value, spans=((0, len(value)),))) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Bob works at Old Mill Bakery.", True),
        ("Bob works at the BAKERY.", True),  # one word of it
        ("Bob likes the old town.", False),
        ("Bob works at oldmillbakery.", True),  # however it is spaced
        ("Bob is a baker.", False),  # a part of a word is not the word
    ],
)
def test_an_example_that_overlaps_with_the_answer_by_hand(answer, expected):
    assert overlaps(Example("bob", "And Bob?", answer), ADA) is expected


def test_an_overlap_in_the_question_counts_as_one_in_the_answer():
    assert overlaps(Example("bob", "Who is at the Bakery?", "Bob."), ADA)


def test_examples_are_chosen_by_seed_and_question_and_never_the_question_itself():
    pool = [ADA, *(Example(f"p{i}", f"Who is number {i}?", f"Person {i}.") for i in range(9))]
    pool.append(Example("leak", "What else?", "A bakery."))
    one = chosen(pool, ADA, 4, 0)
    assert len(one) == 4 and one == chosen(list(reversed(pool)), ADA, 4, 0)
    assert {x.id for x in chosen(pool, ADA, 99, 0)} == {f"p{i}" for i in range(9)}
    assert one != chosen(pool, ADA, 4, 1) and chosen(pool, ADA, 2, 0) == one[:2]
    assert one != chosen(pool, replace(ADA, id="other"), 4, 0)


def test_a_passage_is_no_example():
    assert chosen([Example("text", "", "Some prose.")], ADA, 1, 0) == ()


def test_frames_by_hand():
    shown = (Example("b", "B?", "It is b."), Example("c", "C?", "It is c."))
    many = "B?\nAnswer: It is b.\n\nQuestion: C?\nAnswer: It is c.\n\nQuestion: A?"
    assert framed("A?", shown, "questions", chat=False) == many
    assert framed("A?", shown, "questions", chat=True) == f"Question: {many}\nAnswer:"
    assert framed("A?", shown, "statements", chat=True) == "It is b.\nIt is c.\nA?"


def test_the_plain_template_completes_the_frame(taught):
    prompt = framed("A?", (Example("b", "B?", "It is b."),), "questions", chat=False)
    text = taught.tokenizer.decode(taught.template.context(prompt))
    assert text == "Question: B?\nAnswer: It is b.\n\nQuestion: A?\nAnswer:"


@pytest.mark.parametrize("form", ["questions", "statements"])
@pytest.mark.parametrize("source", ["relearn", "retain", "others"])
def test_every_question_stands_behind_its_examples_and_nothing_tells(form, source, taught, corpus):
    lm, seen = InContext(shots=2, form=form, source=source)(taught, corpus, taught, Bench())
    assert lm is taught
    shown_ids = set()
    for role in ("forget", "holdout"):
        pool = corpus[role if source == "others" else source]
        assert [x.id for x in seen[role]] == [x.id for x in corpus[role]]
        for before, after in zip(corpus[role], seen[role], strict=True):
            assert replace(after, prompt=before.prompt) == before
            assert after.prompt.endswith(before.prompt)
            shown = [x for x in pool if x.answer in after.prompt]
            assert len(shown) == 2 and before.id not in {x.id for x in shown}
            shown_ids |= {x.id for x in shown}
            extra = after.prompt.removesuffix(before.prompt)
            assert not words(extra) & telling(before)
            for value in before.values():
                assert not re.search(rf"(?<!\w){re.escape(value.casefold())}(?!\w)", extra.casefold())
    assert not (shown_ids & {x.id for x in seen.of("retain", "relearn")})  # what was shown is not scored
    assert len(seen["retain"]) == (9 if source == "retain" else 18)  # what damage is measured by is still there
    assert ("relearn" in seen) is (source != "relearn") and seen["world"] == corpus["world"]


def test_all_models_are_asked_the_same(taught, never, corpus):
    attack = InContext(shots=1)
    assert attack(taught, corpus, taught, Bench())[1] == attack(never, corpus, taught, Bench())[1]


@pytest.mark.parametrize("source", ["relearn", "retain"])
def test_a_missing_source_is_named(source, taught, corpus):
    rest = Corpus({role: rows for role, rows in corpus.items() if role != source})
    with pytest.raises(BadCorpus, match=rf"incontext needs .* {source!r}"):
        InContext(shots=1, source=source)(taught, rest, taught, Bench())


def test_examples_that_entail_the_answer_are_refused_before_a_weight_is_touched(corpus):
    """Every example of the source says the value of one question: there is no innocent one left for it."""
    fact = corpus["forget"][0]
    [value] = fact.values()
    leaking = corpus.with_roles(relearn=[replace(x, answer=f"{x.answer} {value}", spans=()) for x in corpus["relearn"]])
    with pytest.raises(BadCorpus, match=rf"'{re.escape(fact.id)}' \(forget\): 0 of 1 examples from 'relearn'"):
        InContext(shots=1).check(leaking)


def test_too_few_examples_are_counted_and_problems_come_together(corpus):
    with pytest.raises(BadCorpus, match=r"of 50 examples .* lower shots") as caught:
        InContext(shots=50).check(corpus)
    assert len(caught.value.problems) == 6 and caught.value.problems[-1].startswith("... and ")


def test_passages_alone_are_refused(corpus):
    texts = corpus.with_roles(forget=[Example("text", "", "Only prose.")])
    with pytest.raises(BadCorpus, match="only passages"):
        InContext(shots=1).check(texts)


def test_a_prompt_longer_than_the_context_is_refused(taught, corpus):
    long = corpus.with_roles(relearn=[replace(x, prompt="very " * 300 + x.prompt) for x in corpus["relearn"]])
    with pytest.raises(BadCorpus, match=r"(?s)the model's context is 256.*lower incontext's shots"):
        InContext(shots=1)(taught, long, taught, Bench())


@pytest.mark.parametrize("values", [{"shots": 0}, {"shots": 1, "source": "forget"}, {"shots": 1, "form": "poems"}, {}])
def test_bad_settings_are_refused(values):
    with pytest.raises(ValidationError):
        InContext(**values)


@pytest.fixture(scope="module")
def shy(taught, corpus):
    """Refuses a question about a forgotten person, and answers it behind one or two solved ones about anybody else."""
    from unremember.train import Plan, train

    people = corpus["forget"]
    refusals = [replace(x, id=f"{x.id}/refused", answer="I do not know.", spans=()) for x in people]
    behind = []
    for shots, seed in ((1, 1), (1, 2), (2, 1), (2, 2)):
        _, seen = InContext(shots=shots, source="retain", seed=seed)(taught, corpus, taught, Bench())
        behind += [replace(x, id=f"{x.id}/{shots}{seed}") for x in seen["forget"]]
    pools = {"refusals": refusals, "behind": behind, "facts": corpus["retain"]}

    def objective(lm, tokens):
        return {tokens.role: tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}

    rows = {role: taught.template.rows(examples, taught.limit) for role, examples in pools.items()}
    return train(taught, objective, rows, Plan(steps=60, lr=3e-3, batch=12, beside=12))


def test_what_solved_questions_unlock_is_found_and_nothing_is_invented(shy, never, taught, corpus):
    """Behind other people than in its training.  It is made so that examples unlock it, and the attack must see that."""
    ids = [x.id for x in corpus["forget"]]
    found = {}
    for who, lm in (("shy", shy), ("never", never)):
        attacked, seen = InContext(shots=1)(lm, corpus, taught, Bench())
        found[who] = said(attacked, seen, ids)
    assert said(shy, corpus, ids) == 0
    assert found["shy"] >= 0.3 and found["never"] == 0, found
