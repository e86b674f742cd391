"""From a run folder to a report: numbers that can be worked out again, and no model needed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unremember.errors import BadFolder
from unremember.folder import read_json, write_json
from unremember.report.build import build, cheapest, strength

WHO = ("original", "forgotten", "never")


@pytest.fixture
def folder(demo_run, tmp_path) -> Path:
    shutil.copytree(demo_run.folder, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def edit(folder):
    """edit("run.json", f): let f change what is in a file of the folder."""

    def change(name: str, how) -> None:
        value = read_json(folder / name)
        how(value)
        write_json(folder / name, value)

    return change


def values(folder: Path, piece: str, score: str) -> dict[str, float]:
    [row] = [row for row in read_json(folder / piece)["scores"] if row["name"] == score]
    return row["per_example"]


def test_a_report_is_rebuilt_from_its_folder_without_torch(folder):
    before = read_json(folder / "report.json")
    for name in ("report.json", "report.html", "model/README.md"):
        (folder / name).unlink()
    for weights in (folder / "model").glob("*.safetensors"):
        weights.unlink()
    script = (
        "import sys; from unremember.cli import main\n"
        "try: main()\n"
        "finally: print('loaded:', *sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "report", str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert read_json(folder / "report.json") == before
    assert (folder / "report.html").exists() and (folder / "model" / "README.md").exists()


def test_building_twice_gives_the_same(folder, demo_run):
    assert build(folder) == build(folder) == demo_run.report


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (("run.json",), "is no run folder"),
        (("corpus.json",), "is no run folder"),
        (("audit/forgotten.json",), "no audit of the forgotten model yet"),
        (("audit/never.json",), "no audit of the never model yet"),
        (("audit/original.json", "audit/forgotten.json"), "no audit of the original and the forgotten model yet"),
    ],
)
def test_a_folder_in_which_too_little_is(gone, said, folder):
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(BadFolder, match=said):
        build(folder)


def test_an_attack_that_was_not_made_is_not_reported(folder):
    (folder / "attack" / "relearn" / "forgotten.json").unlink()
    built = build(folder)
    assert [c["attack"] for c in built["conditions"]] == ["none", "rephrase"]
    assert {row["attack"] for row in built["scores"]} == {"none", "rephrase"}
    shutil.rmtree(folder / "attack")
    assert [c["attack"] for c in build(folder)["conditions"]] == ["none"] and "Attacked" not in build(folder)["words"]


def test_the_table_of_scores_is_that_of_the_pieces(folder, demo_run):
    corpus = read_json(folder / "corpus.json")
    built = build(folder)
    for role in ("forget", "retain"):
        [row] = [
            r for r in built["scores"] if (r["attack"], r["name"], r["role"]) == ("none", "value probability", role)
        ]
        for who in WHO:
            found = values(folder, f"audit/{who}.json", "value probability")
            assert row[who]["mean"] == pytest.approx(np.mean([found[x["id"]] for x in corpus[role]]))
            assert row[who]["low"] <= row[who]["mean"] <= row[who]["high"]
        assert row["n"] == len(corpus[role])


def test_under_rephrasing_the_best_wording_of_a_fact_counts(folder):
    built = build(folder)
    [row] = [
        r for r in built["scores"] if (r["attack"], r["name"], r["role"]) == ("rephrase", "value probability", "forget")
    ]
    found = values(folder, "attack/rephrase/original.json", "value probability")
    ids = [x["id"] for x in read_json(folder / "corpus.json")["forget"]]
    best = [max(v for k, v in found.items() if k.startswith(f"{fact}#")) for fact in ids]
    assert row["original"]["mean"] == pytest.approx(np.mean(best)) and row["n"] == len(ids)


def flatten(folder: Path, piece: str, level: dict[str, float]) -> None:
    """Give every example of the named scores one value."""
    value = read_json(folder / piece)
    for row in value["scores"]:
        if row["name"] in level:
            row["per_example"] = dict.fromkeys(row["per_example"], level[row["name"]])
    write_json(folder / piece, value)


HIGH = {"value probability": 0.9, "said": 1.0, "extraction strength": 1.0, "choice": 0.9, "world accuracy": 0.9,
        "prose NLL": 3.0, "distinct tokens": 0.9}  # fmt: skip
LOW = {"value probability": 0.1, "said": 0.0, "extraction strength": 0.2, "choice": 0.3}


@pytest.fixture
def made(folder, edit):
    """made(forgotten={...}, retained={...}): a folder without attacks in which every number is known."""
    shutil.rmtree(folder / "attack")

    def make(forgotten: dict[str, float], retained: dict[str, float] | None = None) -> dict:
        flatten(folder, "audit/original.json", HIGH)
        flatten(folder, "audit/forgotten.json", HIGH | forgotten)
        flatten(folder, "audit/never.json", HIGH | LOW)
        kept = {x["id"] for x in read_json(folder / "corpus.json")["retain"]}

        def stays(value: dict) -> None:
            for row in value["scores"]:
                level = HIGH | (retained or {})
                row["per_example"] |= {
                    k: level[row["name"]] for k in row["per_example"] if k in kept and row["name"] in level
                }

        for who in WHO[1:]:
            edit(f"audit/{who}.json", stays)
        return build(folder)["conditions"][0]

    return make


def test_the_numbers_of_a_verdict_by_hand(made):
    """Probability .3 of .9 with a control at .1: R = .2 / .8 = .25, which is just allowed."""
    found = made(LOW | {"value probability": 0.3})
    assert found["overall"]["verdict"] == "forgotten" and {v["verdict"] for v in found["entities"]} == {"forgotten"}
    by_name = {x["score"]: x for x in found["overall"]["evidence"]}
    assert by_name["value probability"]["r"] == pytest.approx(0.25)
    assert by_name["said"]["r"] == by_name["choice"]["r"] == by_name["extraction strength"]["r"] == 0.0
    assert made(LOW | {"value probability": 0.31})["overall"]["verdict"] == "remembered"


def test_where_nothing_speaks_luck_has_nothing_to_explain(made, folder, edit):
    made(LOW)
    luck = build(folder)["luck"]
    assert (luck["seen"], luck["mean"], luck["p"]) == (0, 0.0, 1.0) and luck["words"].startswith("None of 4 looks")
    edit("corpus.json", lambda roles: [x.update(entity="") for x in roles["forget"]])
    assert build(folder)["luck"] is None  # nobody to look at


@pytest.mark.parametrize(
    ("change", "retained", "failing"),
    [
        ({"world accuracy": 0.84}, {}, "world accuracy"),
        ({"prose NLL": 3.21}, {}, "prose NLL"),
        ({"distinct tokens": 0.7}, {}, "distinct tokens in free text"),
        ({}, {"value probability": 0.71}, "retained, value probability"),
        ({}, {"said": 0.79}, "retained, said"),
    ],
)
def test_each_line_of_the_gate_can_close_it(change, retained, failing, made):
    found = made(LOW | change, retained)["overall"]
    assert found["verdict"] == "over-forgotten" and found["reason"].startswith(failing)
    assert [c["name"] for c in found["utility"] if not c["passed"]] == [failing]


def test_what_the_gate_still_allows(made):
    found = made(
        LOW | {"world accuracy": 0.86, "prose NLL": 3.19, "distinct tokens": 0.73}, {"value probability": 0.73}
    )
    assert found["overall"]["verdict"] == "forgotten" and all(c["passed"] for c in found["overall"]["utility"])


def test_what_an_attack_costs_a_model_that_never_knew_is_no_harm_by_forgetting(folder, edit):
    """A model that has something to learn is moved further by an attack that trains.  Unattacked, the original is the measure."""

    def lose(piece: dict) -> None:
        for row in piece["scores"]:
            if row["name"] == "world accuracy":
                row["per_example"] = dict.fromkeys(row["per_example"], 0.0)
            if row["name"] == "prose NLL":
                row["per_example"] = dict.fromkeys(row["per_example"], 9.0)

    def gate(place: str) -> dict:
        found = next(c for c in build(folder)["conditions"] if c["attack"] == place)["overall"]["utility"]
        return {c["name"]: (c["against"], c["passed"]) for c in found if c["name"] in ("world accuracy", "prose NLL")}

    for place, name in (("attack/relearn", "relearn"), ("audit", "none")):
        edit(f"{place}/forgotten.json", lose)
        alone = gate(name)
        assert not any(passed for _, passed in alone.values()) and alone["world accuracy"][0] > 0.5
        edit(f"{place}/never.json", lose)
        together = {"world accuracy": (0.0, True), "prose NLL": (9.0, True)}
        assert gate(name) == (together if name == "relearn" else alone)


def test_one_person_who_is_remembered_spoils_the_whole(made, folder, edit):
    made(LOW)
    first = read_json(folder / "corpus.json")["forget"][0]["entity"]
    ids = {x["id"] for x in read_json(folder / "corpus.json")["forget"] if x["entity"] == first}

    def remember(value: dict) -> None:
        for row in value["scores"]:
            if row["name"] == "choice":  # .48 is 30 % of the way from .3 to .9: too much for one, 15 % for both
                row["per_example"] |= dict.fromkeys(ids, 0.48)

    edit("audit/forgotten.json", remember)
    found = build(folder)["conditions"][0]
    assert {v["name"]: v["verdict"] for v in found["entities"]}[first] == "remembered"
    assert sorted(v["verdict"] for v in found["entities"]) == ["forgotten", "remembered"]
    assert found["overall"]["verdict"] == "remembered" and "1 of 2 are still remembered" in found["overall"]["reason"]
    luck = build(folder)["luck"]  # two names, one condition, two scores; in 1 of 64 draws none of her six facts moves
    assert (luck["looks"], luck["seen"]) == (4, 1) and luck["p"] == pytest.approx(1 / 64, abs=0.012)
    assert luck["words"].startswith("1 of 4 looks at single names, by scores that vary by luck, speaks against")


def test_the_rule_can_be_changed_afterwards(made, folder, edit):
    assert made(LOW | {"choice": 0.42})["overall"]["verdict"] == "forgotten"  # R = .12 / .6 = .2
    edit("run.json", lambda run: run["rule"].update(tolerance=0.1))
    assert build(folder)["conditions"][0]["overall"]["verdict"] == "remembered"
    edit("run.json", lambda run: run["rule"].update(tolerance=0.3, overall=1000))
    assert build(folder)["conditions"][0]["overall"]["verdict"] == "not applicable"


def test_without_a_control_the_holdout_of_the_original_is_the_level(made, folder, edit):
    made(LOW)
    holdout = [x["id"] for x in read_json(folder / "corpus.json")["holdout"]]

    def unknown(value: dict) -> None:
        for row in value["scores"]:
            if row["name"] in LOW:
                row["per_example"] |= dict.fromkeys(holdout, LOW[row["name"]])

    edit("audit/original.json", unknown)
    edit("run.json", lambda run: run.update(control=""))
    (folder / "audit" / "never.json").unlink()
    built = build(folder)
    assert built["luck"] is None  # nothing to exchange values with
    assert built["run"]["level"] == "holdout examples" and built["conditions"][0]["overall"]["verdict"] == "forgotten"
    levels = {x["score"]: x["never"] for x in built["conditions"][0]["overall"]["evidence"]}
    assert levels == pytest.approx(LOW)


def test_ids_with_a_sharp_sign_are_ids(folder, edit):
    """ "page#1" is an example of its own, not a variant of "page"."""
    text = (folder / "corpus.json").read_text()
    for path in (folder / "corpus.json", *folder.glob("audit/*.json"), *folder.glob("attack/*/*.json")):
        path.write_text(re.sub(r'"([a-z]+-[a-z]+)/([a-z]+)(["#])', r'"\1#\2\3', path.read_text()))
    assert (folder / "corpus.json").read_text() != text
    built = build(folder)
    assert [c["overall"]["evidence"] for c in built["conditions"]] == [
        c["overall"]["evidence"] for c in read_json(folder / "report.json")["conditions"]
    ]
    assert len(built["answers"]) == len(read_json(folder / "report.json")["answers"])


def test_a_question_is_shown_as_the_forgotten_model_saw_it(folder, edit):
    """Of several wordings the first; a variant whose wording nobody kept is not shown under another one."""
    example = read_json(folder / "corpus.json")["forget"][0]
    fact, plain = example["id"], example["prompt"]

    def shown(answers, asked):
        edit("attack/relearn/forgotten.json", lambda piece: piece.update(answers=answers, asked=asked))
        rows = [r for r in build(folder)["answers"] if r["attack"] == "relearn"]
        return [(row["id"], row["prompt"], row["forgotten"]) for row in rows]

    two = {f"{fact}#told-1": "Ghent", f"{fact}#told-0": "Turin"}
    assert shown({fact: "Ghent"}, {}) == [(fact, plain, "Ghent")]
    assert shown({fact: "Ghent"}, {fact: f"{plain} ! !"}) == [(fact, f"{plain} ! !", "Ghent")]
    assert shown(two, {f"{fact}#told-1": "B?", f"{fact}#told-0": "A?"}) == [(f"{fact}#told-1", "B?", "Ghent")]
    assert shown(two, {}) == []


def test_model_utility_is_worked_out_from_its_parts(folder):
    rows = {row["name"]: row for row in build(folder)["comparisons"]}
    for who in WHO:
        parts = [float(x) for x in re.findall(r"\d\.\d\d", rows[f"model utility, {who}"]["detail"])]
        assert len(parts) == 6 and 0 <= rows[f"model utility, {who}"]["value"] <= 1
        assert rows[f"model utility, {who}"]["value"] == pytest.approx(
            6 / sum(1 / max(p, 1e-9) for p in parts), abs=0.02
        )
    assert {"forget quality, original", "forget quality, forgotten"} <= set(rows)


def test_the_stop_is_told_as_it_was(folder):
    log = (folder / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in log]
    assert build(folder)["method"]["steps"] == len(rows)

    def told(lines: list[dict]) -> str:
        (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return build(folder)["method"]["stop"]

    assert told([{**row, "stopped": False} for row in rows if "look" in row]).startswith("CAP REACHED")
    assert told([*rows[:-1], {**rows[-1], "stopped": True}]) == f"level of the never-taught reached at step {len(rows)}"
    plain = [{k: v for k, v in row.items() if k not in ("look", "stopped")} for row in rows]
    assert "as planned" in told(plain)
    assert "nothing to do" in told([])


def test_an_attack_that_found_nothing_to_work_on_is_not_applicable(folder, edit):
    edit(
        "attack/relearn/forgotten.json", lambda piece: piece.update(scores=[], answers={}, refused="nothing is hidden")
    )
    built = build(folder)
    [relearn] = [c for c in built["conditions"] if c["attack"] == "relearn"]
    assert (relearn["overall"]["verdict"], relearn["overall"]["reason"]) == ("not applicable", "nothing is hidden")
    assert {e["verdict"] for e in relearn["entities"]} == {"not applicable"}
    assert "under relearn: not applicable (nothing is hidden)" in built["words"]


@pytest.mark.parametrize("who", ["original", "never"])
def test_where_one_of_the_three_models_cannot_be_attacked_there_is_no_triple(who, folder, edit):
    edit(f"attack/relearn/{who}.json", lambda piece: piece.update(scores=[], answers={}, refused="it is the original"))
    [relearn] = [c for c in build(folder)["conditions"] if c["attack"] == "relearn"]
    assert (relearn["overall"]["verdict"], relearn["overall"]["reason"]) == ("not applicable", "it is the original")


def strong(attack: str, verdict: str, seconds: float | None, r: float | None, entity: str = "") -> dict:
    row = {"attack": attack, "verdict": verdict, "seconds": seconds, "r": r, "score": r and "said", "entity": entity}
    return row | {"questions": 18.0 if attack == "jailbreak" else 1.0}


def test_the_cheapest_attack_that_brings_it_back_is_named_with_how_much():
    rows = [
        strong("relearn", "remembered", 40.0, 0.9),
        strong("graft", "forgotten", 1.0, 0.1),
        strong("quantise", "remembered", 12.4, 0.62),
        strong("prefix", "remembered", None, 0.7),
    ]
    assert cheapest(rows) == " The cheapest of the 3 attacks that bring it back is quantise, 12 s: 62% of the said."
    kept = [{**row, "verdict": "forgotten"} for row in rows[:2]] + [strong("prune", "not applicable", 3.0, None)]
    told = " None of the 2 attacks that apply brings it back (nearest comes relearn, 90% of the said)."
    assert cheapest(kept) == told
    assert cheapest([strong("prune", "not applicable", 3.0, None)]) == ""
    asking = cheapest([strong("jailbreak", "remembered", 2.0, 0.5), rows[1]])
    assert "jailbreak alone brings it back, 2 s and 18 questions a fact: 50%" in asking


def test_one_attack_alone_and_one_name_alone_are_told_so():
    rows = [strong("rephrase", "remembered", 0.2, 0.29, "Ada Byron"), strong("relearn", "forgotten", 8.0, 0.0)]
    told = (
        " Of the 2 attacks that apply rephrase alone brings it back, less than a second: 29% of the said of Ada Byron."
    )
    assert cheapest(rows) == told
    shares = {
        "overall": ("remembered", 0.15),
        "Ada": ("remembered", 0.29),
        "Bea": ("forgotten", 0.9),
        "Cy": ("remembered", None),
    }
    judged = {
        name: {"name": name, "verdict": verdict, "n": 8, "evidence": [{"r": r, "score": "choice"}]}
        for name, (verdict, r) in shares.items()
    }
    condition = {"attack": "rephrase", "overall": judged.pop("overall"), "entities": list(judged.values())}
    found = strength(condition, {"spent": 3.0, "puts": 24})
    assert (found["r"], found["score"], found["entity"], found["seconds"]) == (0.29, "choice", "Ada", 3.0)
    assert found["questions"] == 3.0 and strength(condition, {})["questions"] is None


def test_many_attacks_are_told_by_their_verdicts(folder, edit):
    def more(run: dict) -> None:
        run["attacks"] |= {"graft": run["attacks"]["relearn"]}

    shutil.copytree(folder / "attack" / "relearn", folder / "attack" / "graft")
    edit("run.json", more)
    edit("attack/graft/forgotten.json", lambda piece: piece.update(refused="no"))
    words = build(folder)["words"]
    assert "not applicable under graft" in words and "under relearn: " not in words


def test_what_an_attack_costs_is_kept(demo_run):
    costs = {row["attack"]: row["seconds"] for row in read_json(demo_run.folder / "report.json")["attacks"]}
    assert set(costs) == {"relearn", "rephrase"} and all(s is not None and s >= 0 for s in costs.values())
    assert costs["relearn"] > costs["rephrase"]  # one trains, the other changes words


def test_nothing_is_brought_back_of_what_never_went(folder, edit):
    """The sentence on the cheapest attack is for models that passed unattacked."""
    flatten(folder, "audit/original.json", HIGH)
    flatten(folder, "audit/forgotten.json", HIGH)
    flatten(folder, "audit/never.json", HIGH | LOW)
    words = build(folder)["words"]
    assert words.startswith("Remembered") and "cheapest" not in words and "brings it back" not in words
