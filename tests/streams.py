"""Weight streams for tests: the plain one, and stand-ins for a device's copies that are slow, late or fail."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from streamcollapse.run.opened import Job
from streamcollapse.storage.locks import FileLease
from streamcollapse.storage.reader import page_aligned
from streamcollapse.storage.source import TensorSource
from streamcollapse.stream.loaders import PlainLoader
from streamcollapse.stream.weights import Limits, WeightStream

CPU = torch.device("cpu")


def plain_stream(job: Job, source: TensorSource | None = None) -> WeightStream:
    """Reads when it is asked to, one tensor after the other: what every faster way must equal."""
    source = source or job.checkpoint
    return WeightStream(job.source, CPU, PlainLoader(source, CPU), job.meter, Limits(0))


class StandInCopies:
    """Copies by a thread, as late as possible: ``delay`` seconds each, and "device" memory of its own.

    Until a copy is done its target holds garbage; if a source is overwritten before, the garbage stays. ``fail_at`` is
    the number of the copy that fails. ``computing`` seconds pass before work that was marked counts as done.
    """

    def __init__(self, delay: float = 0.0, fail_at: int | None = None, computing: float = 0.0) -> None:
        self.delay, self.fail_at, self.computing = delay, fail_at, computing
        self.blocks: list[tuple[str, int]] = []
        self.copies = 0
        self.waited_for_compute = 0
        self._thread = ThreadPoolExecutor(1)

    def host_block(self, num_bytes: int) -> torch.Tensor:
        self.blocks.append(("host", num_bytes))
        return page_aligned(num_bytes)

    def device_block(self, num_bytes: int) -> torch.Tensor:
        self.blocks.append(("device", num_bytes))
        with torch.inference_mode(False):
            return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)

    def upload(self, target: torch.Tensor, source: torch.Tensor, after: Any | None) -> Any:
        self.copies += 1
        if self.copies == self.fail_at:
            raise RuntimeError("the copy failed")

        def work() -> None:
            if after is not None:
                self.waited_for_compute += 1
                after.result()
            target.fill_(0xFF)  # bfloat16 and float32 NaN: whoever reads too early notices
            time.sleep(self.delay)
            target.copy_(source)

        return self._thread.submit(work)

    def arrive(self, ticket: Any) -> None:
        ticket.result()

    def mark(self) -> Any:
        done: Future[None] = Future()
        threading.Timer(self.computing, lambda: done.set_result(None)).start()
        return done

    def wait(self, ticket: Any) -> None:
        ticket.result()

    def free(self) -> None:
        pass


class StandInDevice:
    """A CUDA device as its documentation describes it, on a CPU: whoever does not keep to the rules gets garbage, an
    error, or a line in ``broken_rules``.

    Copies are done by a thread, ``delay`` seconds late; until then their targets hold NaN. Work that was marked counts
    as done ``computing`` seconds later. A block that a computation has read (``compute``) is overwritten only after a
    mark that was set behind it, new memory only after all computation, a host block only after its copy. ``fails_at``:
    the number of the copy that goes wrong, of which nothing is said until somebody waits or asks for something, as from
    then on every time. ``capacity``: bytes of device memory. Host memory is registered, and must be released before it
    is unmapped.
    """

    def __init__(
        self, delay: float = 0.0, computing: float = 0.0, fails_at: int | None = None, capacity: int = 1 << 40
    ) -> None:
        self.delay, self.computing, self.fails_at, self.capacity = delay, computing, fails_at, capacity
        self.broken_rules: list[str] = []
        self.copies, self.held, self.peak, self.registered = 0, 0, 0, 0
        self._failed = False
        self._clock = 0  # counts what is put into the computation's queue
        self._used_since: dict[int, int] = {}  # by address: the moment from which computations may read a block
        self._filled: dict[Any, int] = {}  # by the copy's ticket: the address
        self._sizes: dict[int, int] = {}  # of blocks, by address
        self._copied: dict[int, Any] = {}  # by the address of a host block: its last copy's ticket
        self._unregister: list[Any] = []
        self._thread = ThreadPoolExecutor(1)

    def host_block(self, num_bytes: int) -> torch.Tensor:
        self._check()
        block = page_aligned(num_bytes)
        self.registered += 1
        finalizer = weakref.finalize(
            block.untyped_storage(), self.broken_rules.append, "host memory was unmapped while it was registered"
        )
        finalizer.atexit = False
        self._unregister.append(finalizer)
        return block

    def device_block(self, num_bytes: int) -> torch.Tensor:
        self._check()
        if self.held + num_bytes > self.capacity:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {num_bytes} bytes")
        with torch.inference_mode(False):
            block = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
        self.held += num_bytes
        self.peak = max(self.peak, self.held)
        self._used_since.pop(block.data_ptr(), None)
        self._sizes[block.data_ptr()] = num_bytes
        weakref.finalize(block.untyped_storage(), self._returned, num_bytes).atexit = False
        return block

    def _returned(self, num_bytes: int) -> None:
        self.held -= num_bytes

    def upload(self, target: torch.Tensor, source: torch.Tensor, after: Any | None) -> Any:
        self._check()
        self.copies += 1
        number, block = self.copies, target.data_ptr()
        since = self._used_since.get(block)
        if since is None and after is not None:
            self.broken_rules.append("new memory was filled before the computations that may have had it were done")
        if since is not None and after is not None and after.moment <= since:
            self.broken_rules.append("a block was overwritten while a computation could still read it")
        if (before := self._copied.get(source.data_ptr())) is not None and not before.done():
            self.broken_rules.append("host memory was overwritten while it was copied from")
        done = after or self._mark()

        def work() -> None:
            done.future.result()
            target.fill_(0xFF)
            time.sleep(self.delay)
            if number == self.fails_at:
                self._failed = True
            if not self._failed:
                target.copy_(source)

        ticket = self._thread.submit(work)
        self._filled[ticket] = block
        self._copied[source.data_ptr()] = ticket
        return ticket

    def arrive(self, ticket: Any) -> None:
        ticket.result()
        self._clock += 1
        self._used_since[self._filled.pop(ticket)] = self._clock

    def compute(self, tensors: Iterable[torch.Tensor]) -> None:
        """A computation that reads ``tensors`` is issued."""
        self._clock += 1
        for tensor in tensors:
            for block, size in self._sizes.items():
                if block <= tensor.data_ptr() < block + size:
                    self._used_since[block] = self._clock

    def mark(self) -> Any:
        self._check()
        return self._mark()

    def _mark(self) -> _Moment:
        self._clock += 1
        future: Future[None] = Future()
        threading.Timer(self.computing, lambda: future.set_result(None)).start()
        return _Moment(self._clock, future)

    def wait(self, ticket: Any) -> None:
        ticket.result()
        self._check()

    def free(self) -> None:
        self._thread.submit(lambda: None).result()
        while self._unregister:
            self._unregister.pop().detach()
            self.registered -= 1
        self._check()

    def _check(self) -> None:
        if self._failed:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore lines")


@dataclass(frozen=True)
class _Moment:
    """A mark in the computation's queue, and the work up to it."""

    moment: int
    future: Future[None]


def granted(path: Path) -> FileLease:
    """A lease on ``path``; skips the test where the system grants none."""
    lease = FileLease(path)
    if lease._handle is None:
        pytest.skip("this system or file system grants no leases")
    return lease


def truncating(path: Path, size: int) -> subprocess.Popen[bytes]:
    """Another process that cuts ``path`` to ``size`` bytes, as soon as it may."""
    code = "import os, sys; os.truncate(sys.argv[1], int(sys.argv[2]))"
    return subprocess.Popen([sys.executable, "-c", code, str(path), str(size)])
