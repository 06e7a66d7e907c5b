"""Keeps freed memory from lingering, without giving it back to the system after every operation.

glibc raises its threshold for mapped blocks, and with it the amount that may stay free at the top of the heap, whenever
a large block is freed: how much stays resident then depends on what happened before. Fixed thresholds make the resident
memory of a pass flat and repeatable. They are large enough that activations come from the heap: mapping each of them
anew costs a page fault for every 4 KiB of every activation (docs/decisions/0006-allocator.md has the measurements).
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_MAPPED_BYTES = 6 << 20  # blocks of at least this size are mapped, and leave when they are freed
_TOP_BYTES = 8 << 20  # free memory at the top of the heap that is kept for the next activation


@cache
def steady_heap() -> bool:
    """Set the thresholds for this process, once. Returns whether the allocator took them; elsewhere nothing changes."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, _TOP_BYTES))
