"""A layer slot: one block of memory that every layer's weights pass through in turn.

Allocated once, at the size of the largest layer, so that a pass over the model neither grows nor fragments memory and
no page is faulted in twice. Handed out as a lease: while a layer's weights are in use the slot cannot be filled again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ALIGNMENT = 64  # bytes: a cache line, and what vectorised kernels like best


class LayerSlot:
    """``capacity`` bytes on ``device``; untouched parts of it cost no memory on a CPU."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._block = torch.empty(capacity, dtype=torch.uint8, device=device)
        self._used = 0
        self._leased = False

    @contextmanager
    def lease(self) -> Iterator[LayerSlot]:
        """Hold the slot while the body runs; tensors carved in it are overwritten by the next lease."""
        assert not self._leased, "the slot is in use: let go of a layer's weights before loading the next"
        self._leased, self._used = True, 0
        try:
            yield self
        finally:
            self._leased = False

    def carve(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor in the slot, valid until the lease ends."""
        assert self._leased, "a slot is carved under a lease only"
        size = math.prod(shape) * dtype.itemsize
        start, self._used = self._used, self._used + carved_bytes(size)
        assert self._used <= self._block.numel(), "the slot was sized for the largest layer"
        return self._block[start : start + size].view(dtype).view(shape)


def carved_bytes(size: int) -> int:
    """What a tensor of ``size`` bytes takes in a slot, alignment included."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
