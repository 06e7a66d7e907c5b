"""Reading extents: which pieces, how they lie in memory, and what happens when the disk does not play along."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from streamcollapse.errors import CheckpointError
from streamcollapse.storage.extents import Location, coalesce, needed_bytes, tensors_in
from streamcollapse.storage.reader import FileReader, ReadingStopped, check_direct_reads, page_aligned
from streamcollapse.storage.source import TensorInfo


def _at(path: Path, start: int, count: int) -> Location:
    return Location(path, start, TensorInfo(torch.uint8, (count,)))


def test_neighbours_are_read_together_in_the_order_of_the_disk(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    places = {
        "far": _at(a, 1_000_000, 10),
        "second": _at(a, 5_100, 50),
        "other file": _at(b, 8, 8),
        "first": _at(a, 5_000, 100),
        "near": _at(a, 5_150 + 65_536, 4),
    }
    extents = coalesce(places)
    assert [(e.path, e.start, e.end) for e in extents] == [(a, 5_000, 70_690), (a, 1_000_000, 1_000_010), (b, 8, 16)]
    assert [name for name, _ in extents[0].tensors] == ["first", "second", "near"]
    assert (extents[0].aligned_start, extents[0].aligned_bytes) == (4096, 17 * 4096)
    assert needed_bytes(extents) == 19 * 4096


@pytest.mark.parametrize("direct", [False, True])
def test_bytes_come_where_they_belong(tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamcollapse.storage.reader.REQUEST_BYTES", 8192)
    data = os.urandom(100_003)
    path = tmp_path / "data"
    path.write_bytes(data)
    places = {f"t{start}": _at(path, start, 777) for start in (0, 3, 4090, 50_000, 99_226)}
    extents = coalesce(places)
    block = page_aligned(needed_bytes(extents))
    reader = FileReader(direct)
    reader.read(extents, block)
    reader.close()
    for name, tensor in tensors_in(block, extents).items():
        start = places[name].start
        assert bytes(tensor.numpy()) == data[start : start + 777], name
        assert tensor.data_ptr() % 4096 == start % 4096, "as in the file, so that kernels compute the same bits"


@pytest.mark.parametrize("direct", [False, True])
def test_short_reads_are_continued(tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(40_000)
    path = tmp_path / "data"
    path.write_bytes(data)
    whole, calls = os.preadv, []

    def short(handle: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        return whole(handle, [buffers[0][: 4096 if direct else 1000]], offset)

    monkeypatch.setattr(os, "preadv", short)
    extents = coalesce({"t": _at(path, 100, 39_000)})
    block = page_aligned(needed_bytes(extents))
    reader = FileReader(direct)
    reader.read(extents, block)
    reader.close()
    assert len(calls) > 5
    assert bytes(tensors_in(block, extents)["t"].numpy()) == data[100:39_100]


def test_errors_name_file_and_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(10_000))

    def read(extents: list, direct: bool = False) -> None:
        reader = FileReader(direct)
        try:
            reader.read(extents, page_aligned(needed_bytes(extents)))
        finally:
            reader.close()

    with pytest.raises(CheckpointError, match="data: the file changed size while it was in use"):
        read(coalesce({"t": _at(path, 9_000, 2_000)}))
    with pytest.raises(CheckpointError, match="gone: cannot be read: No such file"):
        read(coalesce({"t": _at(tmp_path / "gone", 0, 8)}))

    def broken(handle: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match="data: byte 4096: cannot be read, 3 times over: Input/output error"):
        read(coalesce({"t": _at(path, 5_000, 100)}))


def test_a_disk_that_fails_for_a_moment_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 40)
    original, failures = os.preadv, [5, 110]

    def flaky(handle: int, buffers: list[memoryview], offset: int) -> int:
        if failures:
            number = failures.pop()
            raise OSError(number, os.strerror(number))
        return original(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", flaky)
    extents = coalesce({"t": _at(path, 5_000, 100)})
    block = page_aligned(needed_bytes(extents))
    reader = FileReader(False)
    reader.read(extents, block)
    reader.close()
    assert tensors_in(block, extents)["t"].numpy().tobytes() == path.read_bytes()[5_000:5_100]
    assert not failures
    failures += [13]
    with pytest.raises(CheckpointError, match="byte 4096: cannot be read: Permission denied"):
        FileReader(False).read(extents, block)
    assert not failures, "what will not pass is not asked again"


def test_a_file_system_that_refuses_direct_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(10_000))
    check_direct_reads(path)
    original = os.open

    def refusing(name: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return original(name, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(CheckpointError, match="cannot read past the page cache; pass `io=pread`, mmap or auto"):
        check_direct_reads(path)


def test_reading_can_be_broken_off(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(10_000))
    reader = FileReader(False)
    reader.stop()
    with pytest.raises(ReadingStopped):
        reader.read(coalesce({"t": _at(path, 0, 100)}), page_aligned(4096))
    reader.close()
