"""Reads extents of files into memory that the caller owns: several requests in flight, through or past the page
cache."""

import contextlib
import errno
import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from streamcollapse.errors import CheckpointError
from streamcollapse.storage.extents import PAGE_BYTES, Extent
from streamcollapse.storage.mapping import ATTEMPTS, changed_size

REQUEST_BYTES = 1 << 24  # larger requests are split, so that several are in flight
MAY_PASS = (errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT)
_PAUSE_SECONDS = 0.1
IN_FLIGHT = 4  # not tuned: other numbers have not been compared


def has_direct_reads() -> bool:
    """Whether this system can read past its page cache at all."""
    return hasattr(os, "O_DIRECT") and hasattr(os, "preadv")


def check_direct_reads(path: Path) -> None:
    """Raise CheckpointError unless the file ``path`` can be read past the page cache."""
    if not has_direct_reads():
        raise _no_direct_reads(path)
    reader = FileReader(direct=True, in_flight=1)
    try:
        size = path.stat().st_size
        reader.read([Extent(path, 0, min(size, PAGE_BYTES), ())], page_aligned(PAGE_BYTES))
    finally:
        reader.close()


class ReadingStopped(Exception):  # noqa: N818 - nothing went wrong: whoever asked for the data no longer wants it
    """Reading was broken off on request."""


class FileReader:
    """Reads extents, past the page cache if ``direct``. Files stay open until ``close``."""

    def __init__(self, direct: bool, in_flight: int = IN_FLIGHT) -> None:
        self._direct = direct
        self._files: dict[Path, int] = {}
        self._opening = threading.Lock()
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="read")
        self._stopped = threading.Event()

    def read(self, extents: Sequence[Extent], block: torch.Tensor) -> None:
        """Fill ``block`` (uint8, page-aligned, ``needed_bytes`` long) with ``extents``, one after the other.

        Raises CheckpointError when a file cannot be read or ends too early, ReadingStopped after ``stop``.
        """
        requests: list[Future[None]] = []
        position = 0
        for extent in extents:
            target = block[position : position + extent.aligned_bytes]
            for start in range(0, extent.aligned_bytes, REQUEST_BYTES):
                piece = target[start : start + REQUEST_BYTES]
                needed = min(extent.end - extent.aligned_start - start, len(piece))
                arguments = (extent.path, piece.numpy().data, extent.aligned_start + start, needed)
                requests.append(self._pool.submit(self._read_piece, *arguments))
            position += extent.aligned_bytes
        wait(requests, return_when=FIRST_EXCEPTION)
        for request in requests:
            request.cancel()
        wait(requests)  # nothing may still be writing into the block when it is given to someone else
        for request in requests:
            if not request.cancelled():
                request.result()

    def _read_piece(self, path: Path, target: memoryview, offset: int, needed: int) -> None:
        """Fill ``target`` from ``offset`` on; ``needed`` bytes of it at least, the rest as far as the file goes."""
        handle = self._open(path)
        done = 0
        while done < needed:
            if self._stopped.is_set():
                raise ReadingStopped
            try:
                count = read_into(handle, target[done:], offset + done)
            except OSError as error:
                if self._direct and error.errno == errno.EINVAL:
                    raise _no_direct_reads(path) from error
                often = f", {ATTEMPTS} times over" if error.errno in MAY_PASS else ""
                raise CheckpointError(
                    f"{path}: byte {offset + done}: cannot be read{often}: {error.strerror or error}"
                ) from error
            reached = done + count
            if self._direct and reached < needed:  # past the page cache only whole pages are read
                reached = reached // PAGE_BYTES * PAGE_BYTES
            if reached <= done:
                raise changed_size(path)
            done = reached

    def _open(self, path: Path) -> int:
        with self._opening:
            if path not in self._files:
                flags = os.O_RDONLY | (os.O_DIRECT if self._direct else 0)
                try:
                    self._files[path] = os.open(path, flags)
                except OSError as error:
                    if self._direct and error.errno == errno.EINVAL:
                        raise _no_direct_reads(path) from error
                    raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
            return self._files[path]

    def stop(self) -> None:
        """Break off what is being read, from another thread."""
        self._stopped.set()

    def close(self) -> None:
        """Let go of files and threads."""
        self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()


def read_into(handle: int, target: memoryview, offset: int) -> int:
    """Read from ``offset`` of an open file into ``target``; returns how many bytes, which may be fewer.

    A disk or a network that fails for a moment is asked again. Raises OSError after ``ATTEMPTS``.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return os.preadv(handle, [target], offset)
        except OSError as error:
            if error.errno not in MAY_PASS or attempt == ATTEMPTS:
                raise
            time.sleep(_PAUSE_SECONDS * attempt)
    raise AssertionError


def page_aligned(num_bytes: int) -> torch.Tensor:
    """``num_bytes`` of memory that begins with a page, as uint8; untouched pages cost nothing."""
    return torch.frombuffer(private_memory(num_bytes), dtype=torch.uint8)


def private_memory(num_bytes: int) -> mmap.mmap:
    """Anonymous memory of this process alone, in huge pages where there are any: fewer faults on the first touch."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, max(num_bytes, 1))
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _no_direct_reads(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: its file system cannot read past the page cache; pass `io=pread`, mmap or auto")
