"""Tensors whose places in files are known: read in place from mapped files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from streamcollapse.storage.extents import Location
from streamcollapse.storage.mapping import MappedFile
from streamcollapse.storage.rows import read_rows
from streamcollapse.storage.source import TensorInfo

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
        mapped.give_back(place.start, place.end, from_cache=False)
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
        self._places[name], self._maps[place.path] = place, None

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
