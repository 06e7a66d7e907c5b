"""A checkpoint directory as a TensorSource: memory-mapped, read in place, never materialised; and what tells it from
others without reading it whole (docs/decisions/0002-fingerprint.md).

Knows shards, names and bytes. Knows nothing of decoder layers, configs or devices' speed.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from streamcollapse.errors import CheckpointError
from streamcollapse.storage.extents import Location
from streamcollapse.storage.header import ShardHeader, StoredTensor, read_header
from streamcollapse.storage.index import SUFFIX, find_shards, is_file
from streamcollapse.storage.mapping import MappedFile
from streamcollapse.storage.placed import PlacedTensors
from streamcollapse.storage.torchfile import read_torch_header

_PAGES_PER_SHARD = 16
_SAMPLED_PAGE = 4096
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


def check_unchanged(shards: Sequence[ShardHeader]) -> None:
    """Raise CheckpointError if one of ``shards`` is not the file any more that was opened."""
    for header in shards:
        try:
            about = header.path.stat()
        except OSError as error:
            raise CheckpointError(f"{header.path}: is gone; start again once it is back") from error
        if (about.st_size, about.st_mtime_ns) != (header.file_bytes, header.mtime_ns):
            raise CheckpointError(f"{header.path}: was changed while it was in use; start again")


def _samples(header: ShardHeader, every: int) -> list[tuple[int, int]]:
    """Offset and length of each sample, in the order of the file."""
    first = 8 + len(header.raw)
    step = max((header.file_bytes - first) // _PAGES_PER_SHARD, 1)
    pages = [(start, _SAMPLED_PAGE) for start in range(first, header.file_bytes, step)]
    tensors = sorted(header.tensors.values(), key=lambda tensor: tensor.start)[::every]
    middles = [(tensor.start + tensor.end - _TENSOR_BYTES) // 2 for tensor in tensors]
    return sorted([*pages, *((max(middle, 0), _TENSOR_BYTES) for middle in middles)])


class Checkpoint(PlacedTensors):
    """Tensors of a checkpoint directory by name; headers are read at once, weights only when asked for.

    Raises CheckpointError on opening when a shard is missing, truncated or contradicts the index.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._root = self.directory.absolute()  # files are opened when they are needed, wherever the program then is
        shards, weight_map = find_shards(self.directory)
        refuse_links_that_leave(self.directory)
        self._headers: dict[str, ShardHeader] = {}
        self._tensors: dict[str, tuple[str, StoredTensor]] = {}
        self._maps: dict[str, MappedFile] = {}
        for shard in shards:
            self._add(shard)
        for name, shard in (weight_map or {}).items():
            if self._tensors.get(name, (None,))[0] != shard:
                raise CheckpointError(
                    f"{self.directory}: the index says that tensor {name} is in "
                    f"{shard}, which has none of this name; index and shard do not belong together"
                )

    def _add(self, shard: str) -> None:
        path = self.directory / shard
        if not is_file(path):
            raise CheckpointError(f"{path}: the shard is missing; download it again")
        header = read_header(path) if path.suffix == SUFFIX else read_torch_header(path)
        for name, tensor in header.tensors.items():
            if name in self._tensors:
                other = self._tensors[name][0]
                raise CheckpointError(f"{path}: tensor {name} is also in {other}")
            self._tensors[name] = (shard, tensor)
        self._headers[shard] = header

    @property
    def names(self) -> Sequence[str]:
        """Every tensor name, by shard and then by offset: the order in which the disk reads fastest."""
        return sorted(self._tensors, key=lambda name: (self._tensors[name][0], self._tensors[name][1].start))

    @property
    def shards(self) -> Sequence[ShardHeader]:
        """The shards' headers, sorted by file name."""
        return [self._headers[name] for name in sorted(self._headers)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(tensor.info.num_bytes for _, tensor in self._tensors.values())

    @property
    def num_parameters(self) -> int:
        """Elements of all floating-point tensors."""
        infos = (tensor.info for _, tensor in self._tensors.values())
        return sum(info.num_elements for info in infos if info.dtype.is_floating_point)

    @property
    def weights_dtype(self) -> torch.dtype:
        """The floating-point dtype that most of the bytes have."""
        totals = Counter[torch.dtype]()
        for _, tensor in self._tensors.values():
            totals[tensor.info.dtype] += tensor.info.num_bytes if tensor.info.dtype.is_floating_point else 0
        return max(totals, key=lambda dtype: totals[dtype]) if any(totals.values()) else torch.float32

    def locate(self, name: str) -> Location:
        """Where the bytes of ``name`` are; KeyError if there is none."""
        shard, tensor = self._tensors[name]
        return Location(self._root / shard, tensor.start, tensor.info, tensor.strides)

    def mapped(self, place: Location) -> MappedFile:
        """The mapping of the shard that ``place`` lies in."""
        return self.mapping(place.path.name)

    def mapping(self, shard: str) -> MappedFile:
        """The mapping of the file ``shard``, made when it is first asked for."""
        if shard not in self._maps:
            self._maps[shard] = MappedFile(self._root / shard, self._headers[shard].file_bytes)
        return self._maps[shard]

    def mappings(self) -> list[MappedFile]:
        """Every shard's mapping."""
        return [self.mapping(shard) for shard in sorted(self._headers)]

    def fingerprint(self) -> str:
        """What tells this checkpoint from others, in hexadecimal; reads a few samples. Raises CheckpointError."""
        return fingerprint(self.shards)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a shard is not the file any more that was opened."""
        check_unchanged(self.shards)

    def state(self, *beside: str) -> str:
        """What changes when the weights' files do, or the files ``beside`` them, in hexadecimal."""
        return state(self.shards, [self._root / name for name in beside])


def refuse_links_that_leave(directory: Path) -> None:
    """Raise CheckpointError for a file of ``directory``, or of a folder in it, that is a link to somewhere outside.

    The Hub's cache consists of links, from a snapshot to the files of the same model beside it: those may be followed.
    """
    try:
        inside = directory.resolve()
        blobs = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else inside
        for entry in [*directory.iterdir(), *directory.glob("*/*")]:
            if not entry.is_symlink():
                continue
            target = entry.resolve()
            if target.exists() and inside not in target.parents and blobs not in target.parents:
                raise CheckpointError(
                    f"{entry}: is a link to {target}, outside the checkpoint's directory; put the file itself there"
                )
    except (OSError, RuntimeError) as error:  # a loop of links, a directory closed to us
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{directory}: cannot be read: {reason}") from error
