"""General ability by lm-evaluation-harness: its tasks asked of the model in memory, a number for every question.

A task is a local file of rows, whose keys say what is asked, or whatever lm-eval knows by name, with data from the network.

    query, choices, gold                      i* = argmax_i log p(choice_i | query) / characters of choice_i       (acc_norm)
    context_options, continuation, gold       i* = argmax_i log p(continuation | context_i)             WinoGrande (acc)
    subject, question, choices, answer        i* = argmax_i log p(letter_i | question, options)         MMLU       (acc)
    context, continuation                     all tokens of the continuation are the arg-max            LAMBADA    (acc)

Gao et al., A framework for few-shot language model evaluation, EleutherAI/lm-evaluation-harness@v0.4.13.
Differs: the model keeps its weights, mode and tokenizer, where HFLM switches it to evaluation, ties its head to the embedding and
gives the tokenizer a padding token; a limit takes rows evenly over a task, where that code takes the first ones, which share a
subject; random seeds are left alone; log-probabilities are float32.  As there: no chat template, and what is longer than
the model's context loses its beginning.
"""

from __future__ import annotations

import copy
import difflib
import io
import json
import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadInput, BadRequest
from unremember.folder import fingerprint
from unremember.lm import LM
from unremember.score import Score, summary
from unremember.train import STRICT

LAYOUTS = {
    "choice": ("query", "choices", "gold"),
    "context": ("context_options", "continuation", "gold"),
    "letter": ("subject", "question", "choices", "answer"),
    "word": ("context", "continuation"),
}
RAW = ("boolq", "copa")  # lm-eval compares their options as they are, not a character
METRICS = ("acc_norm", "acc", "exact_match")  # the first that a task gives is taken
LETTERS = "ABCDEFGHIJ"
PLACES = 256  # in a row, on average: a pass takes about bench.budget of them
SHOTS_SEED = 1234  # lm-eval's own
SHOWN = 20


def even(size: int, limit: int) -> list[int]:
    """At most `limit` of `size` places, evenly spread, in order; 0 = all."""
    return [i * size // limit for i in range(limit)] if 0 < limit < size else list(range(size))


def layout(row: object) -> str:
    """Which layout a row has, '' = none of them."""
    return next((name for name, keys in LAYOUTS.items() if isinstance(row, dict) and set(row) == set(keys)), "")


def document(row: Mapping, shots: Sequence[Mapping] = ()) -> dict:
    """What lm-eval asks of a row: text (or the right one's number, where texts are what is chosen from), choices, target."""
    if layout(row) == "word":
        return {"text": row["context"], "choices": [], "target": f" {row['continuation']}"}
    if layout(row) == "context":
        return {"text": row["gold"], "choices": row["context_options"], "target": row["continuation"]}
    if layout(row) == "choice":
        text = row["query"].rstrip()
        if text.rpartition("\n")[2].startswith("Question:"):
            text += "\nAnswer:"
        return {"text": text, "choices": row["choices"], "target": row["gold"]}
    subject = row["subject"].replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    known = "".join(f"{_question(x)} {LETTERS[x['answer']]}\n\n" for x in shots)
    letters = list(LETTERS[: len(row["choices"])])
    return {"text": head + known + _question(row), "choices": letters, "target": row["answer"]}


def _question(row: Mapping) -> str:
    options = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, row["choices"], strict=False))
    return f"{row['question'].strip()}\n{options}Answer:"


def accuracy(score: Score) -> dict:
    """Of the whole score: 'mean', its 95 % interval 'low' and 'high', 'n', and the 'chance' level."""
    return {**(summary(score.per_example) or {}), "chance": score.chance}


@dataclass(frozen=True, config=STRICT)
class Harness:
    """tasks: names of files in `data` (NAME.jsonl, or NAME_test.jsonl with its worked examples in NAME_dev.jsonl), or lm-eval's.

    limit: rows a task, evenly spread over it; 0 = all.  shots: worked examples in front, None = what the task says, here none.
    metric: '' = per-character accuracy where a task has it, else accuracy, else what it has.
    """

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    data: Path | None = None
    limit: Annotated[int, Field(ge=0)] = 0
    shots: Annotated[int, Field(ge=0)] | None = None
    metric: str = ""

    roles = ()
    needs = ()
    paper = "Gao et al., lm-evaluation-harness v0.4.13"
    summary = "general ability: ARC, PIQA, WinoGrande, LAMBADA, MMLU and whatever lm-eval knows"

    def __call__(self, lm: LM, corpus: Corpus, bench: Bench = BENCH) -> Score:
        """All tasks in one score, under ids TASK/ROW with rows counted from 0; the corpus is not looked at."""
        scores = self.scores(lm, bench)
        values = {key: value for score in scores.values() for key, value in score.per_example.items()}
        guessed = [score.chance for score in scores.values() for _ in score.per_example]
        return self._score(", ".join(scores), values, guessed)

    def scores(self, lm: LM, bench: Bench = BENCH) -> dict[str, Score]:
        """Task -> its score.  All that is wrong with the request is said before the model is asked anything."""
        sources = self._sources()
        known = bench.memory.setdefault(f"{lm.fingerprint}/ability", {})
        keys = {name: fingerprint(name, docs, self.limit, self.shots, self.metric) for name, docs in sources.items()}
        loaded = self._loaded({name: docs for name, docs in sources.items() if keys[name] not in known})
        found = {}
        for done, name in enumerate(sources, 1):
            if name in loaded:
                known[keys[name]] = self._asked(lm, loaded[name], sources[name] is not None, bench)
            values, guessed = ({row: pair[at] for row, pair in known[keys[name]].items()} for at in (0, 1))
            found[name] = self._score(name, values, list(guessed.values()))
            bench.say("ability", done, len(sources), {name: accuracy(found[name])["mean"]})
        return found

    def check(self) -> None:
        """BadRequest where lm-eval, the data or a task is missing, BadCorpus where rows cannot be read."""
        self._sources()

    def _score(self, names: str, values: Mapping[str, float], guessed: Sequence[float | None]) -> Score:
        asked = (
            f"{self.limit or 'all'} rows a task, {'the usual' if self.shots is None else self.shots} worked examples"
        )
        return Score(
            "ability",
            f"share of questions answered rightly by lm-eval's rules in {names}; {self.metric or 'acc_norm, else acc'}, {asked}",
            "higher = better able",
            values,
            self.paper,
            sum(x or 0.0 for x in guessed) / len(guessed) if guessed else None,
        )

    def _sources(self) -> dict[str, list[dict] | None]:
        """Task -> its questions, each with the number of its row; None where lm-eval brings them."""
        problems: list[str] = []
        bad: type[BadInput] = BadRequest
        if find_spec("lm_eval") is None:
            problems.append(
                "the audit 'ability' needs lm-eval, which is not installed; pip install 'unremember[ability]'"
            )
        if twice := sorted({name for name in self.tasks if self.tasks.count(name) > 1}):
            problems.append(f"tasks: {', '.join(twice)} stands there twice; name each task once")
        if self.data is not None and not self.data.is_dir():
            problems.append(f"data = {str(self.data)!r} is no folder; name one with a file NAME.jsonl for each task")
        files = _files(self.data) if self.data is not None and self.data.is_dir() else {}
        foreign = [name for name in self.tasks if name not in files]
        if foreign and not problems:
            known = _manager().all_tasks
            problems += [_unknown(name, [*files, *known], self.data) for name in foreign if name not in known]
        found: dict[str, list[dict] | None] = dict.fromkeys(self.tasks)
        for name in () if problems else [name for name in self.tasks if name in files]:
            try:
                found[name] = self._local(name, files[name])
            except BadInput as error:
                problems += error.problems
                bad = type(error)
        if problems:
            raise bad([*problems[:SHOWN], *([f"... and {len(problems) - SHOWN} more"] if problems[SHOWN:] else [])])
        return found

    def _local(self, name: str, file: Path) -> list[dict]:
        """The documents of a file."""
        rows = _rows(file)
        dev = file.with_name(f"{name}_dev.jsonl")
        if self.metric and self.metric not in (allowed := _metrics(name, layout(rows[0]))):
            raise BadRequest(
                f"metric = {self.metric!r}, and {name} has {' and '.join(allowed)}; leave it out, or take one"
            )
        if self.shots and (layout(rows[0]) != "letter" or not dev.exists()):
            raise BadRequest(
                f"{name}: shots = {self.shots}, and there are worked examples for MMLU alone, in {dev.name}; leave shots out"
            )
        worked = _rows(dev) if self.shots else []
        docs = []
        for i in even(len(rows), self.limit):
            subject = rows[i].get("subject")
            shots = [x for x in worked if x["subject"] == subject][: self.shots or 0]
            if len(shots) < (self.shots or 0):
                raise BadRequest(f"{dev}: {len(shots)} rows about {subject!r} and shots = {self.shots}; ask for fewer")
            docs.append({"row": i, **document(rows[i], shots)})
        return docs

    def _loaded(self, sources: Mapping[str, list[dict] | None]) -> dict[str, dict[str, Any]]:
        """Name -> lm-eval's tasks of that name, one or a group."""
        found: dict[str, dict[str, Any]] = {}
        problems: list[str] = []
        with _quiet():
            for name, docs in sources.items():
                try:
                    found[name] = {name: _task(name, docs)} if docs else self._named(name)
                except BadRequest as error:
                    problems += error.problems
        if problems:
            raise BadRequest(problems)
        return found

    def _asked(self, lm: LM, tasks: dict[str, Any], local: bool, bench: Bench) -> dict[str, tuple[float, float]]:
        """TASK/ROW -> what it scores, and what a guess would."""
        with _quiet():
            rows = None if local else {key: even(len(task.eval_docs), self.limit) for key, task in tasks.items()}
            samples = _samples(lm, tasks, rows, bench)
        found: dict[str, tuple[float, float]] = {}
        for key, lines in samples.items():
            for line in lines:
                row = f"{key}/{line['doc']['row'] if local else line['doc_id']}"
                if row not in found:  # of several ways to read an answer lm-eval's first counts
                    found[row] = (self._value(key, line), _guess(tasks[key], line["doc"]))
        return found

    def _value(self, task: str, line: Mapping) -> float:
        """One example's metric."""
        numbers = [m for m in line["metrics"] if isinstance(line[m], (int, float))]
        wanted = [self.metric] if self.metric else [*(m for m in METRICS if m in numbers), *numbers]
        if not wanted or wanted[0] not in numbers:
            raise BadRequest(
                f"{task} has no number {self.metric or ''!r} for every example; metric can be {', '.join(numbers) or 'none here'}"
            )
        return float(line[wanted[0]])

    def _named(self, name: str) -> dict[str, Any]:
        """lm-eval's own task or group of them."""
        try:
            tasks = _manager().load([name])["tasks"]
        except Exception as error:  # whatever a loader of somebody's data raises
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            raise BadRequest(
                f"lm-eval cannot load {name!r} ({why}); its data come over the network: go online, or put the rows into a local "
                "file and name its folder in data"
            ) from error
        for task in tasks.values():
            said = task.get_config("num_fewshot")
            if said is None or (self.shots is not None and said != 0):  # 0 in a task is meant
                task.set_config(key="num_fewshot", value=self.shots or 0)
            task.set_fewshot_seed(seed=SHOTS_SEED)
        return tasks


def _files(data: Path) -> dict[str, Path]:
    """Task -> its file."""
    stems = {path.stem: path for path in sorted(data.glob("*.jsonl")) if not path.stem.endswith("_dev")}
    return {stem.removesuffix("_test"): path for stem, path in stems.items()}


def _unknown(name: str, known: Sequence[str], data: Path | None) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    there = f"in {data} or " if data else ""
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`lm_eval ls tasks` lists lm-eval's"
    return f"tasks: {name!r} is not {there}among lm-eval's; {hint}"


def _rows(file: Path) -> list[dict]:
    """The rows of a file; BadCorpus with the place of all that is wrong.  All must have the first one's layout."""
    rows: list[dict] = []
    problems = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{file}, line {number}: not JSON ({error.msg}); write one object a line")
            continue
        kind = layout(row)
        if not kind or (rows and kind != layout(rows[0])):
            allowed = LAYOUTS[layout(rows[0])] if rows else " or ".join(", ".join(keys) for keys in LAYOUTS.values())
            keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            problems.append(f"{file}, line {number}: the keys are {keys}; allowed: {allowed}")
        elif wrong := _misfit(row, kind):
            problems.append(f"{file}, line {number}: {wrong}")
        else:
            rows.append(row)
    if not (rows or problems):
        problems.append(f"{file} holds no rows; add some or leave the task out")
    if problems:
        raise BadCorpus(problems)
    return rows


def _misfit(row: Mapping, kind: str) -> str:
    """What is wrong with a row's values, '' = nothing."""
    for key in LAYOUTS[kind]:
        value = row[key]
        if key in ("choices", "context_options"):
            if not (isinstance(value, list) and all(isinstance(x, str) and x.strip() for x in value)):
                return f"{key!r} must be a list of texts, not {value!r}"
            if not 2 <= len(value) <= len(LETTERS):
                return f"{key!r} has {len(value)} texts; give 2 to {len(LETTERS)}"
        elif key in ("gold", "answer"):
            size = len(row["context_options" if kind == "context" else "choices"])
            if type(value) is not int or not 0 <= value < size:
                return f"{key!r} is {value!r}; it is the place of the right one, 0 to {size - 1}"
        elif not (isinstance(value, str) and value.strip()):
            return f"{key!r} must be a text, not {value!r}"
    return ""


def _task(name: str, docs: list[dict]) -> Any:
    """lm-eval's task over these documents."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    chosen = bool(docs[0]["choices"])
    kind = "choice" if chosen and isinstance(docs[0]["text"], str) else "context"
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "test_split": "test",
        "num_fewshot": 0,  # worked examples stand in the text
        "output_type": "multiple_choice" if chosen else "loglikelihood",
        "doc_to_text": "text",
        "doc_to_target": "target",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in _metrics(name, kind)],
    }
    return ConfigurableTask(config=config | ({"doc_to_choice": "choices"} if chosen else {}))


def _metrics(name: str, kind: str) -> tuple[str, ...]:
    """What a local task is scored by.  Of letters, all as long, both are the same."""
    return ("acc_norm", "acc") if kind in ("choice", "letter") and name not in RAW else ("acc",)


def _guess(task: Any, doc: Mapping) -> float:
    """The chance level of one question: 1 / options, and 0 where nothing is chosen from."""
    return 1 / len(task.doc_to_choice(doc)) if task.OUTPUT_TYPE == "multiple_choice" else 0.0


@cache
def _manager() -> Any:
    """The index of lm-eval's tasks, which takes seconds to read."""
    with _quiet():
        from lm_eval.tasks import TaskManager

        return TaskManager()


def _samples(lm: LM, tasks: dict[str, Any], rows: dict[str, list[int]] | None, bench: Bench) -> dict[str, list[dict]]:
    """What lm-eval notes of each question, task by task.  Nothing is moved: the model answers where it is."""
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with torch.no_grad(), _as_it_was(lm), lm.lowered(), lm.headed(lambda hidden: hidden):
        asked = HFLM(
            pretrained=lm.model,
            tokenizer=copy.deepcopy(lm.tokenizer),  # it may be given a padding token
            batch_size=max(1, min(bench.batch, bench.budget // PLACES)),
            max_length=lm.limit or None,
            softmax_dtype="float32",
            mixed_precision_dtype="bfloat16" if lm.precision == "bf16" else None,
        )
        found = evaluate(asked, {"tasks": tasks}, samples=rows, bootstrap_iters=0, log_samples=True)
    return found["samples"]


@contextmanager
def _as_it_was(lm: LM) -> Generator[None]:
    """HFLM turns the model to evaluation and ties its head: the first is undone, the second not let happen."""
    modes = {module: module.training for module in lm.model.modules()}
    lm.model.tie_weights = lambda *_, **__: None  # an edited head would become the embedding again
    try:
        yield
    finally:
        del lm.model.tie_weights
        for module, training in modes.items():
            module.training = training


@contextmanager
def _quiet() -> Generator[None]:
    """Without lm-eval's notes, warnings and progress bars; errors pass."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
