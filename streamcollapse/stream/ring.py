"""A ring of equal blocks of memory, handed out as leases that cannot outlive the data in them.

A block goes back with a **ticket**: work that may still be using it (a copy on its way, a computation that was issued).
Whoever takes the block next waits for that work, on the host or on the device, before overwriting it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from streamcollapse.storage.reader import ReadingStopped

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
