"""One file of a checkpoint, memory-mapped: views of its bytes, populated ahead of use and given back after it.

The kernel is called through ctypes, which lets other threads run meanwhile; the standard library's ``madvise`` does
not.
"""

import ctypes
import errno
import mmap
import os
import sys
from pathlib import Path

import numpy
import torch

from streamcollapse.errors import CheckpointError
from streamcollapse.storage.extents import Location

_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22  # linux/mman.h; since Linux 5.14
ATTEMPTS = 3  # at bytes that a disk or a network fails to bring
_CALL_BYTES = 1 << 25  # populated in one call: short enough to stop a thread between two of them


class MappedFile:
    """``path``, mapped privately: torch wants writable memory, and a stray write must not reach the file.

    Raises CheckpointError when it cannot be mapped or is not ``file_bytes`` long.
    """

    def __init__(self, path: Path, file_bytes: int) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be mapped: {error.strerror or error}") from error
        if len(self._mapped) != file_bytes:
            raise changed_size(path)
        self._address = torch.frombuffer(self._mapped, dtype=torch.uint8).data_ptr()
        if sys.platform == "linux":  # fewer and larger pages, where file system and kernel have them; advice only
            _madvise(self._address, file_bytes, _MADV_HUGEPAGE)

    def check_size(self) -> None:
        """Raise CheckpointError unless the file is as long as it was."""
        try:
            size = self.path.stat().st_size
        except OSError:  # what is mapped stays, whatever becomes of its name
            return
        if size != len(self._mapped):
            raise changed_size(self.path)

    def tensor(self, place: Location) -> torch.Tensor:
        """The tensor at ``place`` in this file: a view of it, unless the file does not align it."""
        info = place.info
        if info.num_elements == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        if place.start % info.dtype.itemsize == 0:
            flat = torch.frombuffer(self._mapped, dtype=info.dtype, count=place.num_elements, offset=place.start)
        else:  # written by a tool that does not align: one copy makes it usable
            count = place.end - place.start
            raw = torch.frombuffer(self._mapped, dtype=torch.uint8, count=count, offset=place.start)
            flat = raw.clone().view(info.dtype)
        return place.shaped(flat)

    def raw(self, start: int, end: int) -> memoryview:
        """Bytes ``[start, end)`` of the file, in place."""
        return memoryview(self._mapped)[start:end]

    @property
    def num_bytes(self) -> int:
        return len(self._mapped)

    def cached_bytes(self, start: int = 0, end: int | None = None) -> int | None:
        """How much of ``[start, end)`` (from a page boundary on) is in the page cache; None where it cannot be told."""
        length = (self.num_bytes if end is None else end) - start
        pages = numpy.zeros(-(-length // mmap.PAGESIZE), dtype=numpy.uint8)
        address, answer = ctypes.c_void_p(self._address + start), ctypes.c_void_p(pages.ctypes.data)
        if sys.platform != "linux" or _libc().mincore(address, ctypes.c_size_t(length), answer):
            return None
        return (
            int((numpy.frombuffer(pages, dtype=numpy.uint8) & 1).sum()) * mmap.PAGESIZE
        )  # the other bits are reserved

    def populate(self, start: int, end: int) -> None:
        """Read the pages of ``[start, end)`` now, instead of a few at a time as the computation runs into them.

        Raises CheckpointError where the disk fails or the file was cut short, which an access would die of.
        """
        position, failed = start // mmap.PAGESIZE * mmap.PAGESIZE, 0
        while position < end and sys.platform == "linux":
            step = min(end - position, _CALL_BYTES)
            failure = _madvise(self._address + position, step, _MADV_POPULATE_READ)
            if failure == errno.EINVAL:  # an older kernel: pages come when they are touched
                return
            if failure == errno.EFAULT and self.path.stat().st_size != len(self._mapped):
                raise changed_size(self.path)
            failed = 0 if failure == 0 else failed + 1
            if failure not in (0, errno.EAGAIN, errno.EINTR) and failed == ATTEMPTS:
                raise CheckpointError(
                    f"{self.path}: byte {position}: cannot be read, {ATTEMPTS} times over: {os.strerror(failure)}"
                )
            position += step if failure == 0 else 0

    def give_back(self, start: int, end: int, drop_after_use: bool) -> None:
        """Let go of the whole pages of ``[start, end)``: of this process and, with ``drop_after_use``, of the page
        cache."""
        if end == len(self._mapped):
            end = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE  # nobody else is on the last page
        forget_pages(self._address + start, end - start)
        if drop_after_use:
            drop_from_cache(self.path, start, end)


def forget_pages(address: int, length: int) -> None:
    """Unmap the whole pages within ``length`` bytes from ``address`` of a mapped file; the next access maps them
    again."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + length) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and last > first:
        _madvise(first, last - first, _MADV_DONTNEED)


def drop_from_cache(path: Path, start: int, end: int) -> None:
    """Tell the kernel that it may forget ``[start, end)`` of ``path``; advice, so a refusal changes nothing."""
    if not hasattr(os, "posix_fadvise"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, start, end - start, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def changed_size(path: Path) -> CheckpointError:
    """The error for a file that is not as long as it was when it was opened."""
    return CheckpointError(f"{path}: the file changed size while it was in use; start again")


def about_to_change(path: Path) -> CheckpointError:
    """The error for a file that another program waits to write to."""
    return CheckpointError(f"{path}: another program is about to change it; start again once it has")


def _madvise(address: int, length: int, advice: int) -> int:
    """0, or the error number."""
    libc = _libc()
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(advice)) == 0:
        return 0
    return ctypes.get_errno()


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
