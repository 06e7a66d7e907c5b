"""Rows of a stored matrix: equal to indexing the whole, and refused where the file has become shorter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streamcollapse.errors import CheckpointError
from streamcollapse.storage.checkpoint import Checkpoint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [[0], [3, 4, 5], [49, 0, 7, 7, 8, 48], [[1, 2], [2, 40]], []])
def test_rows_are_those_of_the_whole_matrix(tmp_path: Path, dtype: torch.dtype, rows: list[int]) -> None:
    matrix = torch.randn(50, 6).to(dtype)
    save_file({"a": torch.zeros(3), "matrix": matrix}, tmp_path / "model.safetensors")
    wanted = torch.tensor(rows, dtype=torch.int64)
    found = Checkpoint(tmp_path).read_rows("matrix", wanted)
    assert found.dtype == dtype
    assert torch.equal(found, matrix[wanted])


def test_a_file_cut_short_is_an_error_and_no_signal(tmp_path: Path) -> None:
    save_file({"matrix": torch.randn(5000, 16)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 8192)
    with pytest.raises(CheckpointError, match="changed size"):
        checkpoint.read_rows("matrix", torch.tensor([4999]))
