"""What comes with the package: models by alias, a dossier of fictional people, world knowledge and prose.

Each alias leads to a function that returns a Hugging Face folder, made once in the cache.
"""

from __future__ import annotations

from pathlib import Path


def _smollm2() -> Path:
    from unremember.embedded.gguf import smollm2

    return smollm2()


def _tiny() -> Path:
    from unremember.embedded.tiny import tiny

    return tiny()


MODELS = {"smollm2-135m": _smollm2, "tiny": _tiny}
