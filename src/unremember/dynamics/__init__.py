"""How a model memorises while it is trained, and what is left after it forgets by itself: the measuring rod for unlearning.

`study.run` trains small models and writes numbers, `claims.judge` says which of the paper's findings hold there,
`page.page` draws them; `own.own` follows a training of one's own, `checkpoints.follow` one of somebody else.
Nothing heavy is imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unremember.folder import write_json, write_text

__all__ = ["write", "write_curves"]


def write(result: dict[str, Any], folder: Path) -> Path:
    """dynamics.html beside dynamics.json; returns the page."""
    from unremember.dynamics.page import page

    path = folder / "dynamics.html"
    write_text(path, page(result))
    return path


def write_curves(title: str, texts: dict[str, Any], left: dict[str, Any], machine: str, folder: Path) -> Path:
    """curves.json and curves.html of one training; returns the page."""
    from unremember.dynamics.page import follow_page

    write_json(folder / "curves.json", {"title": title, "texts": texts, "forgetting": left, "machine": machine})
    path = folder / "curves.html"
    write_text(path, follow_page(title, texts, left, machine))
    return path
