"""PyTorch files against ``torch.load``, and hostile ones against everything that a pickle could do."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamcollapse.errors import CheckpointError
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.extents import coalesce, needed_bytes, tensors_in
from streamcollapse.storage.pickles import PickleError, read_pickle
from streamcollapse.storage.reader import FileReader, page_aligned
from streamcollapse.storage.torchfile import read_torch_header

CPU = torch.device("cpu")


def tensors() -> dict[str, Any]:
    base = torch.arange(60, dtype=torch.float32)
    return {
        "plain": torch.randn(5, 7),
        "bfloat16": torch.randn(4, 4).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "transposed": torch.randn(6, 5).t(),
        "columns": torch.arange(24.0).view(4, 6)[:, 1:3],
        "view of a base": base[10:22].view(3, 4),
        "the base": base,
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "mask": torch.ones(1, 1, 3, 3, dtype=torch.bool).tril(),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "eight bits": torch.randn(8).to(torch.float8_e4m3fn),
        "half": torch.randn(2, 3, 4).half(),
        "double": torch.randn(2).double(),
    }


def save(directory: Path, contents: Any, **options: Any) -> Path:
    directory.mkdir(exist_ok=True)
    torch.save(contents, directory / "pytorch_model.bin", **options)
    return directory


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_tensor_is_what_torch_loads(tmp_path: Path, legacy: bool) -> None:
    contents = tensors()
    if legacy:  # torch writes it, and cannot read it again
        del contents["eight bits"]
    source = save(tmp_path / "m", contents, _use_new_zipfile_serialization=not legacy)
    expected = torch.load(source / "pytorch_model.bin", weights_only=True)
    checkpoint = Checkpoint(source)
    assert sorted(checkpoint.names) == sorted(expected)
    places = {name: checkpoint.locate(name) for name in checkpoint.names}
    extents = coalesce(places)
    block = page_aligned(needed_bytes(extents))
    reader = FileReader(direct=False)
    reader.read(extents, block)
    reader.close()
    copied = tensors_in(block, extents)
    for name, tensor in expected.items():
        info = checkpoint.info(name)
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape)), name
        for found in (checkpoint.read(name, CPU), copied[name]):
            assert found.dtype == tensor.dtype, name
            assert torch.equal(found.float(), tensor.float()), name
        if tensor.dim() == 2 and len(tensor):
            rows = torch.tensor([len(tensor) - 1, 0, 0])
            assert torch.equal(checkpoint.read_rows(name, rows), tensor[rows]), name


def test_what_people_save_beside_tensors_is_no_obstacle(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    contents = model.state_dict()  # an OrderedDict with an attribute
    contents["version"] = 3
    contents["nothing"] = None
    contents["settings"] = OrderedDict()
    checkpoint = Checkpoint(save(tmp_path / "m", contents))
    assert sorted(checkpoint.names) == sorted(model.state_dict())


def test_shards_and_their_index(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "m" / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "m" / "pytorch_model-00002-of-00002.bin")
    index = '{"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}'
    (tmp_path / "m" / "pytorch_model.bin.index.json").write_text(index)
    checkpoint = Checkpoint(tmp_path / "m")
    assert checkpoint.names == ["a", "b"]
    (tmp_path / "m" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.bin: the shard is missing"):
        Checkpoint(tmp_path / "m")


def test_fingerprints_tell_files_apart(tmp_path: Path) -> None:
    contents = tensors()
    first = Checkpoint(save(tmp_path / "a", contents)).fingerprint()
    assert first == Checkpoint(save(tmp_path / "b", contents)).fingerprint()
    contents["plain"] = contents["plain"] + 1
    assert first != Checkpoint(save(tmp_path / "c", contents)).fingerprint()


class Hostile:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def canary(tmp_path: Path) -> Hostile:
    return Hostile(os.mkdir, str(tmp_path / "canary"))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["value", "beside", "key", "inside"])
def test_no_code_runs(tmp_path: Path, place: str, legacy: bool) -> None:
    evil = canary(tmp_path)
    contents: Any = {
        "value": {"a": evil},
        "beside": {"a": torch.ones(2), "b": [1, {"c": evil}]},
        "key": {("a", evil): torch.ones(2)},
        "inside": evil,
    }[place]
    source = save(tmp_path / "m", contents, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: the pickle wants (posix|nt)\.mkdir"):
        Checkpoint(source)
    assert not (tmp_path / "canary").exists()


def test_a_whole_module_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the pickle wants torch\.nn\.modules\.linear\.Linear"):
        Checkpoint(save(tmp_path / "m", torch.nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        ([torch.ones(2)], "holds no dict from names to tensors"),
        ({"state_dict": {"a": torch.ones(2)}}, "state_dict is a dict of its own"),
        ({"epoch": 3}, "holds no tensors"),
        ({"a": torch.ones(2), "b": torch.ones(1).expand(5)}, "tensor b: it repeats its elements"),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, contents: Any, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        Checkpoint(save(tmp_path / "m", contents))


def test_quantised_tensors_are_called_so(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
        source = save(tmp_path / "m", {"a": packed})
    with pytest.raises(CheckpointError, match="holds quantised tensors; use the original weights"):
        Checkpoint(source)


def test_legacy_files_of_later_pickle_protocols(tmp_path: Path) -> None:
    contents = {"a": torch.randn(4, 3), "b": torch.ones(2)}
    source = save(tmp_path / "m", contents, _use_new_zipfile_serialization=False, pickle_protocol=4)
    checkpoint = Checkpoint(source)
    assert all(torch.equal(checkpoint.read(name, CPU), tensor) for name, tensor in contents.items())


def test_files_that_only_point_somewhere(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(CheckpointError, match=rf"{name}: a pointer of git-lfs .*; run git lfs pull"):
            Checkpoint(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "pytorch_model.bin").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is no file .*, or a link that leads nowhere"):
        Checkpoint(tmp_path)


def rewrite(path: Path, **changes: bytes) -> None:
    """The archive at ``path`` with other members; ``data_pkl`` stands for ``data.pkl``."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    prefix = next(iter(members)).partition("/")[0]
    members |= {f"{prefix}/{name.replace('_pkl', '.pkl').replace('_', '/')}": data for name, data in changes.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_damaged_archives(tmp_path: Path) -> None:
    source = save(tmp_path / "m", {"a": torch.ones(64)})
    path = source / "pytorch_model.bin"
    whole = path.read_bytes()

    def refused(complaint: str) -> None:
        with pytest.raises(CheckpointError, match=complaint):
            Checkpoint(source)
        path.write_bytes(whole)

    path.write_bytes(whole[:-100])
    refused("the zip archive is damaged or cut off")
    path.write_bytes(b"<html>not found</html>")
    refused("no PyTorch file; download it again")
    path.write_bytes(b"")
    refused("no PyTorch file; download it again")
    rewrite(path, data_0=b"\0" * 200)
    refused("tensor a: it ends 56 bytes behind its storage")
    rewrite(path, byteorder=b"big")
    refused("not little-endian")
    rewrite(path, constants_pkl=b"")
    refused("TorchScript")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
    refused("compressed or encrypted")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"hello")
    refused("not one that torch.save wrote")


@pytest.mark.parametrize("cut", [3, 20, 200, 700])
def test_a_legacy_file_cut_off(tmp_path: Path, cut: int) -> None:
    source = save(tmp_path / "m", {"a": torch.ones(64), "b": torch.ones(64)}, _use_new_zipfile_serialization=False)
    path = source / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-cut] if cut < 700 else path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: "):
        Checkpoint(source)


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        (b"\x80\x02]q\x00.", None),
        (b"cos\nsystem\n(S'id'\ntR.", "wants os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "wants os.system"),
        (b"(S'id'\nios\nsystem\n.", "an instruction that plain data does not need .INST."),
        (b"\x82\x01.", "an instruction that plain data does not need .EXT1."),
        (b"r\xff\xff\xff\x7f.", "malformed"),
        (b"Nr\xff\xff\xff\x7f.", None),
        (b"}((((KKK\x01\x02\x03tttttK\x01s.", "malformed"),
        (b"}" + b")" + b"\x85" * 10 + b"K\x01s.", "keys are neither text nor numbers"),
        (b"X\xff\xff\xff\xff.", "malformed"),
        (b"h\x05.", "malformed"),
        (b"0.", "POP"),
        (b"", "malformed"),
        (b"K\x01R.", "malformed"),
        (b"L" + b"9" * 5000 + b"L\n.", "malformed"),
    ],
)
def test_programs(program: bytes, complaint: str | None) -> None:
    if complaint is None:
        read_pickle(io.BytesIO(program), lambda name: False)
        return
    with pytest.raises(PickleError, match=complaint):
        read_pickle(io.BytesIO(program), lambda name: False)


plain_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
)


@given(plain_data, st.integers(3, 5))
def test_plain_data_is_what_pickle_says(value: Any, protocol: int) -> None:
    found = read_pickle(io.BytesIO(pickle.dumps(value, protocol)), lambda name: False)
    assert found == value


@given(st.binary(max_size=200) | st.lists(st.sampled_from(b"()tRcKXhq}]u.\x85N0b"), max_size=60).map(bytes))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_noise_is_malformed_or_data(program: bytes) -> None:
    with contextlib.suppress(PickleError):
        read_pickle(io.BytesIO(program), lambda name: False)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_flipped_byte_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("flip")
    for legacy in (False, True):
        path = directory / f"{legacy}.bin"
        torch.save({"a": torch.ones(8), "b": torch.ones(2, 3).t()}, path, _use_new_zipfile_serialization=not legacy)
        raw = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(raw)
        with contextlib.suppress(CheckpointError):
            header = read_torch_header(path)
            for tensor in header.tensors.values():
                assert 0 <= tensor.start <= tensor.end <= header.file_bytes


def test_a_legacy_count_that_lies(tmp_path: Path) -> None:
    source = save(tmp_path / "m", {"a": torch.ones(4)}, _use_new_zipfile_serialization=False)
    path = source / "pytorch_model.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:-24] + struct.pack("<q", 2**60) + raw[-16:])
    with pytest.raises(CheckpointError, match="the file is truncated"):
        Checkpoint(source)


def test_an_archive_whose_members_lie_beyond_the_file(tmp_path: Path) -> None:
    source = save(tmp_path / "m", {"a": torch.ones(4)})
    path = source / "pytorch_model.bin"
    raw = path.read_bytes()
    name = raw.rindex(b"pytorch_model/data/0")  # in the directory at the end, behind the member's offset
    path.write_bytes(raw[: name - 4] + b"\xfe\xff\xff\x7f" + raw[name:])
    with pytest.raises(CheckpointError, match=r"the zip archive is damaged"):
        Checkpoint(source)
