"""What tells one checkpoint from another without reading it whole (docs/decisions/0002-fingerprint.md)."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from streamcollapse.errors import CheckpointError
from streamcollapse.storage.header import ShardHeader
from streamcollapse.storage.index import is_file

_PAGES_PER_SHARD = 16
_PAGE_BYTES = 4096
_MOST_TENSORS = 4096  # of a checkpoint; more are sampled evenly
_TENSOR_BYTES = 256


def fingerprint(shards: Sequence[ShardHeader]) -> str:
    """sha256 over every shard's name, size and header and samples of its data, in hexadecimal: pages spread over the
    file, and the middle of each tensor. Raises CheckpointError where a shard cannot be read."""
    digest = hashlib.sha256()
    every = -(-sum(len(header.tensors) for header in shards) // _MOST_TENSORS)
    for header in shards:
        digest.update(f"{header.path.name}\0{header.file_bytes}\0".encode())
        digest.update(header.raw)
        try:
            handle = os.open(header.path, os.O_RDONLY)
            try:
                for start, count in _samples(header, max(every, 1)):
                    digest.update(os.pread(handle, count, start))
            finally:
                os.close(handle)
        except OSError as error:
            raise CheckpointError(f"{header.path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def state(shards: Sequence[ShardHeader], beside: Sequence[Path] = ()) -> str:
    """sha256 over what changes when files do: size and time of modification of every shard, and the contents of the
    files ``beside`` them, in hexadecimal."""
    digest = hashlib.sha256()
    for header in shards:
        digest.update(f"{header.path.name}\0{header.file_bytes}\0{header.mtime_ns}\0".encode())
    for path in beside:
        if is_file(path):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _samples(header: ShardHeader, every: int) -> list[tuple[int, int]]:
    """Offset and length of each sample, in the order of the file."""
    first = 8 + len(header.raw)
    step = max((header.file_bytes - first) // _PAGES_PER_SHARD, 1)
    pages = [(start, _PAGE_BYTES) for start in range(first, header.file_bytes, step)]
    tensors = sorted(header.tensors.values(), key=lambda tensor: tensor.start)[::every]
    middles = [(tensor.start + tensor.end - _TENSOR_BYTES) // 2 for tensor in tensors]
    return sorted([*pages, *((max(middle, 0), _TENSOR_BYTES) for middle in middles)])
