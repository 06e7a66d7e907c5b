"""The header parser: hand-made files, and the same verdicts as the reference implementation."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from streamcollapse.errors import CheckpointError
from streamcollapse.storage.header import MAX_HEADER_BYTES, read_header
from tests.checkpoints import write_raw

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_offsets_count_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"b": {**A, "data_offsets": [8, 16]}, "a": A}, bytes(16))
    header = read_header(path)
    start = 8 + len(header.raw)
    assert (header.tensors["a"].start, header.tensors["a"].end) == (start, start + 8)
    assert (header.tensors["b"].start, header.tensors["b"].end) == (start + 8, start + 16)
    assert header.tensors["a"].info.dtype == torch.float32
    assert header.tensors["a"].info.shape == (2,)


BAD: dict[str, tuple[Any, bytes, str]] = {
    "truncated": ({"a": A}, bytes(7), r"truncated: its data ends 1 bytes past the end"),
    "trailing": ({"a": A}, bytes(9), r"1 bytes follow the last tensor"),
    "overlap": ({"a": A, "b": {**A, "data_offsets": [4, 12]}}, bytes(12), r"tensor b: its data overlaps"),
    "gap": ({"a": A, "b": {**A, "data_offsets": [9, 17]}}, bytes(17), r"a gap of 1 bytes"),
    "size": ({"a": {**A, "data_offsets": [0, 4]}}, bytes(4), r"F32 \[2\] needs 8 bytes, its offsets span 4"),
    "backwards": ({"a": {**A, "data_offsets": [8, 0]}}, bytes(8), r"are not \[begin, end\]"),
    "negative": ({"a": {**A, "data_offsets": [-8, 0]}}, bytes(8), r"are not \[begin, end\]"),
    "three offsets": ({"a": {**A, "data_offsets": [0, 4, 8]}}, bytes(8), r"are not \[begin, end\]"),
    "dtype": ({"a": {**A, "dtype": "F31"}}, bytes(8), r"dtype F31 is not supported"),
    "dtype kind": ({"a": {**A, "dtype": ["F32"]}}, bytes(8), r"is not supported"),
    "shape": ({"a": {**A, "shape": [-2]}}, bytes(8), r"shape \[-2\] is not a list of sizes"),
    "shape bool": ({"a": {**A, "shape": [True, 2]}}, bytes(8), r"is not a list of sizes"),
    "huge shape": (
        {"a": {**A, "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}},
        b"",
        r"more elements than can be counted",
    ),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), r"needs dtype, shape and data_offsets"),
    "list": ([], b"", r"not a JSON object"),
    "not json": (b"{", b"", r"not JSON"),
    "not utf8": (b'{"\xff": 1}', b"", r"not JSON"),
    "twice": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b"",
        r"twice",
    ),
    "deep": (b"[" * 100_000, b"", r"not JSON"),
    "half a surrogate pair": (
        b'{"a\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b"",
        r"not Unicode text",
    ),
    "control": ({"a\x1b[31m": {**A, "dtype": "?"}}, bytes(8), r"a\\x1b\[31m"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_header_is_refused_with_file_and_reason(tmp_path: Path, case: str) -> None:
    header, data, reason = BAD[case]
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lengths_beyond_the_file_or_the_limit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="header is longer than the file: 3 of 2 bytes"):
        read_header(write_raw(tmp_path / "a", b"{}", header_bytes=3))
    with pytest.raises(CheckpointError, match=f"over the limit of {MAX_HEADER_BYTES}"):
        read_header(write_raw(tmp_path / "b", b"{}", header_bytes=2**63))
    (tmp_path / "c").write_bytes(b"1234567")
    with pytest.raises(CheckpointError, match="has 7 bytes, too few"):
        read_header(tmp_path / "c")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "missing")


def test_agrees_with_the_reference_on_a_real_file(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(6, dtype=torch.int16).view(2, 3), "y": torch.zeros(0, 4), "z": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "real.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "real.safetensors")
    assert {n: (t.info.dtype, t.info.shape) for n, t in header.tensors.items()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
    }


_offsets = st.lists(st.integers(-1, 24), min_size=2, max_size=2)
_entry = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "U8", "BF16", "F64"]), "shape": st.lists(st.integers(0, 4), max_size=2)}
)


@settings(max_examples=300, deadline=None)
@given(
    entries=st.dictionaries(st.sampled_from("abc"), st.tuples(_entry, _offsets), max_size=3), size=st.integers(0, 24)
)
def test_never_accepts_what_the_reference_refuses(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, tuple[dict[str, Any], list[int]]], size: int
) -> None:
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    write_raw(
        path, {name: {**entry, "data_offsets": offsets} for name, (entry, offsets) in entries.items()}, bytes(size)
    )
    assert _ours(path) == _theirs(path)


def _ours(path: Path) -> bool:
    try:
        read_header(path)
    except CheckpointError:
        return False
    return True


def _theirs(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=64) | st.text(max_size=64).map(str.encode), length=st.none() | st.integers(0, 2**64 - 1))
def test_arbitrary_bytes_end_in_the_error_tree(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, length: int | None
) -> None:
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw)
    try:
        header = read_header(path)
    except CheckpointError:
        return
    assert json.loads(raw).keys() - {"__metadata__"} == header.tensors.keys()


def test_a_header_in_another_encoding_is_refused(tmp_path: Path) -> None:
    """Found by fuzzing: Python's JSON reader takes UTF-16 as well, the format does not."""
    path = write_raw(tmp_path / "x.safetensors", json.dumps({}).encode("utf-16-le"))
    with pytest.raises(CheckpointError, match="the header is not JSON"):
        read_header(path)
