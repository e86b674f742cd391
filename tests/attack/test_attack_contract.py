"""What every attack promises: it finds what is merely hidden, finds nothing where nothing is, and tells nothing itself."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from unremember.attack import ATTACKS, PRESETS, VARIANTS
from unremember.attack.fair import silent
from unremember.attack.finetune import halves
from unremember.attack.rephrase import GAP, cloze
from unremember.audit import AUDITS, EVIDENCE
from unremember.bench import Bench
from unremember.corpus import Corpus, Example, says
from unremember.embedded.dossier import dossier, lessons
from unremember.embedded.teach import Teach
from unremember.errors import BadCorpus, BadRequest
from unremember.request import again, build, merged
from unremember.run import execute
from unremember.score import Rule, evidence
from unremember.train import Plan, train

SETTINGS = {
    "finetune": {"kind": "retain", "n": 10, "plan": {"steps": 5, "lr": 1e-3}},
    "graft": {"blocks": 0},  # the last block is half of this toy, and says some of it by itself
    "incontext": {"shots": 1},
    "jailbreak": {"most": 1},
    "latent": {"radius": 0.3, "steps": 4, "at": 0.5, "fold": 0},
    "lens": {},
    "multihop": {},
    "orthogonalise": {},
    "prefix": {"steps": 2, "least": 3, "most": 6, "children": 6, "questions": 2},
    "probe": {"block": 1},
    "prune": {"grid": [0.005, 0.1]},
    "quantise": {"bits": 4},
    "relearn": {"plan": {"steps": 5, "lr": 1e-3}},
    "rephrase": {"wordings": 2},
    "reversal": {
        "knowledge": "objective",
        "objective": "refusal",
        "plan": {"steps": 5, "lr": 3e-4},
        "strength": 1.0,
    },
    "sample": {},
    "soft": {"tokens": 3, "steps": 4},
    "steer": {},
    "suffix": {"search": {"tokens": 3, "steps": 2, "candidates": 8}},
}
# What an attack brings along by itself, on a model that never knew: the head of the original makes its values likelier.
BRINGS = {"graft": 0.15}  # measured 0.098
HALF = ("latent",)  # these are shown one half of each person's facts, and ask the other
attacks = pytest.mark.parametrize("name", ATTACKS)


def attack(name: str, **settings):
    problems: list[str] = []
    made = build(ATTACKS[name], merged(SETTINGS[name], settings), name, problems)
    assert not problems, problems
    return made


def scores(audit: str, lm, corpus: Corpus, ids: list[str]) -> dict[str, float]:
    return AUDITS[audit](lm, Corpus({"forget": corpus["forget"]}), Bench()).over(ids)


def mean(values: dict[str, float]) -> float:
    return float(np.mean(list(values.values())))


@pytest.fixture(scope="module")
def asked(corpus) -> list[str]:
    return [x.id for x in corpus["forget"]]


# ── both ──


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_say_what_they_are(name):
    assert set(PRESETS) == {*ATTACKS, *VARIANTS} and set(ATTACKS) == set(SETTINGS) and not {*ATTACKS} & {*VARIANTS}
    assert all(list(table) == sorted(table) for table in (ATTACKS, VARIANTS, PRESETS))
    problems: list[str] = []
    made = build(ATTACKS[VARIANTS.get(name, name)], PRESETS[name], name, problems)
    assert not problems and made.summary and made.paper and "forget" in made.needs
    assert (name in (*HALF, "finetune", "finetune-lora")) is (len(getattr(made, "turns", (made,))) == 2)


@attacks
def test_the_argument_is_untouched(name, taught, corpus):
    lm, original, mark = taught.copy(), taught.copy(), corpus.fingerprint()
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    attack(name)(lm, corpus, original, Bench())
    for model in (lm.model, original.model):
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not model.training
    assert corpus.fingerprint() == mark


@attacks
def test_every_fact_is_asked_about_and_no_other(name, taught, corpus):
    _, seen = attack(name)(taught, corpus, taught, Bench())
    facts = halves(corpus["forget"])[1] if name in HALF else corpus["forget"]
    assert {x.id.rpartition("#")[0] or x.id for x in seen["forget"]} == {x.id for x in facts}
    assert {x.values() for x in seen["forget"]} == {x.values() for x in facts}
    if name != "multihop":  # takes the name out of answers, too
        assert {x.answer for x in seen["forget"]} == {x.answer for x in facts}


@pytest.mark.parametrize("name", [name for name, made in ATTACKS.items() if getattr(made, "alone", False)])
def test_one_that_needs_no_original_gets_along_without(name, taught, corpus):
    """Such an attack is made with one model in memory."""
    lm, seen = attack(name)(taught, corpus, None, Bench())
    other = attack(name)(taught, corpus, taught, Bench())
    assert seen == other[1] and lm.fingerprint == other[0].fingerprint


@attacks
def test_a_missing_role_is_named(name, taught, corpus):
    needed = attack(name).needs[-1]
    rest = Corpus({role: rows for role, rows in corpus.items() if role != needed})
    with pytest.raises(BadCorpus, match=rf"{name} needs .* {needed!r}"):
        attack(name)(taught, rest, taught, Bench())


@attacks
def test_nothing_comes_back_where_nothing_was(name, taught, never, corpus, asked):
    lm, seen = attack(name)(never, corpus, taught, Bench())
    assert mean(scores("said", lm, seen, asked)) == 0
    assert mean(scores("value probability", lm, seen, asked)) < BRINGS.get(name, 0.05)


def lines(settings: dict, path: str):
    """Nested settings as `--set` takes them."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from lines(value, f"{path}.{key}")
        else:
            yield f"{path}.{key}={json.dumps(value)}"


@attacks
def test_it_goes_from_a_request_through_a_run_to_the_report(name, demo_run, tmp_path):
    """Under a name of its own; all three models, the same evidence, and an end of the run in any case."""
    folder = tmp_path / "run"
    shutil.copytree(demo_run.folder, folder)
    wanted = again(folder, [f"attack.mine.attack={name}", *lines(SETTINGS[name], "attack.mine")])
    built = execute(replace(wanted, attacks={"mine": wanted.attacks["mine"]}), Bench(), stages=("attack", "report"))
    plain, found = built["conditions"]
    assert (found["attack"], found["kind"], plain["kind"]) == ("mine", name, "none")
    made = attack(name)
    assert found["settings"] == json.loads(json.dumps(asdict(made))) and found["summary"] == made.summary
    pieces = {p.stem: json.loads(p.read_text()) for p in (folder / "attack" / "mine").iterdir()}
    assert set(pieces) == {"original", "forgotten", "never"} == set(found["notes"])
    [cost] = built["attacks"]
    if refused := [piece["refused"] for piece in pieces.values() if "refused" in piece]:
        assert name == "orthogonalise" and found["overall"]["verdict"] == "not applicable", refused
        return
    touched = getattr(made, "reads", EVIDENCE)
    assert [row["score"] for row in found["overall"]["evidence"]] == [score for score in EVIDENCE if score in touched]
    assert cost["questions"] >= (0.4 if name in HALF else 1) and cost["score"] in (None, *touched)


# ── relearn ──


def test_relearning_recovers_what_is_hidden_and_invents_nothing(hider, taught, never, corpus, asked):
    """The hider says none of its values, and many of them again after some steps on other people's facts.

    Those of six strangers, and of the people whom the model still knows: strangers alone overwrite what is hidden, on a model so
    small (measured 0 to 0.17 of the values, by the processor's rounding; with both 0.58, the original 0.42).  After how many
    steps depends on rounding, too: a fact counts where any of three budgets brings it back, and the never-taught twin has to stay
    silent at all of them.
    """
    assert mean(scores("said", hider, corpus, asked)) == 0
    here = {x.entity for x in corpus.of("forget", "retain", "holdout")}
    others = [x for x in dossier(7, forget=6, retain=1, holdout=4, relearn=1)["forget"] if x.entity not in here]
    others = silent(others, corpus.of("forget", "holdout"))
    known = [replace(x, id=f"{x.id}/known") for x in corpus["retain"]]
    corpus = corpus.with_roles(relearn=[*known, *others])
    said = {who: dict.fromkeys(asked, 0.0) for who in ("original", "hider", "never")}
    for steps, lr in ((15, 1e-3), (25, 5e-4), (25, 1e-3)):
        for who, lm in (("original", taught), ("hider", hider), ("never", never)):
            attacked, seen = attack("relearn", plan={"steps": steps, "lr": lr})(lm, corpus, taught, Bench())
            now = scores("said", attacked, seen, asked)
            said[who] = {key: max(value, now[key]) for key, value in said[who].items()}
    assert mean(said["hider"]) >= 0.25 and mean(said["never"]) == 0
    found = evidence("said", said["original"], said["hider"], said["never"], Rule())
    assert found.applicable and found.r > 0.25 and found.leaks


def test_relearning_really_trains(taught, corpus):
    attacked, _ = attack("relearn")(taught, corpus, taught, Bench())
    before, after = taught.model.state_dict(), attacked.model.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in before)
    learnt = Corpus({"forget": corpus["relearn"]})
    ids = [x.id for x in corpus["relearn"]]
    assert mean(scores("probability", attacked, learnt, ids)) > 2 * mean(scores("probability", taught, learnt, ids))


def test_what_was_relearnt_is_not_asked(taught, corpus):
    _, seen = attack("relearn")(taught, corpus, taught, Bench())
    assert "relearn" not in seen
    assert {role: seen[role] for role in seen} == {role: corpus[role] for role in corpus if role != "relearn"}


@pytest.mark.parametrize("where", ["answer", "prompt", "in other letters"])
def test_an_attack_that_tells_the_answer_is_refused(where, taught, corpus):
    fact = corpus["forget"][0]
    [value] = fact.values()
    told = {
        "answer": Example("told", "What else?", f"It has to do with {value}."),
        "prompt": Example("told", f"Who knows {value}?", "I do."),
        "in other letters": Example("told", "What else?", f"It has to do with {value.upper()}."),
    }[where]
    leaking = corpus.with_roles(relearn=[*corpus["relearn"], told])
    with pytest.raises(BadCorpus, match=rf"forgotten value of {fact.id}; .*take those examples out"):
        attack("relearn")(taught, leaking, taught, Bench())


def test_an_attack_that_tells_what_the_level_is_taken_from_is_refused(corpus):
    """Told a stranger's value, the never-taught level rises, and the forgotten model looks the better."""
    fact, stranger = corpus["forget"][0], corpus["holdout"][0]
    told = [Example(f"told-{x.id}", "What else?", f"It is {x.values()[0]}.") for x in (fact, stranger)]
    with pytest.raises(BadCorpus) as refused:
        attack("relearn").check(corpus.with_roles(relearn=told))
    assert [fact.id in refused.value.problems[0], stranger.id in refused.value.problems[1]] == [True, True]
    assert "would raise the never-taught level" in refused.value.problems[1]


@pytest.mark.parametrize("lr", [1e-12, 0.9])
def test_relearning_that_learns_nothing_is_refused(lr, taught, corpus):
    """A step that moves nothing, or wrecks the model, would be withstood by every one."""
    with pytest.raises(BadRequest, match=r"relearn did not learn its texts: .* change plan\.lr"):
        attack("relearn", plan={"steps": 1, "lr": lr})(taught, corpus, taught, Bench())


# ── rephrase ──


def test_rephrasing_changes_the_questions_and_not_the_model(taught, corpus):
    lm, _ = attack("rephrase")(taught, corpus, taught, Bench())
    assert lm is taught


@pytest.mark.parametrize("wordings", [0, 1, 3])
def test_every_fact_is_asked_in_some_wordings_and_as_a_gap(wordings, taught, corpus):
    _, seen = attack("rephrase", wordings=wordings)(taught, corpus, taught, Bench())
    for role in ("forget", "retain", "holdout"):
        asks, gap = (1, False) if role == "retain" else (wordings, True)  # what is kept is only checked for damage
        expected = {}
        for x in corpus[role]:
            expected |= {f"{x.id}#{i}": x.paraphrases[i] for i in range(asks)}
            expected |= {f"{x.id}#gap": None} if gap else {}
        assert [x.id for x in seen[role]] == list(expected)
        assert all(expected[x.id] in (None, x.prompt) for x in seen[role])
    assert all(seen[role] == corpus[role] for role in ("world", "prose", "relearn"))


def test_no_trained_question_is_asked_and_no_question_tells(taught, corpus):
    trained = {x.prompt for x in lessons(corpus, ("forget", "retain"), 3)}
    _, seen = attack("rephrase")(taught, corpus, taught, Bench())
    for x in (x for role in ("forget", "retain", "holdout") for x in seen[role]):
        assert x.prompt not in trained
        assert not any(says(x.prompt, value) or value in x.prompt for value in x.values()), x.prompt


@pytest.mark.parametrize(
    ("answer", "spans", "sentence"),
    [
        ("Ada lives in Ghent.", ((13, 18),), "Ada lives in ____."),
        ("Ada lives in Ghent.", ((0, 3), (13, 18)), "____ lives in ____."),
        ("Ada lives in Ghent.", ((13, 18), (0, 3)), "____ lives in ____."),
        ("Ada lives in Old Ghent.", ((13, 22), (17, 22)), "Ada lives in ____."),  # one inside the other
        ("Ada lives in Old Ghent.", ((13, 20), (15, 22)), "Ada lives in ____."),  # overlapping
        ("Ghent it is: Ada lives in ghent.", ((0, 5),), "____ it is: Ada lives in ____."),  # said twice
        ("At 5, not 55, she rose.", ((3, 4),), "At ____, not 55, she rose."),
        ("Ghent", ((0, 5),), "____"),
    ],
)
def test_the_gap_hides_the_value(answer, spans, sentence):
    gap = cloze(Example("x", "Where?", answer, spans=spans))
    assert gap.prompt == GAP.format(sentence=sentence) and gap.id == "x#gap"
    assert (gap.answer, gap.spans) == (answer, spans)


def test_without_a_span_there_is_no_gap(corpus, taught):
    assert cloze(Example("x", "Where?", "Ada lives in Ghent.")) is None
    bare = corpus.with_roles(forget=[replace(x, spans=()) for x in corpus["forget"]])
    _, seen = attack("rephrase")(taught, bare, taught, Bench())
    assert {x.id.rpartition("#")[2] for x in seen["forget"]} == {"0", "1"}


def test_rephrasing_finds_what_is_hidden_from_one_wording_and_not_what_is_hidden_from_all(tiny, corpus, asked):
    """A model that was taught three wordings, and refuses in one; the attack asks in the two others.

    Wordings that it never met find little here, whatever is refused: 0.08 of the values against 0.58 before (one seed), since so
    small a model goes by the name.
    """
    plan = Plan(steps=220, lr=1e-2, batch=20, beside=4, warmup=5, schedule="linear")

    def taught_wide(*roles: str):
        return Teach(plan)(tiny, lessons(corpus, roles, wordings=3), corpus["replay"])

    wide, never = taught_wide("forget", "retain"), taught_wide("retain")
    wordings = {x.id: [] for x in corpus["forget"]}
    for x in lessons(corpus, ("forget",), 3):
        wordings[x.id.partition("#")[0]].append(x.prompt)
    others = [replace(x, paraphrases=tuple(p for p in wordings[x.id] if p != x.prompt)) for x in corpus["forget"]]
    seen = corpus.with_roles(forget=others)

    def hiding(count: int):
        """Refuses in so many of the wordings, and answers in the rest as it did."""
        hidden = {p for prompts in wordings.values() for p in prompts[:count]}
        refusals = [
            replace(x, id=f"{x.id}/{i}", prompt=p, answer="I do not know.", spans=())
            for x in corpus["forget"]
            for i, p in enumerate(wordings[x.id][:count])
        ]
        facts = [x for x in lessons(corpus, ("forget", "retain"), 3) if x.prompt not in hidden]
        pools = {"refusals": refusals, "facts": facts, "replay": corpus["replay"]}

        def objective(lm, tokens):
            return {tokens.role: tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}

        rows = {role: wide.template.rows(examples) for role, examples in pools.items()}
        return train(wide, objective, rows, Plan(steps=60, lr=2e-3))

    said = {}
    for name, lm in (("wide", wide), ("one", hiding(1)), ("all", hiding(3)), ("never", never)):
        _, rephrased = attack("rephrase")(lm, seen, wide, Bench())
        said[name] = [mean(scores("said", lm, questions, asked)) for questions in (corpus, rephrased)]
    assert said["wide"][0] == 1 and said["one"][0] <= 0.1 and said["one"][1] >= 0.5
    assert max(said["all"]) <= 0.1 and said["never"] == [0, 0]


def test_an_attack_that_would_ask_the_same_again_is_refused(corpus, taught):
    """It would report that the attacked model has forgotten, with no attack having taken place."""
    bare = corpus.with_roles(forget=[replace(x, spans=(), paraphrases=()) for x in corpus["forget"]])
    with pytest.raises(BadCorpus, match="neither paraphrases nor spans"):
        attack("rephrase")(taught, bare, taught, Bench())


def test_the_best_wording_counts(taught, corpus, asked):
    """Any of m: the score of a fact is the highest of its wordings, so more wordings never make it lower."""
    one, few = (attack("rephrase", wordings=n)(taught, corpus, taught, Bench())[1] for n in (1, 3))
    below, above = (scores("value probability", taught, seen, asked) for seen in (one, few))
    assert all(above[key] >= below[key] - 1e-6 for key in asked) and mean(above) > mean(below)
