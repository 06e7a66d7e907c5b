"""Time, bytes and memory per phase of a run, measured and sampled while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NotRequired, cast

import psutil
import torch
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from streamcollapse.resources.budget import group_usage

SAMPLE_SECONDS = 0.01
_DEVICE_EVERY = 10  # samples: asking the driver takes a lock that launching kernels needs as well
_STATUS = Path("/proc/self/status")
_FIELDS = {"rss": "VmRSS", "anonymous": "RssAnon", "file_mapped": "RssFile"}


@dataclass(frozen=True)
class MemorySample:
    """Bytes; None where this system does not tell. ``rss``: resident in all; of it ``anonymous`` cannot be dropped, and
    ``file_mapped`` can at any time. ``group``: held by the control group, page cache included. ``vram_device``: in use
    on the device by whomever, as the device itself counts."""

    rss: int
    anonymous: int | None = None
    file_mapped: int | None = None
    group: int | None = None
    vram_device: int | None = None

    def most(self, other: MemorySample) -> MemorySample:
        """The larger of each figure."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        known = {name: [v for v in pair if v is not None] for name, pair in pairs.items()}
        return MemorySample(**{name: max(values, default=None) for name, values in known.items()})  # type: ignore[arg-type]


def sample_memory(device: torch.device | None = None) -> MemorySample:
    """What is held now."""
    vram = None
    if device is not None and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        vram = total - free
    try:
        text = _STATUS.read_text(encoding="ascii")
    except OSError:  # not Linux
        return MemorySample(int(psutil.Process().memory_info().rss), vram_device=vram)
    lines = dict(line.split(":", 1) for line in text.splitlines())
    found = {key: int(lines[name].split()[0]) * 1024 for key, name in _FIELDS.items() if name in lines}
    return MemorySample(**found, group=group_usage(), vram_device=vram)


class MemorySampler:
    """Samples from a thread while the body of a ``with`` runs; ``peak`` is the largest of each figure."""

    def __init__(self, device: torch.device, on_sample: Callable[[float, MemorySample], None]) -> None:
        self._device, self._on_sample = device, on_sample
        self.peak = MemorySample(0)
        self._count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def __enter__(self) -> MemorySampler:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._count = 0
        self._sample()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        ask_device = self._count % _DEVICE_EVERY == 0
        self._count += 1
        sample = sample_memory(self._device if ask_device else None)
        self.peak = self.peak.most(sample)
        self._on_sample(time.perf_counter(), sample)


class Timeline:
    """Memory over time in at most ``most`` points: when there are more, every other one is dropped."""

    def __init__(self, most: int = 2000) -> None:
        self.points: list[tuple[float, MemorySample]] = []
        self._most, self._every, self._seen = most, 1, 0

    def add(self, seconds: float, sample: MemorySample) -> None:
        """A sample taken ``seconds`` after some fixed moment."""
        self._seen += 1
        if self._seen % self._every:
            return
        self.points.append((seconds, sample))
        if len(self.points) >= self._most:
            self.points, self._every = self.points[1::2], self._every * 2


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

    @property
    def seconds_waiting(self) -> float:
        """How long the computation has waited for weights in the running phase so far."""
        return self._current.seconds_waiting

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
