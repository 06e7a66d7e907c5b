"""A source whose tensors are read once and kept only as long as they are needed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from streamcollapse.storage.source import TensorInfo, TensorSource


class WindowedSource:
    """``source`` with each tensor held from its first to its last read; ``uses`` has a name as often as it is read.

    On a CPU the held tensors are views of the mapped file and cost nothing; on a device they are the merge window.
    """

    def __init__(self, source: TensorSource, uses: Iterable[str], device: torch.device) -> None:
        self._source = source
        self._device = device
        self._left = Counter(uses)
        self._held: dict[str, torch.Tensor] = {}

    @property
    def names(self) -> Sequence[str]:
        return self._source.names

    def info(self, name: str) -> TensorInfo:
        return self._source.info(name)

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """``name`` on ``device``, from the window where it is held."""
        if device != self._device:
            return self._source.read(name, device)
        tensor = self._held.pop(name, None)
        if tensor is None:
            tensor = self._source.read(name, device)
        self._left[name] -= 1
        if self._left[name] > 0:
            self._held[name] = tensor
        return tensor

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self._source.read_rows(name, rows)

    @property
    def held_bytes(self) -> int:
        """Bytes of the tensors that are held now."""
        return sum(tensor.nbytes for tensor in self._held.values())
