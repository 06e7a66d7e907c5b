"""Blocks of memory that weights pass through in turn: the slot of the layer that runs, and the ring of those that come.

A layer slot is allocated once, at the size of the largest layer, so that a pass over the model neither grows nor
fragments memory and no page is faulted in twice. It is handed out as a lease: while a layer's weights are in use it
cannot be filled again.

A ring hands out equal blocks as leases that cannot outlive the data in them. A block goes back with a **ticket**: work
that may still be using it (a copy on its way, a computation that was issued). Whoever takes the block next waits for
that work, on the host or on the device, before overwriting it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

from streamcollapse.storage.reader import ReadingStopped
from streamcollapse.storage.source import TensorInfo

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


Ticket = TypeVar("Ticket")


class Lease(Generic[Ticket]):
    """A block for as long as it is not released; ``after`` is the ticket that its last user left, if any."""

    def __init__(self, ring: Ring[Ticket], block: torch.Tensor, after: Ticket | None) -> None:
        self._ring = ring
        self._block: torch.Tensor | None = block
        self.after = after

    @property
    def block(self) -> torch.Tensor:
        """The memory, as uint8."""
        assert self._block is not None, "the lease has ended: its block belongs to someone else"
        return self._block

    def release(self, ticket: Ticket | None = None) -> None:
        """Give the block back; it may be overwritten once the work of ``ticket`` is done."""
        block, self._block = self.block, None
        self._ring.give_back(block, ticket)


class Ring(Generic[Ticket]):
    """At most ``count`` blocks of ``num_bytes``, each made by ``make`` when it is first needed and then used again and
    again."""

    def __init__(self, count: int, num_bytes: int, make: Callable[[int], torch.Tensor]) -> None:
        self._make, self._count, self._num_bytes = make, count, num_bytes
        self._unmade = count
        self._free: list[tuple[torch.Tensor, Ticket | None]] = []
        self._changed = threading.Condition()
        self._closed = False

    def serves(self, count: int, num_bytes: int) -> bool:
        """Whether it has as many blocks, of at least that size."""
        return count <= self._count and num_bytes <= self._num_bytes

    def acquire(self) -> Lease[Ticket]:
        """The next block, the one given back longest ago; waits for one. Raises ReadingStopped after ``close``, and
        what ``make`` raises."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._unmade or self._closed)
            if self._closed:
                raise ReadingStopped
            if self._unmade:
                block = self._make(self._num_bytes)  # where this fails the block is still to be made
                self._unmade -= 1
                return Lease(self, block, None)
            block, ticket = self._free.pop(0)
            return Lease(self, block, ticket)

    def give_back(self, block: torch.Tensor, ticket: Ticket | None) -> None:
        """Called by leases."""
        with self._changed:
            self._free.append((block, ticket))
            self._changed.notify()

    def close(self) -> None:
        """Wake whoever waits, and give out nothing more until ``open``."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def open(self) -> None:
        """Give out blocks again."""
        with self._changed:
            self._closed = False


def layer_slot_bytes(layers: Iterable[Iterable[TensorInfo]], dtype: torch.dtype) -> int:
    """Bytes of the slot that holds any one of ``layers`` in the compute ``dtype``."""

    def placed(info: TensorInfo) -> int:
        return carved_bytes(info.num_elements * (dtype if info.dtype.is_floating_point else info.dtype).itemsize)

    return max(sum(map(placed, infos)) for infos in layers)
