"""One process or many, with the same code and the same data: rank, size, sharding (FSDP2) and checkpoints.

Started by `torchrun`, the processes join over nccl on GPUs and gloo elsewhere.  Alone, every function here is the
obvious thing.  Which rows a process sees is decided by its rank; which rows a step sees never is.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def join(device: str = "cpu") -> None:
    """Enter the process group when torchrun started us, with nccl for device 'cuda'; once, and a no-op otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        if device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def leave() -> None:
    """Leave the process group, if in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def merge(part: dict) -> dict:
    """The union of every process's dictionary, on every process."""
    if size() == 1:
        return part
    parts: list[dict] = [{} for _ in range(size())]
    dist.all_gather_object(parts, part)
    return {key: value for piece in parts for key, value in piece.items()}


def wait() -> None:
    """Until every process is here."""
    if size() > 1:
        dist.barrier()


def total(terms: dict[str, float]) -> dict[str, float]:
    """Sum named numbers over the processes (a name that one of them lacks counts as zero there)."""
    if size() == 1:
        return terms
    parts: list[dict] = [{} for _ in range(size())]
    dist.all_gather_object(parts, terms)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in sorted({n for part in parts for n in part})}


def most(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The greatest of each number over the processes, which all have equally many: so that all of them group alike."""
    if size() == 1:
        return shapes
    parts: list[list] = [[] for _ in range(size())]
    dist.all_gather_object(parts, shapes)
    return [tuple(map(max, zip(*place, strict=True))) for place in zip(*parts, strict=True)]


def shard(model: nn.Module, precision: str = "fp32", again: bool = False) -> nn.Module:
    """Split the weights over the processes, block by block (FSDP2); alone, return the model as it is.

    precision 'bf16' gathers blocks in bfloat16 and sends their gradients so, as they are, which halves the bytes; each process
    keeps its part in float32, gradients add up in float32, and so does the residual stream.  Embedding and head stay whole
    in precision: bfloat16 logits tie.  again: a block's weights go after its use and are gathered again on the way back;
    otherwise they stay, where something below them or in them moves, until the way back has passed.
    """
    if size() == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    lower = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(lower, torch.float32 if lower else None, cast_forward_inputs=False)
    mesh = init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (size(),))
    inside = {id(w) for block in blocks(model) for w in block.parameters()}
    # the token table lies below all blocks
    back = any(w.requires_grad for w in model.parameters() if id(w) not in inside)
    for block in blocks(model):
        back = back or any(w.requires_grad for w in block.parameters())
        sharded: Any = fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=again or not back)
        if lower:
            sharded.set_custom_reduce_scatter(_Lower(lower))
    fully_shard(model, mesh=mesh)
    return model


def scatter(model: nn.Module) -> None:
    """Drop what was gathered for a look at the model: an optimiser moves each process's own part alone."""
    if size() > 1:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@dataclass(frozen=True)
class _Lower:
    """Sums of gradients that come in `kind`: they travel in it, and add up in the precision in which they are wanted.

    Changes no number where the gradients are of that kind already, as those of weights that were gathered in it.
    """

    kind: torch.dtype

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op: bool = False) -> None:
        """FSDP2's call: each process's part of the sum over them, or of their mean where op says so, in output_tensor."""
        sent = input_tensor.to(self.kind)
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=group)
        torch.sum(got.view(group.size(), -1), 0, dtype=output_tensor.dtype, out=output_tensor)
        if op == dist.ReduceOp.AVG:
            output_tensor /= group.size()


def like(whole: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`whole`, which every process has, split over them as `weight` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(weight, DTensor):
        return whole.to(weight.device)
    return distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a transformer: the members of its longest module list."""
    place = _stack(model)
    return list(getattr(*place)) if place else []


def _stack(model: nn.Module) -> tuple[nn.Module, str] | None:
    """Who holds the longest module list, and under which name."""
    lists = [(m, name) for m in model.modules() for name, x in m.named_children() if isinstance(x, nn.ModuleList)]
    return max(lists, key=lambda x: len(getattr(*x))) if lists else None


@contextmanager
def cut(model: nn.Module, block: int) -> Generator[None]:
    """While the context lasts, a forward pass ends behind block `block`, counted from 0: those above are out of its way."""
    place = _stack(model)
    assert place, "a model without blocks has none to end at"
    owner, name = place
    whole = getattr(owner, name)
    # not before the pass begins: FSDP2 has to meet all blocks at its first one
    handle = model.register_forward_pre_hook(lambda *_: setattr(owner, name, whole[: block + 1]))
    try:
        yield
    finally:
        handle.remove()
        setattr(owner, name, whole)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The full weights, on every process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if size() == 1:
        return model.state_dict()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    box: list[Any] = [state if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def save(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    """A sharded checkpoint of all that training moves, at `folder`/step-N; older ones go once it is whole."""
    import torch.distributed.checkpoint as dcp

    target, fresh = folder / f"step-{step}", folder / f".step-{step}"
    if rank() == 0:
        shutil.rmtree(fresh, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    wait()
    with _quiet():
        dcp.save(_moving(model, optimiser), checkpoint_id=fresh, no_dist=size() == 1)
    wait()
    if rank() == 0:
        fresh.rename(target)
        for other in folder.glob("step-*"):
            if other != target:
                shutil.rmtree(other, ignore_errors=True)
    wait()


def restore(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint under `folder`, however many processes wrote it; the step it was made after, or 0."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    steps = sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*"))
    if not steps:
        return 0
    state = _moving(model, optimiser)
    options = StateDictOptions(strict=False)  # what is frozen is not there
    with _quiet():
        dcp.load(state, checkpoint_id=folder / f"step-{steps[-1]}", no_dist=size() == 1)
    set_state_dict(
        model, optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"], options=options
    )
    return steps[-1]


def _moving(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, dict]:
    """The weights that training moves, and what the optimiser keeps of them."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimiser)
    names = {name for name, w in model.named_parameters(remove_duplicate=False) if w.requires_grad}
    return {"model": {name: w for name, w in weights.items() if name in names}, "optimiser": moments}


@contextmanager
def _quiet() -> Generator[None]:
    """Without torch's warning that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
