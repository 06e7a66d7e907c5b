"""Time, bytes and memory per phase of a run, measured while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

_SAMPLE_SECONDS = 0.01
_STATUS = Path("/proc/self/status")


@dataclass
class PhaseUsage:
    """What one phase used. ``seconds_reading`` is how long weights were on their way, ``seconds_waiting`` how much of
    that the computation stood still for. Memory in bytes; ``peak_anonymous_rss`` (None where the system does not tell)
    leaves out file pages, which the kernel can drop at any time; ``peak_vram`` is the allocator's (None without
    CUDA)."""

    name: str
    seconds: float = 0.0
    seconds_reading: float = 0.0
    seconds_waiting: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    peak_rss: int = 0
    peak_anonymous_rss: int | None = None
    peak_vram: int | None = None


@dataclass
class Pace:
    """How fast this run reads and computes: ``reading`` seconds over ``layers`` layers that were read and made ready,
    ``computing`` seconds over ``runs`` runs of one layer for one candidate."""

    reading: float = 0.0
    layers: int = 0
    computing: float = 0.0
    runs: int = 0

    def ratio(self) -> float:
        """Reading a layer in multiples of running one; 0 before anything is known."""
        if not (self.layers and self.runs and self.computing):
            return 0.0
        return (self.reading / self.layers) / (self.computing / self.runs)


class Meter:
    """Collects PhaseUsage; ``read`` and ``written`` count towards the phase that runs."""

    def __init__(self, device: torch.device) -> None:
        self.phases: list[PhaseUsage] = []
        self.pace = Pace()
        self._device = device
        self._current = PhaseUsage("outside")

    def read(self, name: str, num_bytes: int) -> None:
        self._current.bytes_read += num_bytes

    def written(self, num_bytes: int) -> None:
        self._current.bytes_written += num_bytes

    @property
    def bytes_read(self) -> int:
        """Bytes read in the running phase so far."""
        return self._current.bytes_read

    @contextmanager
    def computing(self, runs: int) -> Iterator[None]:
        """Time ``runs`` runs of one layer."""
        start = time.perf_counter()
        yield
        self.pace.computing += time.perf_counter() - start
        self.pace.runs += runs

    def loaded(self, seconds: float, num_bytes: int) -> None:
        """A unit of ``num_bytes`` was brought in; called from the thread that did it."""
        self._current.bytes_read += num_bytes
        self._current.seconds_reading += seconds
        self.pace.reading += seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the computation's waiting for weights."""
        start = time.perf_counter()
        yield
        self._current.seconds_waiting += time.perf_counter() - start

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Time what is done with one layer's weights before it can run: mixing, converting."""
        start = time.perf_counter()
        yield
        self.pace.reading += time.perf_counter() - start
        self.pace.layers += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[PhaseUsage]:
        """Measure the body as one phase."""
        usage = PhaseUsage(name)
        self.phases.append(usage)
        outer, self._current = self._current, usage
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        try:
            with MemorySampler() as sampler:
                yield usage
        finally:
            usage.seconds = time.perf_counter() - start
            usage.peak_rss, usage.peak_anonymous_rss = sampler.peak_rss, sampler.peak_anonymous
            if self._device.type == "cuda":
                usage.peak_vram = torch.cuda.max_memory_allocated(self._device)
            self._current = outer

    def summary(self) -> dict[str, Any]:
        """Totals over the phases and the phases themselves, as JSON types."""
        anonymous = [p.peak_anonymous_rss for p in self.phases if p.peak_anonymous_rss is not None]
        vram = [p.peak_vram for p in self.phases if p.peak_vram is not None]
        return {
            "seconds": sum(p.seconds for p in self.phases),
            "bytes_read": sum(p.bytes_read for p in self.phases),
            "bytes_written": sum(p.bytes_written for p in self.phases),
            "peak_rss": max((p.peak_rss for p in self.phases), default=0),
            "peak_anonymous_rss": max(anonymous, default=None),
            "peak_vram": max(vram, default=None),
            "phases": [asdict(p) for p in self.phases],
        }


class MemorySampler:
    """Samples this process's resident memory from a thread while the body of a ``with`` runs."""

    def __init__(self) -> None:
        self.peak_rss = 0
        self.peak_anonymous: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def __enter__(self) -> MemorySampler:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        rss, anonymous = resident_memory()
        self.peak_rss = max(self.peak_rss, rss)
        if anonymous is not None:
            self.peak_anonymous = max(self.peak_anonymous or 0, anonymous)


def resident_memory() -> tuple[int, int | None]:
    """Resident bytes of this process: all, and anonymous ones (None where the system does not tell them apart)."""
    try:
        text = _STATUS.read_text(encoding="ascii")
    except OSError:
        return int(psutil.Process().memory_info().rss), None
    fields = dict(line.split(":", 1) for line in text.splitlines() if line.startswith(("VmRSS", "RssAnon")))
    kilobytes = {key: int(value.split()[0]) for key, value in fields.items()}
    anonymous = kilobytes.get("RssAnon")
    return kilobytes["VmRSS"] * 1024, None if anonymous is None else anonymous * 1024
