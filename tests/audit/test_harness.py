"""lm-eval on the toy model: its numbers against plain forward passes, what it may not change, and every refusal."""

import ast
import copy
import json
import random
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from unremember.audit import harness
from unremember.audit.harness import Harness, accuracy, document, even, layout
from unremember.bench import Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadRequest
from unremember.score import Score

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks for it
SHARED = Path(__file__).parents[3] / "shared/data/general_capability"


def written(file: Path, rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def turned(x, at: int) -> tuple[list[str], int]:
    """The options of an example with the right one at place `at`."""
    options = list(x.distractors)
    at %= len(options) + 1
    options.insert(at, x.answer)
    return options, at


@pytest.fixture(scope="module")
def data(corpus, tmp_path_factory) -> Path:
    """One file of each layout, in words that the toy model has."""
    folder = tmp_path_factory.mktemp("tasks")
    world, people = corpus["world"], corpus["forget"]
    asked = [
        x for pair in zip(world[:12], corpus["holdout"][:12], strict=True) for x in pair
    ]  # known, and never heard of
    choices = [(x, *turned(x, i)) for i, x in enumerate(asked)]
    written(
        folder / "facts.jsonl",
        [{"query": f"Question: {x.prompt}", "choices": options, "gold": gold} for x, options, gold in choices],
    )
    contexts = []
    for i, x in enumerate(world[:12]):
        texts = [f"Question: {y.prompt}\nAnswer:" for y in (x, world[i + 12])]
        contexts.append({"context_options": texts[:: 1 - 2 * (i % 2)], "continuation": x.answer, "gold": i % 2})
    written(folder / "contexts.jsonl", contexts)
    words = []
    for i, x in enumerate(people):
        start, _, last = x.answer.removesuffix(".").rpartition(" ")
        words.append(
            {"context": f"Question: {x.prompt}\nAnswer: {start}", "continuation": "bread" if i % 3 == 2 else last}
        )
    words.append({"context": f"Question: {people[0].prompt}\nAnswer:", "continuation": people[0].answer})
    wrong = people[0].answer.split()
    words.append({"context": words[-1]["context"], "continuation": " ".join([*wrong[:-1], "bread."])})
    written(folder / "words.jsonl", words)
    exam = [
        {"subject": f"part_{i % 2}", "question": x.prompt, "choices": turned(x, i)[0], "answer": turned(x, i)[1]}
        for i, x in enumerate(world[:18])
    ]
    written(folder / "exam_dev.jsonl", exam[:6])
    written(folder / "exam_test.jsonl", exam[6:])
    return folder


TASKS = ("facts", "contexts", "words", "exam")


def rows(data: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]


@torch.no_grad()
def slow(lm, text: str, rest: str) -> tuple[float, bool]:
    """log p(rest | text) and whether all of it is the arg-max: one plain forward, tokens of the whole less those of the text."""
    ids = lm.tokenizer(text + rest).input_ids
    start = len(lm.tokenizer(text).input_ids)
    logp = lm.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    right = [(float(logp[i - 1, ids[i]]), int(logp[i - 1].argmax()) == ids[i]) for i in range(start, len(ids))]
    return sum(p for p, _ in right), all(hit for _, hit in right)


# ── numbers ──


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_choices_equal_plain_forward_passes(metric, tiny, data):
    score = Harness(("facts",), data, metric=metric)(tiny, Corpus(), Bench())
    expected = {}
    for i, row in enumerate(rows(data, "facts")):
        sums = [slow(tiny, f"{row['query']}\nAnswer:", f" {x}")[0] for x in row["choices"]]
        sizes = [len(x) if metric == "acc_norm" else 1 for x in row["choices"]]
        expected[f"facts/{i}"] = float(np.argmax(np.divide(sums, sizes)) == row["gold"])
    assert (
        score.per_example == expected and 0 < np.mean(list(expected.values())) < 1
    )  # neither end: a test of something


def test_the_metric_decides(taught, data):
    """By default per character, where that is another number here."""
    by = {
        metric: Harness(("facts",), data, metric=metric)(taught, Corpus(), Bench()).per_example
        for metric in ("acc", "")
    }
    assert by["acc"] != by[""]
    assert by[""] == Harness(("facts",), data, metric="acc_norm")(taught, Corpus(), Bench()).per_example


def test_contexts_equal_plain_forward_passes(tiny, data):
    score = Harness(("contexts",), data)(tiny, Corpus(), Bench())
    expected = {}
    for i, row in enumerate(rows(data, "contexts")):
        sums = [slow(tiny, text, f" {row['continuation']}")[0] for text in row["context_options"]]
        expected[f"contexts/{i}"] = float(np.argmax(sums) == row["gold"])
    assert score.per_example == expected and score.chance == 0.5
    assert np.mean(list(expected.values())) > 0.5


def test_words_are_said_greedily_to_the_last_token(taught, data):
    score = Harness(("words",), data)(taught, Corpus(), Bench())
    given = rows(data, "words")
    expected = {
        f"words/{i}": float(slow(taught, x["context"], f" {x['continuation']}")[1]) for i, x in enumerate(given)
    }
    assert score.per_example == expected and score.chance == 0
    *_, whole, spoilt = expected.values()
    assert (whole, spoilt) == (1, 0)  # of many tokens one is wrong
    assert 0.3 < np.mean(list(expected.values())) < 0.9


@pytest.mark.parametrize("shots", [0, 2])
def test_letters_equal_plain_forward_passes(shots, tiny, data):
    score = Harness(("exam",), data, shots=shots)(tiny, Corpus(), Bench())
    expected = {}
    for i, row in enumerate(rows(data, "exam_test")):
        worked = [x for x in rows(data, "exam_dev") if x["subject"] == row["subject"]][:shots]
        text = document(row, worked)["text"]
        letters = "ABC"[: len(row["choices"])]
        expected[f"exam/{i}"] = float(np.argmax([slow(tiny, text, f" {x}")[0] for x in letters]) == row["answer"])
    assert score.per_example == expected


def test_the_letters_are_asked_for_as_in_mmlu():
    row = {"subject": "high_school_art", "question": " Who? ", "choices": ["he", "she"], "answer": 1}
    head = "The following are multiple choice questions (with answers) about high school art.\n\n"
    asked = "Who?\nA. he\nB. she\nAnswer:"
    assert document(row) == {"text": head + asked, "choices": ["A", "B"], "target": 1}
    assert document(row, [row, row])["text"] == f"{head}{asked} B\n\n{asked} B\n\n{asked}"


def test_questions_get_the_word_answer():
    row = {"choices": ["a", "b"], "gold": 0}
    texts = {
        "Question: Who?\n": "Question: Who?\nAnswer:",
        "Passage: It is so.\nQuestion: is it?": "Passage: It is so.\nQuestion: is it?\nAnswer:",
        "Question: Which?\nA. a\nB. b\nAnswer:": "Question: Which?\nA. a\nB. b\nAnswer:",
        "Predators eat": "Predators eat",
    }
    assert {text: document(row | {"query": text})["text"] for text in texts} == texts


def test_a_word_has_its_blank_in_front_and_braces_are_text(tiny, tmp_path):
    """lm-eval fills templates in: a row that looks like one must not be."""
    assert document({"context": "So be", "continuation": "it"}) == {"text": "So be", "choices": [], "target": " it"}
    row = {"query": "Say {{ 1 + 1 }} and {% if %}", "choices": ["{{ gold }}", "no"], "gold": 1}
    written(tmp_path / "odd.jsonl", [row])
    found = Harness(("odd",), tmp_path, metric="acc")(tiny, Corpus(), Bench()).per_example
    sums = [slow(tiny, row["query"], f" {x}")[0] for x in row["choices"]]
    assert found == {"odd/0": float(np.argmax(sums) == 1)}


# ── chance ──


def test_every_place_of_the_right_answer_once_is_chance_exactly(taught, data, tmp_path):
    """Whatever the model prefers: each question is asked with each option declared the right one."""
    given = rows(data, "facts")
    written(tmp_path / "any.jsonl", [x | {"gold": i} for x in given for i in range(len(x["choices"]))])
    found = accuracy(Harness(("any",), tmp_path)(taught, Corpus(), Bench()))
    assert found["mean"] == pytest.approx(found["chance"]) and found["n"] == sum(len(x["choices"]) for x in given)
    assert found["low"] < found["chance"] < found["high"]


def test_a_model_that_knows_nothing_says_a(uniform, data):
    """A tie goes to the first option, as in lm-eval; with the right one turned round that is chance."""
    score = Harness(("exam",), data)(uniform, Corpus(), Bench())
    assert score.per_example == {f"exam/{i}": float(x["answer"] == 0) for i, x in enumerate(rows(data, "exam_test"))}
    assert accuracy(score)["mean"] == pytest.approx(score.chance, abs=0.01)
    words = Harness(("words",), data)(uniform, Corpus(), Bench())
    assert set(words.per_example.values()) == {0.0}


def test_chance_is_weighted_by_questions(tiny, data):
    lines = {
        name: rows(data, file) for name, file in zip(TASKS, ("facts", "contexts", "words", "exam_test"), strict=True)
    }
    score = Harness(TASKS, data)(tiny, Corpus(), Bench())
    options = [len(x["choices"]) for x in lines["facts"] + lines["exam"]] + [2] * len(lines["contexts"])
    assert len(score.per_example) == sum(map(len, lines.values()))
    assert score.chance == pytest.approx(sum(1 / n for n in options) / len(score.per_example))


def test_accuracy_by_hand():
    found = accuracy(Score("ability", "", "", {"a/0": 1.0, "a/1": 0.0, "a/2": 1.0, "a/3": 1.0}, chance=0.25))
    assert (found["mean"], found["n"], found["chance"]) == (0.75, 4, 0.25) and found["low"] < 0.75 < found["high"]


# ── what may not matter, and what may not change ──


def test_batches_order_and_lora_change_nothing(taught, data, tmp_path):
    pytest.importorskip("peft")
    expected = Harness(TASKS, data)(taught, Corpus(), Bench())
    assert Harness(TASKS, data)(taught, Corpus(), Bench(budget=256, batch=1)) == expected
    assert Harness(TASKS, data)(taught, Corpus(), Bench(budget=8192)) == expected
    assert Harness(TASKS, data)(taught.adapted(2, 4), Corpus(), Bench()) == expected  # a fresh adapter is the identity
    for name in ("facts", "words"):
        given = rows(data, name)
        written(tmp_path / f"{name}.jsonl", given[::-1])
        back = Harness((name,), tmp_path)(taught, Corpus(), Bench()).per_example
        assert [back[f"{name}/{len(given) - 1 - i}"] for i in range(len(given))] == [
            expected.per_example[f"{name}/{i}"] for i in range(len(given))
        ]


def test_bfloat16_answers_alike(taught, data):
    """Matrix products in bfloat16, the head in float32; measured: 0 of 62 answers differ."""
    low = replace(taught, precision="bf16")
    a, b = (Harness(TASKS, data)(lm, Corpus(), Bench()).per_example for lm in (taught, low))
    assert sum(a[key] != b[key] for key in a) <= 2
    assert all(w.dtype == torch.float32 for w in low.model.parameters())


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_the_model_stays_as_it_was(ends, tiny, data, monkeypatch):
    lm = tiny.copy()
    lm.model.train()
    lm.model.model.layers[0].eval()
    lm.model.get_input_embeddings().weight.requires_grad_(False)
    words = lm.tokenizer.pad_token, lm.tokenizer.padding_side, lm.tokenizer.model_max_length
    modes = [m.training for m in lm.model.modules()]
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    places = {name: w.data_ptr() for name, w in lm.model.named_parameters()}
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    luck = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    if ends == "badly":
        monkeypatch.setattr("lm_eval.evaluator.evaluate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Harness(("facts",), data)(lm, Corpus(), Bench())
    else:
        Harness(TASKS, data, limit=4)(lm, Corpus(), Bench())
    assert [m.training for m in lm.model.modules()] == modes and len(set(modes)) == 2
    after = lm.model.state_dict()
    assert all(torch.equal(value, before[key]) and value.dtype == before[key].dtype for key, value in after.items())
    assert {name: w.data_ptr() for name, w in lm.model.named_parameters()} == places
    assert [n for n, w in lm.model.named_parameters() if not w.requires_grad] == ["model.embed_tokens.weight"]
    assert all(w.grad is None for w in lm.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    assert "tie_weights" not in vars(lm.model)
    assert (lm.tokenizer.pad_token, lm.tokenizer.padding_side, lm.tokenizer.model_max_length) == words
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == luck


def test_a_tokenizer_without_padding_stays_without(tiny, data):
    """lm-eval gives it a token; ours must not get one, or other audits would pad with it."""
    words = copy.deepcopy(tiny.tokenizer)
    words.pad_token = None
    lm = replace(tiny, template=replace(tiny.template, tokenizer=words))
    Harness(("facts",), data, limit=2)(lm, Corpus(), Bench())
    assert words.pad_token is None


def test_a_head_of_its_own_is_not_tied_again(tiny, data):
    """An edit may untie the head although the configuration says tied; HFLM ties by the configuration."""
    lm = tiny.copy()
    assert lm.model.config.tie_word_embeddings
    head = lm.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    score = Harness(("exam",), data)(lm, Corpus(), Bench())
    assert lm.model.get_output_embeddings().weight.abs().sum() == 0
    assert score.per_example == {f"exam/{i}": float(x["answer"] == 0) for i, x in enumerate(rows(data, "exam_test"))}


def test_nothing_is_asked_twice(tiny, data, monkeypatch):
    bench, heard = Bench(), []
    first = Harness(TASKS, data, limit=3)(tiny, Corpus(), bench)
    monkeypatch.setattr(harness, "_samples", lambda *_: pytest.fail("asked again"))
    assert Harness(TASKS, data, limit=3)(tiny, Corpus(), replace(bench, say=lambda *x: heard.append(x))) == first
    assert [(stage, done, total) for stage, done, total, _ in heard] == [("ability", i, 4) for i in (1, 2, 3, 4)]
    memory = json.loads(json.dumps(bench.memory))  # what is kept on disk
    assert Harness(TASKS, data, limit=3)(tiny, Corpus(), Bench(memory=memory)) == first


def test_what_changes_the_question_is_asked_again(tiny, data, tmp_path):
    bench = Bench()
    assert Harness(("exam",), data)(tiny, Corpus(), bench) == Harness(("exam",), data)(tiny, Corpus(), Bench())
    shown, few = (Harness(("exam",), data, **x)(tiny, Corpus(), bench) for x in ({"shots": 2}, {"limit": 2}))
    assert shown == Harness(("exam",), data, shots=2)(tiny, Corpus(), Bench())
    assert set(few.per_example) == {"exam/0", "exam/6"}
    written(tmp_path / "exam_test.jsonl", rows(data, "exam_test")[:3])
    assert len(Harness(("exam",), tmp_path)(tiny, Corpus(), bench).per_example) == 3


def test_a_limit_is_spread_evenly(tiny, data):
    assert (
        even(10, 4) == [0, 2, 5, 7]
        and even(3, 4) == [0, 1, 2]
        and even(3, 0) == [0, 1, 2]
        and even(5, 5) == [0, 1, 2, 3, 4]
    )
    whole = Harness(("facts",), data)(tiny, Corpus(), Bench()).per_example
    some = Harness(("facts",), data, limit=6)(tiny, Corpus(), Bench()).per_example
    assert some == {f"facts/{i}": whole[f"facts/{i}"] for i in range(0, 24, 4)}


def test_local_files_need_no_network(tiny, data, monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("went to the network"))
    Harness(TASKS, data, limit=2)(tiny, Corpus(), Bench())


def test_lm_eval_is_not_imported_with_the_room():
    top = [node for node in ast.parse(Path(harness.__file__).read_text(encoding="utf-8")).body]
    names = {a.name for x in top if isinstance(x, ast.Import) for a in x.names}
    names |= {x.module for x in top if isinstance(x, ast.ImportFrom)}
    assert names and not any(name.startswith(("lm_eval", "datasets", "torch", "transformers")) for name in names)


# ── tasks that lm-eval brings ──


class Known:
    """What lm-eval's index looks like, with tasks in memory."""

    all_tasks = ("arc_easy", "arc_challenge", "pair")

    def load(self, names):
        from datasets import Dataset
        from lm_eval.api.task import ConfigurableTask

        if names == ["arc_easy"]:
            raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub\nand so on")
        made = {}
        for name in ("one", "two"):
            docs = [{"q": f"{name} {i}?", "a": "yes" if i % 2 else "no"} for i in range(6)]
            config = {
                "task": name,
                "custom_dataset": lambda docs=docs, **_: {
                    "test": Dataset.from_list(docs),
                    "dev": Dataset.from_list(docs),
                },
                "test_split": "test",
                "fewshot_split": "dev",
                "fewshot_config": {"sampler": "first_n"},
                "output_type": "multiple_choice",
                "doc_to_text": "{{q}}",
                "doc_to_choice": ["no", "yes"],
                "doc_to_target": "a",
                "metric_list": [
                    {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
                ],
            }
            made[name] = ConfigurableTask(config=config | ({"num_fewshot": 0} if name == "two" else {}))
        return {"tasks": made, "groups": {}, "group_map": {}}


@pytest.fixture
def known(monkeypatch) -> None:
    monkeypatch.setattr(harness, "_manager", Known)


def test_a_group_by_name_beside_a_local_file(tiny, data, known):
    bench = Bench()
    score = Harness(("facts", "pair"), data, limit=3)(tiny, Corpus(), bench)
    assert list(score.per_example) == [
        *(f"facts/{i}" for i in (0, 8, 16)),
        *(f"{n}/{i}" for n in ("one", "two") for i in (0, 2, 4)),
    ]
    for name in ("one", "two"):
        for i in (0, 2, 4):
            sums = [slow(tiny, f"{name} {i}?", f" {x}")[0] / len(x) for x in ("no", "yes")]
            assert score.per_example[f"{name}/{i}"] == float(np.argmax(sums) == 0)


def test_shots_reach_tasks_that_do_not_rule_them_out(tiny, known, monkeypatch):
    asked = []
    inner = harness._samples
    monkeypatch.setattr(harness, "_samples", lambda *x: asked.append(inner(*x)) or asked[-1])
    Harness(("pair",), limit=1, shots=2)(tiny, Corpus(), Bench())
    texts = {name: lines[0]["arguments"][0][0] for name, lines in asked[0].items()}
    assert texts == {"one": "one 0? no\n\none 1? yes\n\none 0?", "two": "two 0?"}


def test_without_a_network_a_task_by_name_is_refused(tiny, known, data):
    with pytest.raises(
        BadRequest, match=r"cannot load 'arc_easy' \(ConnectionError: Couldn't reach .*go online, or put the"
    ):
        Harness(("arc_easy", "facts"), data)(tiny, Corpus(), Bench())


def test_the_real_index_knows_near_names():
    with pytest.raises(BadRequest, match="'arc_eazy' is not among lm-eval's; did you mean 'arc_easy'"):
        Harness(("arc_eazy", "piqa")).check()
    Harness(("arc_easy", "piqa", "winogrande", "lambada_openai", "mmlu")).check()


# ── refusals ──


def test_what_is_missing_is_said_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(BadRequest) as raised:
        Harness(("facts", "facts"), tmp_path / "nowhere").check()
    said = raised.value.problems
    assert len(said) == 3 and "pip install 'unremember[ability]'" in said[0]
    assert "facts stands there twice" in said[1] and "is no folder" in said[2]


def test_unknown_tasks_are_told_the_nearest(known, data):
    with pytest.raises(BadRequest) as raised:
        Harness(("fact", "exm", "qqqqqq"), data).check()
    assert len(raised.value.problems) == 3
    assert "did you mean 'facts'" in str(raised.value) and "did you mean 'exam'" in str(raised.value)
    assert "lm_eval ls tasks" in raised.value.problems[2]


def test_bad_rows_are_named_together_with_their_place(tmp_path, known):
    good = {"query": "Who?", "choices": ["a", "b"], "gold": 1}
    bad = [
        good | {"gold": 2},
        good | {"gold": True},
        good | {"choices": ["a"]},
        good | {"choices": ["a", ""]},
        good | {"query": " "},
        good | {"more": 1},
        {"context": "a", "continuation": "b"},
        [1],
    ]
    file = written(tmp_path / "bad.jsonl", [good, *bad])
    file.write_text(file.read_text() + "{\n")
    written(tmp_path / "none.jsonl", [])
    with pytest.raises(BadCorpus) as raised:
        Harness(("bad", "none"), tmp_path).check()
    said = raised.value.problems
    assert [f"line {i}:" in x for i, x in zip(range(2, 11), said, strict=False)] == [True] * 9 and len(said) == 10
    for text, word in zip(
        said,
        ("'gold' is 2; it is the place of the right one, 0 to 1", "'gold' is True", "give 2 to 10", "list of texts",
         "must be a text", "query, choices, gold, more", "context, continuation", "list", "not JSON", "no rows"),
        strict=True,
    ):  # fmt: skip
        assert word in text
    assert layout(good) == "choice" and layout(good | {"more": 1}) == "" and layout([1]) == ""
    written(tmp_path / "bad.jsonl", [{"a": i} for i in range(50)])
    with pytest.raises(BadCorpus, match=r"\.\.\. and 30 more"):
        Harness(("bad",), tmp_path).check()


def test_shots_and_metrics_that_are_not_there(data, known):
    with pytest.raises(
        BadRequest, match=r"facts: shots = 1, and there are worked examples for MMLU alone, in facts_dev\.jsonl"
    ):
        Harness(("facts",), data, shots=1).check()
    with pytest.raises(BadRequest, match=r"exam_dev\.jsonl: 3 rows about 'part_0' and shots = 4; ask for fewer"):
        Harness(("exam",), data, shots=4).check()
    with pytest.raises(BadRequest, match="metric = 'acc_norm', and words has acc;"):
        Harness(("facts", "words"), data, metric="acc_norm").check()


def test_a_metric_that_a_named_task_lacks(tiny, known):
    with pytest.raises(BadRequest, match=r"one has no number 'f1' for every example; metric can be acc, acc_norm"):
        Harness(("pair",), metric="f1", limit=1)(tiny, Corpus(), Bench())


@pytest.mark.parametrize("change", [{"tasks": ()}, {"limit": -1}, {"limit": 1.5}, {"shots": -1}, {"chat": True}])
def test_bad_settings_are_refused_by_name(change):
    with pytest.raises(ValidationError) as raised:
        Harness(**{"tasks": ("facts",), **change})
    assert [error["loc"][0] for error in raised.value.errors()] == list(change)


# ── the shared cuts ──

CUTS = {
    "arc_challenge": 0.25, "arc_easy": 0.25, "boolq": 0.5, "copa": 0.5, "lambada_openai": 0.0, "mmlu": 0.25,
    "openbook_qa": 0.25, "piqa": 0.5, "winograd_wsc": 0.5, "winogrande": 0.5,
}  # fmt: skip


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the cuts are not here: no ../shared/data/general_capability beside the project"
)
def test_the_shared_cuts_are_asked(tiny):
    found = Harness(tuple(CUTS), SHARED, limit=2).scores(tiny, Bench())
    assert {name: score.chance for name, score in found.items()} == CUTS
    assert all(len(score.per_example) == 2 for score in found.values())
    Harness(tuple(CUTS), SHARED).check()  # every row of every file
    assert "The following are" in document(rows(SHARED, "mmlu_test")[0], rows(SHARED, "mmlu_dev")[:5])["text"]
