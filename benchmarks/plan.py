"""`python -m benchmarks.plan`: what forgetting takes on 7B and 70B models, on paper, without torch or a GPU.

    step = operations / (peak · share)  +  bytes moved outside of matrix products / (bandwidth · share)
         + bytes over the links / (link · share)

A sum, because these are different kernels that a step runs one after another.  Inside a matrix product the larger of
the two counts, and that is the operations wherever a micro-batch has more places than peak / bandwidth (153 on an A100,
295 on an H100).  `hidden` is the same with communication wholly behind the rest: what prefetching could give at best.

Counted for Llama-like blocks as transformers writes them, GB are 10^9 bytes, everything is a GPU's own share.  Nothing
here was measured on a GPU.  Places are tokens of a packed micro-batch, moving weights those that the method may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

STREAM = 4  # bytes that a block's element-wise kernels move for each byte that it keeps, forward; twice that backward
LOGIT = 6  # bytes a logit at the peak: in bf16 itself, its gradient, and a copy of that on its way (a term in `kl`: 20)
RMU_BLOCKS, RMU_DEPTH = 3, 0.3  # blocks whose down-projections move, and the default depth of the last one
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A Llama-like model.  kv: key-value heads.  inner: width of the MLP.  tied: head and embedding are one matrix."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv: int
    inner: int
    vocab: int
    tied: bool = False

    @property
    def narrow(self) -> int:
        """Width of keys and of values."""
        return self.kv * self.hidden // self.heads

    @property
    def block(self) -> int:
        """Weights in the seven matrices of a block."""
        return 2 * self.hidden * (self.hidden + self.narrow) + 3 * self.hidden * self.inner

    @property
    def head(self) -> int:
        """Weights of the head, tied or not."""
        return self.vocab * self.hidden


# From the config.json that each is published with.
SMOLLM2_135M = Shape("SmolLM2-135M", 30, 576, 9, 3, 1536, 49_152, tied=True)
LLAMA_32_1B = Shape("Llama-3.2-1B", 16, 2048, 32, 8, 8192, 128_256, tied=True)
LLAMA_2_7B = Shape("Llama-2-7B", 32, 4096, 32, 32, 11_008, 32_000)
LLAMA_31_8B = Shape("Llama-3.1-8B", 32, 4096, 32, 8, 14_336, 128_256)
LLAMA_31_70B = Shape("Llama-3.1-70B", 80, 8192, 64, 8, 28_672, 128_256)


@dataclass(frozen=True)
class Machine:
    """`count` equal GPUs.  flops: dense bf16 matrix products, FLOP/s.  memory: bytes.  bandwidth: of it, bytes/s.

    link: bytes/s in one direction, while as many go in the other.  All of one GPU, from the vendor's data sheet.
    matrix, stream, wire: achievable shares of flops, bandwidth and link.  usable: share of the memory that the driver's
    context and fragmentation leave us.  These four are assumed.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    count: int = 1
    matrix: float = 0.6
    stream: float = 0.7
    wire: float = 0.7
    usable: float = 0.95


A100 = Machine("A100 SXM 80 GB", 312e12, 80e9, 2.039e12, 300e9)  # NVLink: 600 GB/s both directions together
H100 = Machine("H100 SXM 80 GB", 989e12, 80e9, 3.35e12, 450e9)  # NVLink: 900 GB/s


@dataclass(frozen=True)
class Settings:
    """What is trained and how it is held; the defaults are the code as it is.

    moves: 'all' weights, a 'lora' adapter of `rank` on every matrix of the blocks, or RMU's 'down' projections.
    weight, frozen, moment: bytes of a moving weight (its gradient has as many), of a frozen one in a block's matrices
    (embedding, head and norms stay float32), and of one of AdamW's two moments.
    beside: bytes a parameter of further whole models on each GPU: 4 for the original in float32, 0 for none.  `train`
    shares with it what does not move, on one GPU: with 0 the original of what does is still there.
    cached: autocast's bf16 copies of all matrices are there at once; else those of one block, cast at every pass.
    policy: sharded blocks are gathered in bf16 (FSDP2's MixedPrecisionPolicy) and not in float32; the root never is.
    checkpointed: a block keeps its input alone and is computed again on the way back; sharded, it is gathered again, too.
    micro: places in one pass of one GPU.  step: places a step, all GPUs.  lane: places that attend to one another.
    scored: share of places whose logits are wanted.  score: bytes kept an attention score, 0 in a fused kernel.
    """

    name: str
    moves: Literal["all", "lora", "down"] = "all"
    rank: int = 16
    optimiser: Literal["adamw", "sgd"] = "adamw"
    weight: int = 4
    frozen: int = 4
    moment: int = 4
    beside: int = 4
    cached: bool = True
    policy: bool = True
    checkpointed: bool = False
    micro: int = 2048
    step: int = 8192
    lane: int = 256
    scored: float = 0.25
    score: int = 0


def parameters(shape: Shape) -> dict[str, int]:
    """How many weights each component has; a tied head has none of its own."""
    narrow, wide = shape.hidden * shape.narrow, shape.hidden * shape.hidden
    return {
        "embedding": shape.head,
        "attention": shape.layers * 2 * (wide + narrow),
        "MLP": shape.layers * 3 * shape.hidden * shape.inner,
        "norms": (2 * shape.layers + 1) * shape.hidden,
        "head": 0 if shape.tied else shape.head,
    }


def total(shape: Shape) -> int:
    """All weights."""
    return sum(parameters(shape).values())


def moving(shape: Shape, s: Settings) -> int:
    """How many weights may change; those of an adapter are not part of the model."""
    sides = 2 * (2 * shape.hidden + shape.hidden + shape.narrow) + 3 * (shape.hidden + shape.inner)
    return {
        "all": total(shape),
        "lora": shape.layers * s.rank * sides,
        "down": min(RMU_BLOCKS, reached(shape)) * shape.hidden * shape.inner,
    }[s.moves]


def reached(shape: Shape) -> int:
    """How many blocks lie below the point that RMU looks at, its own included."""
    return max(1, round(RMU_DEPTH * shape.layers))


def passed(shape: Shape, s: Settings) -> int:
    """Blocks that a forward pass goes through."""
    return reached(shape) if s.moves == "down" else shape.layers


def learning(shape: Shape, s: Settings) -> int:
    """Blocks that a backward pass goes through (RMU: an upper bound)."""
    return min(RMU_BLOCKS, reached(shape)) if s.moves == "down" else shape.layers


def micros(machine: Machine, s: Settings) -> int:
    """Passes a step on each GPU."""
    return ceil(s.step / (machine.count * s.micro))


def wants_logits(s: Settings) -> bool:
    """Whether the loss is taken from logits; RMU's is taken half-way up."""
    return s.moves != "down"


def lean(s: Settings) -> bool:
    """Whether the residual stream is bf16; under autocast it is float32, as the embedding is."""
    return s.moves == "all" and s.weight == 2


def kept(shape: Shape, s: Settings) -> int:
    """Bytes a place that a block keeps for its backward pass.

    Under autocast, H = hidden, I = inner: two norms keep their input in float32 (8 H) and for their weights' gradient
    the normalised input (8 H), each of five matrices its own bf16 cast of a norm's output (10 H), attention its
    queries, keys and values of all heads and its output in bf16 (8 H), the MLP four tensors in bf16 (8 I).  An adapter
    leaves the norms alone and casts attention's output once more.  In a bf16 stream norms keep 6 H and matrices 2 H,
    twice (adapter: an upper bound).
    """
    streams = 16 if lean(s) else 20 if s.moves == "lora" else 26
    return (streams + 8) * shape.hidden + 8 * shape.inner + s.score * shape.heads * s.lane


def activations(shape: Shape, s: Settings) -> int:
    """Bytes kept between forward and backward pass of one micro-batch, logits left out."""
    blocks, whole = learning(shape, s), kept(shape, s)
    inputs = (2 if lean(s) else 4) * shape.hidden
    return s.micro * (blocks * inputs + whole if s.checkpointed else blocks * whole)


def copies(shape: Shape, machine: Machine, s: Settings) -> int:
    """Bytes of bf16 copies of float32 matrices; without `cached`, of the largest that is at work at a time."""
    if s.moves == "all" and s.weight == 2:
        return 0
    if s.policy and machine.count > 1:
        return 2 * shape.head if wants_logits(s) else 0
    if s.moves == "down":
        return 2 * (moving(shape, s) if s.frozen == 2 else learning(shape, s) * shape.block)
    body = 0 if s.moves == "lora" and s.frozen == 2 else shape.block
    return 2 * (shape.layers * body + shape.head if s.cached else max(body, shape.head))


def held(shape: Shape, s: Settings) -> int:
    """Bytes of the live model's weights, all GPUs together."""
    moves = moving(shape, s)
    if s.moves == "all":
        return moves * s.weight
    matrices = shape.layers * shape.block - (moves if s.moves == "down" else 0)
    return moves * s.weight + matrices * s.frozen + (total(shape) - shape.layers * shape.block) * 4


def gathered(shape: Shape, machine: Machine, s: Settings) -> int:
    """Bytes of weights and gradients that are whole for a moment.

    Weights: blocks from the lowest that moves, with checkpointing two (at work, and on its way), and the root (embedding, last
    norm, head), which is gathered once a pass and stays.  Gradients: those of a block in float32 to be added up, as they are sent
    and as they come, and those of the next, or of two blocks where they are sent as they are; and of the root, where it moves.
    """
    if machine.count == 1:
        return 0
    width = 2 if s.policy or s.weight == 2 else 4
    body = 2 if s.moves != "all" and s.frozen == 2 else width
    ends = total(shape) - shape.layers * shape.block
    block = {"all": shape.block, "lora": moving(shape, s) // shape.layers, "down": shape.hidden * shape.inner}[s.moves]
    gradients = block * (10 if s.policy and s.weight == 4 else 2 * s.weight) + (
        ends * s.weight if s.moves == "all" else 0
    )
    blocks = 2 if s.checkpointed else max(2, learning(shape, s))
    return min(blocks, passed(shape, s)) * shape.block * body + ends * s.weight + gradients


def memory(shape: Shape, machine: Machine, s: Settings) -> dict[str, float]:
    """Bytes on each GPU at the peak of a step: the head's backward pass of the second micro-batch, by component.

    passing: the gradient of the largest moving matrix, in bf16 and once more in float32 before it is added.
    """
    n, moves = machine.count, moving(shape, s)
    largest = {"all": shape.head, "lora": s.rank * shape.inner, "down": shape.hidden * shape.inner}[s.moves]
    shared = n == 1 and s.moves != "all" and not s.beside
    return {
        "weights": held(shape, s) / n,
        "beside": 4 * moves if shared else s.beside * total(shape),
        "copies": copies(shape, machine, s),
        "gathered": gathered(shape, machine, s),
        "gradients": moves * s.weight / n,
        "moments": 2 * moves * s.moment / n if s.optimiser == "adamw" else 0,
        "activations": activations(shape, s),
        "logits": s.scored * s.micro * shape.vocab * LOGIT if wants_logits(s) else 0,
        "passing": largest * (6 if s.weight == 4 else 2),
    }


def fits(shape: Shape, machine: Machine, s: Settings) -> bool:
    """Whether a GPU holds it all."""
    return sum(memory(shape, machine, s).values()) <= machine.usable * machine.memory


def fewest(shape: Shape, machine: Machine, s: Settings, most: int = 1024) -> int | None:
    """The smallest number of GPUs that holds it; None above `most`.  micro, not step, decides."""
    return next((n for n in range(1, most + 1) if fits(shape, replace(machine, count=n), s)), None)


def operations(shape: Shape, machine: Machine, s: Settings) -> float:
    """FLOP a step on each GPU: 2 a weight and place forward, 2 for the place's gradient, 2 for a moving weight's.

    Attention computes all lane² scores, masked or not: 4 · hidden · lane a place forward, twice that backward.
    The head works on scored places alone.
    """
    places = s.step / machine.count
    block = 2 * shape.block + 4 * shape.hidden * s.lane
    back = 2 * block if s.moves == "all" else block + 4 * shape.hidden * s.lane
    again = block if s.checkpointed else 0
    body = places * (passed(shape, s) * block + learning(shape, s) * (back + again))
    extra = {"all": 0, "lora": 6 * moving(shape, s), "down": 2 * moving(shape, s)}[s.moves] * places
    head = s.scored * places * 2 * shape.head * (3 if s.moves == "all" else 2) if wants_logits(s) else 0
    return body + extra + head


def moved(shape: Shape, machine: Machine, s: Settings) -> float:
    """Bytes a step on each GPU that kernels other than matrix products read or write.

    Optimiser and gradient norm once; at every pass the sum of gradients, casts that are not kept, element-wise kernels,
    and the loss.
    """
    n, moves, passes = machine.count, moving(shape, s), micros(machine, s)
    places = s.step / n
    states = 4 * s.moment if s.optimiser == "adamw" else 0
    update = (
        moves / n * (4 * s.weight + states)
    )  # weight read and written, gradient read twice, moments read and written
    sums = passes * moves * (18 if s.weight == 4 else 6)
    again = 1 + s.checkpointed
    matrices = 0 if s.moves == "lora" and s.frozen == 2 else passed(shape, s) * shape.block
    if s.moves == "down" and s.frozen == 2:
        matrices = moves
    cast = 6 * (matrices + (shape.head if wants_logits(s) else 0))
    once = s.cached and s.moves == "all" and n == 1  # a frozen weight's copy is not kept by autocast's cache
    if s.policy and n > 1:
        cast = 6 * shape.head if wants_logits(s) else 0
    casts = 0 if lean(s) else cast * (1 if once else passes * again)
    learns = learning(shape, s)
    flow = places * STREAM * kept(shape, s) * (passed(shape, s) + learns * (2 + s.checkpointed))
    loss = 3 * LOGIT * s.scored * places * shape.vocab if wants_logits(s) else 0
    return update + sums + casts + flow + loss


def communicated(shape: Shape, machine: Machine, s: Settings) -> float:
    """Bytes a step that each GPU receives under FSDP2, at every pass: all-gather (checkpointed: twice) and reduce-scatter.

    The root is gathered once.  Gradients travel as wide as their weights were gathered.  Of a whole that n GPUs share,
    (n − 1) / n comes from elsewhere.
    """
    n, moves = machine.count, moving(shape, s)
    width = 2 if s.policy or s.weight == 2 else 4
    body = 2 if s.moves != "all" and s.frozen == 2 else width
    ends = total(shape) - shape.layers * shape.block
    blocks = passed(shape, s) + (learning(shape, s) if s.checkpointed else 0)
    root = ends if s.moves == "all" else 0
    back = (moves - root) * width + root * s.weight
    return (n - 1) / n * micros(machine, s) * (blocks * shape.block * body + ends * s.weight + back)


def seconds(shape: Shape, machine: Machine, s: Settings) -> dict[str, float]:
    """Expected seconds of a step: its three terms, their sum, and the sum with communication wholly hidden."""
    terms = {
        "products": operations(shape, machine, s) / (machine.flops * machine.matrix),
        "streams": moved(shape, machine, s) / (machine.bandwidth * machine.stream),
        "links": communicated(shape, machine, s) / (machine.link * machine.wire),
    }
    work = terms["products"] + terms["streams"]
    return terms | {"step": work + terms["links"], "hidden": max(work, terms["links"])}


def references(shape: Shape, tokens: int, rows: int) -> dict[str, int]:
    """Bytes on the host of what methods keep of the original. tokens: scored ones of all `rows` it is kept for."""
    return {"NPO": 8 * rows, "KL": 2 * shape.vocab * tokens, "RMU": 4 * shape.hidden * tokens}


def speaking(shape: Shape, models: int, batch: int = 64, length: int = 256) -> dict[str, float]:
    """Bytes on one GPU while a model generates, as the code is. models: whole float32 ones, itself included.

    lowered: bf16 copies of the blocks' matrices.  cache: keys and values in bf16, of whole rows from the start.
    """
    return {
        "weights": 4 * models * total(shape),
        "lowered": 2 * shape.layers * shape.block,
        "cache": 4 * batch * length * shape.layers * shape.narrow,
    }


def ladder(start: Settings, *changes: tuple[str, dict]) -> list[Settings]:
    """Settings that add one change after another. changes: (name, fields that it sets)."""
    found = [start]
    for name, fields in changes:
        found.append(replace(found[-1], name=f"+ {name}", **fields))
    return found


AWAY = ("original put away", {"beside": 0})
PIECES = ("loaded in pieces, no whole model on a GPU", {"beside": 0})
CHECKPOINT = ("activation checkpointing", {"checkpointed": True})
BLOCKWISE = ("copies of one block at a time", {"cached": False})
FROZEN = ("frozen matrices in bf16", {"frozen": 2})
BF16 = ("weights, gradients and moments in bf16", {"weight": 2, "moment": 2})
EIGHT = ("moments in 8 bits", {"moment": 1})

ONE = [  # 7B on one GPU
    *ladder(Settings("**NPO, all weights, AdamW**, as it is"), AWAY, CHECKPOINT, BLOCKWISE, BF16),
    *ladder(Settings("**NPO, all weights, SGD**, as it is", optimiser="sgd"), AWAY, CHECKPOINT, BLOCKWISE),
    *ladder(Settings("**NPO, LoRA of rank 16**, as it is", "lora", beside=0), FROZEN, CHECKPOINT),
    *ladder(Settings("**RMU**, as it is", "down", beside=0), FROZEN),
]
WIDE = 2 * 8 * 2048  # places a step on eight GPUs: two full passes on each
EIGHT_GPUS = [  # 70B on eight GPUs, where `train` copies the whole model before it shards it: the original stays whole
    *ladder(Settings("**NPO, all weights, AdamW**, as it is", step=WIDE), PIECES, CHECKPOINT, BF16, EIGHT),
    *ladder(
        Settings("**NPO, all weights, SGD**, as it is", optimiser="sgd", step=WIDE),
        PIECES,
        CHECKPOINT,
        ("weights and gradients in bf16", {"weight": 2}),
    ),
    *ladder(
        Settings("**NPO, LoRA of rank 16**, as it is", "lora", step=WIDE),
        PIECES,
        FROZEN,
        CHECKPOINT,
    ),
    *ladder(Settings("**RMU**, as it is", "down", step=WIDE), PIECES, FROZEN),
]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table. -> its lines"""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def memories(shape: Shape, machine: Machine, cases: Sequence[Settings]) -> str:
    """Memory by component, GB a GPU, and whether it fits."""
    names = [k for k in memory(shape, machine, cases[0]) if machine.count > 1 or k != "gathered"]
    rows = []
    for s in cases:
        found = memory(shape, machine, s)
        need = sum(found.values())
        verdict = f"{need / GB:.1f}", "yes" if fits(shape, machine, s) else "no"
        rows.append([s.name, *(f"{found[k] / GB:.1f}" for k in names), *verdict])
    return markdown(["", *names, "GB in all", "fits"], rows)


def steps(shape: Shape, machines: Sequence[Machine], cases: Sequence[Settings]) -> str:
    """What a step costs and how long it takes, for what fits."""
    many = machines[0].count > 1
    rows = []
    for s in (s for s in cases if fits(shape, machines[0], s)):
        line = [named(s, cases), f"{operations(shape, machines[0], s) / 1e12:.0f}"]
        line.append(f"{moved(shape, machines[0], s) / GB:.0f}")
        line += [f"{communicated(shape, machines[0], s) / GB:.0f}"] if many else []
        for machine in machines:
            t = seconds(shape, machine, s)
            terms = " + ".join(f"{t[k]:.2f}" for k in ("products", "streams", "links")[: 2 + many])
            line.append(f"{t['step']:.2f} = {terms}")
            line += [f"{t['hidden']:.2f}"] if many else []
        rows.append(line)
    times = [x for m in machines for x in (f"{m.name.split()[0]}, s", *(["hidden, s"] if many else []))]
    return markdown(["", "TFLOP", "GB moved", *(["GB over links"] if many else []), *times], rows)


def named(s: Settings, cases: Sequence[Settings]) -> str:
    """The name of a rung with the method that it belongs to."""
    first = next(x for x in reversed(cases[: cases.index(s) + 1]) if not x.name.startswith("+"))
    return s.name if s is first else f"{first.name.removesuffix(', as it is')} {s.name}"


def stages(shape: Shape) -> str:
    """Whole float32 models on a GPU at each stage of a run today, and what they come to, `relearn` with what it needs."""
    plain, tuned = total(shape), 16 * total(shape)  # weight, gradient and two moments of four bytes
    rows = [
        ("audit of the original", 1, 4 * plain),
        ("audit of the never-taught", 1, 4 * plain),
        ("forget, all weights: original, its copy", 2, 8 * plain),
        ("forget, all weights, when it ends: original, the result", 2, 8 * plain),
        ("forget, LoRA or RMU: original, which shares its weights", 1, 4 * plain),
        ("forget, LoRA or RMU, when it ends: original, the result", 2, 8 * plain),
        ("audit of the forgotten", 1, 4 * plain),
        ("attack `finetune` with a `rank` on it, and its audit: forgotten, the result", 2, 8 * plain),
        ("attack `graft` on it: original, forgotten, a copy", 3, 12 * plain),
        ("attack `relearn` on it: forgotten, a copy with AdamW", 2, 4 * plain + tuned),
    ]
    return markdown(["stage", "models", "GB"],
                    [[a, str(b), f"{c / GB:.0f}"] for a, b, c in rows])  # fmt: skip


def main() -> None:
    for shape in (SMOLLM2_135M, LLAMA_32_1B, LLAMA_2_7B, LLAMA_31_8B, LLAMA_31_70B):
        parts = ", ".join(f"{k} {v:,}" for k, v in parameters(shape).items() if v)
        print(f"{shape.name}: {total(shape):,} weights ({parts})")
    for shape in (LLAMA_2_7B, LLAMA_31_8B):
        print(f"\n### {shape.name} on one GPU of 80 GB: memory\n\n{memories(shape, A100, ONE)}")
    shape = LLAMA_2_7B
    print(f"\n### {shape.name} on one GPU: a step of {ONE[0].step:,} places\n\n{steps(shape, [A100, H100], ONE)}")
    eight = [replace(machine, count=8) for machine in (A100, H100)]
    shape = LLAMA_31_70B
    print(f"\n### {shape.name} on eight GPUs of 80 GB: memory of each\n\n{memories(shape, eight[0], EIGHT_GPUS)}")
    print(f"\n### {shape.name} on eight GPUs: a step of {WIDE:,} places\n\n{steps(shape, eight, EIGHT_GPUS)}")
    wide = EIGHT_GPUS[2]  # float32 AdamW with all that costs no precision
    print(
        f"\nAll weights with AdamW in float32, sharded, with checkpointing: {fewest(shape, A100, wide)} GPUs of 80 GB."
    )
    today = [s for s in ONE if not s.name.startswith("+")]
    for small in (SMOLLM2_135M, LLAMA_32_1B):
        print(f"\n### {small.name} on one GPU of 80 GB, to be checked: memory\n\n{memories(small, A100, today)}")
        print(f"\n### {small.name}: a step of {ONE[0].step:,} places\n\n{steps(small, [A100, H100], today)}")
    print(f"\n### A whole run of {LLAMA_2_7B.name} today\n\n{stages(LLAMA_2_7B)}")
    spoken = speaking(LLAMA_2_7B, 2)
    print("\nGenerating beside one other model: " + ", ".join(f"{k} {v / GB:.1f} GB" for k, v in spoken.items()))
    known = references(LLAMA_31_8B, 20_000, 400)
    print("On the host, 400 rows of 50 tokens: " + ", ".join(f"{k} {v / GB:.3f} GB" for k, v in known.items()))


if __name__ == "__main__":
    main()
