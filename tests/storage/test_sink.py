"""Sinks: whatever the way, the bytes in their order; errors of the disk come out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from streamcollapse.storage import writer as sinks
from streamcollapse.storage.writer import Sink, open_sink


def _direct(path: Path) -> Sink:
    return Sink(os.open(path, os.O_WRONLY | os.O_DIRECT), direct=True)


def _buffered(path: Path) -> Sink:
    return Sink(os.open(path, os.O_WRONLY), direct=False)


@pytest.mark.parametrize("make", [_direct, _buffered])
@pytest.mark.parametrize("sizes", [(), (10,), (8192, 8192), (5, 20_000, 0, 70_000, 3), (16_384,) * 9, (100_001,)])
def test_bytes_in_their_order(
    tmp_path: Path, make: Callable[[Path], Sink], sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "CHUNK_BYTES", 16_384)
    path = tmp_path / "file"
    path.write_bytes(b"")
    sink, expected = make(path), b""
    for size in sizes:
        data = bytearray(os.urandom(size))
        expected += data
        sink.write(memoryview(data))
        data[:] = bytes(size)  # the caller may use its memory again
    sink.finish()
    sink.close()
    assert path.read_bytes() == expected


@pytest.mark.parametrize("make", [_direct, _buffered])
def test_short_writes_are_continued_and_errors_come_out(
    tmp_path: Path, make: Callable[[Path], Sink], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "CHUNK_BYTES", 16_384)
    path = tmp_path / "file"
    path.write_bytes(b"")
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: original(handle, data[:4096], at))
    data = os.urandom(50_000)
    sink = make(path)
    sink.write(memoryview(data))
    sink.finish()
    sink.close()
    assert path.read_bytes() == data

    def full(handle: int, data: memoryview, at: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    sink = make(path)
    with pytest.raises(OSError, match="No space left"):
        sink.write(memoryview(data))
        sink.finish()
    sink.close()


def test_large_shards_go_past_the_page_cache_where_that_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    for size, direct in ((1 << 20, False), (1 << 30, True)):
        sink = open_sink(path, size)
        assert sink.is_direct == direct
        sink.close()
    original = os.open

    def refusing(name: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return original(name, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refusing)
    sink = open_sink(path, 1 << 30)
    assert not sink.is_direct
    sink.close()
