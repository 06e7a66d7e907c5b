"""Mapped files: pages come when they are asked for, go when they are given back, and a cut file is an error."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from streamcollapse.errors import CheckpointError
from streamcollapse.resources.meter import sample_memory
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.extents import Location
from streamcollapse.storage.mapping import MappedFile
from streamcollapse.storage.probe import cached_share, forget, read_rate
from streamcollapse.storage.source import TensorInfo
from tests.checkpoints import write_raw

SIZE = 64 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are populated and given back on Linux only")


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.write(os.urandom(SIZE))
        file.flush()
        os.fsync(file.fileno())  # dirty pages cannot be dropped
    return path


def _mapped_bytes() -> int:
    return sample_memory().file_mapped or 0


@linux
def test_pages_come_and_go(big: Path) -> None:
    mapped = MappedFile(big, SIZE)
    before = _mapped_bytes()
    mapped.populate(0, SIZE)
    assert _mapped_bytes() - before > 0.9 * SIZE
    assert (mapped.cached_bytes() or 0) > 0.9 * SIZE
    mapped.give_back(0, SIZE // 2, drop_after_use=False)
    assert _mapped_bytes() - before < 0.6 * SIZE
    assert (mapped.cached_bytes() or 0) > 0.5 * SIZE, "still in the page cache"
    mapped.give_back(0, SIZE, drop_after_use=True)
    assert _mapped_bytes() - before < 0.1 * SIZE
    if mapped.cached_bytes() == SIZE:
        pytest.skip("this file system keeps its pages")
    assert (mapped.cached_bytes() or 0) < 0.1 * SIZE
    data = big.read_bytes()
    assert bytes(mapped.tensor(Location(big, 5, TensorInfo(torch.uint8, (1000,)))).numpy()) == data[5:1005], (
        "and it can be read again"
    )


@linux
def test_a_file_that_was_cut_short_is_an_error(big: Path) -> None:
    mapped = MappedFile(big, SIZE)
    os.truncate(big, SIZE // 2)
    mapped.populate(0, SIZE // 4)
    with pytest.raises(CheckpointError, match="big: the file changed size while it was in use"):
        mapped.populate(SIZE // 4, SIZE)
    with pytest.raises(CheckpointError, match="big: the file changed size"):
        MappedFile(big, SIZE)
    with pytest.raises(CheckpointError, match="gone: cannot be mapped: No such file"):
        MappedFile(big.with_name("gone"), SIZE)


@linux
def test_rates_are_measured_on_cold_pages_which_are_dropped_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 400 << 20
    header = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    path = write_raw(tmp_path / "model.safetensors", header)
    os.truncate(path, path.stat().st_size + size)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    checkpoint = Checkpoint(tmp_path)
    forget(checkpoint)
    assert cached_share(checkpoint) < 0.01
    for mode in ("mmap", "pread", "direct"):
        rate = read_rate(checkpoint, mode, 64 << 20)
        assert rate is not None
        assert rate > 1e6
    assert cached_share(checkpoint) < 0.3, "but for what the system read ahead"
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass
    assert cached_share(checkpoint) > 0.5, "the system may have dropped some again"
    monkeypatch.setattr(MappedFile, "cached_bytes", lambda self, start=0, end=SIZE: (end or SIZE) - start)
    assert read_rate(checkpoint, "mmap", 64 << 20) is None, "nothing is cold"
    forget(checkpoint)
