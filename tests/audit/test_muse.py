"""VerbMem and KnowMem: by hand, the slow way, the ends, and the published ways to get the reference wrong."""

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from unremember.audit import muse
from unremember.audit.muse import SHOTS, KnowMem, VerbMem, asked, first_answer
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus, BadRequest
from unremember.tokens import PLAIN, Template


@pytest.fixture
def speaks(monkeypatch, tiny):
    """Let every model say this; returns the (prompt, most new tokens) that it was asked."""

    def this(*texts: str) -> list:
        prompts = []

        def go_on(lm, asked, bench):
            prompts.extend(asked)
            return [tuple(tiny.tokenizer(t, add_special_tokens=False).input_ids) for t in texts]

        monkeypatch.setattr(muse, "continuations", go_on)
        return prompts

    return this


# ── by hand ──


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (" sat home now.", 1.0),
        (" sat home", 4 / 5),  # precision 1, recall 2/3
        (" he said the cat sat home now.", 6 / 10),  # precision 3/7, recall 1
        (" a box.", 0.0),
        ("", 0.0),
    ],
)
def test_verbmem_by_hand(speaks, tiny, said, expected):
    """The cat | sat home now. — with two tokens given, four are asked for, and three words are compared."""
    text = Corpus({"forget": [Example("x", "What did it do?", "The cat sat home now.")]})
    prompts = speaks(said)
    assert VerbMem(context=2)(tiny, text).per_example == {"x": pytest.approx(expected)}
    assert prompts == [(tuple(tiny.tokenizer("The cat").input_ids), 4)]


def test_at_most_half_is_given_and_no_more_is_compared_than_asked(speaks, tiny):
    text = Corpus({"forget": [Example("x", "", "The cat sat home now.")]})  # 6 tokens
    prompts = speaks(" home now")
    assert VerbMem(context=50, new=2)(tiny, text).per_example == {"x": 1.0}
    assert prompts == [(tuple(tiny.tokenizer("The cat sat").input_ids), 2)]


def test_stemming_is_off_unless_asked_for(speaks, tiny):
    """MUSE's code has the stemmer off and open-unlearning on: 'apple' against 'apples' is where they differ."""
    text = Corpus({"forget": [Example("x", "What grows there?", "Green apples")]})
    speaks(" Green apple")
    assert KnowMem()(tiny, text).per_example == {"x": 0.5}
    assert KnowMem(stem=True)(tiny, text).per_example == {"x": 1.0}
    assert "as they are" in KnowMem()(tiny, text).definition and "stemmed" in KnowMem(stem=True)(tiny, text).definition


def test_an_answer_ends_where_the_next_question_begins(speaks, tiny):
    assert first_answer(" A box.\n\nQuestion: What?\nAnswer: A key.") == " A box."
    assert first_answer(" A box.\nQuestion: What?") == " A box." and first_answer("A box. Question: Who?") == "A box. "
    text = Corpus({"forget": [Example("x", "Where?", "In a box.")]})
    speaks(" In a box.\n\nQuestion: Who has the key?\nAnswer: Her uncle.")
    assert KnowMem()(tiny, text).per_example == {"x": 1.0}


def test_the_prompt_is_muses(tiny):
    ids = asked(tiny.template, "Who has the key?", (("A?", "B."), ("C?", "D.")))
    assert tiny.tokenizer.decode(ids) == (
        "Question: A?\nAnswer: B.\n\nQuestion: C?\nAnswer: D.\n\nQuestion: Who has the key?\nAnswer:"
    )
    assert asked(tiny.template, "Who?", ()) == tiny.template.context("Who?")


def test_a_chat_model_gets_the_examples_in_one_message(tiny):
    words = tiny.tokenizer
    chat = Template(_Chatty(words), chat=True)
    text = words.decode(asked(chat, "Who?", (("A?", "B."),)))
    assert text == f"<{PLAIN.format(prompt='A?')} B.\n\n{PLAIN.format(prompt='Who?')}>"
    assert words.decode(asked(chat, "Who?", ())) == "<Who?>"


class _Chatty:
    """A tokenizer with the simplest of chat templates."""

    def __init__(self, words):
        self.words = words

    def __call__(self, *args, **kwargs):
        return self.words(*args, **kwargs)

    def apply_chat_template(self, messages, **_):
        assert [m["role"] for m in messages] == ["user"]
        return f"<{messages[0]['content']}>"


# ── the slow way ──


def test_both_the_slow_way(moved, corpus):
    from rouge_score.rouge_scorer import RougeScorer

    score = RougeScorer(["rougeL"], use_stemmer=False).score
    few = Corpus({"forget": corpus["forget"][:5], "holdout": corpus["holdout"][:5]})
    verb, know = (audit(moved, few, Bench()).per_example for audit in (VerbMem(context=4), KnowMem()))
    decode = moved.tokenizer.decode
    for x in few.of("forget", "holdout"):
        ids = tuple(moved.tokenizer(x.answer).input_ids)
        [said] = moved.generate([ids[:4]], len(ids) - 4)
        assert verb[x.id] == pytest.approx(score(decode(ids[4:]), decode(said))["rougeL"].fmeasure)
        text = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in SHOTS) + f"Question: {x.prompt}\nAnswer:"
        [said] = moved.generate([tuple(moved.tokenizer(text).input_ids)], 32)
        spoken = decode(said).split("\n\n")[0].split("\nQuestion")[0].split("Question:")[0]
        assert know[x.id] == pytest.approx(score(x.answer, spoken)["rougeL"].fmeasure)


# ── the ends ──


def test_a_memoriser_and_one_that_knows_nothing(memoriser, uniform, small):
    whole = Corpus({"forget": [*small["forget"], *small["prose"]], "retain": small["retain"]})
    assert set(VerbMem(context=4)(memoriser, whole, Bench()).per_example.values()) == {1.0}
    assert set(VerbMem()(memoriser, whole, Bench()).per_example) == {"f1", "f2", "f3", "p0", "p1", "r1"}
    assert set(KnowMem(shots=())(memoriser, whole, Bench()).per_example.values()) == {1.0}
    assert set(KnowMem()(memoriser, whole, Bench()).per_example) == {"f1", "f2", "f3", "r1"}  # passages ask nothing
    for audit in (VerbMem(), KnowMem()):
        assert set(audit(uniform, whole, Bench()).per_example.values()) == {0.0}


def test_taught_against_never_taught(taught, never, corpus):
    """Measured without examples, which the toy was never shown: 0.99 against 0.51, which is the wording; with them 0.04."""
    forget = Corpus({"forget": corpus["forget"]})
    known, level = (
        np.mean(list(KnowMem(shots=())(lm, forget, Bench()).per_example.values())) for lm in (taught, never)
    )
    assert known > 0.95 and level < known - 0.2


# ── published bugs ──


def test_a_repeated_beginning_stays_in_the_reference(speaks, tiny):
    """open-unlearning deletes the prompt string from the whole text, and every repetition of it with it."""
    text, prompt = "The cat sat The cat sat home", "The cat sat"
    assert text.replace(prompt, "").split() == ["home"]  # what it compares with
    ids = tuple(tiny.tokenizer(text).input_ids)
    corpus = Corpus({"forget": [Example("x", "", text)]})
    prompts = speaks(" The cat sat home")
    assert VerbMem(context=3)(tiny, corpus).per_example == {"x": 1.0}
    assert prompts == [(ids[:3], len(ids) - 3)]
    speaks(" home")
    assert VerbMem(context=3)(tiny, corpus).per_example == {"x": 2 / 5}


def test_an_answer_that_is_in_its_question_is_no_empty_target(speaks, tiny):
    x = Example("x", "Is it a box or a key?", "a box")
    speaks(" a box")
    assert KnowMem()(tiny, Corpus({"forget": [x]})).per_example == {"x": 1.0}


def test_no_end_mark_in_either_text(memoriser, small):
    """Cut to the truth's length, the continuation holds no end mark, and none is asked for."""
    lm = memoriser
    x = small["forget"][0]
    ids = tuple(lm.tokenizer(x.answer).input_ids)
    [said] = lm.generate([ids[:4]], len(ids))
    assert said == ids[4:] and lm.tokenizer.eos_token_id not in said
    assert VerbMem(context=4)(lm, Corpus({"forget": [x]}), Bench()).per_example == {x.id: 1.0}


# ── bad input ──


def test_texts_that_are_too_long_or_too_short_are_named(tiny):
    long, one = Example("long", "", "cat " * 400), Example("one", "", "The")
    with pytest.raises(BadCorpus) as error:
        VerbMem(context=200, new=100)(tiny, Corpus({"forget": [long], "retain": [one]}))
    assert "example 'long': context and continuation are 300 tokens and the model's context is 256" in str(error.value)
    assert "example 'one': the answer 'The' has no token to score" in str(error.value)
    assert set(VerbMem()(tiny, Corpus({"forget": [long]}), Bench()).per_example) == {"long"}
    question = replace(long, id="q", prompt="Who? " * 100, answer="cat")
    with pytest.raises(BadCorpus, match="the model's context is 256; give fewer or shorter shots"):
        KnowMem()(tiny, Corpus({"forget": [question]}))


def test_an_example_that_is_asked_is_not_shown(tiny):
    x = Example("x", SHOTS[1][0], "Eight.")
    with pytest.raises(BadCorpus, match="'x' is among the few-shot examples; give others as shots"):
        KnowMem()(tiny, Corpus({"forget": [x]}))
    assert set(KnowMem(shots=())(tiny, Corpus({"forget": [x]}), Bench()).per_example) == {"x"}


@pytest.mark.parametrize("bad", [{"new": 0}, {"stem": "maybe"}, {"tokens": 3}])
def test_settings_are_checked(bad):
    for audit in (VerbMem, KnowMem):
        with pytest.raises(ValidationError):
            audit(**bad)
    with pytest.raises(ValidationError):
        VerbMem(context=0)


def test_without_rouge_score_the_way_out_is_named(monkeypatch, tiny, small):
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    for audit in (VerbMem(), KnowMem()):
        with pytest.raises(BadRequest, match=r"install unremember\[audit\]"):
            audit(tiny, small)


@pytest.mark.parametrize("audit", [VerbMem(), KnowMem()])
def test_batch_budget_and_order_change_nothing(audit, taught, corpus):
    few = Corpus({role: corpus[role][:6] for role in ("forget", "retain", "holdout")})
    turned = Corpus({role: rows[::-1] for role, rows in reversed(list(few.items()))})
    one = audit(taught, few, Bench())
    assert audit(taught, turned, Bench(budget=300, batch=3)).per_example == pytest.approx(one.per_example)
    assert set(one.per_example) == {x.id for x in few.of(*audit.roles)}
    assert one.paper == audit.paper and one.definition and one.direction and audit.summary
