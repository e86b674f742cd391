"""unremember: make a language model forget, attack the result, and report a verdict that a sceptic can check.

Public names are looked up on first use, so that importing the package loads neither torch nor transformers.
"""

from importlib import import_module

__version__ = "0.1.0"

_WHERE = {
    "Bench": "unremember.bench",
    "Corpus": "unremember.corpus",
    "Example": "unremember.corpus",
    "LM": "unremember.lm",
    "Plan": "unremember.train",
    "Request": "unremember.request",
    "Rule": "unremember.score",
    "Score": "unremember.score",
    "Sites": "unremember.sites",
    "UnrememberError": "unremember.errors",
    "Verdict": "unremember.score",
    "load": "unremember.loading",
    "execute": "unremember.run",
}

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'unremember' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
