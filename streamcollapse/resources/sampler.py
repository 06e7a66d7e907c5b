"""What memory this process holds, sampled while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import psutil
import torch

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
