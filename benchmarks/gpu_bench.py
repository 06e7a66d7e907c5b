"""What every row of gpu_day.py gets: the device or its stand-in, shapes and samples in their real or tiny size."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from about import environment
from gpu_devices import CudaDevice, Device, HostDevice
from gpu_rows import Finding
from gpu_runner import note
from make_checkpoint import SHAPES, Shape
from measure import write_sentences

from streamcollapse.resources.meter import MemorySample, sample_memory
from streamcollapse.settings.run import Calibration, Compute, Streaming
from streamcollapse.units import format_bytes

VERSIONS = ("torch", "transformers", "safetensors", "numpy", "psutil")
REHEARSED_BYTES = 1 << 28  # of memory, where a row has a budget of a GPU's


@dataclass(frozen=True)
class Bench:
    """``work`` is the directory of all rows of the part, ``place`` the row's own."""

    work: Path
    place: Path
    rehearsal: bool

    @cached_property
    def device(self) -> Device:
        """The device, settled."""
        device: Device = HostDevice() if self.rehearsal else CudaDevice()
        device.page_out()
        return device

    def pick(self, real: int, rehearsed: int) -> int:
        """One for the device, one for a rehearsal."""
        return rehearsed if self.rehearsal else real

    def shape(self, name: str) -> Shape:
        """The shape ``name``; in a rehearsal 8 tiny layers."""
        return SHAPES["tiny" if self.rehearsal else name]

    def source(self, name: str) -> Path:
        """Where the checkpoint of the shape ``name`` is."""
        return self.work / name

    def compute(self, dtype: str = "auto") -> Compute:
        """On the device."""
        return Compute(self.device.name, dtype)

    def streaming(self, vram: int | None = None, ram: int | None = None, io: str = "auto") -> Streaming:
        """Budgets for the device. A rehearsal has memory alone, and a fixed amount of it in the place of ``vram``."""
        if self.rehearsal:
            return Streaming(ram_budget=ram if vram is None else REHEARSED_BYTES, io=io)
        return Streaming(vram_budget=vram, ram_budget=ram, io=io)

    def calibration(self, kind: str | None = None) -> Calibration:
        """The samples ``kind``, None for those of the strategy; in a rehearsal one sentence."""
        if not self.rehearsal:
            return Calibration(kind)
        file = self.place / "sentences.txt"
        write_sentences(file, 1)
        return Calibration(file)

    def before(self) -> MemorySample:
        """What is held before a job: by this process, context included, and on the device by whomever."""
        return sample_memory(self.device.place)

    def note(self, **figures: Any) -> None:
        """Keep ``figures`` for the case that the row does not come to its end."""
        note(self.place, **figures)


def about(bench: Bench) -> Finding:
    """What machine this is. ``usable``: whether a process like this one can use the device."""
    if getattr(torch.cuda, "_is_in_bad_fork", bool)():  # the server has touched the device
        return Finding("forked from a process that has used CUDA", {"usable": False, "forked": True})
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(bench.work)
    figures = {
        **environment(),
        "memory_free_bytes": memory.available,
        "disk_free_bytes": disk.free,
        "versions": {name: metadata.version(name) for name in VERSIONS},
        "usable": bench.rehearsal or torch.cuda.is_available(),
        "forked": False,
    }
    words = "a CPU in the place of a GPU" if bench.rehearsal else str(figures["cuda"])
    if torch.cuda.is_available() and not bench.rehearsal:
        properties, free = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info(0)[0]
        total, capability = properties.total_memory, f"{properties.major}.{properties.minor}"
        figures |= {"vram_bytes": total, "vram_free_bytes": free, "capability": capability}
        figures |= {"cuda_version": torch.version.cuda}
        words = f"{properties.name}, {format_bytes(total)}, of which {format_bytes(free)} are free, "
        words += f"capability {capability}, CUDA {torch.version.cuda}"
    versions = ", ".join([f"python {figures['python']}", *(f"{k} {v}" for k, v in figures["versions"].items())])
    lines = [
        f"device: {words}",
        f"machine: {figures['cores']} cores, {format_bytes(memory.available)} of memory free, "
        f"{format_bytes(disk.free)} free in {bench.work.parent}",
        f"versions: {versions}",
    ]
    return Finding("\n".join(lines), figures)
