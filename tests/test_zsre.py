"""zsRE: the real file where it is at hand, and small ones of our own for what can be wrong with it."""

import json
from pathlib import Path

import pytest

from unremember.errors import BadCorpus
from unremember.zsre import zsre

FILE = Path(__file__).parents[2] / "shared" / "data" / "zsre" / "zsre_mend_train-1k.json"


def record(number: int, **changes) -> dict:
    return {
        "subject": f"Ann {number}",
        "src": f"Where does Ann {number} live?",
        "pred": "Rome",
        "rephrase": f"What is the home of Ann {number}?",
        "alt": "Oslo",
        "answers": ["Bonn"],
        "loc": f"nq question: who is king {number}",
        "loc_ans": "Nobody",
    } | changes


def written(tmp_path: Path, records) -> Path:
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.mark.skipif(not FILE.exists(), reason="zsRE is not here: no ../shared/data/zsre beside the project")
def test_the_real_file():
    """1000 records; left out are 22 with several old answers, 17 whose new answer is the old one, 2 without a new one."""
    corpus = zsre(FILE)
    assert {role: len(rows) for role, rows in corpus.items()} == {"forget": 959, "new": 959, "neighbour": 955}
    first = corpus["forget"][0]
    assert (first.prompt, first.answer, first.entity) == (
        "What is the product made by UniFirst?",
        "uniform",
        "UniFirst",
    )
    assert first.paraphrases == ("What will be the product of UniFirst?",)
    assert corpus["new"][0].answer == "unmanned aircraft" and corpus["new"][0].prompt == first.prompt
    assert corpus["neighbour"][0].prompt == "john goodman's character in the big lebowski"
    assert corpus["forget"][2].answer == "1987", "what was true, not MEND's 1998"


def test_a_record_becomes_an_old_answer_a_new_one_and_a_neighbour(tmp_path):
    corpus = zsre(written(tmp_path, [record(1, alt=" Oslo "), record(2)]))
    old, new, other = (corpus[role][0] for role in ("forget", "new", "neighbour"))
    assert old.prompt == new.prompt == "Where does Ann 1 live?" and old.paraphrases == new.paraphrases
    assert (
        (old.answer, new.answer) == ("Bonn", "Oslo") and old.distractors == ("Oslo",) and new.distractors == ("Bonn",)
    )
    assert (other.prompt, other.answer) == ("who is king 1", "Nobody")
    assert [x.id for x in corpus["new"]] == ["zsre/00001/new", "zsre/00002/new"]
    assert {x.prompt for x in corpus["new"]} == {x.prompt for x in corpus["forget"]}


def test_what_is_no_update_is_left_out_and_neighbours_are_asked_once(tmp_path):
    same = record(9)["loc"]
    records = [
        record(1, loc=same),
        record(2, answers=["Bonn", "Kiel"]),  # two current answers
        record(3, alt="bonn "),  # nothing changes
        record(4, alt=""),
        record(5, answers=[]),
        record(6, loc=same),
    ]
    corpus = zsre(written(tmp_path, records))
    assert [x.id for x in corpus["forget"]] == ["zsre/00001/forget", "zsre/00006/forget"]
    assert [x.id for x in corpus["neighbour"]] == ["zsre/00001/neighbour"]
    assert len(zsre(written(tmp_path, records), limit=1)["forget"]) == 1
    with pytest.raises(BadCorpus, match="none of the 1 records holds one old answer and another new one"):
        zsre(written(tmp_path, records[1:2]))


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ([record(1), {"src": "Who?"}], r"record 2: no 'subject'; name zsRE's JSON file"),
        ([record(1, alt=7)], r"record 1: 'alt' must be text and is 7"),
        ([record(1, answers="Bonn")], r"record 1: 'answers' must be a list of texts and is 'Bonn'"),
        (["Bonn"], r"record 1: an object was expected, not 'Bonn'"),
        ([], "is no list of records"),
        ({"a": 1}, "is no list of records"),
    ],
)
def test_a_file_in_another_form_is_refused(tmp_path, records, match):
    with pytest.raises(BadCorpus, match=match):
        zsre(written(tmp_path, records))


def test_all_problems_together_but_not_too_many(tmp_path):
    with pytest.raises(BadCorpus) as raised:
        zsre(written(tmp_path, [{}] * 30))
    assert len(raised.value.problems) == 21 and raised.value.problems[-1] == "... and 10 more"


def test_no_file_no_json_no_sense(tmp_path):
    with pytest.raises(BadCorpus, match=r"absent\.json cannot be read: No such file"):
        zsre(tmp_path / "absent.json")
    bad = tmp_path / "bad.json"
    bad.write_text("{", encoding="utf-8")
    with pytest.raises(BadCorpus, match="is no JSON"):
        zsre(bad)
    with pytest.raises(BadCorpus, match="limit is -1"):
        zsre(bad, limit=-1)
