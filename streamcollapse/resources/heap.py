"""Keeps freed memory from lingering, without giving back to the system what the next operation wants again.

glibc raises its threshold for mapped blocks, and with it the amount that may stay free at the top of the heap, whenever
a large block is freed: how much stays resident then depends on what happened before. Fixed thresholds make the resident
memory of a pass flat and repeatable. While layers run they are large enough that activations come from the heap:
mapping each of them anew costs a page fault for every 4 KiB of every activation (docs/decisions/0006-allocator.md has
the measurements).
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_MAPPED_BYTES = 6 << 20  # blocks of at least this size are mapped, and leave when they are freed
_TOP_BYTES = 8 << 20  # free memory at the top of the heap that is kept for the next activation
_LARGEST_MAPPED, _LARGEST_TOP = 32 << 20, 256 << 20  # glibc takes no larger threshold; a bound of our own


def steady_heap(activations: int = 0) -> bool:
    """Set the thresholds for this process, so that ``activations`` bytes, of which one takes a quarter at most, come
    from the heap. Returns whether the allocator took them; elsewhere nothing changes."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    mapped = min(max(_MAPPED_BYTES, activations // 4 + 4096), _LARGEST_MAPPED)
    top = min(max(_TOP_BYTES, activations), _LARGEST_TOP)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, mapped)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, top))


@contextmanager
def heap_for(activations: int) -> Iterator[None]:
    """While the body runs, the ``activations`` bytes of a call of a layer come from the heap; then they leave it."""
    steady_heap(activations)
    try:
        yield
    finally:
        if steady_heap():
            ctypes.CDLL(None).malloc_trim(0)
