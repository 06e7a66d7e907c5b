"""The files that ``torch.save`` writes (``pytorch_model.bin``): where in them the bytes of each tensor are.

Two formats. Since torch 1.6 a zip archive of uncompressed members, ``data.pkl`` and a member for each storage; before,
a sequence of pickles followed by the storages. Either way a pickle says which tensors there are; it is read as data
(pickles.py), and the tensors are then used in place, like those of a safetensors file.
"""

import io
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from streamcollapse.errors import CheckpointError
from streamcollapse.storage.header import DTYPES, POINTER, ShardHeader, StoredTensor
from streamcollapse.storage.pickles import Call, Global, PickleError, StorageReference, read_pickle
from streamcollapse.storage.source import TensorInfo, span_elements

MAX_PICKLE_BYTES = 64_000_000  # some hundred thousand tensors
_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_STORAGES = {
    "BFloat16": torch.bfloat16,
    "Bool": torch.bool,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "ComplexFloat": torch.complex64,
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Short": torch.int16,
    "Untyped": torch.uint8,
}
_DTYPE_NAMES = {str(dtype): dtype for dtype in DTYPES.values()}
_STORAGE_NAME = re.compile(rf"torch\.(?:cuda\.|storage\.)?({'|'.join(_STORAGES)})Storage")
# What a tensor was made by -> which argument is the tensor or, for those below, its storage.
_WRAPPERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_TYPED = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_UNTYPED = {"torch._utils._rebuild_tensor_v3"}


@dataclass(frozen=True)
class _Storage:
    """Bytes ``[start, end)`` of the file."""

    start: int
    end: int


def read_torch_header(path: Path) -> ShardHeader:
    """What is in the file ``path`` and where. Nothing in it is run; no weight is read.

    Raises CheckpointError when the file is damaged, in no format of weights, or wants code of its own to be run.
    """
    try:
        about = path.stat()
        file_bytes = about.st_size
        with path.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            read = _read_zip if magic == _ZIP_MAGIC else _read_legacy
            raw, contents, storages = read(file, file_bytes)
        return ShardHeader(path, _tensors(contents, storages), raw, file_bytes, about.st_mtime_ns)
    except PickleError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _may_name(name: str) -> bool:
    if name == "torch._utils._rebuild_qtensor" or name.startswith("torch.QInt"):
        raise PickleError("holds quantised tensors; use the original weights, and quantise the result")
    return name in _WRAPPERS | _TYPED | _UNTYPED or name in _DTYPE_NAMES or _STORAGE_NAME.fullmatch(name) is not None


def _read_zip(file: BinaryIO, file_bytes: int) -> tuple[bytes, Any, dict[str, _Storage]]:
    """The pickle as stored, what it says, and the storages by key."""
    try:
        archive = zipfile.ZipFile(file)
        members = {member.filename: member for member in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise PickleError("a zip archive with two members of one name; download it again")
        pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise PickleError("a zip archive, but not one that torch.save wrote; use the original checkpoint")
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in members:
            raise PickleError("TorchScript, a program and not a checkpoint; use the original checkpoint")
        for name, member in members.items():
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise PickleError(f"its member {name} is compressed or encrypted; unpack and save it with torch.save")
        if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise PickleError(
                f"a pickle of {members[pickles[0]].file_size} bytes, over the limit of {MAX_PICKLE_BYTES}"
            )
        raw = archive.read(pickles[0])
        order = members.get(f"{prefix}byteorder")
        if order is not None and (order.file_size > 16 or archive.read(order).strip() != b"little"):
            raise PickleError("its numbers are not little-endian; save it again on a little-endian machine")
        storages = {
            name.removeprefix(f"{prefix}data/"): _member(file, member, file_bytes)
            for name, member in members.items()
            if name.startswith(f"{prefix}data/")
        }
    except PickleError:
        raise
    # What zipfile lets through of a damaged archive besides its own error: seeks to nowhere, versions it does not know.
    except (zipfile.BadZipFile, NotImplementedError, struct.error, EOFError, OverflowError, ValueError) as error:
        raise PickleError(f"the zip archive is damaged or cut off ({error}); download it again") from error
    return raw, read_pickle(io.BytesIO(raw), _may_name), storages


def _member(file: BinaryIO, member: zipfile.ZipInfo, file_bytes: int) -> _Storage:
    """Where the bytes of ``member`` are: behind its own header, whose length only the header tells."""
    file.seek(member.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != _ZIP_MAGIC:
        raise PickleError(f"the zip archive is damaged at its member {member.filename}; download it again")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    start = member.header_offset + 30 + name_bytes + extra_bytes
    if start + member.file_size > file_bytes:
        raise PickleError(f"the file is truncated in its member {member.filename}; download it again")
    return _Storage(start, start + member.file_size)


def _read_legacy(file: BinaryIO, file_bytes: int) -> tuple[bytes, Any, dict[str, _Storage]]:
    """As ``_read_zip``, from the older format: magic number, protocol, machine, contents, keys, then the storages."""
    opening = file.read(len(POINTER))
    if opening == POINTER:
        raise PickleError("a pointer of git-lfs and not the file itself; run git lfs pull")
    if not re.match(rb"\x80[\x02-\x05]", opening):
        raise PickleError("neither a zip archive nor a pickle of torch.save, so no PyTorch file; download it again")
    file.seek(0)
    head = io.BytesIO(file.read(min(file_bytes, MAX_PICKLE_BYTES)))
    if read_pickle(head, _may_name) != _LEGACY_MAGIC or read_pickle(head, _may_name) != _LEGACY_PROTOCOL:
        raise PickleError("a pickle, but not one that torch.save wrote; use the original checkpoint")
    machine = read_pickle(head, _may_name)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise PickleError("its numbers are not little-endian; save it again on a little-endian machine")
    first = head.tell()
    contents = read_pickle(head, _may_name)
    raw = head.getvalue()[first : head.tell()]
    keys = read_pickle(head, _may_name)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PickleError("the pickle is malformed (no list of storages)")
    widths = dict(map(_storage_width, _references(contents)))
    storages, position = {}, head.tell()
    for key in keys:
        file.seek(position)
        counted = file.read(8)
        if key not in widths or len(counted) < 8:
            raise PickleError("the file is truncated, or its storages are not those of its tensors; download it again")
        start = position + 8
        position = start + int.from_bytes(counted, "little") * widths[key]
        if position > file_bytes:
            raise PickleError("the file is truncated; download it again")
        storages[key] = _Storage(start, position)
    return raw, contents, storages


def _references(contents: Any) -> list[StorageReference]:
    """The storages that the tensors in ``contents`` use."""
    calls = [call for value in _entries(contents).values() if (call := _unwrapped(value)) is not None]
    return [call.arguments[0] for call in calls if call.arguments and isinstance(call.arguments[0], StorageReference)]


def _entries(contents: Any) -> dict[str, Any]:
    if not isinstance(contents, dict):
        raise PickleError("holds no dict from names to tensors; save the model's state_dict()")
    return {name: value for name, value in contents.items() if isinstance(name, str)}


def _tensors(contents: Any, storages: dict[str, _Storage]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for name, value in _entries(contents).items():
        if isinstance(value, dict) and value:
            raise PickleError(f"{name} is a dict of its own, not a tensor; save the model's state_dict() alone")
        call = _unwrapped(value)
        if call is not None:  # anything else is data beside the tensors, such as a version
            try:
                tensors[name] = _tensor(call, storages)
            except PickleError as error:
                raise PickleError(f"tensor {name}: {error}") from error
    if not tensors:
        raise PickleError("holds no tensors; save the model's state_dict()")
    return tensors


def _unwrapped(value: Any) -> Call | None:
    """The call that makes the tensor ``value``; None where it is none."""
    while isinstance(value, Call) and value.name in _WRAPPERS and value.arguments:
        value = value.arguments[0]
    return value if isinstance(value, Call) else None


def _tensor(call: Call, storages: dict[str, _Storage]) -> StoredTensor:
    arguments = call.arguments
    if call.name not in _TYPED | _UNTYPED or len(arguments) < (7 if call.name in _UNTYPED else 4):
        raise PickleError("it is made in a way that this version does not know")
    reference, offset, shape, strides = arguments[:4]
    key, stored_dtype = _storage(reference)
    dtype = stored_dtype
    if call.name in _UNTYPED:
        wanted = arguments[6]
        if not isinstance(wanted, Global) or wanted.name not in _DTYPE_NAMES:
            raise PickleError("its dtype is not known")
        dtype = _DTYPE_NAMES[wanted.name]
    sizes = all(isinstance(sizes, tuple) and all(map(_is_size, sizes)) for sizes in (shape, strides))
    if not sizes or not _is_size(offset) or len(shape) != len(strides) or key not in storages:
        raise PickleError("its shape, strides or storage are malformed")
    info = TensorInfo(dtype, shape)
    span = span_elements(shape, strides)
    start = storages[key].start + offset * dtype.itemsize
    end = start + span * dtype.itemsize
    if end > storages[key].end:
        raise PickleError(f"it ends {end - storages[key].end} bytes behind its storage; download it again")
    if info.num_elements > span:
        raise PickleError("it repeats its elements (expand); save it as a whole tensor")
    return StoredTensor(info, start, end, None if _is_dense(shape, strides) else strides)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements lie one after the other, the last dimension fastest."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True


def _storage(reference: Any) -> tuple[str, torch.dtype]:
    """The key and dtype of a storage, from ``("storage", type, key, location, elements)``."""
    parts = reference.identifier if isinstance(reference, StorageReference) else None
    if not isinstance(parts, tuple) or len(parts) < 5 or parts[0] != "storage" or not isinstance(parts[2], str):
        raise PickleError("its storage is malformed")
    kind = _STORAGE_NAME.fullmatch(parts[1].name) if isinstance(parts[1], Global) else None
    if kind is None or any(part is not None for part in parts[5:]):
        raise PickleError("its storage is of a kind that this version does not know")
    return parts[2], _STORAGES[kind[1]]


def _storage_width(reference: StorageReference) -> tuple[str, int]:
    key, dtype = _storage(reference)
    return key, dtype.itemsize
