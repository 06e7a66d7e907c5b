from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from streamcollapse.errors import NonFiniteError, OutputError
from streamcollapse.storage import disk
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.disk import check_space
from streamcollapse.storage.source import TensorInfo
from streamcollapse.storage.staging import check_output, staged_directory
from streamcollapse.storage.writer import Writing, plan_shards, write_shards

CPU = torch.device("cpu")


class Tensors:
    """A TensorSource over a dict."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self.tensors[name].dtype, tuple(self.tensors[name].shape))

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        return self.tensors[name].to(device)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self.tensors[name][rows]


def _sample() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "odd": torch.randint(0, 255, (3,), generator=g, dtype=torch.uint8),
        "a": torch.randn(4, 6, generator=g),
        "b": torch.randn(5, generator=g).bfloat16(),
        "transposed": torch.randn(3, 2, generator=g).T,
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "empty": torch.zeros(0, 7),
        "flag": torch.tensor([True, False]),
        "c": torch.randn(2, 2, generator=g).double(),
    }


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100, 1])
def test_what_is_written_is_read_back_by_the_reference(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = _sample()
    source = Tensors(tensors)
    shards = plan_shards(source, max_shard_bytes)
    written: dict[str, int] = {}
    write_shards(source, shards, tmp_path, CPU, Writing(written.__setitem__))
    assert written == {name: t.nbytes for name, t in tensors.items()}
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == len(shards)
    loaded: dict[str, torch.Tensor] = {}
    for file, shard in zip(files, shards, strict=True):
        assert file.stat().st_size == shard.file_bytes
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        loaded |= load_file(file)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in tensors.items())
    assert all(not s.names[1:] or s.data_bytes <= max_shard_bytes for s in shards)
    assert Checkpoint(tmp_path).num_bytes == sum(t.nbytes for t in tensors.values())
    if len(shards) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    else:
        assert [f.name for f in files] == ["model.safetensors"]


def test_tensors_are_aligned_to_their_own_size(tmp_path: Path) -> None:
    source = Tensors(_sample())
    write_shards(source, plan_shards(source, 10**9), tmp_path, CPU)
    (header,) = Checkpoint(tmp_path).shards
    assert (8 + len(header.raw)) % 8 == 0
    assert all(t.start % t.info.dtype.itemsize == 0 for t in header.tensors.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_non_finite_weight_is_not_written(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    bad = torch.zeros(1000, dtype=dtype)
    bad[617] = value
    source = Tensors({"good": torch.ones(3), "bad": bad})
    with pytest.raises(NonFiniteError, match="tensor bad has 1 NaN or infinite values"):
        write_shards(source, plan_shards(source, 10**9), tmp_path, CPU)


def test_no_space_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 1, 99))
    check_space(tmp_path / "out", 99)
    with pytest.raises(OutputError, match=r"no space on the disk: 100 B needed, 99 B free"):
        check_space(tmp_path / "out", 100)


def test_a_disk_that_fills_up_while_reserving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    source = Tensors(_sample())
    with pytest.raises(OutputError, match="no space on the disk"):
        write_shards(source, plan_shards(source, 10**9), tmp_path, CPU)


def test_a_file_system_that_cannot_reserve_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(handle: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unable)
    source = Tensors(_sample())
    write_shards(source, plan_shards(source, 10**9), tmp_path, CPU)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], source.tensors["a"])


def test_a_real_full_disk(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    try:
        source = Tensors({"big": torch.ones(100_000)})
        with pytest.raises(OutputError, match=r"no space on the disk: 400 kB needed"):
            write_shards(source, plan_shards(source, 10**9), mount, CPU)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_memory_is_one_tensor_not_one_shard(tmp_path: Path) -> None:
    alive: list[int] = []

    class Watched(Tensors):
        def read(self, name: str, device: torch.device) -> torch.Tensor:
            tensor = self.tensors[name].clone()
            alive.append(0)
            weakref.finalize(tensor, alive.pop)
            assert len(alive) <= 2, "the writer keeps tensors"
            return tensor

    source = Watched({f"t{i}": torch.ones(10) for i in range(20)})
    write_shards(source, plan_shards(source, 10**9), tmp_path, CPU)
    assert not alive


def test_staging_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged_directory(out, overwrite=False) as stage:
        (stage / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt()])
def test_staging_that_failed_is_there_for_another_run(tmp_path: Path, failure: BaseException) -> None:
    out = tmp_path / "out"
    with pytest.raises(type(failure)), staged_directory(out, overwrite=False) as stage:
        (stage / "file").write_text("x")
        raise failure
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    with staged_directory(out, overwrite=False) as stage:
        assert (stage / "file").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwriting_keeps_the_old_until_the_new_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(ValueError, match="half-way"), staged_directory(out, overwrite=True) as stage:
        assert (out / "old").exists()
        raise ValueError("half-way")
    assert (out / "old").read_text() == "old"
    with staged_directory(out, overwrite=True) as stage:
        (stage / "new").write_text("new")
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_fails_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="cannot be written"), staged_directory(out, overwrite=True):
        pass
    assert (out / "old").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "out"]


def test_places_where_no_output_may_go(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "inside", tmp_path, tmp_path / "link", source / ".." / "source"):
        with pytest.raises(OutputError, match="is, contains or lies inside the source"):
            check_output(out, source, overwrite=True)
    with pytest.raises(OutputError, match="is not a directory"):
        check_output(tmp_path / "file", source, overwrite=True)
    check_output(tmp_path / "no" / "where", source, overwrite=False)
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists; choose another `out` or pass `overwrite`"):
        check_output(tmp_path / "there", source, overwrite=False)
    check_output(tmp_path / "there", source, overwrite=True)
    check_output(tmp_path / "new", source, overwrite=False)
    assert disk.no_space(tmp_path, None).startswith(str(tmp_path))
