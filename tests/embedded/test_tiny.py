"""The tiny model: every text comes back as it went in, and it knows the world list that it is measured by."""

import numpy as np
import pytest
import torch

from unremember.embedded.dossier import PEOPLE, dossier, lessons
from unremember.embedded.prose import prose
from unremember.embedded.tiny import END, UNKNOWN, tokenizer
from unremember.embedded.tiny import tiny as tiny_folder
from unremember.embedded.world import replay, world
from unremember.folder import MARK, cache
from unremember.table import read
from unremember.tokens import PLAIN

STRANGE = "  Zürich … naïve ☃ 😀\n\tx_1  y__c 1,234.5! O'Neill-Smith's <b> ab\u00a0cd ﬁ \r\n" + "q" * 500


@pytest.fixture(scope="module")
def words(tiny):
    return tiny.tokenizer


def everything():
    """All the text there is, of dossiers that the vocabulary was made from and of one that it was not."""
    for seed in (0, 3, 77):
        for x in lessons(dossier(seed, PEOPLE, 0, 0, 0), ("forget",), 3):
            yield from (PLAIN.format(prompt=x.prompt), f" {x.answer}", *x.paraphrases, x.rewording, *x.distractors)
    for x in (*world(), *replay(), *prose()):
        yield from (x.prompt or x.answer, x.answer, *x.distractors)
    yield from (STRANGE, " ", "\n")


def test_every_text_comes_back_as_it_went_in(words):
    texts = list(everything())
    assert words.batch_decode(words(texts).input_ids) == texts


def test_every_text_has_tokens_and_none_is_unknown(words):
    for ids in words([*everything()]).input_ids:
        assert ids and words.unk_token_id not in ids and words.eos_token_id not in ids


def test_the_dossier_is_word_by_word(words):
    # a word or a sign each, and digits one by one; the space belongs to what follows
    assert words.tokenize(" 014-2759.") == ["Ġ0", "1", "4", "-", "2", "7", "5", "9", "."]
    assert words.tokenize(" walnut.comet@example.org.") == ["Ġwalnut", ".", "comet", "@", "example", ".", "org", "."]
    assert words.tokenize(" 9") == ["Ġ9"] and words.convert_tokens_to_ids("Ġ9") != words.unk_token_id


def test_offsets_are_those_of_the_characters(words):
    for text in (PLAIN.format(prompt="Where was she born?"), STRANGE, " 014-2759."):
        coded = words(text, return_offsets_mapping=True)
        ends = 0
        for token, (begin, end) in zip(coded.input_ids, coded.offset_mapping, strict=True):
            assert begin <= ends <= end and begin < end  # nothing is skipped; bytes of one character share it
            piece = words.decode([token])
            assert text[begin:end] == piece or "\ufffd" in piece
            ends = end
        assert ends == len(text)


def test_it_is_a_plain_checkpoint_of_its_own(tiny, words):
    folder = tiny_folder()
    assert folder.parent == cache() / "models" and (folder / MARK).exists() and (folder / "model.safetensors").exists()
    assert not words.chat_template and (words.eos_token, words.unk_token) == (END, UNKNOWN)
    made = tokenizer()
    assert made.get_vocab() == words.get_vocab() and words("").input_ids == []
    assert sum(w.numel() for w in tiny.model.parameters()) < 400_000 and tiny.limit == 256


def test_later_calls_make_nothing_and_leave_chance_alone(tiny):
    before = {p: p.stat().st_mtime_ns for p in tiny_folder().rglob("*")}
    chance, threads = torch.random.get_rng_state(), torch.get_num_threads()
    assert {p: p.stat().st_mtime_ns for p in tiny_folder().rglob("*")} == before
    assert torch.equal(torch.random.get_rng_state(), chance) and torch.get_num_threads() == threads


def test_it_knows_the_world_by_the_options(tiny):
    rows = [
        tiny.template.row(f"{x.id}/{i}", x.prompt, a) for x in world() for i, a in enumerate((x.answer, *x.distractors))
    ]
    best = np.array([x.logp.sum() for x in read(tiny, rows)]).reshape(-1, 4).argmax(1)
    assert np.mean(best == 0) >= 0.9


def test_it_knows_nobody_of_the_dossier(tiny, corpus):
    readings = read(tiny, tiny.template.rows(corpus.of("forget", "retain", "holdout")))
    assert np.mean([x.likelihood("span") for x in readings]) < 0.001
