"""Weight streams for tests: the plain one, and stand-ins for a device's copies that are slow, late or fail."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from streamcollapse.jobs.opening import Job
from streamcollapse.storage.leases import FileLease
from streamcollapse.storage.reader import page_aligned
from streamcollapse.storage.source import TensorSource
from streamcollapse.stream.loaders import PlainLoader
from streamcollapse.stream.weights import WeightStream

CPU = torch.device("cpu")


def plain_stream(job: Job, source: TensorSource | None = None) -> WeightStream:
    """Reads when it is asked to, one tensor after the other: what every faster way must equal."""
    source = source or job.checkpoint
    return WeightStream(job.source, CPU, PlainLoader(source, CPU), job.meter, prefetch=0)


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


def granted(path: Path) -> FileLease:
    """A lease on ``path``; skips the test where the system grants none."""
    lease = FileLease(path)
    if not lease.is_held:
        pytest.skip("this system or file system grants no leases")
    return lease


def truncating(path: Path, size: int) -> subprocess.Popen[bytes]:
    """Another process that cuts ``path`` to ``size`` bytes, as soon as it may."""
    code = "import os, sys; os.truncate(sys.argv[1], int(sys.argv[2]))"
    return subprocess.Popen([sys.executable, "-c", code, str(path), str(size)])
