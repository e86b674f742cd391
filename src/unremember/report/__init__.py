"""Scores -> a report that a sceptic can check: report.json, one page of HTML, and a model card.  No torch here."""

from __future__ import annotations

import json
from pathlib import Path

from unremember.errors import BadFolder
from unremember.folder import write_text
from unremember.report.build import build

# not bound as `html` and `card`: those names are the modules'
from unremember.report.card import card as model_card
from unremember.report.html import html as page

__all__ = ["SCHEMA", "build", "model_card", "page", "read", "write", "write_card"]

SCHEMA = "unremember.report/1"


def write(report: dict, folder: Path) -> Path:
    """Write report.json, then report.html, each atomically; returns the page.  Should it fail, the numbers are safe."""
    write_text(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    path = folder / "report.html"
    write_text(path, page(report))
    return path


def read(folder: Path) -> dict:
    """The report of a run folder; BadFolder where there is none, or one that this version cannot read."""
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BadFolder(f"{path} does not exist; name the folder of a finished run") from None
    except OSError as error:
        raise BadFolder(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadFolder(f"{path} is not valid JSON ({error}); run the report again, or restore the file") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise BadFolder(f"{path} has the schema {schema!r}, and this version of unremember reads {SCHEMA!r} only")
    return report


def write_card(folder: Path) -> Path | None:
    """Put the verdict into model/README.md, where there is a model to describe; returns its path."""
    if not (folder / "model").is_dir():
        return None
    report = read(folder)
    path = folder / "model" / "README.md"
    base = report["run"]["model"]
    write_text(path, model_card(report, license="apache-2.0" if base.startswith("smollm2") else "", base=base))
    return path
