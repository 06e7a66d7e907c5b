"""A tensor source in another precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streamcollapse.errors import NonFiniteError
from streamcollapse.storage.finite import is_finite
from streamcollapse.storage.source import TensorInfo, TensorSource


class CastSource:
    """``source`` with every floating-point tensor in ``dtype``; integers and flags stay what they are."""

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype

    @property
    def names(self) -> Sequence[str]:
        return self._source.names

    def info(self, name: str) -> TensorInfo:
        info = self._source.info(name)
        return TensorInfo(self._dtype, info.shape) if info.dtype.is_floating_point else info

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """``name`` on ``device``. Raises NonFiniteError where a number is too large for the new dtype."""
        stored = self._source.read(name, device)
        cast = stored.to(self.info(name).dtype)
        if cast.dtype != stored.dtype and not is_finite(cast) and is_finite(stored):
            kind = str(cast.dtype).removeprefix("torch.")
            raise NonFiniteError(f"tensor {name} has numbers that are too large for {kind}; choose bfloat16 or float32")
        return cast

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self._source.read_rows(name, rows).to(self.info(name).dtype)
