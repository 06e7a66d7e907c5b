"""Leases on blocks of memory: exclusive, in order, and over when they are over."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from streamcollapse.storage.reader import ReadingStopped
from streamcollapse.stream.slots import Ring


def _ring(count: int) -> Ring[str]:
    return Ring(count, 8, lambda size: torch.empty(size, dtype=torch.uint8))


def test_blocks_are_made_when_needed_and_used_again_oldest_first() -> None:
    made: list[torch.Tensor] = []

    def make(num_bytes: int) -> torch.Tensor:
        made.append(torch.empty(num_bytes, dtype=torch.uint8))
        return made[-1]

    ring: Ring[str] = Ring(3, 8, make)
    a, b = ring.acquire(), ring.acquire()
    assert len(made) == 2
    assert (a.after, b.after) == (None, None)
    first = a.block
    a.release("copy of a")
    b.release()
    third = ring.acquire()
    assert len(made) == 3, "a block that was never used is taken before one that may still be in use"
    again = ring.acquire()
    assert again.block is first
    assert again.after == "copy of a"
    assert third.block is not first


def test_a_lease_cannot_outlive_its_data() -> None:
    ring = _ring(1)
    lease = ring.acquire()
    lease.release()
    with pytest.raises(AssertionError, match="the lease has ended"):
        _ = lease.block
    with pytest.raises(AssertionError, match="the lease has ended"):
        lease.release()


def test_whoever_comes_too_early_waits() -> None:
    ring = _ring(1)
    lease = ring.acquire()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ring.acquire)
        assert not threading.Event().wait(0.05)
        assert not waiting.done()
        lease.release("ticket")
        assert waiting.result(timeout=5).after == "ticket"


def test_closing_wakes_whoever_waits_and_opening_goes_on() -> None:
    ring = _ring(1)
    lease = ring.acquire()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ring.acquire)
        ring.close()
        with pytest.raises(ReadingStopped):
            waiting.result(timeout=5)
    lease.release()
    with pytest.raises(ReadingStopped):
        ring.acquire()
    ring.open()
    ring.acquire()


def test_a_block_that_could_not_be_made_is_made_later() -> None:
    failures = [torch.OutOfMemoryError("no memory")]

    def make(num_bytes: int) -> torch.Tensor:
        if failures:
            raise failures.pop()
        return torch.empty(num_bytes, dtype=torch.uint8)

    ring: Ring[str] = Ring(2, 8, make)
    with pytest.raises(torch.OutOfMemoryError):
        ring.acquire()
    assert ring.acquire().block is not ring.acquire().block, "both blocks are there, and nobody waits for a third"


def test_a_ring_serves_what_is_no_more_than_it_has() -> None:
    ring = _ring(3)
    assert ring.serves(3, 8)
    assert ring.serves(1, 1)
    assert not ring.serves(4, 8)
    assert not ring.serves(3, 9)
