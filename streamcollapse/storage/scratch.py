"""Where tensors that a run makes are kept: in memory, on a device, or in files, whose pages the system can drop."""

import math
import os
from pathlib import Path

import torch

from streamcollapse.errors import OutputError
from streamcollapse.storage.disk import disk_errors
from streamcollapse.storage.mapping import forget_pages


class Scratch:
    """Room for tensors in this process's memory, or in that of ``device``."""

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008 - immutable
        self._device = device

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor. Raises OutputError where there is no space for it."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    def page_out(self, tensor: torch.Tensor) -> None:
        """``tensor``, or a contiguous part of one, will not be needed for a while."""


class DiskScratch(Scratch):
    """Room in files of ``directory``, one for each name; what is there already can be found again."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        path = self._directory / name
        num_bytes = max(math.prod(shape) * dtype.itemsize, 1)
        with disk_errors(path, needed=num_bytes), path.open("wb") as file:
            # Reserved now: a mapped page for which the disk has no space left kills the process.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        return self.find(name, shape, dtype)

    def find(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensor that was allocated as ``name``. Raises OutputError where its file is not whole."""
        count = math.prod(shape)
        path = self._directory / name
        if not path.is_file() or path.stat().st_size < count * dtype.itemsize:
            raise OutputError(f"{path}: is not there, or not whole; choose another `work_dir`")
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)

    def page_out(self, tensor: torch.Tensor) -> None:
        forget_pages(tensor.data_ptr(), tensor.nbytes)
