"""Where a shard's bytes go, one after the other: past the page cache where the file system allows it.

A shard is written once and not read again. Through the page cache it would push out the source that is being read, and
its pages have to be found and cleared first, which on many virtual machines takes longer than the disk
(docs/decisions/0009-direct-writes.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Protocol

from streamcollapse.storage.extents import PAGE_BYTES
from streamcollapse.storage.reader import private_memory

CHUNK_BYTES = 1 << 24
_SMALL_BYTES = 1 << 26  # a shard that is likely to be read again soon, and cheap to keep
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


class Sink(Protocol):
    """Takes a file's bytes from its beginning. Every method raises OSError where the disk fails."""

    def write(self, data: memoryview) -> None:
        """Append ``data`` (bytes), which may change afterwards."""

    def finish(self) -> None:
        """Return when everything is on the disk."""

    def close(self) -> None:
        """Let go of the file, finished or not."""


def open_sink(path: Path, num_bytes: int) -> Sink:
    """A sink for the existing file ``path``, which will take ``num_bytes``."""
    if num_bytes > _SMALL_BYTES and hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # a file system that only knows its page cache
            return DirectSink(os.open(path, os.O_WRONLY | os.O_DIRECT))
    return BufferedSink(os.open(path, os.O_WRONLY))


class BufferedSink:
    """Through the page cache, with the system told to begin writing at once instead of letting pages pile up."""

    def __init__(self, handle: int) -> None:
        self._handle, self._position = handle, 0

    def write(self, data: memoryview) -> None:
        for start in range(0, len(data), CHUNK_BYTES):
            piece = data[start : start + CHUNK_BYTES]
            _write_at(self._handle, piece, self._position)
            if sys.platform == "linux":
                where = (ctypes.c_longlong(self._position), ctypes.c_longlong(len(piece)))
                _libc().sync_file_range(self._handle, *where, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
            self._position += len(piece)

    def finish(self) -> None:
        os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)


class DirectSink:
    """Past the page cache: whole pages from two buffers in turn, one being filled while the other is written."""

    def __init__(self, handle: int) -> None:
        self._handle, self._position = handle, 0
        self._free = deque(private_memory(CHUNK_BYTES) for _ in range(2))
        self._filled = 0
        self._writing: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")

    def write(self, data: memoryview) -> None:
        start = 0
        while start < len(data):
            buffer = self._buffer()
            count = min(len(data) - start, CHUNK_BYTES - self._filled)
            buffer[self._filled : self._filled + count] = data[start : start + count]
            self._filled += count
            start += count
            if self._filled == CHUNK_BYTES:
                self._flush(CHUNK_BYTES)

    def _buffer(self) -> memoryview:
        """The buffer that is being filled, once it is not being written any more."""
        if len(self._writing) == len(self._free):
            self._writing.popleft().result()
        return memoryview(self._free[0])

    def _flush(self, count: int) -> None:
        piece = memoryview(self._free[0])[:count]
        self._writing.append(self._thread.submit(_write_at, self._handle, piece, self._position))
        self._free.rotate(-1)
        self._position += count
        self._filled = 0

    def finish(self) -> None:
        whole = self._filled // PAGE_BYTES * PAGE_BYTES
        tail = bytes(self._buffer()[whole : self._filled])
        self._flush(whole)
        while self._writing:
            self._writing.popleft().result()
        if tail:  # the last page is not whole, so it goes the other way
            import fcntl

            flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
            fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            _write_at(self._handle, memoryview(tail), self._position)
        os.fsync(self._handle)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        os.close(self._handle)


def _write_at(handle: int, data: memoryview, position: int) -> None:
    done = 0
    while done < len(data):  # a write may stop short, where the disk is almost full
        done += os.pwrite(handle, data[done:], position + done)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
