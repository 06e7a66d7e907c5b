"""The header of a safetensors file: parsed strictly, since everything else trusts its offsets.

Format: 8 bytes little-endian header length, that many bytes of JSON ``{name: {dtype, shape, data_offsets}}``,
then the data, which the tensors cover without gap or overlap. We parse it ourselves rather than through the
``safetensors`` package because reads are planned by byte offset; the tests hold both parsers to the same verdicts.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamcollapse.errors import CheckpointError
from streamcollapse.storage.source import TensorInfo

POINTER = b"version https://git-lfs"  # what stands in a repository for a file that was not fetched
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a shard: ``start`` and ``end`` are byte offsets from the beginning of the file.

    ``strides`` (in elements) where its elements do not lie one after the other, the last dimension fastest.
    """

    info: TensorInfo
    start: int
    end: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ShardHeader:
    """Everything a shard says of itself: ``raw`` is that as stored. ``file_bytes`` and ``mtime_ns`` are the size of the
    file and when it was last changed, as it was opened."""

    path: Path
    tensors: dict[str, StoredTensor]
    raw: bytes
    file_bytes: int
    mtime_ns: int


def read_header(path: Path) -> ShardHeader:
    """Parse and check the header of the safetensors file at ``path``.

    Raises CheckpointError when the file is missing, truncated, or its header contradicts itself or the file.
    """
    try:
        about = path.stat()
        file_bytes = about.st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _bad(
                    path, f"the file has {file_bytes} bytes, too few for a safetensors header; download it again"
                )
            if prefix == POINTER[:8]:
                raise _bad(path, "a pointer of git-lfs and not the file itself; run git lfs pull")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > MAX_HEADER_BYTES:
                raise _bad(path, f"a header of {header_bytes} bytes is over the limit of {MAX_HEADER_BYTES}")
            if header_bytes > file_bytes - 8:
                raise _bad(path, f"the header is longer than the file: {header_bytes} of {file_bytes - 8} bytes")
            raw = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    tensors = _parse(path, raw, data_start=8 + header_bytes, file_bytes=file_bytes)
    return ShardHeader(path, tensors, raw, file_bytes, about.st_mtime_ns)


def _parse(path: Path, raw: bytes, data_start: int, file_bytes: int) -> dict[str, StoredTensor]:
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)  # bytes could be UTF-16 as well
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"the header is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise _bad(path, "the header is not a JSON object")
    tensors: dict[str, StoredTensor] = {}
    for name, entry in document.items():
        if any("\ud800" <= c <= "\udfff" for c in name):
            raise _bad(path, "the name is not Unicode text", name)
        if name != "__metadata__":
            tensors[name] = _tensor(path, name, entry, data_start)
    _check_cover(path, tensors, data_start, file_bytes)
    return tensors


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key appears twice")
    return keys


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, "the entry needs dtype, shape and data_offsets", name)
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise _bad(path, f"dtype {dtype_name} is not supported", name)
    if not _natural_numbers(shape):
        raise _bad(path, f"shape {shape} is not a list of sizes", name)
    if not _natural_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"data_offsets {offsets} are not [begin, end]", name)
    if math.prod(size for size in shape if size) >= 2**63:
        raise _bad(path, f"shape {shape} has more elements than can be counted", name)
    info = TensorInfo(DTYPES[dtype_name], tuple(shape))
    if offsets[1] - offsets[0] != info.num_bytes:
        span = offsets[1] - offsets[0]
        raise _bad(path, f"{dtype_name} {shape} needs {info.num_bytes} bytes, its offsets span {span}", name)
    return StoredTensor(info, data_start + offsets[0], data_start + offsets[1])


def _natural_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_cover(path: Path, tensors: dict[str, StoredTensor], data_start: int, file_bytes: int) -> None:
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start < position:
            raise _bad(path, "its data overlaps another tensor's", name)
        if tensor.start > position:
            raise _bad(path, f"a gap of {tensor.start - position} bytes lies before its data", name)
        if tensor.end > file_bytes:
            missing = tensor.end - file_bytes
            raise _bad(
                path, f"the file is truncated: its data ends {missing} bytes past the end; download it again", name
            )
        position = tensor.end
    if position != file_bytes:
        raise _bad(path, f"{file_bytes - position} bytes follow the last tensor; the file does not match its header")


def _bad(path: Path, problem: str, tensor: str | None = None) -> CheckpointError:
    where = path if tensor is None else f"{path}: tensor {tensor}"
    return CheckpointError(f"{where}: {problem}")
