"""Files that are never half written, and folders that know whose they are.  No torch here."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from unremember.errors import BadFolder

MARK = "unremember.json"


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """`value` as JSON, atomically; a number that is not finite is our own mistake and raises ValueError."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict | None:
    """The JSON in `path`, None where there is no such file, BadFolder where it was damaged: we never leave one half written."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadFolder(f"{path} is no JSON ({error}); remove it and run again, what it held is made again") from error


@contextmanager
def whole(folder: Path) -> Generator[Path]:
    """Yield an empty sibling to fill; it becomes `folder`, all at once, when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield fresh
        fresh.chmod(0o755)
        stale = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(stale, ignore_errors=True)
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
        shutil.rmtree(stale, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def fingerprint(*parts: object) -> str:
    """A short content hash of plain values (anything JSON can write, with dataclasses as their repr)."""
    return sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:16]


def claim(folder: Path, need_bytes: int = 0) -> None:
    """Make `folder` a run folder of ours, or raise BadFolder: a stranger's files, no permission, or no space."""
    if folder.exists() and not folder.is_dir():
        raise BadFolder(f"{folder} is a file, not a folder; choose another with --out DIR")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise BadFolder(f"{folder} holds files that are not ours (no {MARK} in it); choose an empty one with --out DIR")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MARK, {"what": "an unremember run folder"})
    except OSError as error:
        raise BadFolder(f"cannot write in {folder}: {error.strerror}; choose another with --out DIR") from error
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise BadFolder(
            f"{folder} has {free / 1e9:.1f} GB free and this run needs about {need_bytes / 1e9:.1f} GB; "
            "free some space or choose another folder with --out DIR"
        )


def cache() -> Path:
    """Where dequantised and taught models are kept: $UNREMEMBER_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("UNREMEMBER_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "unremember"
