"""Tensors whose places in files are known: read in place from mapped files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from streamcollapse.errors import CheckpointError
from streamcollapse.storage.extents import Location
from streamcollapse.storage.mapping import MappedFile, changed_size
from streamcollapse.storage.reader import read_into
from streamcollapse.storage.source import TensorInfo


def read_rows(place: Location, rows: torch.Tensor) -> torch.Tensor:
    """Rows ``rows`` (int64, any shape) of the matrix at ``place``, each read once; neighbours together.

    Returns shape (*rows.shape, *the matrix's shape without its first dimension). Raises CheckpointError where the file
    cannot be read or ends too early.
    """
    if place.strides is not None:
        return _whole(place)[rows.cpu()]
    wanted, where = torch.unique(rows.cpu(), return_inverse=True)
    shape = place.info.shape[1:]
    row_bytes = place.info.num_bytes // max(place.info.shape[0], 1)
    read = torch.empty(len(wanted), row_bytes, dtype=torch.uint8)
    starts = [i for i in range(len(wanted)) if i == 0 or wanted[i] != wanted[i - 1] + 1]
    try:
        with place.path.open("rb", buffering=0) as file:
            for first, end in pairwise([*starts, len(wanted)]):
                _fill(file.fileno(), read[first:end], place, int(wanted[first]) * row_bytes)
    except OSError as error:
        raise CheckpointError(f"{place.path}: cannot be read: {error.strerror or error}") from error
    return read.view(-1).view(place.info.dtype).view(len(wanted), *shape)[where]


def _whole(place: Location) -> torch.Tensor:
    """The matrix, whose rows do not lie one after the other (a transposed one, in a PyTorch file)."""
    read = torch.empty(place.end - place.start, dtype=torch.uint8)
    try:
        with place.path.open("rb", buffering=0) as file:
            _fill(file.fileno(), read, place, 0)
    except OSError as error:
        raise CheckpointError(f"{place.path}: cannot be read: {error.strerror or error}") from error
    return place.shaped(read.view(place.info.dtype))


def _fill(handle: int, target: torch.Tensor, place: Location, offset: int) -> None:
    """``target`` from ``offset`` within the tensor on."""
    view, done = target.view(-1).numpy().data, 0
    while done < len(view):
        count = read_into(handle, view[done:], place.start + offset + done)
        if count <= 0:
            raise changed_size(place.path)
        done += count


if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamcollapse.storage.checkpoint import Checkpoint


class PlacedTensors(ABC):
    """A TensorSource that knows where each tensor lies."""

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """Every tensor name."""

    @abstractmethod
    def locate(self, name: str) -> Location:
        """Where the bytes of ``name`` are; KeyError if there is none."""

    @abstractmethod
    def mapped(self, place: Location) -> MappedFile:
        """The mapping of the file that ``place`` lies in."""

    def info(self, name: str) -> TensorInfo:
        """dtype and shape of ``name``; KeyError if there is none."""
        return self.locate(name).info

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """``name`` on ``device``; on the CPU the tensor is a view of the mapped file, read in whole but not copied."""
        place = self.locate(name)
        mapped = self.mapped(place)
        mapped.populate(place.start, place.end)
        tensor = mapped.tensor(place)
        if device.type == "cpu":
            return tensor
        copied = tensor.to(device)
        mapped.give_back(place.start, place.end, drop_after_use=False)
        return copied

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``rows`` of the matrix ``name``, copied. Only they are read: a mapped page would bring megabytes
        along."""
        return read_rows(self.locate(name), rows)


class Overlay(PlacedTensors):
    """The tensors of ``checkpoint``, and others that a run has stored in files of its own, which may come and go.

    The others are found by name and are not among ``names``.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._places: dict[str, Location] = {}
        self._maps: dict[Path, MappedFile | None] = {}  # of the files of its own, once they are needed

    @property
    def names(self) -> Sequence[str]:
        return self._checkpoint.names

    def add(self, name: str, place: Location) -> None:
        """Let ``name``, which the checkpoint has not, be read at ``place``."""
        self._places[name] = place
        self._maps.setdefault(place.path, None)

    def has(self, name: str) -> bool:
        """Whether ``name`` was added."""
        return name in self._places

    def remove(self, name: str) -> Path:
        """Undo ``add``; returns the file, which nothing reads any more."""
        path = self._places.pop(name).path
        self._maps.pop(path, None)
        return path

    def locate(self, name: str) -> Location:
        return self._places.get(name) or self._checkpoint.locate(name)

    def mapped(self, place: Location) -> MappedFile:
        if place.path not in self._maps:
            return self._checkpoint.mapped(place)
        mapped = self._maps[place.path] or MappedFile(place.path, place.path.stat().st_size)
        self._maps[place.path] = mapped
        return mapped
