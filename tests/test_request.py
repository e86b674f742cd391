"""Requests: whatever is wrong is said, all of it, with the next move, before a weight is loaded."""

import json
import shutil
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from unremember.audit import AUDITS, EVIDENCE, UTILITY
from unremember.corpus import Corpus
from unremember.errors import BadCorpus, BadInput, BadRequest
from unremember.forget import METHODS
from unremember.readers import write_jsonl
from unremember.request import SECTIONS, TEMPLATE, handed, parse, request

BASE = """
[run]
name = "test"
[model]
name = "model"
[corpus]
forget = "forget.jsonl"
retain = "retain.jsonl"
holdout = "holdout.jsonl"
relearn = "relearn.jsonl"
[attack.rephrase]
wordings = 1
[attack.relearn]
plan = { steps = 4 }
"""


@pytest.fixture(scope="session")
def saved(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.save(folder)
    return folder


@pytest.fixture
def place(saved, corpus, tmp_path, monkeypatch) -> Path:
    """The working folder: a model, four corpus files and the request that names them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("unremember.embedded.world.world", lambda: corpus["world"][:3])  # encoding all takes time
    (tmp_path / "model").symlink_to(saved)
    for role in ("forget", "retain", "holdout", "relearn"):
        write_jsonl(corpus[role], tmp_path / f"{role}.jsonl")
    (tmp_path / "request.toml").write_text(BASE)
    return tmp_path


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Checking must not load a model: here it cannot."""
    import torch
    from transformers import AutoModelForCausalLM

    def refuse(*_, **__):
        pytest.fail("a weight was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("safetensors.safe_open", refuse)
    monkeypatch.setattr(torch, "load", refuse)


@pytest.fixture
def ask(place):
    """ask("a.b=value", …): the request with these changes."""

    def checked(*changes: str):
        return request(parse(Path("request.toml"), changes), Path())

    return checked


@pytest.fixture
def problems(ask):
    """problems("a.b=value", …): what is said against the request with these changes."""

    def found(*changes: str) -> tuple[str, ...]:
        with pytest.raises(BadRequest) as raised:
            ask(*changes)
        assert len(set(raised.value.problems)) == len(raised.value.problems)
        return raised.value.problems

    return found


# ── good requests ──


def test_a_good_request_becomes_what_it_says(ask, corpus):
    wanted = ask("run.seed=7", "forget.beta=0.5", "rule.tolerance=0.1", 'forget.sites=["*mlp*"]', "forget.lora.rank=4")
    assert (wanted.name, wanted.out, wanted.model, wanted.seed) == ("test", Path("runs/test"), "model", 7)
    assert all(wanted.corpus[role] == corpus[role] for role in ("forget", "retain", "holdout", "relearn"))
    assert wanted.corpus["world"] and wanted.corpus["prose"]
    assert (wanted.method_name, wanted.method.beta, wanted.method.plan.stop) == ("npo", 0.5, "probability")
    assert wanted.rule.tolerance == 0.1 and wanted.sites == ("*mlp*",) and wanted.lora.rank == 4
    assert list(wanted.attacks) == ["rephrase", "relearn"]
    assert asdict(wanted.attacks["relearn"].plan)["steps"] == 4 and wanted.attacks["relearn"].plan.lr == 5e-5
    assert wanted.audits == tuple(AUDITS)
    assert wanted.echo["run"] == {"name": "test", "seed": 7}


def test_what_a_verdict_rests_on_is_always_measured(ask):
    assert set(ask('audit.audits=["truth ratio"]').audits) == {"truth ratio", *EVIDENCE, *UTILITY}
    assert set(ask("audit.audits=[]").audits) == {*EVIDENCE, *UTILITY}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_preset_that_is_enough(method, ask):
    wanted = ask(f"forget.method={method}")
    assert (
        type(wanted.method) is METHODS[method] and getattr(wanted.method, "plan", wanted.method).stop == "probability"
    )


def test_the_template_passes_once_its_files_are_there(place):
    raw = tomllib.loads(TEMPLATE)
    assert set(raw) <= set(SECTIONS)
    (place / "path" / "to").mkdir(parents=True)
    (place / "path" / "to" / "model").symlink_to(place / "model")
    wanted = request(raw, place)
    assert wanted.method_name == "npo" and list(wanted.attacks) == ["rephrase"] and not wanted.control


@pytest.mark.parametrize("where", ["sites", "locate"])
def test_every_line_of_the_template_that_is_commented_out_is_right_too(place, corpus, where):
    """Sites and adapter, or a locator: both at once is refused."""
    write_jsonl(corpus["replay"], place / "replay.jsonl")
    text = TEMPLATE.replace("path/to/model", "model").replace("path/to/control", "model")
    text = text.replace('["model.layers.1?.mlp.*"]', '["*mlp*"]')
    others = ("# sites", "# lora") if where == "locate" else ("# [locate", "# locator", "# budget")
    lines = [
        line.removeprefix("# ") if line.startswith("# ") and (" = " in line or "# [" in line) else line
        for line in text.splitlines()
        if not line.startswith(("# columns", *others))
    ]
    wanted = request(tomllib.loads("\n".join(lines)), place)
    assert (
        wanted.control == "model" and wanted.chunks == 4 and list(wanted.attacks) == ["rephrase", "relearn", "gentle"]
    )
    if where == "locate":
        assert wanted.locator and wanted.budget.share == 0.01 and not wanted.sites and not wanted.lora
    else:
        assert wanted.lora and wanted.sites and not wanted.locator


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("forget.chunks=0", "forget.chunks is 0; it must be a whole number from 1"),
        ("forget.chunks=99", "forget.chunks is 99 and there are 12 forget examples; ask for fewer"),
        (
            'forget={ method = "kga", chunks = 12 }',
            "kga compares means over the forget role, and one example makes none",
        ),
        ('locate={ locator = "integratd", budget = { units = 3 } }', "unknown locator 'integratd'; did you mean"),
        ('locate={ locator = "integrated" }', "give exactly one of units, share and parameters; given: none"),
        ('locate={ locator = "integrated", budget = { units = 3, share = 0.1 } }', "given: units, share"),
        ('locate={ locator = "integrated", budget = { share = 2.0 } }', "locate.budget.share is 2.0"),
        ('locate={ locator = "integrated", budget = { units = 3 }, stepps = 4 }', "unknown key locate.stepps"),
    ],
)
def test_where_and_in_how_many_portions(change, said, problems):
    assert any(said in problem for problem in problems(change)), problems(change)


def test_a_portion_without_spans_is_warned_of_before_it_is_its_turn(ask, corpus, place):
    """The forget role as a whole has spans, its second half has none, and the holdout has."""
    first, last = corpus["forget"][:6], [replace(x, spans=()) for x in corpus["forget"][6:]]
    write_jsonl([*first, *last], place / "mixed.jsonl")
    with pytest.warns(UserWarning, match="holdout examples have spans and no forget example has any"):
        ask('corpus.forget="mixed.jsonl"', "forget.chunks=2", 'forget.plan.stop="probability"')


def test_sites_and_a_locator_are_refused_together(ask):
    with pytest.raises(BadRequest, match=r"so do forget\.sites and forget\.lora; leave one out"):
        ask('locate={ locator = "integrated", budget = { units = 3 } }', 'forget.sites=["*mlp*"]')


def test_corpus_files_are_found_beside_the_request(place, tmp_path_factory, monkeypatch):
    raw = parse(place / "request.toml", [f"model.name={place / 'model'}"])
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert request(raw, place).corpus["forget"]


def test_columns_of_a_table_can_be_named(place, ask):
    (place / "retain.csv").write_text("q,a\nWhere is Ghent?,It is in Belgium.\n")
    wanted = ask('corpus.retain={ file = "retain.csv", question = "q", answer = "a", entity = "Ghent" }')
    [row] = wanted.corpus["retain"]
    assert (row.prompt, row.answer, row.entity) == ("Where is Ghent?", "It is in Belgium.", "Ghent")


@pytest.mark.parametrize("name", ["someone/something", "smollm2-135m", "notes.gguf"])
def test_a_tokenizer_that_is_not_at_hand_is_no_problem(name, place, ask):
    (place / "notes.gguf").write_text("")
    assert ask(f"model.name={name}").model == name


# ── one problem at a time ──


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("modle.name=x", ["unknown table [modle]; did you mean 'model'?"]),
        ("run.sed=1", ["unknown key run.sed; did you mean 'seed'?"]),
        ("model.nme=x", ["unknown key model.nme; did you mean 'name'?"]),
        ("corpus.forgt=x", ["unknown key corpus.forgt; did you mean 'forget'?"]),
        ("audit.audit=[]", ["unknown key audit.audit; did you mean 'audits'?"]),
        ("rule.tolerence=0.1", ["unknown key rule.tolerence; did you mean 'tolerance'?"]),
        ("forget.bta=1", ["unknown key forget.bta; did you mean 'beta'?"]),
        ("forget.plan.step=1", ["unknown key forget.plan.step; did you mean 'steps'?"]),
        ("forget.lora.rnk=1", ["unknown key forget.lora.rnk; did you mean 'rank'?"]),
        ("attack.rephrase.wording=1", ["unknown key attack.rephrase.wording; did you mean 'wordings'?"]),
        ("attack.relearn.plan.sped=1", ["unknown key attack.relearn.plan.sped; did you mean"]),
        ("forget.method=ngo", ["unknown method 'ngo'; did you mean 'npo'?"]),
        ("forget.method=zzz", [f"unknown method 'zzz'; known: {', '.join(sorted(METHODS))}"]),
        ("attack.relern.plan.steps=1", ["unknown attack 'relern'; did you mean 'relearn'?"]),
        ('audit.audits=["probabilty"]', ["unknown audit 'probabilty'; did you mean 'probability'?"]),
        ("audit.audits=[1]", ["unknown audit 1"]),
        ("audit.audits=said", ["audit.audits is 'said'; it must be a list of names"]),
        ("run.seed=-1", ["run.seed is -1; it must be a whole number from 0"]),
        ("run.seed=true", ["run.seed is True"]),
        ("run.places=8", ["run.places is 8; it must be a whole number from 64"]),
        ('run.places="many"', ["run.places is 'many'"]),
        ("run.recompute=1", ["run.recompute is 1; it must be true or false"]),
        ("run.seed=1.5", ["run.seed is 1.5"]),
        ("run.name=5", ["run.name is 5; it must be a text"]),
        ("run=5", ["[run] must be a table and is 5"]),
        ("model.template=chatty", ["model.template is 'chatty'; it must be 'auto' or 'chat' or 'plain'"]),
        ("model.precision=fp16", ["model.precision is 'fp16'; it must be 'auto' or 'bf16' or 'fp32'"]),
        ("forget.beta=high", ["forget.beta is 'high'"]),
        ("forget.beta=0", ["forget.beta is 0", "greater than 0"]),
        ("forget.beta=nan", ["forget.beta is nan", "finite"]),
        ("forget.plan.steps=0", ["forget.plan.steps is 0", "greater than or equal to 1"]),
        ("forget.plan.steps=2.5", ["forget.plan.steps is 2.5"]),
        ("forget.plan.lr=-1", ["forget.plan.lr is -1"]),
        ("forget.plan.stop=soon", ["forget.plan.stop is 'soon'"]),
        ("forget.sites=mlp", ["forget.sites is 'mlp'; it must be a list of parameter name patterns"]),
        ("forget.lora=8", ["forget.lora is 8"]),
        ("attack.rephrase=2", ["attack.rephrase is 2; it must be a table, [attack.rephrase]"]),
        ("attack.rephrase.wordings=-1", ["attack.rephrase.wordings is -1"]),
        ("rule.tolerance=much", ["rule.tolerance is 'much'"]),
        ("corpus.retain=5", ["corpus.retain is 5", 'file = "…"']),
        ('corpus.retain={ file = "retain.jsonl", questoin = "q" }', ["unknown key corpus.retain.questoin", "'question'"]),
        ("corpus.retain=retian.jsonl", ["retian.jsonl does not exist; did you mean 'retain.jsonl'?"]),
        ("model.name=smollm2-135", ["model 'smollm2-135' is no alias", "did you mean 'smollm2-135m'?"]),
        ("model.name=./nowhere", ["model './nowhere' is no alias, folder"]),
        ("model.control=./nowhere", ["model './nowhere' is no alias, folder"]),
        ("model.name=none.gguf", ["model 'none.gguf': no such GGUF file"]),
        ("model.name=", ["model.name is missing"]),
        ("model.template=chat", ["model 'model' has no chat template; set model.template = \"plain\""]),
    ],
)  # fmt: skip
def test_one_problem(change, said, problems):
    [problem] = problems(change)
    assert all(part in problem for part in said), problem


def test_all_problems_come_together(place, problems):
    (place / "retain.jsonl").write_text('{"prompt": "a", "answer": "b"}\nnot json\n')
    changes = ("run.seed=-1", "modle.x=1", "model.name=./nowhere", "forget.method=ngo", "rule.kept=x", "attack.y.z=1")
    found = problems(*changes, 'audit.audits=["x"]')
    for part in (
        "run.seed",
        "[modle]",
        "./nowhere",
        "'ngo'",
        "rule.kept",
        "'y'",
        "unknown audit 'x'",
        "retain.jsonl:2",
    ):
        assert sum(part in problem for problem in found) == 1, (part, found)
    assert len(found) == 8


# ── models ──


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "a folder without config.json is no Hugging Face checkpoint"),
        (("config.json",), "a folder without weights (*.safetensors); copy them there"),
        (("config.json", "pytorch_model.bin"), "has only pickled weights (pytorch_model.bin), which can run code"),
        (("config.json", "model.pt"), "has only pickled weights (model.pt)"),
        (("adapter_config.json",), "an adapter without adapter_model.safetensors"),
        (("adapter_config.json", "adapter_model.safetensors"), "adapter_config.json names no base model"),
    ],
)
@pytest.mark.parametrize("key", ["name", "control"])
def test_a_folder_that_cannot_be_loaded(files, said, key, place, problems):
    folder = place / "broken"
    folder.mkdir()
    for file in files:
        (folder / file).write_text("{}")
    [problem] = problems(f"model.{key}=broken")
    assert "model 'broken'" in problem and said in problem


def test_an_adapter_is_checked_down_to_its_base(place, ask, problems):
    folder = place / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text("")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "./gone"}))
    [problem] = problems("model.name=adapter")
    assert "model './gone' is no alias" in problem
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "model"}))
    assert ask("model.name=adapter").model == "adapter"


def test_a_folder_without_a_tokenizer_is_said_before_the_weights_are_read(place, problems, saved):
    folder = place / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(saved / name)
    [problem] = problems("model.name=bare")
    assert "model 'bare' cannot be loaded" in problem


# ── corpora ──


def test_what_is_wrong_in_a_file_is_named_by_line(place, problems):
    good = '{"prompt": "Who has it?", "answer": "Nobody has it."}'
    lines = [good, "{not json}", good, '{"prompt": "only"}', '{"prompt": "x", "answer": "y", "spans": [[0, 9]]}', "[1]"]
    (place / "forget.jsonl").write_text("\n".join(lines))
    found = problems()
    for line, part in ((2, "not JSON"), (4, "no 'answer'"), (5, "span [0, 9] lies outside"), (6, "must be an object")):
        assert sum(f"forget.jsonl:{line}: " in problem and part in problem for problem in found) == 1, (line, found)
    assert len(found) == 4


@pytest.mark.parametrize(("content", "said"), [("", "is empty"), ("\n\n", "is empty"), ("[]", "holds no rows")])
def test_an_empty_forget_file(content, said, place, problems):
    (place / "forget.jsonl").write_text(content)
    assert any("forget.jsonl" in problem and said in problem for problem in problems())


def test_no_forget_file_at_all(place, problems):
    (place / "request.toml").write_text(BASE.replace('forget = "forget.jsonl"\n', ""))
    assert any("corpus.forget is missing" in problem for problem in problems())


def test_the_same_example_to_be_forgotten_and_kept(place, problems, corpus):
    twin = replace(corpus["forget"][0], id="twin")
    write_jsonl([*corpus["retain"], twin], place / "retain.jsonl")
    [problem] = problems()
    assert "example 'twin' is in retain and in forget" in problem


def test_an_id_in_two_roles(place, problems, corpus):
    write_jsonl([*corpus["retain"], replace(corpus["retain"][0], id=corpus["forget"][0].id)], place / "retain.jsonl")
    [problem] = problems()
    assert f"{corpus['forget'][0].id!r} occurs twice" in problem


def test_a_missing_role_is_asked_for_by_who_needs_it(place, problems):
    (place / "request.toml").write_text(BASE.replace('retain = "retain.jsonl"\n', "").replace('relearn = "re', '# "'))
    found = problems()
    assert any("npo needs examples in the role 'retain'" in problem for problem in found)
    assert any("relearn needs examples in the role 'relearn'" in problem for problem in found)


def test_without_a_never_taught_level_nothing_can_be_called_forgotten(place, problems, ask):
    (place / "request.toml").write_text(BASE.replace('holdout = "holdout.jsonl"\n', ""))
    [problem] = problems("forget.plan.stop=never")
    assert "without a never-taught level" in problem and "control model" in problem
    assert ask("forget.plan.stop=never", "model.control=model").control == "model"


def test_a_stop_without_enough_holdout_is_said_before_the_work(place, problems, ask, corpus):
    write_jsonl(corpus["holdout"][:19], place / "holdout.jsonl")
    [problem] = problems()
    assert "needs at least 20 holdout examples and there are 19" in problem and 'forget.plan.stop = "never"' in problem
    assert ask("forget.plan.stop=never")


def test_an_attack_that_tells_the_answer_is_said_before_the_work(place, problems, corpus):
    told = replace(corpus["relearn"][0], id="told", answer=corpus["forget"][0].answer, spans=())
    write_jsonl([*corpus["relearn"], told], place / "relearn.jsonl")
    [problem] = problems()
    assert f"the relearn role contains the forgotten value of {corpus['forget'][0].id}" in problem


def test_an_attack_without_other_questions_is_said_before_the_work(place, problems, corpus):
    write_jsonl([replace(x, paraphrases=(), spans=()) for x in corpus["forget"]], place / "forget.jsonl")
    write_jsonl([replace(x, spans=()) for x in corpus["holdout"]], place / "holdout.jsonl")
    [problem] = problems()
    assert "neither paraphrases nor spans" in problem and "[attack.rephrase]" in problem


# ── what the model cannot read ──

LONG = "word " * 300


@pytest.mark.parametrize(
    "change",
    [
        {"answer": LONG, "spans": ()},
        {"prompt": LONG},
        {"paraphrases": ("Short?", LONG)},
        {"rewording": LONG},
        {"distractors": (LONG,)},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("role", ["forget", "holdout"])
def test_what_is_longer_than_the_context_is_said_before_the_work(change, role, place, problems, corpus):
    rows = [replace(corpus[role][0], **change), *corpus[role][1:]]
    write_jsonl(rows, place / f"{role}.jsonl")
    [problem] = problems()
    assert f"example {rows[0].id!r} is " in problem and "tokens long and the model's context is 256" in problem


def test_twenty_long_examples_are_shown_and_the_others_counted(place, problems, corpus):
    write_jsonl([replace(x, answer=LONG, spans=()) for x in corpus["holdout"]], place / "holdout.jsonl")
    write_jsonl([replace(x, spans=()) for x in corpus["forget"]], place / "forget.jsonl")
    found = problems()
    assert len(found) == 21 and found[-1] == "... and 4 more"


def test_audits_that_need_longer_answers_are_left_out_unless_they_were_named(place, ask, problems, corpus):
    """The cat. → two words and a full stop: too short for EL_3.  The → one token: as raw text, nothing to predict."""
    short = [replace(x, answer=a, spans=()) for x, a in zip(corpus["forget"], ("The cat.", "The"), strict=False)]
    write_jsonl(short[:1], place / "forget.jsonl")
    write_jsonl([replace(x, spans=()) for x in corpus["holdout"]], place / "holdout.jsonl")
    assert set(AUDITS) - set(ask().audits) == {"EL_3"}
    write_jsonl(short, place / "forget.jsonl")
    assert set(AUDITS) - set(ask().audits) == {"EL_3", "memorisation accuracy"}
    [one, two] = problems('audit.audits=["EL_3", "memorisation accuracy"]')
    assert one.startswith("audit 'EL_3': the answer of ") and "fewer than 4 tokens" in one
    assert short[1].id in two and "fewer than 2 tokens" in two and short[0].id not in two


def test_a_corpus_in_memory_is_checked_like_one_in_files(place, corpus):
    raw = {"model": {"name": "model"}, "forget": {"method": "npo"}}
    assert request(raw, corpus=corpus).corpus is corpus
    with pytest.raises(BadRequest, match="npo needs examples in the role 'retain'"):
        request(raw, corpus=Corpus({role: corpus[role] for role in ("forget", "holdout")}))


# ── the file and --set ──


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("run.seed=3", ("run", "seed"), 3),
        ("run.name=two words", ("run", "name"), "two words"),
        ('run.name="5"', ("run", "name"), "5"),
        ("forget.beta=1e-2", ("forget", "beta"), 0.01),
        ("forget.plan.steps = 7", ("forget", "plan", "steps"), 7),
        ('forget.sites=["a=b", "c"]', ("forget", "sites"), ["a=b", "c"]),
        ("attack.relearn.plan={ steps = 1 }", ("attack", "relearn", "plan"), {"steps": 1}),
        ("new.table.key=true", ("new", "table", "key"), True),
        ("model.name=a/b=c", ("model", "name"), "a/b=c"),
    ],
)
def test_a_change_is_written_into_the_request(change, path, value, place):
    raw = parse(place / "request.toml", [change])
    for key in path:
        raw = raw[key]
    assert raw == value and type(raw) is type(value)


def test_later_changes_win(place):
    assert parse(place / "request.toml", ["run.seed=1", "run.seed=2"])["run"]["seed"] == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [("run.seed", "write it as section.key=value"), ("run.name.x=1", "'name' is a value, not a table")],
)
def test_a_change_that_cannot_be_made(change, said, place):
    with pytest.raises(BadRequest, match=said):
        parse(place / "request.toml", [change])


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"[run\n", "no valid TOML"), (b'[run]\nname = "\xff"\n', "no valid TOML"), (b"a = 1\na = 2\n", "no valid TOML")],
)
def test_a_file_that_is_no_toml(content, said, tmp_path):
    (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(BadRequest, match=said):
        parse(tmp_path / "r.toml")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(BadRequest, match=r"no such request file: .*unremember init"):
        parse(tmp_path / "none.toml")
    with pytest.raises(BadRequest, match="cannot be read: Is a directory"):
        parse(tmp_path)


def test_every_problem_is_bad_input():
    with pytest.raises(BadInput) as raised:
        request({})
    assert raised.value.code == 2 and len(raised.value.problems) >= 2


def test_what_a_suite_cannot_do_with_a_corpus_does_not_refuse_the_request(ask, problems, monkeypatch):
    """The run says "not applicable" of it; an attack that the request names itself is refused, as ever."""

    def cannot(self, corpus):
        raise BadCorpus("probe needs distractors")

    monkeypatch.setattr("unremember.attack.probe.Probe.check", cannot)
    assert "probe" in ask("attack.suite=standard").attacks
    assert problems("attack.suite=standard", "attack.probe.seed=1") == ("probe needs distractors",)


def test_an_attack_is_made_several_times_under_names_of_their_own(ask, problems):
    from unremember.attack import Quantise, Relearn

    wanted = ask("attack.int8={}", "attack.nf4={}", 'attack.coarse={attack="quantise", group=128}').attacks
    assert [type(wanted[name]) for name in ("int8", "nf4", "coarse")] == [Quantise] * 3
    assert [wanted[name].bits for name in ("int8", "nf4", "coarse")] == [8, 4, 4]
    assert wanted["nf4"].grid == "nf4" and wanted["coarse"].group == 128
    gentle = ask('attack.gentle={attack="relearn", plan={steps=2}}').attacks["gentle"]
    assert (
        isinstance(gentle, Relearn) and gentle.plan.steps == 2 and gentle.plan.lr > 0
    )  # the rest as relearn is preset
    assert isinstance(
        ask('attack.int8={attack="relearn"}').attacks["int8"], Relearn
    )  # a name of its own is the request's
    [problem] = problems('attack.gentle={attack="relern"}')
    assert "'relern'" in problem and "did you mean 'relearn'" in problem
    [problem] = problems("attack.gentle={}")
    assert "[attack.gentle] attack = " in problem
    for name in ("none", "a/b", "-", "x" * 41, "é"):
        [problem] = problems(f'attack={{"{name}"={{attack="relearn"}}}}')
        assert f"{name!r} is no name" in problem


def test_models_that_would_be_asked_in_different_ways_are_refused(place, ask, problems):
    """One with a chat template, one without: the never-taught level would be that of another question."""
    shutil.copytree(place / "model", place / "chatty")
    told = json.loads((place / "chatty" / "tokenizer_config.json").read_text())
    told["chat_template"] = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (place / "chatty" / "tokenizer_config.json").write_text(json.dumps(told))
    [problem] = problems("model.control=chatty")
    assert "'chatty' has a chat template and 'model' has none" in problem and 'model.template = "plain"' in problem
    assert ask("model.control=chatty", "model.template=plain").control == "chatty"


def test_an_attack_is_checked_with_what_it_will_be_handed(corpus):
    """As many retained facts as must go, and the holdout only where it is the never-taught level."""
    seen = handed(corpus, control=True)
    assert len(seen["retain"]) == len(corpus["forget"]) < len(corpus["retain"]) and "holdout" not in seen
    assert handed(corpus, control=False)["holdout"] == corpus["holdout"] and seen["forget"] == corpus["forget"]
    assert handed(Corpus({"retain": corpus["retain"]}), control=False)["retain"] == corpus["retain"]


def test_a_suite_is_its_attacks_and_the_requests_own_settings_stay(ask, problems):
    from unremember.attack import PRESETS, SUITES

    assert set(SUITES["quick"]) < set(SUITES["standard"]) < set(SUITES["full"]) == set(PRESETS)
    wanted = ask("attack.suite=quick", "attack.rephrase.wordings=1")
    assert set(SUITES["quick"]) <= set(wanted.attacks) and wanted.attacks["rephrase"].wordings == 1
    [problem] = problems("attack.suite=fast")
    assert problem.startswith("attack.suite is 'fast'") and "quick" in problem
