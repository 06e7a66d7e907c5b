"""The seam of the project: bytes by tensor name.

A checkpoint is a TensorSource, a plan over a checkpoint is one; the streamed forward pass and the writer
consume one. Tests and benchmarks wrap it to count, slow down or break reads. Knows nothing of decoder layers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from streamcollapse.errors import NonFiniteError


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


def span_elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a tensor of ``shape`` whose dimensions are ``strides`` elements apart."""
    return 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


class TensorSource(Protocol):
    """Named tensors that can be described without being read."""

    @property
    def names(self) -> Sequence[str]:
        """Every tensor name, each once, in a fixed order."""

    def info(self, name: str) -> TensorInfo:
        """dtype and shape of ``name``; KeyError if there is none."""

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """The values of ``name`` on ``device``. Never written to by the caller: it may alias the file."""

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``rows`` (int64, on the CPU) of the matrix ``name``, on the CPU; nothing else of it is read."""


def bytes_by_dtype(source: TensorSource) -> dict[str, int]:
    """Bytes of all tensors of ``source`` by dtype (``bfloat16``), in the order in which they are met."""
    totals: dict[str, int] = {}
    for info in map(source.info, source.names):
        key = str(info.dtype).removeprefix("torch.")
        totals[key] = totals.get(key, 0) + info.num_bytes
    return totals


class ObservedSource:
    """A TensorSource that reports the size of every read to ``on_read(name, num_bytes)``."""

    def __init__(self, source: TensorSource, on_read: Callable[[str, int], None]) -> None:
        self._source = source
        self._on_read = on_read

    @property
    def names(self) -> Sequence[str]:
        return self._source.names

    def info(self, name: str) -> TensorInfo:
        return self._source.info(name)

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        self._on_read(name, self._source.info(name).num_bytes)
        return self._source.read(name, device)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        values = self._source.read_rows(name, rows)
        self._on_read(name, values.nbytes)
        return values


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` holds neither NaN nor infinity; integers and 8-bit floats always pass."""
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2 or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN propagates; far faster than isfinite().all(), which makes a mask
    return bool(torch.isfinite(low) and torch.isfinite(high))


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise NonFiniteError, naming the tensor, unless it ``is_finite``."""
    if not is_finite(tensor):
        count = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"tensor {name} has {count} NaN or infinite values; download the checkpoint again or repair it"
        )


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
