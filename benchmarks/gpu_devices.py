"""The one seam of gpu_day.py: the GPU, and a stand-in on a CPU for rehearsals. Rows are the same code on both."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, Protocol

import torch

from streamcollapse.storage.reader import page_aligned
from streamcollapse.stream.copies import Copies, CudaCopies


class RatedCopies(Copies, Protocol):
    """Copies whose ceiling can be measured."""

    def rate(self, num_bytes: int) -> float:
        """Bytes a second from host blocks to the device."""
        ...


class Device(Protocol):
    """Where rows compute; ``name`` as ``--device`` takes it."""

    name: str
    place: torch.device

    def page_out(self) -> None:
        """Bring in the context and the kernels of a first product, which no job is to account for, and let go of
        what the allocator has kept."""
        ...

    def copies(self) -> RatedCopies:
        """Copies to it."""
        ...

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Host memory that torch has pinned, as uint8."""
        ...

    def synchronize(self) -> None:
        """Return when all that was issued is done."""
        ...


class CudaDevice:
    """The first GPU."""

    name = "cuda"
    place = torch.device("cuda", 0)

    def page_out(self) -> None:
        ones = torch.ones(256, 256, dtype=torch.bfloat16, device=self.place)
        torch.mm(ones, ones)
        del ones
        self.synchronize()
        torch.cuda.empty_cache()

    def copies(self) -> RatedCopies:
        return CudaCopies(self.place)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.place)


class HostDevice:
    """A CPU in the place of a GPU."""

    name = "cpu"
    place = torch.device("cpu")

    def page_out(self) -> None: ...

    def copies(self) -> RatedCopies:
        return HostCopies()

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return page_aligned(num_bytes)

    def synchronize(self) -> None: ...


class HostCopies:
    """Copies that are done when they are issued."""

    def host_block(self, num_bytes: int) -> torch.Tensor:
        return page_aligned(num_bytes)

    def device_block(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def upload(self, target: torch.Tensor, source: torch.Tensor, after: Any | None) -> Any:
        target.copy_(source)

    def arrive(self, ticket: Any) -> None: ...

    def mark(self) -> Any: ...

    def wait(self, ticket: Any) -> None: ...

    def free(self) -> None: ...

    def rate(self, num_bytes: int) -> float:
        source, target = self.host_block(num_bytes).fill_(0), self.device_block(num_bytes)
        return num_bytes / best_of(3, lambda: self.upload(target, source, None))


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def best_of(rounds: int, work: Callable[[], object]) -> float:
    """The fewest seconds that ``work`` takes."""
    return min(timed(work) for _ in range(rounds))


def median_of(rounds: int, work: Callable[[], object]) -> float:
    """The median of the seconds that ``work`` takes."""
    return median(timed(work) for _ in range(rounds))


def gigabytes(num_bytes: float, seconds: float) -> str:
    """A rate in words."""
    return f"{num_bytes / max(seconds, 1e-9) / 1e9:.3g} GB/s"
