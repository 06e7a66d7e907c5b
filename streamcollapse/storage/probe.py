"""How fast a checkpoint's disk reads, and how much of the checkpoint is in memory already: short measurements.

What was read for a measurement was not in the page cache and is dropped from it again, but for what the system read
ahead.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from streamcollapse.errors import CheckpointError
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.extents import Extent
from streamcollapse.storage.mapping import drop_from_cache
from streamcollapse.storage.reader import FileReader, has_direct_reads, page_aligned

_PIECE_BYTES = 1 << 25


def cached_share(checkpoint: Checkpoint) -> float:
    """The share of the checkpoint's bytes that is in the page cache; 0 where the system does not tell."""
    pages = [(mapped.cached_bytes(), mapped.num_bytes) for mapped in checkpoint.mappings()]
    return sum(cached or 0 for cached, _ in pages) / max(sum(total for _, total in pages), 1)


def read_rate(checkpoint: Checkpoint, mode: str, num_bytes: int) -> float | None:
    """Bytes a second of cold reads in ``mode`` (mmap, pread or direct) of about ``num_bytes``, spread over the shards.

    None where the file system refuses, or where there is nothing cold to read.
    """
    if mode == "direct" and not has_direct_reads():
        return None
    pieces = list(_cold_pieces(checkpoint, num_bytes, skip={"mmap": 0, "pread": 1, "direct": 2}[mode]))
    if not pieces:
        return None
    total = sum(piece.end - piece.start for piece in pieces)
    block = page_aligned(_PIECE_BYTES).fill_(0)
    reader = None if mode == "mmap" else FileReader(mode == "direct")
    start = time.perf_counter()
    try:
        for piece in pieces:
            if reader is None:
                checkpoint.mapping(piece.path.name).populate(piece.start, piece.end)
            else:
                reader.read([piece], block)
    except CheckpointError:
        if mode == "direct":
            return None
        raise
    finally:
        elapsed = time.perf_counter() - start
        if reader is not None:
            reader.close()
        for piece in pieces:
            checkpoint.mapping(piece.path.name).give_back(piece.start, piece.end, drop_after_use=True)
    return total / max(elapsed, 1e-9)


def write_rate(directory: Path, num_bytes: int) -> float | None:
    """Bytes a second that reach the disk of ``directory``, by a file without a name that is gone afterwards; None where
    none can be made."""
    piece = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            start = time.perf_counter()
            for _ in range(num_bytes >> 20):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            return num_bytes / max(time.perf_counter() - start, 1e-9)
    except OSError:
        return None


def _cold_pieces(checkpoint: Checkpoint, num_bytes: int, skip: int) -> Iterator[Extent]:
    """Stretches of shards that are not in the page cache, at places that differ for each ``skip`` of 0, 1, 2."""
    shards = checkpoint.shards
    each = max(num_bytes // _PIECE_BYTES // max(len(shards), 1), 1)
    for shard in shards:
        mapped = checkpoint.mapping(shard.path.name)
        places = range(0, shard.file_bytes - _PIECE_BYTES, _PIECE_BYTES)[skip::3]
        cold = (start for start in places if mapped.cached_bytes(start, start + _PIECE_BYTES) == 0)
        for start, _ in zip(cold, range(each), strict=False):
            yield Extent(mapped.path, start, start + _PIECE_BYTES, ())


def forget(checkpoint: Checkpoint) -> None:
    """Drop the checkpoint from the page cache, so that the next read comes from the disk."""
    for mapped in checkpoint.mappings():
        mapped.give_back(0, mapped.num_bytes, drop_after_use=True)
        drop_from_cache(mapped.path, 0, mapped.num_bytes)
