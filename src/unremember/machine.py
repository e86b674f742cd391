"""The computer: memory that is kept rather than handed back.

Every step allocates and frees the same few gigabytes.  By default the C library returns them to the system and faults them
in again page by page; where pages are dear (virtual machines) that was seen to cost more than the arithmetic.
"""

from __future__ import annotations

import ctypes
import sys

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
