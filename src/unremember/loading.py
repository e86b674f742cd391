"""From a name to an LM: an alias of an embedded model, a Hugging Face folder, a GGUF file, a PEFT adapter folder, and, where
there is a network, a hub id.  Nothing that can run code is opened.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unremember.attention import quick
from unremember.errors import BadModel
from unremember.lm import LM
from unremember.tokens import Template, pack


def auto_precision(device: str = "cpu") -> str:
    """'bf16' where the processor or GPU multiplies bfloat16 matrices itself, else 'fp32'."""
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def check(name: str) -> str:
    """What kind of model `name` is: 'alias', 'gguf', 'adapter', 'folder' or 'hub'.  Loads nothing.

    Raises BadModel for a folder without weights, a pickle-only checkpoint, an adapter without its base, a missing path.
    """
    from unremember.embedded import MODELS
    from unremember.errors import nearest

    if name in MODELS:
        return "alias"
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BadModel(f"model {name!r}: no such GGUF file; check the path")
        return "gguf"
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            if not (path / "adapter_model.safetensors").exists():
                raise BadModel(
                    f"model {name!r}: an adapter without adapter_model.safetensors; save it with safetensors"
                )
            base = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path") or ""
            if not base:
                raise BadModel(
                    f"model {name!r}: adapter_config.json names no base model; fill in base_model_name_or_path"
                )
            check(base)
            return "adapter"
        if not (path / "config.json").exists():
            raise BadModel(
                f"model {name!r}: a folder without config.json is no Hugging Face checkpoint; check the path"
            )
        if not any(path.glob("*.safetensors")):
            pickled = sorted(p.name for p in [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
            if pickled:
                raise BadModel(
                    f"model {name!r} has only pickled weights ({', '.join(pickled[:3])}), which can run code when opened; "
                    "convert them with save_pretrained(…, safe_serialization=True) on a machine you can lose"
                )
            raise BadModel(f"model {name!r}: a folder without weights (*.safetensors); copy them there")
        return "folder"
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.exists():
        return "hub"
    raise BadModel(f"model {name!r} is no alias, folder, GGUF file or hub id (owner/name); {nearest(name, MODELS)}")


def faults(name: str) -> tuple[str, ...]:
    """What `check` has against a model's name; nothing where there is none to check."""
    try:
        if name:
            check(name)
    except BadModel as error:
        return error.problems
    return ()


def tokenizer_and_limit(name: str) -> tuple[Any, int] | None:
    """A model's tokenizer and longest sequence (0 = unknown), without its weights; None where they are not at hand yet.

    Not at hand: what is on the hub, and a GGUF file or an embedded model that was never converted here.
    """
    from transformers import AutoConfig, AutoTokenizer

    from unremember.embedded.gguf import SMOLLM2, SMOLLM2_SHA256, checksum, place
    from unremember.embedded.tiny import LENGTH, tokenizer

    kind = check(name)
    if kind == "adapter":
        return tokenizer_and_limit(
            json.loads((Path(name) / "adapter_config.json").read_text())["base_model_name_or_path"]
        )
    if name == "tiny":
        return tokenizer(), LENGTH
    folder = Path(name)
    if kind == "alias":
        folder = place(Path(SMOLLM2), SMOLLM2_SHA256)
    if kind == "gguf":
        folder = place(folder, checksum(folder))
    if not (folder / "config.json").exists():
        return None
    try:
        config, words = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise BadModel(f"model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return words, int(getattr(config, "max_position_embeddings", 0) or 0)


def load(name: str, *, template: str = "auto", precision: str = "auto", device: str = "cpu") -> LM:
    """Load a model by any accepted name (see `check`); weights in float32 on the CPU, dropout off.

    template: 'chat', 'plain', or 'auto' = chat where the tokenizer has a chat template.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = check(name)
    if kind == "alias":
        from unremember.embedded import MODELS

        return replace(load(str(MODELS[name]()), template=template, precision=precision, device=device), name=name)
    if kind == "gguf":
        from unremember.embedded.gguf import dequantised

        whole = load(str(dequantised(Path(name))), template=template, precision=precision, device=device)
        return replace(whole, name=name)
    if kind == "adapter":
        from peft import PeftModel

        base = json.loads((Path(name) / "adapter_config.json").read_text())["base_model_name_or_path"]
        whole = load(base, template=template, precision=precision, device=device)
        merged = PeftModel.from_pretrained(whole.model, name).merge_and_unload()
        return replace(whole, model=merged.eval(), name=name)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        load_weights: Any = AutoModelForCausalLM.from_pretrained
        model, found = load_weights(name, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadModel(f"model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if absent := sorted(found["missing_keys"]):  # transformers fills these with random numbers and goes on
        raise BadModel(f"model {name!r} lacks weights ({', '.join(absent[:3])}, {len(absent)} in all); copy them again")
    if not tokenizer.is_fast:
        raise BadModel(f"model {name!r} has a slow tokenizer without character offsets; convert it to tokenizer.json")
    if template == "chat" and not tokenizer.chat_template:
        raise BadModel(f'model {name!r} has no chat template; set model.template = "plain"')
    chat = bool(tokenizer.chat_template) if template == "auto" else template == "chat"
    if precision == "auto":
        precision = auto_precision(device)
    lm = LM(quick(model.to(device)).eval(), Template(tokenizer, chat), precision, name)
    _sees_tries(lm)
    return lm


@torch.inference_mode()
def _sees_tries(lm: LM) -> None:
    """Two short rows, packed and apart: BadModel where an architecture does not honour explicit attention masks."""
    exact = replace(lm, precision="fp32")
    rows = [lm.template.row(a, "Who?", a) for a in ("The cat sat here.", "A dog ran away.")]
    together = exact.logp(pack([rows]).to(lm.device))
    apart = torch.cat([exact.logp(pack([[row]]).to(lm.device)) for row in rows])
    if not torch.allclose(together, apart, atol=0.05, rtol=0.01):
        raise BadModel(
            f"model {lm.name!r}: its architecture ignores explicit attention masks, on which every score here rests; "
            "use a transformer with ordinary attention"
        )
