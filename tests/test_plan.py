"""The paper plan: its arithmetic by hand on a tiny shape, published sizes, and what must rise when something does."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from benchmarks.plan import (
    A100,
    EIGHT_GPUS,
    LLAMA_2_7B,
    LLAMA_31_8B,
    LLAMA_31_70B,
    LLAMA_32_1B,
    ONE,
    SMOLLM2_135M,
    Machine,
    Settings,
    Shape,
    activations,
    communicated,
    copies,
    fewest,
    fits,
    kept,
    main,
    memory,
    moved,
    moving,
    named,
    operations,
    parameters,
    passed,
    references,
    seconds,
    speaking,
    total,
)

TINY = Shape("tiny", layers=2, hidden=8, heads=2, kv=1, inner=16, vocab=10)
ALONE = Machine("", flops=1000.0, memory=1e5, bandwidth=100.0, link=10.0, matrix=0.5, stream=0.5, wire=0.5, usable=1.0)
PAIR = replace(ALONE, count=2)
AS_IT_IS = Settings("", micro=4, step=8, lane=4, scored=0.5)
LORA, DOWN = (replace(AS_IT_IS, moves=moves, rank=2) for moves in ("lora", "down"))


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        (SMOLLM2_135M, 134_515_008),
        (LLAMA_32_1B, 1_235_814_400),
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_31_8B, 8_030_261_248),
        (LLAMA_31_70B, 70_553_706_496),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_published_sizes(shape, count):
    assert total(shape) == count


def test_parameters_by_hand():
    assert parameters(TINY) == {"embedding": 80, "attention": 2 * 192, "MLP": 2 * 384, "norms": 5 * 8, "head": 80}
    assert total(replace(TINY, tied=True)) == total(TINY) - 80 == 1272


def test_moving_by_hand():
    assert moving(TINY, AS_IT_IS) == 1352
    assert moving(TINY, LORA) == 2 * 2 * (16 + 12 + 12 + 16 + 3 * 24)
    assert moving(LLAMA_2_7B, Settings("", "lora", rank=16)) == 39_976_960  # what peft prints for rank 16, all-linear
    assert moving(TINY, DOWN) == 128  # one block of two lies below
    assert moving(LLAMA_2_7B, Settings("", "down")) == 3 * 4096 * 11_008


def test_memory_by_hand():
    assert memory(TINY, ALONE, AS_IT_IS) == {
        "weights": 1352 * 4,
        "beside": 1352 * 4,
        "copies": 2 * (2 * 576 + 80),
        "gathered": 0,
        "gradients": 1352 * 4,
        "moments": 1352 * 8,
        "activations": 4 * 2 * (34 * 8 + 8 * 16),
        "logits": 2 * 10 * 6,
        "passing": 80 * 6,
    }
    assert activations(TINY, replace(AS_IT_IS, checkpointed=True)) == 4 * (2 * 4 * 8 + 400)
    assert kept(TINY, replace(AS_IT_IS, score=2)) == 400 + 2 * 2 * 4
    assert memory(TINY, ALONE, replace(AS_IT_IS, optimiser="sgd"))["moments"] == 0


def test_memory_of_what_is_frozen_by_hand():
    found = memory(TINY, ALONE, replace(LORA, frozen=2))
    assert found["weights"] == 512 * 4 + 2 * 576 * 2 + 200 * 4 and found["copies"] == 2 * 80
    assert found["gradients"] == 512 * 4 and found["moments"] == 512 * 8
    found = memory(TINY, ALONE, DOWN)
    assert found["weights"] == 1352 * 4 and found["copies"] == 2 * 576 and found["logits"] == 0
    assert found["activations"] == 4 * 400  # one block


def test_what_is_there_of_the_original_by_hand():
    assert memory(TINY, ALONE, replace(AS_IT_IS, beside=0))["beside"] == 0
    for s, moves in ((LORA, 512), (DOWN, 128)):  # what does not move is shared on one GPU
        assert memory(TINY, ALONE, replace(s, beside=0))["beside"] == 4 * moves
        assert memory(TINY, PAIR, s)["beside"] == 4 * 1352
        assert memory(TINY, PAIR, replace(s, beside=0))["beside"] == 0
    for cases, many in ((ONE, False), (EIGHT_GPUS, True)):
        for s in (s for s in cases if s.name.endswith("as it is")):
            assert s.beside == (4 if many or s.moves == "all" else 0)


def test_memory_of_two_by_hand():
    alone, two = memory(TINY, ALONE, AS_IT_IS), memory(TINY, PAIR, AS_IT_IS)
    for name in ("weights", "gradients", "moments"):
        assert two[name] == alone[name] / 2
    for name in ("beside", "activations", "logits"):
        assert two[name] == alone[name]
    assert two["copies"] == 2 * 80  # of the head alone, which is not gathered in bf16
    assert two["gathered"] == 2 * 2 * 576 + 4 * 200 + 10 * 576 + 4 * 200  # blocks, root, gradients of both
    whole = memory(TINY, PAIR, replace(AS_IT_IS, policy=False))
    assert (
        memory(TINY, PAIR, replace(DOWN, policy=True))["gathered"] == 2 * 576 + 4 * 200 + 10 * 128
    )  # one block of two
    deep = replace(TINY, layers=5)
    less, more = (memory(deep, PAIR, replace(AS_IT_IS, checkpointed=x))["gathered"] for x in (True, False))
    assert more - less == 3 * 2 * 576
    lower = replace(deep, layers=20)  # RMU looks at block 6 and moves three
    assert memory(lower, PAIR, DOWN)["gathered"] == 3 * 2 * 576 + 4 * 488 + 10 * 128
    assert whole["copies"] == alone["copies"] and whole["gathered"] == 2 * 4 * (2 * 576 + 200)


def test_a_pass_of_rmu_ends_at_its_block():
    assert passed(TINY, DOWN) == 1 and passed(TINY, AS_IT_IS) == 2
    assert activations(TINY, DOWN) == activations(TINY, AS_IT_IS) / 2
    assert copies(TINY, ALONE, DOWN) == 2 * 576 and copies(TINY, PAIR, DOWN) == 0


def test_operations_by_hand():
    block = 2 * 576 + 4 * 8 * 4
    assert operations(TINY, ALONE, AS_IT_IS) == 8 * 2 * 3 * block + 4 * 3 * 2 * 80
    assert operations(TINY, ALONE, replace(AS_IT_IS, checkpointed=True)) == 8 * 2 * 4 * block + 4 * 3 * 2 * 80
    attention = 4 * 8 * 4
    assert operations(TINY, ALONE, LORA) == 8 * (2 * (2 * block + attention) + 6 * 512) + 4 * 2 * 2 * 80
    assert operations(TINY, ALONE, DOWN) == 8 * (2 * block + attention + 2 * 128)


def test_bytes_moved_by_hand():
    update, sums, cast = 1352 * (16 + 16), 2 * 1352 * 18, 6 * (2 * 576 + 80)
    flow, loss = 8 * 4 * 400 * 2 * 3, 3 * 6 * 4 * 10
    assert moved(TINY, ALONE, AS_IT_IS) == update + sums + cast + flow + loss
    # copies that are not kept are made in both passes, and a checkpointed block is computed again
    less = replace(AS_IT_IS, cached=False, checkpointed=True)
    assert moved(TINY, ALONE, less) == update + sums + 4 * cast + flow * 4 / 3 + loss
    # sharded, blocks are there in bf16, and the head is cast at the one pass of its own
    assert moved(TINY, PAIR, AS_IT_IS) == update / 2 + sums / 2 + 6 * 80 + (flow + loss) / 2


def test_communication_by_hand():
    assert communicated(TINY, ALONE, AS_IT_IS) == 0
    one_pass = 2 * 576 * 2 + 200 * 4 + 1152 * 2 + 200 * 4  # blocks in bf16, the root, the gradients of both
    assert communicated(TINY, PAIR, AS_IT_IS) == one_pass / 2
    assert communicated(TINY, PAIR, replace(AS_IT_IS, checkpointed=True)) == (one_pass + 2 * 576 * 2) / 2
    assert communicated(TINY, PAIR, replace(AS_IT_IS, micro=1)) == 4 * one_pass / 2
    assert communicated(TINY, PAIR, LORA) == (2 * 576 * 2 + 200 * 4 + 512 * 2) / 2
    assert communicated(TINY, PAIR, replace(LORA, policy=False)) == (2 * 576 * 4 + 200 * 4 + 512 * 4) / 2


def test_seconds_by_hand():
    found = seconds(TINY, PAIR, AS_IT_IS)
    terms = operations(TINY, PAIR, AS_IT_IS) / 500, moved(TINY, PAIR, AS_IT_IS) / 50, 3104 / 5
    assert tuple(found[k] for k in ("products", "streams", "links")) == pytest.approx(terms)
    assert found["step"] == pytest.approx(sum(terms)) and found["hidden"] == pytest.approx(
        max(sum(terms[:2]), terms[2])
    )


def test_what_is_kept_of_the_original_and_what_generating_takes():
    assert references(TINY, tokens=7, rows=3) == {"NPO": 24, "KL": 140, "RMU": 224}
    found = speaking(TINY, models=2, batch=3, length=5)
    assert found == {"weights": 2 * 4 * 1352, "lowered": 2 * 2 * 576, "cache": 4 * 3 * 5 * 2 * 4}


def test_what_fits_as_it_is():
    fitting = {s.moves for s in ONE if s.name.endswith("as it is") and fits(LLAMA_2_7B, A100, s)}
    assert fitting == {"lora", "down"}
    assert not any(fits(LLAMA_31_70B, replace(A100, count=8), s) for s in EIGHT_GPUS if s.name.endswith("as it is"))


def test_fewest_gpus():
    need = sum(memory(TINY, ALONE, AS_IT_IS).values())
    assert fewest(TINY, replace(ALONE, memory=need), AS_IT_IS) == 1
    n = fewest(LLAMA_31_70B, A100, EIGHT_GPUS[3])
    assert fits(LLAMA_31_70B, replace(A100, count=n), EIGHT_GPUS[3])
    assert not fits(LLAMA_31_70B, replace(A100, count=n - 1), EIGHT_GPUS[3])
    assert fewest(TINY, replace(ALONE, memory=1.0), AS_IT_IS, most=3) is None


@pytest.mark.parametrize("s", [*ONE, *EIGHT_GPUS], ids=lambda s: f"{s.moves} {s.optimiser} {s.name}")
@pytest.mark.parametrize("count", [1, 8])
def test_more_costs_more_and_sharing_costs_less(s, count):
    machine = replace(A100, count=count)
    for shape in (SMOLLM2_135M, LLAMA_2_7B, LLAMA_31_70B):
        longer, wider = replace(s, step=2 * s.step), replace(s, micro=2 * s.micro)
        assert operations(shape, machine, longer) == pytest.approx(2 * operations(shape, machine, s))
        assert moved(shape, machine, longer) > moved(shape, machine, s)
        assert seconds(shape, machine, longer)["step"] > seconds(shape, machine, s)["step"]
        assert memory(shape, machine, longer) == memory(shape, machine, s)
        assert sum(memory(shape, machine, wider).values()) > sum(memory(shape, machine, s).values())
        assert communicated(shape, machine, wider) <= communicated(shape, machine, s)
        double = replace(machine, count=2 * count)
        assert operations(shape, double, s) == pytest.approx(operations(shape, machine, s) / 2)
        for name in ("weights", "gradients", "moments"):
            assert memory(shape, double, s)[name] == memory(shape, machine, s)[name] / 2


def test_every_change_of_a_ladder_needs_no_more_memory_but_for_the_wider_pass():
    for shape, machine, cases in ((LLAMA_2_7B, A100, ONE), (LLAMA_31_70B, replace(A100, count=8), EIGHT_GPUS)):
        for before, after in pairwise(cases):
            if after.name.startswith("+"):
                need = [sum(memory(shape, machine, s).values()) for s in (before, after)]
                assert need[1] <= need[0], after
        assert all(named(s, cases).startswith("**") for s in cases)


def saved(blocks: int, places: int, how: str) -> int:
    """Bytes of every storage that a forward pass of a small model keeps for its backward pass."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval().to(torch.bfloat16 if how == "bf16" else torch.float32)
    if how == "lora":
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, adapter).eval()
    mask = torch.zeros(1, 1, places, places, dtype=torch.bfloat16)
    found: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        found[x.untyped_storage().data_ptr()] = x
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=how != "bf16"),
    ):
        ids = torch.zeros(1, places, dtype=torch.long)
        out = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert out.requires_grad
    return sum(x.untyped_storage().nbytes() for x in found.values())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("how", ["autocast", "bf16", "lora"])
def test_what_a_block_keeps_is_what_torch_keeps(how):
    """The difference of two lengths and of two depths, with torch's fused attention: weights and ends fall out."""
    s = Settings("", moves="lora" if how == "lora" else "all", weight=2 if how == "bf16" else 4)
    shape = Shape("", 3, hidden=64, heads=4, kv=2, inner=96, vocab=32)
    short, long = (saved(3, places, how) - saved(2, places, how) for places in (16, 32))
    small = 2 * 4 + 4 * 4  # a float32 number a place of each norm, and one of each head
    small += 7 * 2 * 2 if how == "lora" else 0  # what the adapter's seven pairs hand on, two wide
    assert (long - short) / 16 == kept(shape, s) + small
    # what does not grow with the places: bf16 copies of weights, also of those that do not move
    assert 2 * short - long >= 2 * shape.block


def test_the_page_has_the_tables_as_they_are_printed(capsys):
    main()
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("|") and line not in page] == []
