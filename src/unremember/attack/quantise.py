"""Quantisation: round the weights to fewer bits, and an edit that is smaller than the rounding is undone.

    symmetric   D = max|w| / (2^(b−1) − 1),          Q(w) = D · round(w / D)
    asymmetric  D = (max w − min w) / (2^b − 1),     Q(w) = min w + D · round((w − min w) / D)
    nf4         D = max|w|,                          Q(w) = D · the nearest of 16 normal quantiles to w / D
    q4_0        D = (the w of largest |w|) / −8,     Q(w) = D₁₆ · (min(15, ⌊w / D + 8.5⌋) − 8),   D₁₆ = D as a float16

D belongs to `group` neighbours of a row.  Zhang et al. 2024 (arXiv 2410.16454), round-to-nearest; nf4: Dettmers et al.
2023 (arXiv 2305.14314); q4_0: the blocks of 32 of GGUF files of that name, to the bit.  Reference code:
zzwjames/FailureLLMUnlearning@10131ae, which quantises through bitsandbytes with its defaults (fp4).
Differs: own grids, and the rounded weights are put back as ordinary numbers, so what comes out is a plain LM.  'symmetric' is
not what a file of either kind holds: it has the levels −7 to 7 at 4 bits, as many on either side, its D stays a float32, and its
groups are as long as is asked for.  A grid on which the original lies already is refused: rounding to it restores the original
bit for bit and would overstate what was left (a model that comes from a Q4_1 file lies on the asymmetric 4-bit grid with groups
of 32).  No calibrated quantisers, and none of GGUF's K-quants.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Corpus
from unremember.errors import BadModel, BadRequest
from unremember.lm import LM
from unremember.train import STRICT

Grid = Literal["symmetric", "asymmetric", "nf4", "q4_0"]
FULL = (torch.float32, torch.float16, torch.bfloat16)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 32  # neighbours that share a step in a Q4_0 file
BESIDE = {"symmetric": 32, "asymmetric": 64, "nf4": 32, "q4_0": 16}  # bits of a group's own numbers, beside its codes
NEAR = 1 / 16  # of a step: what lies as near as this to the grid lies on it (1/8 of all weights do by chance)


class Coded(NamedTuple):
    """A matrix on a grid, all (R, C): integer codes, the numbers they stand for, and the mean step between two of these."""

    codes: Tensor
    values: Tensor
    step: Tensor


def coded(weight: Tensor, bits: int, group: int, grid: Grid) -> Coded:
    """Round to nearest. weight: (R, C); group: divides C, 0 = a whole row.  A group of equal numbers is kept as it is."""
    w = weight.detach().float().unflatten(1, (-1, group or weight.shape[1]))  # (R, groups, group)
    if grid == "asymmetric":
        low = w.amin(-1, keepdim=True)
        step = (w.amax(-1, keepdim=True) - low) / (2**bits - 1)
        codes = ((w - low) / _safe(step)).round().clamp(0, 2**bits - 1)
        values = low + step * codes
    elif grid == "symmetric":
        most = 2 ** (bits - 1) - 1
        step = w.abs().amax(-1, keepdim=True) / most
        codes = (w / _safe(step)).round().clamp(-most, most)
        values = step * codes
    elif grid == "q4_0":
        extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))  # of equals the first
        d = extreme / -8
        codes = (w * torch.where(d == 0, d, 1 / d) + 8.5).floor().clamp(0, 15) - 8
        kept = d.half().float()  # codes come from D as it is, numbers from what a file keeps of it
        values, step = kept * codes, kept.abs()
    else:
        levels = torch.tensor(NF4, device=w.device)
        largest = w.abs().amax(-1, keepdim=True)
        codes = torch.bucketize(w / _safe(largest), (levels[1:] + levels[:-1]) / 2)
        values, step = largest * levels[codes], largest * 2 / (len(NF4) - 1)
    return Coded(codes.flatten(1).short(), values.flatten(1), step.expand_as(w).flatten(1))


def _safe(step: Tensor) -> Tensor:
    """The same with 1 for 0: a group of zeros has no step."""
    return torch.where(step > 0, step, torch.ones_like(step))


def code_change(ours: Tensor, theirs: Tensor) -> float:
    """c_b: share of weights with different codes in Q_b(θ_u) and Q_b(θ_o). both: (R, C) codes, each of its model's own grid"""
    return float((ours != theirs).float().mean())


def survival(edit: Tensor, step: Tensor) -> float:
    """Expected share of edits that rounding keeps, mean of min(1, |Δw| / D): w is taken to lie anywhere in its bin.

    edit, step: (R, C).  Where a weight did not move, and where a group has no step, nothing is counted; 0 if nothing moved.
    """
    counted = (edit != 0) & (step > 0)
    share = (edit.abs() / _safe(step)).clamp(max=1)[counted]
    return float(share.mean()) if len(share) else 0.0


def lies(weight: Tensor, on: Coded) -> tuple[int, int]:
    """How many weights lie on the grid already, and of how many that could."""
    real = on.step > 0
    return int(((on.values - weight.detach().float()).abs() <= NEAR * on.step)[real].sum()), int(real.sum())


def plain(lm: LM) -> LM:
    """A copy with weights of its own, an adapter merged into them."""
    lm = lm.copy()
    model: Any = lm.model
    return replace(lm, model=model.merge_and_unload().eval()) if hasattr(model, "peft_config") else lm


def whole(lm: LM) -> LM:
    """The LM itself, or where it has an adapter a copy, into whose weights that is merged."""
    return plain(lm) if hasattr(lm.model, "peft_config") else lm


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear matrix of the blocks by name, a shared one once; BadModel where there is none or one is not whole numbers."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[int, tuple[str, nn.Linear]] = {}
    for block in team.blocks(model):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                found.setdefault(id(module.weight), (names[id(module)], module))
    if not found:
        raise BadModel(
            f"{type(model).__name__} has no linear layers in a list of blocks, so no weight-side attack reaches it; use a "
            "transformer with torch.nn.Linear"
        )
    if bad := [f"{name} ({module.weight.dtype})" for name, module in found.values() if module.weight.dtype not in FULL]:
        raise BadModel(
            f"{bad[0]}, {len(bad)} in all: quantised or packed weights have no numbers to edit; load the model in float32, "
            "float16 or bfloat16"
        )
    return dict(found.values())


@dataclass(frozen=True, config=STRICT)
class Quantise:
    """bits: 8 or 4; nf4 and q4_0 have 4.  group: neighbours of a row that share a step, 0 = the whole row; q4_0 has 32.

    embeddings: round the token table (and a head of its own), too; without it linear matrices of the blocks alone.
    same_grid: go on where the original lies on the grid already, to report it beside another one.
    """

    bits: Literal[4, 8]
    grid: Grid = "symmetric"
    group: Annotated[int, Field(ge=0)] = 64
    embeddings: bool = False
    same_grid: bool = False

    needs = ("forget",)
    paper = "Zhang et al. 2024, arXiv 2410.16454"
    summary = "weights rounded to fewer bits"

    @model_validator(mode="after")
    def _four(self):
        if self.grid in ("nf4", "q4_0") and self.bits != 4:
            raise ValueError(
                f"grid = {self.grid!r} has 16 levels and bits is {self.bits}; set bits = 4, or another grid"
            )
        if self.grid == "q4_0" and self.group != BLOCK:
            raise ValueError(
                f"grid = 'q4_0' has groups of {BLOCK} and group is {self.group}; set group = {BLOCK}, or another grid"
            )
        if self.group == 1:
            raise ValueError("group = 1 keeps every weight as it is; take 16 or more, or 0 for the whole row")
        return self

    def check(self, corpus: Corpus) -> None:
        """BadCorpus where nothing is asked afterwards."""
        corpus.require("quantise", self.needs)

    def __call__(self, lm: LM, corpus: Corpus, original: LM, bench: Bench = BENCH) -> tuple[LM, Corpus]:
        self.check(corpus)
        attacked = plain(lm)
        ours, theirs = self.weights(attacked.model), self.weights(whole(original).model)
        self._fit(ours, theirs)
        if not self.same_grid:
            self._trap(theirs)
        moved, changed = 0, 0.0
        for done, (name, weight) in enumerate(ours.items()):
            mine, other = self.coded(weight), self.coded(theirs[name])
            edit = weight.detach().float() - theirs[name].detach().float()
            with torch.no_grad():
                rounded = mine.values.to(weight.dtype)
                moved += int((rounded != weight).sum())
                weight.copy_(rounded)
            terms = {"code change": code_change(mine.codes, other.codes), "survival": survival(edit, mine.step)}
            changed += terms["code change"] * weight.numel()
            bench.say("quantise", done + 1, len(ours), terms)
        if not moved and not self.same_grid:
            raise BadRequest(
                f"{lm.name or 'the model'} lies on this very grid ({self.words()}), so rounding changes nothing and nothing was "
                "attacked; take another group size or grid"
            )
        count = sum(weight.numel() for weight in ours.values())
        groups = sum(len(weight) * (weight.shape[1] // self.group if self.group else 1) for weight in ours.values())
        bench.notes["bits a weight"] = self.bits + BESIDE[self.grid] * groups / count
        bench.notes["share of codes unlike the original's"] = changed / count
        return attacked, corpus

    def words(self) -> str:
        return f"{self.grid}, {self.bits} bits, {f'groups of {self.group}' if self.group else 'whole rows'}"

    def coded(self, weight: Tensor) -> Coded:
        return coded(weight, self.bits, self.group, self.grid)

    def weights(self, model: Any) -> dict[str, Tensor]:
        """What is rounded, by module name; a head that is the token table is there once."""
        found: dict[str, Tensor] = {name: module.weight for name, module in linears(model).items()}
        if self.embeddings:
            table, head = model.get_input_embeddings(), model.get_output_embeddings()
            found["embedding"] = table.weight
            if head is not None and head.weight is not table.weight:
                found["head"] = head.weight
        return found

    def _fit(self, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
        problems = []
        for name, weight in ours.items():
            width = weight.shape[1]
            if name not in theirs or theirs[name].shape != weight.shape:
                problems.append(
                    f"{name} {tuple(weight.shape)} is not in the original like this; give the original it came from"
                )
            if self.group and width % self.group:
                good = [g for g in (16, 32, 64, 128, 256) if width % g == 0]
                problems.append(
                    f"{name} has rows of {width}, which group = {self.group} does not divide; take "
                    f"{', '.join(map(str, [*good, 0]))} (0 = the whole row)"
                )
            if not weight.isfinite().all():
                problems.append(f"{name} holds numbers that are not finite; its weights are broken")
        if problems:
            raise BadModel(problems)

    def _trap(self, original: dict[str, Tensor]) -> None:
        """BadRequest where rounding would put the original back."""
        counts = [lies(weight, self.coded(weight)) for weight in original.values()]
        share = sum(n for n, _ in counts) / max(1, sum(n for _, n in counts))
        if share > 0.5:
            raise BadRequest(
                f"quantise: {share:.0%} of the original's weights lie on this very grid ({self.words()}), so rounding puts them "
                "back bit for bit and overstates what is left; take another group size or grid, or set same_grid = true and "
                "report it beside another one"
            )
