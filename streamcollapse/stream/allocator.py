"""Keeps freed memory from lingering: large blocks go straight back to the system.

glibc raises its threshold for mapped blocks to 32 MiB as soon as a large block is freed; activations then come from the
heap, whose holes stay resident. A fixed threshold makes the resident memory of a pass flat and repeatable
(docs/decisions/0006-allocator.md has the measurement).
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache

_M_MMAP_THRESHOLD = -3  # from malloc.h
_THRESHOLD_BYTES = 1 << 20


@cache
def return_large_blocks() -> bool:
    """Set the threshold for this process, once. Returns whether the allocator took it; elsewhere nothing changes."""
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES))
