"""Where a shard's bytes go, one after the other: past the page cache where the file system allows it.

A shard is written once and not read again. Through the page cache it would push out the source that is being read, and
its pages have to be found and cleared first, which on many virtual machines takes longer than the disk
(docs/decisions/0009-direct-writes.md).
"""

import contextlib
import ctypes
import os
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from streamcollapse.storage.extents import PAGE_BYTES
from streamcollapse.storage.reader import private_memory

CHUNK_BYTES = 1 << 24
_SMALL_BYTES = 1 << 26  # a shard that is likely to be read again soon, and cheap to keep
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


class Sink:
    """Takes a file's bytes from its beginning: into two buffers in turn, one being filled while the other is written.

    ``direct``: ``handle`` was opened to write past the page cache. If not, the system is told to begin writing at once
    instead of letting pages pile up. Every method raises OSError where the disk fails.
    """

    def __init__(self, handle: int, direct: bool) -> None:
        self._handle, self._position, self.is_direct = handle, 0, direct
        self._free = deque(private_memory(CHUNK_BYTES) for _ in range(2))
        self._filled = 0
        self._writing: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")

    def write(self, data: memoryview) -> None:
        """Append ``data`` (bytes), which may change afterwards."""
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
        self._writing.append(self._thread.submit(self._write_at, piece, self._position))
        self._free.rotate(-1)
        self._position += count
        self._filled = 0

    def _write_at(self, data: memoryview, position: int) -> None:
        done = 0
        while done < len(data):  # a write may stop short, where the disk is almost full
            done += os.pwrite(self._handle, data[done:], position + done)
        if sys.platform == "linux" and not self.is_direct:
            where = (ctypes.c_longlong(position), ctypes.c_longlong(len(data)))
            ctypes.CDLL(None).sync_file_range(self._handle, *where, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))

    def finish(self) -> None:
        """Return when everything is on the disk."""
        whole = self._filled // PAGE_BYTES * PAGE_BYTES
        tail = bytes(self._buffer()[whole : self._filled])
        self._flush(whole)
        while self._writing:
            self._writing.popleft().result()
        if tail and self.is_direct:  # the last page is not whole, so it goes the other way
            import fcntl

            flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
            fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._write_at(memoryview(tail), self._position)
        os.fsync(self._handle)

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        os.close(self._handle)


def open_sink(path: Path, num_bytes: int) -> Sink:
    """A sink for the existing file ``path``, which will take ``num_bytes``."""
    if num_bytes > _SMALL_BYTES and hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # a file system that only knows its page cache
            return Sink(os.open(path, os.O_WRONLY | os.O_DIRECT), direct=True)
    return Sink(os.open(path, os.O_WRONLY), direct=False)
