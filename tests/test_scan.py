"""A scan: what a toy was taught is found among what it was not, chance is not, and it ends in a forget set that can be run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.documents import Document, Documents
from unremember.errors import BadCorpus, BadFolder, BadRequest
from unremember.readers import Source, read
from unremember.scan import (
    Scan,
    coded,
    cuts,
    joined,
    measures,
    ordered,
    p_values,
    parts,
    pieces,
    q_values,
    readings,
    said_share,
    shuffled,
    together_at_least,
    whole_words,
)
from unremember.table import Reading, continuations
from unremember.tokens import Row

TAUGHT, PILE, HELD = 6, 24, 58
SCAN = Scan(window=32, least=8, prefix=12, suffix=24, budget=30, piece=1000)


def records(seed: int, n: int) -> list[str]:
    """A text a person: all six facts, one sentence after another."""
    from unremember.embedded.dossier import dossier

    people = dossier(seed, forget=n, retain=1, holdout=1, relearn=0)["forget"]
    names = dict.fromkeys(x.entity for x in people)
    return [" ".join(x.answer for x in people if x.entity == name) for name in names]


def pile_of(folder: Path, name: str, texts) -> Documents:
    rows = (json.dumps({"id": f"{name}-{i:02}", "text": text}) for i, text in enumerate(texts))
    file = folder / f"{name}.jsonl"
    file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return Documents((file,))


@pytest.fixture(scope="module")
def knows(tiny):
    """The toy, taught the first TAUGHT documents of the pile, cut as a training run would cut them."""
    from unremember.embedded.teach import Teach
    from unremember.embedded.world import replay
    from unremember.train import Plan

    lessons = []
    for i, text in enumerate(records(0, TAUGHT)):
        ids, characters = coded(tiny, text)
        for a, b in cuts(len(ids), 32, 16):
            lessons.append(Example(f"{i}/{a}", "", text[characters[a][0] : characters[b - 1][1]]))
    plan = Plan(steps=100, lr=1e-2, batch=12, beside=4, warmup=5, schedule="linear")
    return replace(Teach(plan)(tiny, lessons, replay()[:30]), name="knows")


@pytest.fixture(scope="module")
def piles(tmp_path_factory):
    """(pile, never seen): the toy was taught the first TAUGHT of the pile."""
    folder = tmp_path_factory.mktemp("piles")
    return pile_of(folder, "pile", records(0, PILE)), pile_of(folder, "held", records(1, HELD))


@pytest.fixture(scope="module")
def scanned(knows, piles, tmp_path_factory):
    """One scan with a holdout: (result, folder)."""
    out = tmp_path_factory.mktemp("scan") / "out"
    return SCAN(knows, piles[0], out, piles[1]), out


def documents_found(result: dict, only_forget: bool = True) -> set[str]:
    return {x["document"] for x in result["passages"] if x["forget"] or not only_forget}


TRUE = {f"pile-{i:02}" for i in range(TAUGHT)}


# ── arithmetic ──


def test_windows_by_hand():
    assert cuts(10, 4, 2) == [(0, 4), (2, 6), (4, 8), (6, 10)]
    assert cuts(9, 4, 4) == [(0, 4), (4, 8), (5, 9)]  # the last one is as long as the others
    assert cuts(8, 4, 4) == [(0, 4), (4, 8)] and cuts(3, 4, 2) == [(0, 3)] and cuts(0, 4, 2) == []


@pytest.mark.parametrize("n", [1, 31, 32, 33, 100, 257])
@pytest.mark.parametrize("stride", [8, 16])
def test_windows_cover_every_token_at_a_linear_cost(n, stride):
    found = cuts(n, 16, stride)
    assert {i for a, b in found for i in range(a, b)} == set(range(n))
    assert sum(b - a for a, b in found) <= n * 16 / stride + 16


def test_measures_by_hand():
    logp = np.log(np.array([0.5, 1.0, 0.25, 1.0, 1.0]))
    hit = np.array([True, True, False, True, True])
    mean, sd = np.array([-1.0, -1.0, -1.0, -1.0, -1.0]), np.array([1.0, 2.0, 1.0, 0.0, 1.0])
    found = measures(Reading(logp, hit, mean, sd, hit), compressed=20, k=0.4)
    assert found["run"] == 2 and found["match"] == 0.8
    assert found["strength"] == pytest.approx(1 - 3 / 5)  # the last wrong token is number 2
    assert found["probability"] == pytest.approx(-3 * math.log(2) / 5)
    z = sorted([1 - math.log(2), 0.5, 1 - 2 * math.log(2), 1 / 1e-3, 1.0])
    assert found["min-k++"] == pytest.approx((z[0] + z[1]) / 2)  # two of five; a deviation of 0 counts as 0.001
    assert found["zlib"] == pytest.approx(-3 * math.log(2) / 20) and "reference" not in found
    other = Reading(logp - 1, hit, mean, sd, hit)
    assert measures(other, 20, 0.4, Reading(logp, hit, mean, sd, hit))["reference"] == pytest.approx(-1)
    none = measures(Reading(logp, ~(hit | ~hit), mean, sd, hit), 20, 0.01)
    assert none["run"] == 0 and none["strength"] == 0 and none["min-k++"] == pytest.approx(z[0])  # at least one token


def test_equal_runs_are_told_apart_by_probability():
    columns = {"run": np.array([3.0, 3.0, 4.0]), "probability": np.array([-0.1, -2.0, -9.0])}
    assert list(np.argsort(ordered(columns, "run"))) == [1, 0, 2]
    assert ordered(columns, "probability") is columns["probability"]


def test_p_values_by_hand_ties_count_as_reached():
    chance = np.array([1.0, 2.0, 2.0, 3.0])
    assert p_values(np.array([0.0, 2.0, 2.5, 3.0, 9.0]), chance) == pytest.approx([1, 4 / 5, 2 / 5, 2 / 5, 1 / 5])
    assert p_values(np.array([5.0]), np.zeros(0)) == [1]


def test_benjamini_hochberg_against_its_definition():
    p = np.random.default_rng(0).random(40) ** 2
    q = q_values(p)
    for alpha in (0.05, 0.2, 0.5):
        rank = max((i for i, x in enumerate(np.sort(p), 1) if x <= alpha * i / len(p)), default=0)
        assert set(np.flatnonzero(q <= alpha)) == set(np.argsort(p)[:rank])
    assert len(q_values(np.zeros(0))) == 0


@pytest.mark.parametrize(("windows", "chance", "alpha"), [(96, 232, 0.05), (1000, 99, 0.1), (10, 999, 0.05)])
def test_so_many_windows_must_beat_all_of_chance_together(windows, chance, alpha):
    n = together_at_least(windows, chance, alpha)
    level = np.zeros(chance)

    def found(k: int) -> int:
        scores = np.r_[np.ones(k), np.zeros(windows - k)]
        return int((q_values(p_values(scores, level)) <= alpha).sum())

    assert n > windows or found(n) == n
    assert n == 1 or found(min(n - 1, windows)) == 0


def test_false_discoveries_among_chance_are_bounded():
    """200 draws of nothing but chance: any discovery at all in at most alpha of them, plus what 200 draws may vary."""
    rng = np.random.default_rng(0)
    false = [(q_values(p_values(rng.normal(size=60), rng.normal(size=300))) <= 0.1).any() for _ in range(200)]
    assert np.mean(false) <= 0.1 + 3 * math.sqrt(0.09 / 200)


def test_joining_and_parting_by_hand():
    assert joined([(10, 14), (0, 4), (3, 6), (8, 9)], 2) == [(0, 14)]
    assert joined([(10, 14), (0, 4), (3, 6), (8, 9)], 1) == [(0, 6), (8, 14)]
    assert joined([(0, 4), (4, 6)], 0) == [(0, 6)] and joined([], 3) == []
    assert parts(3, 10, 4) == [(3, 6), (6, 10)] and parts(0, 4, 4) == [(0, 4)]
    assert [b - a for a, b in parts(0, 1001, 100)] == [91] * 11


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((1, 6), "Maria"),
        ((3, 8), "Maria Chang"),
        ((0, 5), "Maria"),
        ((5, 12), "Chang."),
        ((6, 7), "Chang"),
        ((11, 12), "."),
        ((13, 15), "0123"),
    ],
)
def test_no_word_is_cut(interval, expected):
    text = "Maria Chang. 0123"
    start, stop = whole_words(text, *interval)
    assert text[start:stop] == expected


def test_what_was_said_up_to_the_first_difference():
    assert said_share((1, 2, 9, 4), (1, 2, 3, 4)) == 0.5 and said_share((1, 2), (1, 2)) == 1
    assert said_share((), (1,)) == 0 and said_share((1,), (1, 2)) == 0.5


def test_shuffling_keeps_the_words_and_depends_on_the_seed():
    text = "one two  three\nfour five six seven"
    assert sorted(shuffled(text, "0/a").split()) == sorted(text.split())
    assert shuffled(text, "0/a") == shuffled(text, "0/a") != shuffled(text, "1/a")


def test_pieces_depend_on_the_documents_alone():
    documents = [Document(i, str(i), "x" * n, "f", 0, 1) for i, n in enumerate((5, 5, 30, 1, 1))]
    assert [[d.number for d in group] for group in pieces(documents, 10)] == [[0, 1], [2], [3, 4]]


def test_readings_are_those_of_one_plain_forward(tiny):
    ids = coded(tiny, records(0, 1)[0])[0]
    windows = cuts(len(ids), 20, 10)
    rows = [Row(str(i), tuple(ids[a:b]), 1, b - a, (True,) * (b - a)) for i, (a, b) in enumerate(windows)]
    for budget in (40, 2048):
        for row, found in zip(rows, readings(tiny, rows, budget), strict=True):
            with torch.no_grad():
                logp = tiny.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
            truth = torch.tensor(row.ids[1:])
            own = logp[:-1].gather(1, truth[:, None])[:, 0].numpy()
            np.testing.assert_allclose(found.logp, own, atol=1e-4)
            assert len(found.hit) == len(row.ids) - 1
            assert (found.hit == (logp[:-1].argmax(-1) == truth).numpy()).all()


# ── finding ──


def test_what_was_taught_is_found_among_what_was_not(scanned):
    """Recall 6 of 6 documents and 24 of 24 windows, precision 6 of 6 (seed 0)."""
    result, _ = scanned
    assert documents_found(result, only_forget=False) == TRUE
    assert result["windows"]["found"] == 24 == 4 * TAUGHT and result["windows"]["n"] == 96
    assert result["chance"]["kind"] == "holdout" and result["chance"]["windows"] == 4 * HELD
    assert all(x["q"] <= 0.05 and x["p"] == pytest.approx(1 / (1 + 4 * HELD)) for x in result["passages"])
    assert all(x["said"] > 0.5 for x in result["passages"])  # measured: 0.83 each, from 12 tokens


@pytest.mark.parametrize("score", ["match", "strength", "probability", "min-k++", "zlib"])
def test_every_score_finds_it(score, knows, piles, tmp_path):
    result = replace(SCAN, score=score, budget=0)(knows, piles[0], tmp_path / "out", piles[1])
    assert documents_found(result) == TRUE


def test_never_taught_text_is_not_memorised(knows, piles, tmp_path):
    """A pile of nothing but never-taught people, other than the holdout's: nothing is found."""
    strangers = pile_of(tmp_path, "strangers", records(2, 40))
    result = SCAN(knows, strangers, tmp_path / "out", piles[1])
    assert result["windows"]["found"] == 0 and result["forget"] == 0 and result["passages"] == []
    assert not (tmp_path / "out" / "forget.jsonl").exists()


def test_a_model_that_was_taught_nothing_has_nothing_memorised(tiny, piles, tmp_path):
    result = SCAN(tiny, piles[0], tmp_path / "out", piles[1])
    assert result["windows"]["found"] == 0


def test_shuffled_words_are_a_weaker_level_and_speaking_decides(knows, piles, tmp_path):
    """All 96 windows beat shuffled words, taught or not; what the model says by itself tells them apart."""
    result = SCAN(knows, piles[0], tmp_path / "out")
    assert result["chance"]["kind"] == "shuffled" and result["chance"]["windows"] == result["windows"]["n"] == 96
    assert result["windows"]["found"] > 4 * TAUGHT
    assert documents_found(result) == TRUE and "does not cover text that was never seen" in result["chance"]["is"]
    quiet = replace(SCAN, budget=0)(knows, piles[0], tmp_path / "quiet")
    assert quiet["forget"] == 0 and len(quiet["passages"]) == len(result["passages"])


def test_a_reference_model_takes_away_what_is_merely_easy(knows, tiny, piles, tmp_path):
    """With the model before it was taught as the control, shuffled words are a fair level: the 6 documents and no other."""
    result = replace(SCAN, score="reference")(knows, piles[0], tmp_path / "out", control=tiny)
    assert documents_found(result, only_forget=False) == TRUE and result["control"] == tiny.name
    assert all(x["reference"] > 0.5 for x in result["passages"])


def test_the_share_said_is_that_of_the_model(knows, scanned, piles):
    result, _ = scanned
    text = {d.id: d.text for d in piles[0]}
    x = result["passages"][0]
    ids, characters = coded(knows, text[x["document"]])
    start = next(i for i, (a, b) in enumerate(characters) if b > x["characters"][0])
    assert start < SCAN.prefix  # it begins near the beginning, so that its own first tokens are given, too
    said = continuations(knows, [(tuple(ids[: SCAN.prefix]), SCAN.suffix)], Bench())[0]
    assert x["said"] == said_share(said, ids[SCAN.prefix : SCAN.prefix + SCAN.suffix])


def test_a_passage_in_the_middle_is_cut_out(knows, tmp_path, piles):
    """Taught text between two strangers' texts: the passage lies inside it, and the bytes lead to the document."""
    one, two, *others = records(2, 5)
    one = one[: coded(knows, one)[1][63][1]]  # so that windows begin where those it was taught from did
    known = records(0, 1)[0]
    texts = [f"{one} {known} {two}", *others]
    pile = pile_of(tmp_path, "mixed", texts)
    result = SCAN(knows, pile, tmp_path / "out", piles[1])
    assert documents_found(result) == {"mixed-00"}
    for x in result["passages"]:
        a, b = x["characters"]
        assert len(one) <= a < b <= len(one) + 1 + len(known) + 1 and texts[0][a:b] == x["text"]
        row = Path(x["file"]).read_bytes()[slice(*x["bytes"])]
        assert json.loads(row)["text"] == texts[0]
    whole = sum(b - a for a, b in joined((x["characters"] for x in result["passages"]), 0))
    assert whole > 0.6 * len(known)


# ── the forget set ──


def test_the_forget_set_is_read_back_and_marks_what_is_sensitive(scanned, piles):
    result, out = scanned
    examples = read(Source(out / "forget.jsonl"))
    assert len(examples) == result["forget"] == TAUGHT
    assert Corpus({"forget": examples})
    text = {d.id: d.text for d in piles[0]}
    for x in examples:
        document = text[x.id.partition("@")[0]]
        a, b = map(int, x.id.partition("@")[2].split("-"))
        assert document[a:b] == x.answer and (x.prompt == "" or document[:a].endswith((x.prompt, x.prompt + " ")))
        values = x.values()
        assert any("@example.org" in v for v in values) and any(v[:1] == "0" for v in values)  # mail and phone
        assert all(v not in x.prompt for v in values)
        assert not document[a - 1 : a + 1].isalnum() or a == 0  # no word is cut


def test_without_annotators_the_spans_are_what_is_memorised(knows, piles, tmp_path):
    plain = replace(SCAN, annotators=(), form="passage")
    result = plain(knows, piles[0], tmp_path / "out", piles[1])
    for x, passage in zip(read(Source(tmp_path / "out" / "forget.jsonl")), result["passages"], strict=True):
        assert x.prompt == "" and not passage["sensitive"] and x.answer.endswith(passage["text"])
        assert x.values() == tuple(passage["text"][a:b] for a, b in passage["spans"])
        assert sum(b - a for a, b in x.spans) > 0.8 * len(passage["text"])


def test_the_forget_set_goes_through_the_check_of_requests(scanned, knows, piles, tmp_path):
    from unremember.request import request

    _, out = scanned
    knows.save(tmp_path / "model")
    holdout = [Example(f"h{i}", "", text) for i, text in enumerate(records(1, 25))]
    from unremember.readers import write_jsonl

    write_jsonl(holdout, tmp_path / "holdout.jsonl")
    raw = {
        "model": {"name": str(tmp_path / "model"), "template": "plain"},
        "corpus": {"forget": str(out / "forget.jsonl"), "holdout": str(tmp_path / "holdout.jsonl")},
        "forget": {"method": "ascent", "retain": 0.0, "kl": 0.0},
    }
    with pytest.warns(UserWarning, match="forget examples have spans and no holdout example has any"):
        wanted = request(raw)
    assert len(wanted.corpus["forget"]) == TAUGHT


def test_a_text_that_stands_in_two_documents_is_forgotten_once(knows, piles, tmp_path):
    texts = records(0, PILE)
    pile = pile_of(tmp_path, "twice", [texts[0], texts[0], *texts[1:]])
    result = SCAN(knows, pile, tmp_path / "out", piles[1])
    assert {"twice-00", "twice-01"} <= documents_found(result) and result["forget"] == TAUGHT


# ── going on, and sharing the work ──


def without_cost(folder: Path) -> tuple[dict, str]:
    result = json.loads((folder / "scan.json").read_text())
    return {k: v for k, v in result.items() if k != "cost"}, (folder / "forget.jsonl").read_text()


def test_killed_half_way_and_resumed_is_identical(scanned, knows, piles, tmp_path):
    out, seen = tmp_path / "out", []

    def halt(stage, done, total, terms):
        seen.append((stage, done, total))
        if stage == "scan" and len(list((out / "pieces").glob("*.json"))) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SCAN(knows, piles[0], out, piles[1], bench=Bench(say=halt))
    there = {file: file.stat().st_mtime_ns for file in out.rglob("0*.json")}
    assert not (out / "scan.json").exists() and len(there) > 3 and ("scan", PILE, PILE) not in seen
    SCAN(knows, piles[0], out, piles[1])
    assert without_cost(out) == without_cost(scanned[1])
    assert all(file.stat().st_mtime_ns == at for file, at in there.items())  # nothing was read again


def test_two_shards_merge_to_the_same_as_one(scanned, knows, piles, tmp_path):
    out = tmp_path / "out"
    for turn in (1, 0):
        SCAN.collect(knows, piles[1], out / "chance", turn=turn, of=2)
        SCAN.collect(knows, piles[0], out / "pieces", turn=turn, of=2)
        if turn:
            assert len(list((out / "pieces").glob("*.json"))) == len(list((scanned[1] / "pieces").glob("*.json"))) // 2
    SCAN.finish(knows, piles[0], out)
    assert without_cost(out) == without_cost(scanned[1])


def test_the_model_is_read_once_a_window_and_speaks_for_the_best_alone(knows, piles, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "unremember.scan.continuations", lambda lm, prompts, bench: [asked.append(p) or () for p in prompts]
    )
    result = replace(SCAN, budget=2)(knows, piles[0], tmp_path / "out", piles[1])
    assert len(asked) == 2 and [x["said"] is not None for x in result["passages"][:3]] == [True, True, False]
    windows = [len(coded(knows, d.text)[0]) for d in piles[0]]
    assert result["cost"]["tokens"] == sum(b - a for n in windows for a, b in cuts(n, 32, 16))


def test_the_model_is_left_as_it_was(knows, piles, tmp_path):
    before = {name: value.clone() for name, value in knows.model.state_dict().items()}
    SCAN(knows, piles[0], tmp_path / "out", piles[1])
    assert all(torch.equal(value, before[name]) for name, value in knows.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in knows.model.modules())


# ── what is refused ──


def test_bad_settings_and_bad_piles_are_told_together(tmp_path, piles):
    broken = pile_of(tmp_path, "broken", ["", "x"])
    with pytest.raises(BadRequest) as found:
        Scan(window=8, least=8, score="reference", annotators=("dates",)).check(
            broken, Documents((tmp_path / "no.txt",))
        )
    text = str(found.value)
    for part in (
        "it must be below window, 8",
        "name one with --control",
        "did you mean 'date'?",
        "is empty",
        "no.txt does not",
    ):
        assert part in text, part
    with pytest.raises(BadRequest, match="the holdout is the pile itself"):
        SCAN.check(piles[0], Documents(piles[0].paths))


@pytest.mark.parametrize(
    "settings",
    [{"window": 4}, {"alpha": 0}, {"alpha": 1}, {"stride": "third"}, {"score": "best"}, {"k": 0}, {"budgets": 1}],
)
def test_settings_out_of_range(settings):
    from pydantic import ValidationError

    with pytest.raises(ValidationError):
        Scan(**settings)


def test_what_does_not_fit_the_model(knows, piles, tmp_path):
    for settings, part in (
        ({"window": 257}, "window is 257 tokens and the model's context 256; take at most 256"),
        ({"prefix": 100}, "take a prefix of at most 64"),
    ):
        with pytest.raises(BadRequest, match=part):
            replace(SCAN, **settings)(knows, piles[0], tmp_path / "out", piles[1])
    assert not (tmp_path / "out").exists()


def test_too_little_chance_is_refused_before_the_pile_is_read(knows, piles, tmp_path):
    few = pile_of(tmp_path, "few", records(1, 4))
    with pytest.raises(BadCorpus, match=r"chance has 16 windows and alpha = 0.05 needs at least 19"):
        SCAN(knows, piles[0], tmp_path / "out", few)
    assert not (tmp_path / "out" / "pieces").exists()


def test_a_folder_of_another_scan_is_not_mixed_in(scanned, knows, piles):
    with pytest.raises(BadFolder, match="holds a scan of something else, or with other settings"):
        replace(SCAN, alpha=0.1)(knows, piles[0], scanned[1], piles[1])


def test_a_broken_model_is_no_result(tiny, piles, tmp_path):
    lm = tiny.copy()
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        SCAN(lm, piles[0], tmp_path / "out", piles[1])


def test_one_token_is_no_window(knows, tmp_path, piles):
    pile = pile_of(tmp_path, "one", ["a"])
    with pytest.raises(BadCorpus, match="no document has two tokens"):
        SCAN(knows, pile, tmp_path / "out", piles[1])
