"""Writes a TensorSource as safetensors shards whose every byte is placed before the first is written.

Names, shapes and dtypes are known in advance, so each shard's header goes first, its space is reserved
(a full disk is found before any work), and tensors stream through one at a time. Memory: one tensor.

A shard is written once and not read again, so its bytes go past the page cache where the file system allows it. Through
it they would push out the source that is being read, and pages have to be found and cleared first, which on many
virtual machines takes longer than the disk (docs/decisions/0009-direct-writes.md).
"""

import contextlib
import ctypes
import errno
import json
import os
import struct
import sys
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from streamcollapse.storage.disk import Digest, disk_errors, write_whole
from streamcollapse.storage.extents import PAGE_BYTES
from streamcollapse.storage.header import DTYPE_NAMES
from streamcollapse.storage.index import INDEX_FILE, SINGLE_FILE
from streamcollapse.storage.reader import private_memory
from streamcollapse.storage.source import TensorSource, check_finite

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


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be written: file name, tensors in file order, header bytes with their length prefix."""

    file_name: str
    names: tuple[str, ...]
    header: bytes
    data_bytes: int

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.data_bytes


def plan_shards(source: TensorSource, max_shard_bytes: int) -> list[ShardPlan]:
    """Distribute the tensors of ``source``, in its order, over shards of at most ``max_shard_bytes`` of data.

    A tensor larger than the limit gets a shard of its own.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name in source.names:
        num_bytes = source.info(name).num_bytes
        if groups[-1] and filled + num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += num_bytes
    if len(groups) == 1:
        return [_shard(source, SINGLE_FILE, groups[0])]
    total = len(groups)
    return [_shard(source, f"model-{i:05d}-of-{total:05d}.safetensors", g) for i, g in enumerate(groups, 1)]


def _shard(source: TensorSource, file_name: str, names: Sequence[str]) -> ShardPlan:
    # Widest dtype first keeps every tensor aligned to its own size, as the format's own writer does.
    ordered = tuple(sorted(names, key=lambda name: -source.info(name).dtype.itemsize))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in ordered:
        info = source.info(name)
        end = position + info.num_bytes
        entries[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return ShardPlan(file_name, ordered, struct.pack("<Q", len(header)) + header, position)


@dataclass(frozen=True)
class Writing:
    """What else happens while shards are written.

    The shards in ``skip`` are there already. ``on_shard(file_name, sha256)`` is called once a shard is on the disk,
    ``on_written(name, num_bytes)`` after each tensor, which is read and written inside of ``turn()``, and shown to
    ``check`` in between: by default NaN and infinite weights raise NonFiniteError.
    """

    on_written: Callable[[str, int], None] = lambda name, num_bytes: None
    on_shard: Callable[[str, str], None] = lambda name, sha256: None
    turn: Callable[[], AbstractContextManager[None]] = nullcontext
    check: Callable[[str, torch.Tensor], None] = check_finite
    skip: Collection[str] = ()


def write_shards(
    source: TensorSource,
    shards: Sequence[ShardPlan],
    directory: Path,
    device: torch.device,
    writing: Writing = Writing(),
) -> None:
    """Write ``shards`` of ``source`` into ``directory``, fsync each, and the index last where there are several.

    ``device`` is where ``source`` computes what it must compute. Raises OutputError when the disk is full, and what
    ``writing.check`` raises.
    """
    left = [shard for shard in shards if shard.file_name not in writing.skip]
    for shard in left:
        _reserve(directory / shard.file_name, shard)
    for shard in left:
        path, digest = directory / shard.file_name, Digest()
        with closing(digest), disk_errors(path), closing(open_sink(path, shard.file_bytes)) as sink:
            digest.update(memoryview(shard.header))
            sink.write(memoryview(shard.header))
            for name in shard.names:
                with writing.turn():
                    tensor = source.read(name, device)
                    writing.check(name, tensor)
                    data = _bytes_of(tensor)
                    hashed = digest.update(data)
                    sink.write(data)
                    hashed.result()
                writing.on_written(name, source.info(name).num_bytes)
            sink.finish()
        writing.on_shard(shard.file_name, digest.close())
    if len(shards) > 1:
        total = sum(shard.data_bytes for shard in shards)
        weight_map = {name: shard.file_name for shard in shards for name in shard.names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_whole(directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _reserve(path: Path, shard: ShardPlan) -> None:
    with disk_errors(path, needed=shard.file_bytes), path.open("wb") as file:
        file.write(shard.header)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, shard.file_bytes)
            except OSError as error:
                # Some network file systems cannot reserve; there the write itself finds a full disk.
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        else:
            file.truncate(shard.file_bytes)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
