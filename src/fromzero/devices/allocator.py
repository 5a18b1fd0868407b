"""The allocator: memory that was freed is kept for the next step instead of going back to the system and coming again.

A training step frees and takes the same large blocks again and again. glibc gives blocks above its threshold, and the
top of its heap, back to the system each time; the next step then pays a page fault for every 4 kB.
source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
"""

from __future__ import annotations

import ctypes
import gc
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more on 64 bits
_TRIM_NEVER = 2**31 - 1  # bytes


def has_glibc() -> bool:
    """Whether this process's allocator can be told so."""
    return platform.libc_ver()[0] == "glibc"


def keep_freed_memory() -> None:
    """Tell it, for the whole process; no number that is computed changes by it."""
    if has_glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, _TRIM_NEVER)


def give_back_memory(*, collect: bool = True) -> None:
    """Hand what is free back to the system; collect what circles hold before, for models that were looked at are large."""
    if collect:
        gc.collect()
    if has_glibc():
        ctypes.CDLL(None).malloc_trim(0)
