"""The computer: memory that is kept rather than handed back, and how much it was at most.

Every step allocates and frees the same few gigabytes.  By default the C library returns them to the system and faults them
in again page by page; where pages are dear (virtual machines) that was seen to cost more than the arithmetic.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's names for mallopt


def keep_memory() -> bool:
    """Let the C library keep what is freed, for the life of this process; whether it agreed (glibc only)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes.

    Linux hands ru_maxrss on to what a process starts, so that a child of a large parent seems large: its own is in /proc.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
