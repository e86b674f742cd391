"""Rows and tries: what is packed scores as one row at a time does, with nothing twice and nothing lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unremember.corpus import Example
from unremember.errors import BadCorpus
from unremember.tokens import PLAIN, Row, count, fitting, joined, lanes, pack, packs, shares


def slow(lm, rows: list[Row]) -> list[torch.Tensor]:
    """Log-probability of each row's scored tokens the obvious way: eos to the right as padding, no tricks."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), lm.tokenizer.eos_token_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = torch.tensor(row.ids)
        mask[at, : len(row.ids)] = 1
    with torch.no_grad():
        logp = lm.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    return [
        torch.stack([logp[at, place - 1, row.ids[place]] for place in range(row.start, len(row.ids))])
        for at, row in enumerate(rows)
    ]


def fast(lm, grouped: list[list[Row]]) -> dict[str, torch.Tensor]:
    tokens = pack(grouped)
    with torch.no_grad():
        logp = lm.logp(tokens)
    return {key: logp[tokens.row == at] for at, key in enumerate(tokens.keys)}


@pytest.fixture(scope="module")
def rows(tiny, corpus):
    """Questions with their options (shared prefixes), passages (none) and very short answers."""
    make = tiny.template.row
    options = [
        make(f"{x.id}/{i}", x.prompt, a) for x in corpus["world"][:6] for i, a in enumerate((x.answer, *x.distractors))
    ]
    return [
        *options,
        *tiny.template.rows(corpus["prose"][:2]),
        *tiny.template.rows(corpus["forget"]),
        make("s", "Who?", "I"),
    ]


# ── what is scored ──


@pytest.mark.parametrize("width", [1, 40, 100, 256, 10_000])
def test_a_packed_batch_equals_one_forward_a_row(tiny, rows, width):
    packed = fast(tiny, lanes(rows, width))
    assert len(packed) == len(rows)
    for row, expected in zip(rows, slow(tiny, rows), strict=True):
        [alone] = slow(tiny, [row])
        torch.testing.assert_close(packed[row.key], expected, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(packed[row.key], alone, atol=2e-4, rtol=1e-4)


def test_shared_prefixes_take_one_place(tiny, rows):
    together = sum(pack([lane]).ids.shape[1] for lane in lanes(rows, 10_000))
    assert together < 0.6 * sum(len(row.ids) - 1 for row in rows)


def test_two_rows_with_the_same_text_are_two_rows(tiny):
    twice = [tiny.template.row(key, "Who?", "The cat.") for key in "ab"]
    packed = fast(tiny, [twice])
    assert torch.equal(packed["a"], packed["b"]) and len(packed["a"]) == 4  # The, cat, full stop, end


def test_a_row_that_begins_another_is_scored_alike(tiny):
    short, long = tiny.template.row("s", "", "The cat"), tiny.template.row("l", "", "The cat sat here.")
    packed = fast(tiny, [[short, long]])
    for row, expected in zip((short, long), slow(tiny, [short, long]), strict=True):
        torch.testing.assert_close(packed[row.key], expected, atol=2e-4, rtol=1e-4)


def test_every_row_scores_exactly_its_answer_and_its_end(tiny, rows):
    tokens = pack(lanes(rows, 256))
    by_key = {row.key: row for row in rows}
    assert sorted(tokens.keys) == sorted(by_key)
    for at, key in enumerate(tokens.keys):
        row, mine = by_key[key], tokens.row == at
        assert tuple(tokens.target[mine & tokens.answer].tolist()) == row.ids[row.start : row.stop]
        assert tokens.target[mine & tokens.end].tolist() == [tiny.tokenizer.eos_token_id]
        assert tuple(tokens.span[mine & tokens.answer].tolist()) == row.span
        assert not (tokens.span & tokens.end).any() and (tokens.answer ^ tokens.end)[mine].all()
    assert tokens.lengths("train").sum() == sum(len(row.ids) - row.start for row in rows)


def test_the_answer_decodes_to_the_answer(tiny, corpus):
    for x in (*corpus["forget"], *corpus["world"]):
        row = tiny.template.row(x.id, x.prompt, x.answer, x.spans)
        assert tiny.tokenizer.decode(row.ids[: row.start]) == PLAIN.format(prompt=x.prompt)
        assert tiny.tokenizer.decode(row.ids[row.start : row.stop]) == f" {x.answer}"


# ── spans ──


def test_spans_become_their_tokens(tiny, corpus):
    for x in corpus["forget"]:
        row = tiny.template.row(x.id, x.prompt, x.answer, x.spans)
        inside = [i for i, hit in zip(row.ids[row.start :], row.span, strict=False) if hit]
        assert tiny.tokenizer.decode(inside).strip() == x.values()[0]
        assert 0 < sum(row.span) < len(row.span)


@pytest.mark.parametrize(
    ("spans", "hit"),
    [
        ((), "111111"),  # none given: all of it
        (((0, 3),), "100000"),
        (((4, 5),), "010000"),  # half a word is a word
        (((3, 4),), "010000"),  # the space belongs to the word after it
        (((0, 3), (14, 16)), "100011"),
        (((0, 17),), "111111"),
    ],
)
def test_spans_by_hand(tiny, spans, hit):
    row = tiny.template.row("x", "Who?", "The cat is in 42.", spans)  # The| cat| is| in| 4|2|.
    assert "".join("01"[x] for x in row.span) == hit + ("1" if not spans or spans[-1][1] == 17 else "0")


# ── passages, end marks ──


def test_a_passage_starts_at_its_second_token(tiny):
    row = tiny.template.row("p", "", "The cat sat.")
    assert (row.start, len(row.ids)) == (1, 5) and len(row.span) == row.stop - row.start == 3
    [expected] = slow(tiny, [row])
    torch.testing.assert_close(fast(tiny, [[row]])["p"], expected, atol=2e-4, rtol=1e-4)
    assert len(expected) == 4


def test_an_end_mark_inside_a_text_is_scored_like_any_token(tiny):
    end = tiny.tokenizer.eos_token_id
    row = tiny.template.row("e", "Who?", "The<end> cat.")
    assert row.ids[row.start : row.stop].count(end) == 1 and row.ids.count(end) == 2
    tokens = pack(
        [[row], [tiny.template.row("longer", "", "The cat sat here and there and was not seen again by anyone.")]]
    )
    mine = tokens.row == 0
    assert (tokens.target[mine & tokens.answer] == end).sum() == 1
    packed = fast(tiny, [[row], [tiny.template.row("longer", "", "The cat " * 20)]])
    [alone] = slow(tiny, [row])  # alone nothing is padded: whatever happens to padding cannot happen here
    torch.testing.assert_close(packed["e"], alone, atol=2e-4, rtol=1e-4)


# ── refusals ──


def test_an_answer_without_a_token_to_score_is_refused(tiny):
    with pytest.raises(BadCorpus, match=r"'one'.*no token to score"):
        tiny.template.row("one", "", "The")
    with pytest.raises(BadCorpus, match=r"'none'.*no token to score"):
        tiny.template.row("none", "", "")
    assert tiny.template.row("two", "", "The cat").stop == 2


def test_a_row_longer_than_the_context_is_refused(tiny):
    x = Example("long", "Who?", "The cat sat.")
    exact = len(tiny.template.rows([x])[0].ids)
    assert tiny.template.rows([x], limit=exact)
    with pytest.raises(BadCorpus, match=rf"'long' is {exact} tokens long .* {exact - 1}"):
        tiny.template.rows([x], limit=exact - 1)


# ── counting and packing ──


def test_totals_are_those_of_the_whole_step(tiny, rows):
    half = rows[: len(rows) // 2]
    tokens = pack([half], "forget", (len(rows), count(rows)))
    assert tokens.rows == len(half) and tokens.step_rows == len(rows) and tokens.role == "forget"
    assert pack([half]).step_tokens == count(half)
    assert count(rows) == {k: count(half)[k] + count(rows[len(half) :])[k] for k in ("answer", "span", "train")}
    assert count(half) == {part: int(pack([half]).lengths(part).sum()) for part in ("answer", "span", "train")}


def test_per_row_sums_only_its_part(tiny):
    tokens = pack([[tiny.template.row("a", "Who?", "The cat.", [(4, 7)]), tiny.template.row("b", "", "The cat sat.")]])
    ones = torch.ones(len(tokens.row))
    assert tokens.keys == ("a", "b")
    assert tokens.per_row(ones, "answer").tolist() == [3, 3]
    assert tokens.per_row(ones, "span").tolist() == [1, 3]
    assert tokens.per_row(ones, "train").tolist() == [4, 4]


def test_a_silent_batch_scores_nothing(tiny):
    tokens = pack([[tiny.template.row("a", "Who?", "The cat.")]]).silent()
    broken = torch.full((len(tokens.row),), float("nan"))
    assert [tokens.per_row(broken, part).tolist() for part in ("answer", "span", "train")] == [[0], [0], [0]]


@st.composite
def some_rows(draw) -> list[Row]:
    """Rows over an alphabet of three, so that prefixes are often shared and rows often equal."""
    made = []
    for i, ids in enumerate(
        draw(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=30), min_size=1, max_size=25))
    ):
        start = draw(st.integers(1, len(ids) - 2))
        made.append(Row(str(i), tuple(ids), start, len(ids) - 1, (True,) * (len(ids) - 1 - start)))
    return made


@given(some_rows(), st.integers(1, 60))
def test_lanes_partition_the_rows_and_keep_their_width(rows, width):
    found = lanes(rows, width)
    assert sorted(row.key for lane in found for row in lane) == sorted(row.key for row in rows)
    for lane in found:
        assert pack([lane]).ids.shape[1] <= width or len(lane) == 1


@given(some_rows(), st.integers(1, 60))
def test_even_lanes_are_as_many_and_as_narrow_as_can_be(rows, width):
    """Against the slow way, all widths."""
    found = [lane for group in packs(rows, 10_000, width, even=True) for lane in group]
    narrowest = min(range(1, width + 1), key=lambda each: (len(lanes(rows, each)) > len(lanes(rows, width)), each))
    assert sorted(found, key=repr) == sorted(lanes(rows, narrowest), key=repr)


@given(some_rows(), st.integers(1, 4))
def test_shares_partition_the_rows(rows, count):
    """No share has more places than its part, half a row at either end, and what its first row shared with another."""
    found = shares(rows, count)
    assert len(found) == count and [row for share in found for row in share] == sorted(
        rows, key=lambda row: (row.ids, row.key)
    )
    whole, longest = pack([rows]).ids.shape[1], max(len(row.ids) - 1 for row in rows)
    for share in filter(None, found):
        assert pack([share]).ids.shape[1] <= whole / count + longest + len(share[0].ids) - 1


def test_shares_are_alike_in_places_and_not_in_rows():
    long = Row("long", (0, *range(1000, 1060), 0), 1, 61, (True,) * 60)
    short = [Row(str(i), (9, 100 + i, 200 + i, 300 + i, 0), 1, 4, (True,) * 3) for i in range(20)]
    assert shares([*short, long], 2) == [[long], short]
    assert shares([long, *short], 1) == [[long, *short]]
    assert shares([long], 3) == [[], [long], []]


@given(some_rows(), st.integers(1, 200), st.integers(1, 60))
def test_packs_partition_the_rows_and_keep_their_budget(rows, budget, width):
    groups = packs(rows, budget, width)
    assert sorted(row.key for group in groups for lane in group for row in lane) == sorted(row.key for row in rows)
    for group in groups:
        assert pack(group).ids.numel() <= budget or [len(lane) for lane in group] == [1]


@given(some_rows(), st.integers(1, 60), st.integers(1, 200))
def test_joined_batches_are_one_that_holds_them_all(rows, width, budget):
    """Every scored token keeps its row, its target, and the text that its source sees."""
    micros = [pack([lane]) for lane in lanes(rows, width)]
    groups = fitting([tuple(t.ids.shape) for t in micros], budget)
    assert [at for group in groups for at in group] == list(range(len(micros)))
    for places in groups:
        group = [micros[at] for at in places]
        whole = joined(group)
        assert whole.ids.numel() <= budget or len(group) == 1
        assert whole.keys == tuple(key for t in group for key in t.keys) and len(whole.row) == sum(
            len(t.row) for t in group
        )

        def told(t):
            flat, wide = t.ids.flatten(), t.ids.shape[1]
            for row, source, target in zip(t.row.tolist(), t.source.tolist(), t.target.tolist(), strict=True):
                lane, place = divmod(source, wide)
                seen = t.visible[lane, 0, place].nonzero()[:, 0]
                depth = t.positions[lane, seen].tolist()
                text = [int(flat[lane * wide + int(p)]) for p in seen[torch.tensor(depth).argsort()]]
                yield t.keys[row], target, depth, text

        assert list(told(whole)) == [x for t in group for x in told(t)]


@given(some_rows(), st.integers(1, 60))
def test_every_place_sees_exactly_its_own_ancestors(rows, width):
    """From any source, the visible places in order of depth spell the row up to there."""
    grouped = lanes(rows, width)
    tokens = pack(grouped)
    flat, wide = tokens.ids.flatten(), tokens.ids.shape[1]
    inside = [row for lane in grouped for row in lane]
    for number, row in enumerate(inside):
        sources = tokens.source[tokens.row == number].tolist()
        assert len(sources) == len(row.ids) - row.start
        for step, source in enumerate(sources):
            lane, place = divmod(source, wide)
            seen = tokens.visible[lane, 0, place].nonzero()[:, 0]
            seen = seen[tokens.positions[lane, seen].argsort()]
            assert tuple(flat[lane * wide + seen].tolist()) == row.ids[: row.start + step]
            assert tokens.positions[lane, seen].tolist() == list(range(row.start + step))
