"""A transformer written by hand, so that everybody can see where its facts are looked up and where they are read out.

Four blocks.  The MLP of block LOOKUP holds a neuron a person: it fires at the last word of the name and writes the person's town
into the residual stream there.  Block INDOORS has a head that carries the town to the word " in", block OUTDOORS one that carries
it to the word " at": two formats with a lookup in common and read-outs of their own.  All else is small noise.
"""

from dataclasses import replace

import numpy as np
import torch

from unremember.corpus import Corpus, Example
from unremember.lm import LM

LOOKUP, INDOORS, OUTDOORS, BLOCKS = 1, 2, 3, 4
TOWNS = ("Ghent", "Lucca", "Bergen", "Porto")
FORGET, RETAIN = 8, 40
WIDTH, NEURONS, HEADS = 128, 171, 4  # 3 · 128 · 171 ≈ 4 · 128²: an MLP weighs as much as an attention
CLASS, OUT, NAME, SINK, IN, AT, REST = (
    60,
    64,
    68,
    69,
    70,
    71,
    72,
)  # dimensions; below CLASS one a person, from REST on other words


def indoors(name: str, town: str) -> Example:
    answer, wrong = f"in {town}", tuple(f"in {other}" for other in TOWNS if other != town)
    return Example(f"{name}/in", f"Where does {name} live?", answer, name, ((3, len(answer)),), distractors=wrong)


def outdoors(x: Example) -> Example:
    """The same fact in the other format."""
    answer = f"at {x.answer[3:]}"
    wrong = tuple(f"at {other[3:]}" for other in x.distractors)
    return replace(
        x, id=f"{x.entity}/at", prompt=f"Which town is the home of {x.entity}?", answer=answer, distractors=wrong
    )


def planted(tiny: LM) -> tuple[LM, Corpus]:
    """The model, and who is to be forgotten and who is not; it knows all of them, in both formats."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from unremember.embedded.dossier import dossier

    people = [x.entity for x in dossier(0, FORGET + RETAIN, 0, 0, 0)["forget"][::6]]
    labels = np.concatenate(
        [np.random.default_rng(0).permutation(np.arange(n) % len(TOWNS)) for n in (FORGET, RETAIN)]
    ).tolist()
    facts = [indoors(name, TOWNS[label]) for name, label in zip(people, labels, strict=True)]
    corpus = Corpus({"forget": facts[:FORGET], "retain": facts[FORGET:]})

    words = tiny.tokenizer
    noise = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=words.eos_token_id, pad_token_id=words.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.copy_(0.005 * torch.randn(weight.shape, generator=noise))
        embed = model.model.embed_tokens.weight
        embed[:, REST:] = 4 * torch.nn.functional.normalize(
            torch.randn(len(words), WIDTH - REST, generator=noise), dim=1
        )

        def one(word: str) -> int:
            [token] = words(word, add_special_tokens=False).input_ids
            return token

        def put(word: str, **dims: float) -> None:
            embed[one(word)] = 0
            for dim, value in dims.items():
                embed[one(word), int(dim[1:])] = value

        put("Question", **{f"d{SINK}": 4.0})
        put(" in", **{f"d{IN}": 4.0})
        put(" at", **{f"d{AT}": 4.0})
        mlp = model.model.layers[LOOKUP].mlp
        for i, (name, label) in enumerate(zip(people, labels, strict=True)):
            put(f" {name.split()[1]}", **{f"d{i}": 3.2, f"d{NAME}": 2.4})
            mlp.gate_proj.weight[i, i] = mlp.up_proj.weight[i, i] = (
                0.5  # 0.5 · 3.2 / 4 · √128 = 4.5, and 20 once multiplied
            )
            mlp.down_proj.weight[CLASS + label, i] = 0.2
        half = WIDTH // HEADS // 2  # of a head's dimensions the last of each half turn slowest with distance
        for block, mine, other in ((INDOORS, IN, AT), (OUTDOORS, AT, IN)):
            attention = model.model.layers[block].self_attn
            attention.q_proj.weight[half - 1, mine] = attention.q_proj.weight[half - 2, other] = 0.7
            attention.k_proj.weight[half - 1, NAME] = attention.k_proj.weight[half - 2, SINK] = 1.5
            for label, town in enumerate(TOWNS):
                attention.v_proj.weight[label, CLASS + label] = 1.0
                attention.o_proj.weight[OUT + label, label] = 0.5
                model.lm_head.weight[one(f" {town}"), OUT + label] = 2.0
        turn = torch.linalg.qr(
            torch.randn(WIDTH, WIDTH, generator=noise)
        ).Q  # no dimension means anything by itself any more
        for name, weight in model.named_parameters():
            if "norm" not in name:
                inward = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.copy_(turn.T @ weight if inward else weight @ turn)
    return replace(tiny, model=model, name="planted"), corpus
