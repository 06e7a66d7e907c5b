"""Time, bytes and memory per phase of a run, measured while it runs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, NotRequired, cast

import torch
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from streamcollapse.resources.sampler import MemorySample, MemorySampler, Timeline


@dataclass
class PhaseUsage:
    """What one phase used.

    ``seconds_reading`` is how long weights were on their way, ``seconds_waiting`` how much of that the computation
    stood still for. Peaks in bytes, None where the system does not tell: ``peak_anonymous_rss`` leaves out file pages,
    which the kernel can drop at any time; ``peak_file_rss`` are those; ``peak_group`` is what the control group held,
    page cache included; ``peak_vram`` and ``peak_vram_reserved`` are the allocator's, ``peak_vram_device`` the device's
    own.
    """

    name: str
    seconds: float = 0.0
    seconds_reading: float = 0.0
    seconds_waiting: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    peak_rss: int = 0
    peak_anonymous_rss: int | None = None
    peak_file_rss: int | None = None
    peak_group: int | None = None
    peak_vram: int | None = None
    peak_vram_reserved: int | None = None
    peak_vram_device: int | None = None


class Usage(TypedDict):
    """Totals and peaks over the phases of a run, and the phases (``PhaseUsage``) themselves, as JSON types; ``memory``:
    how it was planned."""

    seconds: float
    bytes_read: int
    bytes_written: int
    peak_rss: int
    peak_anonymous_rss: int | None
    peak_file_rss: int | None
    peak_group: int | None
    peak_vram: int | None
    peak_vram_reserved: int | None
    peak_vram_device: int | None
    phases: list[dict[str, Any]]
    memory: NotRequired[dict[str, Any]]


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
        self._started = time.perf_counter()
        self.timeline = Timeline()

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
            with MemorySampler(self._device, self._sampled) as sampler:
                yield usage
        finally:
            usage.seconds = time.perf_counter() - start
            peak = sampler.peak
            usage.peak_rss, usage.peak_anonymous_rss, usage.peak_file_rss = peak.rss, peak.anonymous, peak.file_mapped
            usage.peak_group, usage.peak_vram_device = peak.group, peak.vram_device
            if self._device.type == "cuda":
                usage.peak_vram = torch.cuda.max_memory_allocated(self._device)
                usage.peak_vram_reserved = torch.cuda.max_memory_reserved(self._device)
            self._current = outer

    def _sampled(self, moment: float, sample: MemorySample) -> None:
        self.timeline.add(moment - self._started, sample)

    def summary(self) -> Usage:
        """What all phases used."""

        def peak(name: str) -> int | None:
            return max((v for p in self.phases if (v := getattr(p, name)) is not None), default=None)

        totals = {"seconds": sum(p.seconds for p in self.phases)}
        totals |= {name: sum(getattr(p, name) for p in self.phases) for name in ("bytes_read", "bytes_written")}
        peaks = {f.name: peak(f.name) for f in fields(PhaseUsage) if f.name.startswith("peak_")}
        return cast(Usage, {**totals, **peaks, "phases": [asdict(p) for p in self.phases]})
