"""Sparse autoencoder: activations of one site as sums of few directions out of many, for superposed features.

    f = ReLU((a − b_d) W_e + b_e), or its k largest;     â = f W_d + b_d,   rows of W_d of length 1
    loss = ‖a − â‖² + λ Σ f   (with k: the first term alone),  a in units of its mean length

Reported: L0, explained variance, dead share (features never active in 10,000 tokens or more; with fewer tokens it is not said),
and loss recovered = (L_mean − L_sae) / (L_mean − L_clean), L the nll of text with the site's mean, or â, in the place of a.
Bricken et al. 2023 (transformer-circuits.pub, Towards Monosemanticity); Cunningham et al. 2023 (arXiv 2309.08600); top-k: Gao
et al. 2024 (arXiv 2406.04093).  Files: those of jbloomAus/SAELens@03a2eaf (cfg.json, sae_weights.safetensors), both ways.
Differs: loss recovered is against the mean, not zero, which flatters; beside it stands a control, in which every token gets
another token's â; dead features start again at what is worst explained.  The first place of a text, an attention sink, is left
out.
A feature is not what its strongest examples look like; this file names no feature.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass as plain
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from unremember import team
from unremember.bench import BENCH, Bench
from unremember.corpus import Example
from unremember.errors import BadCorpus, BadFolder, BadModel, BadRequest, nearest
from unremember.folder import whole, write_json
from unremember.lm import LM
from unremember.locate.anatomy import Site, components, edited, watched
from unremember.locate.subject import laid
from unremember.tokens import Row
from unremember.train import STRICT

ENOUGH = 10_000  # tokens before a feature may be called dead
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")


@plain(frozen=True)
class SparseAutoencoder:
    """W_enc (D, F), W_dec (F, D), b_enc (F,), b_dec (D,), float32.  k: how many may be active, 0 = all that are positive.

    centred: whether b_dec is taken off the input.  hook: what SAELens calls the site, '' = not said.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    k: int = 0
    centred: bool = True
    hook: str = ""

    def __post_init__(self):
        problems = []
        D, F = self.W_enc.shape if self.W_enc.dim() == 2 else (0, 0)
        for name, shape in zip(NAMES, ((D, F), (F, D), (F,), (D,)), strict=True):
            weight = getattr(self, name)
            if tuple(weight.shape) != shape:
                problems.append(f"{name} has the shape {tuple(weight.shape)}; with W_enc (D, F) it must be {shape}")
            if not weight.isfinite().all():
                problems.append(f"{name} holds numbers that are not finite; the file or its training is broken")
        if not 0 <= self.k <= F:
            problems.append(f"k = {self.k} of {F} features; it must lie between 0 and {F}")
        if problems:
            raise BadModel(f"sparse autoencoder: {problem}" for problem in problems)

    def encode(self, a: Tensor) -> Tensor:
        """(…, D) -> (…, F)"""
        a = a.to(self.W_enc) - (self.b_dec if self.centred else 0)
        f = (a @ self.W_enc + self.b_enc).relu()
        return largest(f, self.k) if self.k else f

    def decode(self, f: Tensor) -> Tensor:
        """(…, F) -> (…, D)"""
        return f @ self.W_dec + self.b_dec

    def __call__(self, a: Tensor) -> Tensor:
        """(…, D) -> (…, D), in the input's precision"""
        return self.decode(self.encode(a)).to(a)

    def save(self, folder: Path) -> None:
        """In SAELens's form; a folder that is there already is refused."""
        if folder.exists():
            raise BadFolder(f"{folder} exists; choose another folder for the autoencoder, or remove it")
        D, F = self.W_enc.shape
        config = {
            "architecture": "topk" if self.k else "standard",
            "d_in": D,
            "d_sae": F,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": self.centred,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {"hook_name": self.hook},
        } | ({"k": self.k, "rescale_acts_by_decoder_norm": False} if self.k else {})
        with whole(folder) as fresh:
            (fresh / WEIGHTS).write_bytes(save({name: getattr(self, name).cpu().contiguous() for name in NAMES}))
            write_json(fresh / CONFIG, config)

    @staticmethod
    def load(folder: Path) -> SparseAutoencoder:
        """A folder of SAELens's: architecture standard or topk.  BadModel names everything that is not supported."""
        problems = [
            f"{folder}: no {name} there; a SAELens folder holds {CONFIG} and {WEIGHTS} (pickled .pt weights are not opened)"
            for name in (CONFIG, WEIGHTS)
            if not (folder / name).is_file()
        ]
        if problems:
            raise BadModel(problems)
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            weights = {name: x.float() for name, x in load_file(folder / WEIGHTS).items()}
        except (ValueError, SafetensorError) as error:
            raise BadModel(f"{folder} cannot be read: {str(error).splitlines()[0]}") from error
        if problems := [f"{folder}: {problem}" for problem in unsupported(config, weights)]:
            raise BadModel(problems)
        k = top(config)
        meta = config.get("metadata") or config.get("meta") or config
        if config.get("rescale_acts_by_decoder_norm"):  # the same numbers, with the lengths where they belong
            length = weights["W_dec"].norm(dim=1)
            weights["W_enc"] = weights["W_enc"] * length
            weights["b_enc"] = weights["b_enc"] * length
            weights["W_dec"] = weights["W_dec"] / length[:, None]
        return SparseAutoencoder(
            *(weights[name] for name in NAMES),
            k,
            bool(config.get("apply_b_dec_to_input", True)),
            meta.get("hook_name") or "",
        )


def largest(f: Tensor, k: int) -> Tensor:
    """All but the k largest of the last dimension at 0."""
    top = f.topk(k, dim=-1)
    return torch.zeros_like(f).scatter(-1, top.indices, top.values)


def top(config: Mapping[str, Any]) -> int:
    """SAELens's k, 0 where it has none; older files keep it beside the name of the activation function."""
    if config.get("architecture") == "topk" or config.get("activation_fn_str") == "topk":
        return int(config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k") or 0)
    return 0


def unsupported(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
    """What in a SAELens folder this file would compute wrongly, as sentences."""
    problems = []
    kind = config.get("architecture", "standard")
    if kind not in ("standard", "topk"):
        problems.append(f"architecture {kind!r} is not supported; standard and topk are")
    allowed = {
        "normalize_activations": (None, False, "none"),
        "reshape_activations": (None, "none"),
        "finetuning_scaling_factor": (None, False),
        "activation_fn_str": (None, "relu", "topk"),
        "activation_fn": (None, "relu", "topk"),
        "hook_head_index": (None,),
    }
    for key, values in allowed.items():
        places = [config, *(config[m] for m in ("metadata", "meta") if isinstance(config.get(m), dict))]
        for value in (place.get(key) for place in places):
            if value not in values:
                words = ", ".join(str(v) for v in values if v is not None) or "none"
                problems.append(f"{key} = {value!r} is not supported; allowed: {words}")
    is_top = kind == "topk" or config.get("activation_fn_str") == "topk"
    if is_top and top(config) < 1:
        problems.append("a topk autoencoder without its k; add it to cfg.json")
    if absent := [name for name in NAMES if name not in weights]:
        problems.append(f"weights {', '.join(absent)} are missing")
    if extra := sorted(set(weights) - set(NAMES)):
        problems.append(f"weights {', '.join(extra)} are not supported; allowed: {', '.join(NAMES)}")
    for key, axis in (("d_in", 0), ("d_sae", 1)):
        given = config.get(key)
        if (
            given is not None
            and "W_enc" in weights
            and weights["W_enc"].dim() == 2
            and given != weights["W_enc"].shape[axis]
        ):
            problems.append(f"{key} = {given} and W_enc has the shape {tuple(weights['W_enc'].shape)}; they must agree")
    return problems


def place(model: Any, hook: str) -> Site:
    """The site that SAELens calls blocks.L.hook_resid_pre, resid_post, attn_out or mlp_out; BadModel for others."""
    names = {id(module): name for name, module in model.named_modules()}
    known: dict[str, Site] = {}
    blocks = [names[id(block)] for block in team.blocks(model)]
    for x in components(model):
        at = f"blocks.{x.block}.hook_"
        known[at + ("attn_out" if x.kind == "attention" else "mlp_out")] = x.output
        known[at + "resid_pre"], known[at + "resid_post"] = (blocks[x.block], "in"), (blocks[x.block], "out")
    if hook not in known:
        raise BadModel(f"the autoencoder's hook {hook!r} is no site of this model; {nearest(hook, known)}")
    return known[hook]


@dataclass(frozen=True, config=STRICT)
class Fit:
    """Trains a SparseAutoencoder on activations (N, D).  Exactly one of k (top-k) and sparsity (λ) is above 0.

    revive: steps between two looks for dead features, in the first four fifths.
    """

    features: Annotated[int, Field(ge=2)]
    steps: Annotated[int, Field(ge=1)]
    k: Annotated[int, Field(ge=0)] = 0
    sparsity: Annotated[float, Field(ge=0)] = 0.0
    lr: Annotated[float, Field(gt=0, lt=1)] = 2e-3
    batch: Annotated[int, Field(ge=1)] = 512
    revive: Annotated[int, Field(ge=1)] = 200
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one(self):
        if (self.k > 0) == (self.sparsity > 0):
            raise ValueError(f"give exactly one of k (now {self.k}) and sparsity (now {self.sparsity:g})")
        if self.k > self.features:
            raise ValueError(f"k = {self.k} of {self.features} features; it must be smaller")
        return self

    def __call__(self, a: Tensor, hook: str = "") -> SparseAutoencoder:
        """BadCorpus where the activations are not finite, all alike, or fewer than a batch."""
        if a.dim() != 2 or len(a) < self.batch or not a.isfinite().all() or float(a.float().std(0).max()) == 0:
            raise BadCorpus(
                f"activations of shape {tuple(a.shape)} cannot train a dictionary with batch = {self.batch}: they must be "
                "(N, D), at least a batch, finite, and not all alike; take more text, or another site"
            )
        a = a.detach().float()
        scale = float(len(a[0]) ** 0.5 / a.norm(dim=1).mean())
        random = torch.Generator().manual_seed(self.seed)
        W_dec = _unit(torch.randn(self.features, a.shape[1], generator=random)).to(a.device)
        weights = [W_dec.T.clone(), W_dec, torch.zeros(self.features, device=a.device), a.mean(0) * scale]
        for weight in weights:
            weight.requires_grad_()
        optimiser = torch.optim.Adam(weights, lr=self.lr, betas=(0.9, 0.99))
        active = torch.zeros(self.features, device=a.device)
        with torch.enable_grad():
            for step in range(self.steps):
                optimiser.param_groups[0]["lr"] = self.lr * min(1.0, 5 * (1 - step / self.steps))
                x = a[torch.randint(len(a), (self.batch,), generator=random)] * scale
                f = ((x - weights[3]) @ weights[0] + weights[2]).relu()
                f = largest(f, self.k) if self.k else f
                missed = x - f @ weights[1] - weights[3]
                loss = missed.square().sum(1).mean() + self.sparsity * f.sum(1).mean()
                optimiser.zero_grad()
                loss.backward()
                with torch.no_grad():
                    slope: Any = weights[1].grad
                    slope -= (slope * weights[1]).sum(1, keepdim=True) * weights[1]  # along the sphere
                    optimiser.step()
                    weights[1].copy_(_unit(weights[1]))
                    active += (f > 0).sum(0)
                    if (step + 1) % self.revive == 0 and step < 0.8 * self.steps:
                        self._revive(weights, optimiser, active == 0, missed.detach(), random)
                        active.zero_()
        W_enc, W_dec, b_enc, b_dec = (weight.detach() for weight in weights)
        return SparseAutoencoder(W_enc, W_dec, b_enc / scale, b_dec / scale, self.k, True, hook)

    def _revive(
        self, weights: list[Tensor], optimiser: Any, dead: Tensor, missed: Tensor, random: torch.Generator
    ) -> None:
        """Dead features begin again in the directions that are missed most."""
        count = int(dead.sum())
        if not count:
            return
        chance = missed.square().sum(1).square().cpu() + 1e-12
        drawn = torch.multinomial(chance, count, replacement=count > len(missed), generator=random)
        fresh = _unit(missed[drawn])
        weights[1][dead] = fresh
        length = weights[0].norm(dim=0)[~dead].mean() if not dead.all() else torch.tensor(1.0)
        weights[0][:, dead] = fresh.T * length * (1.0 if self.k else 0.2)
        weights[2][dead] = 0
        for weight, kept in zip(weights[:3], (dead[None], dead[:, None], dead), strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                optimiser.state[weight][name].masked_fill_(kept, 0)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-8)


@plain(frozen=True)
class Quality:
    """l0: mean number of active features.  explained: share of variance.  dead: share, None below 10,000 tokens."""

    l0: float
    explained: float
    dead: float | None
    tokens: int


@torch.no_grad()
def quality(sae: SparseAutoencoder, a: Tensor) -> Quality:
    """a: (N, D), better not those it was trained on."""
    a = a.float()
    l0, missed, active = 0.0, 0.0, torch.zeros(sae.W_enc.shape[1], dtype=torch.bool, device=a.device)
    for part in a.split(4096):
        f = sae.encode(part)
        l0 += float((f > 0).sum())
        active |= (f > 0).any(0)
        missed += float((part - sae.decode(f)).double().square().sum())
    spread = float((a - a.mean(0)).double().square().sum())
    if spread == 0:
        raise BadCorpus(f"all {len(a)} activations are alike, so there is no variance to explain; take more text")
    dead = float((~active).float().mean()) if len(a) >= ENOUGH else None
    return Quality(l0 / len(a), 1 - missed / spread, dead, len(a))


@plain(frozen=True)
class Match:
    """cosine: mean over the first's rows of the largest cosine.  matched: the same when every row has a partner of its own.

    unique: share of the first's rows whose nearest row is nobody else's nearest.
    """

    cosine: float
    matched: float
    unique: float


def match(a: Tensor, b: Tensor) -> Match:
    """Two dictionaries, (F, D) and (G, D): that of another seed, or a planted one first."""
    from scipy.optimize import linear_sum_assignment

    cosine = (_unit(a.float()) @ _unit(b.float()).T).cpu().numpy()  # (F, G)
    rows, columns = linear_sum_assignment(-cosine)
    nearest_rows = cosine.argmax(1)
    times = np.bincount(nearest_rows, minlength=cosine.shape[1])
    return Match(
        float(cosine.max(1).mean()), float(cosine[rows, columns].mean()), float((times[nearest_rows] == 1).mean())
    )


def _texts(lm: LM, examples: Sequence[Example], budget: int) -> list[list[Row]]:
    """Rows in groups of equal lengths' neighbours, a lane a row."""
    rows = sorted(lm.template.rows(examples, lm.limit), key=lambda row: (len(row.ids), row.key))
    groups: list[list[Row]] = []
    for row in rows:
        if groups and (len(groups[-1]) + 1) * len(row.ids) <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _real(group: Sequence[Row], width: int, device: Any) -> Tensor:
    """(L, T) bool: places that hold a token, without the first of each text."""
    long = torch.tensor([len(row.ids) - 1 for row in group], device=device)
    at = torch.arange(width, device=device)
    return (at < long[:, None]) & (at > 0)


@torch.no_grad()
def activations(lm: LM, examples: Sequence[Example], site: Site, bench: Bench = BENCH) -> Tensor:
    """What passes the site at every token of the examples but the first of each. -> (N, D) float32 on the CPU"""
    lm, found = replace(lm, precision="fp32"), []
    for group in _texts(lm, examples, bench.budget):
        tokens = laid(lm, group)
        with watched(lm.model, [site]) as seen:
            lm.logits(tokens)
        found.append(seen[site][_real(group, tokens.ids.shape[1], lm.device)].float().cpu())
    return torch.cat(found)


@plain(frozen=True)
class Recovered:
    """share: loss recovered; control: the same with every token's reconstruction at another token, where little may be left.

    clean, rebuilt, mean: nll a token, nats, of the texts as they are, with â, and with the site's mean.
    """

    share: float
    control: float
    clean: float
    rebuilt: float
    mean: float
    tokens: int


@torch.no_grad()
def recovered(
    lm: LM, examples: Sequence[Example], site: Site, sae: SparseAutoencoder, seed: int = 0, bench: Bench = BENCH
) -> Recovered:
    """BadRequest where the widths differ; BadModel where the mean costs so little that there is nothing to recover."""
    lm = replace(lm, precision="fp32")
    a = activations(lm, examples, site, bench)
    if a.shape[1] != len(sae.b_dec):
        raise BadRequest(
            f"{site[0]} has {a.shape[1]} dimensions and the autoencoder {len(sae.b_dec)}; take its own site"
        )
    mean, random = a.mean(0).to(lm.device), torch.Generator().manual_seed(seed)
    sums, count = np.zeros(4), 0

    def other(value: Tensor, real: Tensor) -> Tensor:
        rebuilt, moved = sae(value), value.clone()
        moved[real] = rebuilt[real][torch.randperm(int(real.sum()), generator=random).to(value.device)]
        return moved

    for group in _texts(lm, examples, bench.budget):
        tokens = laid(lm, group)
        real = _real(group, tokens.ids.shape[1], lm.device)
        ways: list[Callable[[Tensor], Tensor]] = [
            lambda value: value,
            lambda value, real=real: torch.where(real[..., None], sae(value), value),
            lambda value, real=real: torch.where(real[..., None], mean.to(value), value),
            lambda value, real=real: other(value, real),
        ]
        for at, way in enumerate(ways):
            with edited(lm.model, {site: way}):
                sums[at] -= float(lm.logp(tokens)[tokens.answer].double().sum())
        count += int(tokens.answer.sum())
    clean, rebuilt, flat, shuffled = (sums / count).tolist()
    if not flat - clean >= 0.01:
        raise BadModel(
            f"the mean in the place of {site[0]} costs {flat - clean:.4f} nats a token, so there is no loss to recover; take a "
            "site that the model needs"
        )
    share, control = ((flat - x) / (flat - clean) for x in (rebuilt, shuffled))
    return Recovered(share, control, clean, rebuilt, flat, count)
