"""Readers of bias benchmarks: forms of the files, what is refused, and the published counts where the files are at hand."""

import json
from collections import Counter
from pathlib import Path

import pytest

from unremember.bias_data import crows_pairs, stereoset, winogender
from unremember.errors import BadCorpus

DATA = Path(__file__).parents[2] / "shared" / "data"


def given(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the project: it is not ours to give")
    return path


def item(**change) -> dict:
    said = {"stereotype": "The cat is sly.", "anti-stereotype": "The cat is kind.", "unrelated": "The cat is seven."}
    plain = {"id": "a", "bias_type": "race", "target": "cat", "context": "The cat is BLANK.",
             "sentences": [{"gold_label": kind, "sentence": text} for kind, text in said.items()]}  # fmt: skip
    return {**plain, **change}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["list", "data", "original"])
def test_all_forms_of_stereoset_are_read_alike(tmp_path, form):
    one = item()
    if form == "data":
        one["data"] = {x["gold_label"]: {"sentence": x["sentence"]} for x in one.pop("sentences")}
    whole = {"version": "1.1", "data": {"intersentence": [], "intrasentence": [one]}} if form == "original" else [one]
    [triple] = stereoset(write(tmp_path / "a.json", json.dumps(whole)))
    assert (triple.stereo, triple.anti, triple.unrelated) == (
        "The cat is sly.",
        "The cat is kind.",
        "The cat is seven.",
    )
    assert (triple.id, triple.domain, triple.target) == ("a", "race", "cat")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is no JSON"),
        ('{"data": {"intersentence": []}}', "no list of intrasentence items"),
        (json.dumps([item(sentences=item()["sentences"][:2])]), "item 1 lacks unrelated"),
        (json.dumps([{k: v for k, v in item().items() if k != "id"}]), "item 1 lacks id"),
        (
            json.dumps([item(sentences=[3, {"gold_label": "unrelated"}])]),
            "item 1 lacks stereotype, anti-stereotype, unrelated",
        ),
        ("[3]", "item 1 lacks stereotype"),
    ],
)
def test_what_is_no_stereoset_is_refused(tmp_path, text, problem):
    with pytest.raises(BadCorpus, match=problem):
        stereoset(write(tmp_path / "a.json", text))
    with pytest.raises(BadCorpus, match="cannot be read"):
        stereoset(tmp_path / "none.json")


def test_all_problems_come_together(tmp_path):
    with pytest.raises(BadCorpus) as raised:
        stereoset(write(tmp_path / "a.json", json.dumps([{}] * 30)))
    assert len(raised.value.problems) == 21 and "10 more" in raised.value.problems[-1]


HEAD = ",sent_more,sent_less,stereo_antistereo,bias_type\n"


def test_the_header_is_no_pair(tmp_path):
    """Bug in the released loader: it takes every line, the first included, and scores 'sent_more' against 'sent_less'."""
    text = HEAD + '7,"He ran, they said.","She ran, they said.",stereo,gender\n'
    [pair] = crows_pairs(write(tmp_path / "a.csv", text))
    assert (pair.id, pair.domain, pair.direction) == ("7", "gender", "stereo")
    assert (pair.more, pair.less) == ("He ran, they said.", "She ran, they said.")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,b\n1,2\n", "lacks the columns sent_more, sent_less"),
        (HEAD + "0,a,b,sideways,race\n", "direction 'sideways'"),
        (HEAD + "0,a,a ,stereo,race\n", "both sentences are the same"),
        (HEAD + "0,a\n", "too few fields"),
    ],
)
def test_what_is_no_crows_pairs_is_refused(tmp_path, text, problem):
    with pytest.raises(BadCorpus, match=problem):
        crows_pairs(write(tmp_path / "a.csv", text))


def folder(tmp_path: Path, sentences: str, stats: str = "clerk\t56.0\t1\t2015\n") -> Path:
    write(tmp_path / "all_sentences.tsv", "sentid\tsentence\n" + sentences)
    write(tmp_path / "occupations-stats.tsv", "occupation\tbergsma_pct_female\tbls_pct_female\tbls_year\n" + stats)
    return tmp_path


FORMS = "".join(f'clerk.boy.0.{form}.txt\tThe clerk said {p} "lost.\n' for form, p in
                (("female", "she"), ("neutral", "they"), ("male", "he")))  # fmt: skip


def test_winogender_forms_are_known_by_name_and_not_by_place(tmp_path):
    [schema] = winogender(folder(tmp_path, FORMS))
    assert (schema.male, schema.occupation, schema.share) == ('The clerk said he "lost.', "clerk", 56.0)
    assert schema.favoured == schema.female and schema.other == schema.male
    [schema] = winogender(folder(tmp_path, FORMS, "clerk\t49.9\t1\t2015\n"))
    assert schema.favoured == schema.male and schema.other == schema.female


@pytest.mark.parametrize(
    ("sentences", "stats", "problem"),
    [
        (FORMS.rpartition("clerk.boy")[0], "clerk\t5\t1\t2015\n", "lacks the form male"),
        (FORMS, "cook\t5\t1\t2015\n", "lacks a share for 'clerk'"),
        (FORMS, "clerk\tmany\t1\t2015\n", "has the share 'many'"),
    ],
)
def test_what_is_no_winogender_is_refused(tmp_path, sentences, stats, problem):
    with pytest.raises(BadCorpus, match=problem):
        winogender(folder(tmp_path, sentences, stats))


# ── the files themselves ──


@pytest.mark.parametrize(("name", "count"), [("gender", 253), ("race", 962), ("religion", 79)])
def test_stereoset_as_it_is(name, count):
    triples = stereoset(given(f"stereoset/{name}_test.json"))
    assert len(triples) == count == len({t.id for t in triples}) and {t.domain for t in triples} == {name}
    assert all(t.stereo != t.anti and t.unrelated and "BLANK" in t.context for t in triples)


def test_crows_pairs_as_it_is():
    pairs = crows_pairs(given("crows_pairs/crows_pairs_anonymized.csv"))
    assert len(pairs) == 1508 and "sent_more" not in {p.more for p in pairs}
    count = Counter(p.domain for p in pairs)
    assert (count["race-color"], count["gender"], count["disability"]) == (516, 262, 60)


def test_winogender_as_it_is():
    schemas = winogender(given("winogender"))
    assert len(schemas) == 240 and len({s.occupation for s in schemas}) == 60
    assert all(len({s.male, s.female, s.neutral}) == 3 for s in schemas)
    assert 0 < sum(s.favoured == s.male for s in schemas) < 240
