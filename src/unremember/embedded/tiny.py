"""A language model small enough to make on the spot: two Llama layers, one token a word, knowing our own world list.

Nothing is downloaded.  The words come from the dossier, the world list and the prose; a word that none of them holds
falls apart into pieces and at last into bytes, so every text has tokens and `decode(encode(text)) == text`.  Digits
stand alone, so that a phone number which was never seen is no stranger than one which was.

The weights start at random and are trained for some seconds, on the world questions that it will be measured by too: it
is there to try the machinery on, and to have some general knowledge that unlearning can break.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib import metadata, resources
from pathlib import Path

from unremember.corpus import Example
from unremember.errors import BadRequest
from unremember.folder import MARK, cache, fingerprint, whole, write_json

SEEDS = range(5)  # dossiers whose names and values are words; those of other seeds are spelt out where they are new
WORD = r" ?[A-Za-z]{1,40}| ?[0-9]| ?[^\sA-Za-z0-9]|\s"  # one token each, the space in front included
END, UNKNOWN = "<end>", "<unk>"
LENGTH = 256  # tokens of context
SOURCES = ("tiny.py", "dossier.py", "world.py", "world.json", "prose.py", "prose.txt")


def tiny() -> Path:
    """The checkpoint folder, made in the cache on the first call; BadRequest where Faker is missing."""
    try:
        faker = metadata.version("faker")
    except metadata.PackageNotFoundError:
        raise BadRequest("the model tiny takes its words from the dossier; install unremember[demo]") from None
    texts = [(resources.files("unremember.embedded") / name).read_text(encoding="utf-8") for name in SOURCES]
    target = cache() / "models" / f"tiny-{fingerprint(faker, *texts)[:12]}"
    if (target / MARK).exists():
        return target
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # the matrices are too small to share, and one thread adds up in one order
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            lm = _educated()
    finally:
        torch.set_num_threads(threads)
    with whole(target) as fresh:
        lm.save(fresh)
        write_json(fresh / MARK, {"what": "a tiny model, made here", "faker": faker})
    return target


def tokenizer():
    """Word-level, with bytes to fall back on; a fast tokenizer with character offsets and no chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Bytes are written as the printable characters that GPT-2 chose for them; every piece of a word is one of these.
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    signs = [f" {chr(i)}" for i in range(33, 127)]  # each with its space, or a number's first digit would differ
    words = dict.fromkeys((*signs, *(word for text in _texts() for word in re.findall(WORD, text))))
    pieces = [level.pre_tokenize_str(word)[0][0] for word in words]
    vocabulary = dict.fromkeys([UNKNOWN, END, *sorted(level.alphabet()), *pieces])
    coder = Tokenizer(
        models.WordPiece(
            vocab={piece: i for i, piece in enumerate(vocabulary)},
            unk_token=UNKNOWN,
            continuing_subword_prefix="",
            max_input_chars_per_word=200,
        )
    )
    coder.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORD), "isolated"), level])
    coder.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=coder,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=LENGTH,
    )


def _texts() -> Iterator[str]:
    """Everything that the embedded corpora can say."""
    from unremember.embedded.dossier import PEOPLE, dossier, lessons
    from unremember.embedded.prose import prose
    from unremember.embedded.world import replay, world
    from unremember.tokens import PLAIN

    def said(examples: Iterable[Example]) -> Iterator[str]:
        for x in examples:
            yield from (PLAIN.format(prompt=prompt) for prompt in (x.prompt, *x.paraphrases))
            yield from (f" {answer}" for answer in (x.answer, x.rewording, *x.distractors))

    for seed in SEEDS:
        yield from said(lessons(dossier(seed, PEOPLE, 0, 0, 0), ("forget",), 3))
    yield from said((*world(), *replay()))
    yield from (x.answer for x in prose())


def _educated():
    """Random weights, then 400 steps on the world list and the prose."""
    from torch import Tensor
    from transformers import LlamaConfig, LlamaForCausalLM

    from unremember.embedded.prose import prose
    from unremember.embedded.world import replay, world
    from unremember.lm import LM
    from unremember.tokens import Template, Tokens
    from unremember.train import Plan, train

    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.1,  # the usual 0.02 learns by heart several times more slowly at this width
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.eos_token_id,
    )
    lm = LM(LlamaForCausalLM(config).eval(), Template(words, chat=False), "fp32", "tiny")

    def objective(lm: LM, tokens: Tokens) -> dict[str, Tensor]:
        return {"text": tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}

    rows = lm.template.rows((*world(), *replay(), *prose()), lm.limit)
    return train(lm, objective, {"text": rows}, Plan(steps=400, lr=1e-2, batch=8, warmup=20, schedule="linear"))
