"""How much memory there is: of the machine, of the control group that this process is in, of a CUDA device."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from streamcollapse.errors import OptionError
from streamcollapse.resources.device import free_vram
from streamcollapse.settings.run import Streaming
from streamcollapse.units import parse_bytes

MARGIN = 0.1  # of what is free, left to everyone else unless the user says how much to take
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may take beyond what the process had before: ``ram``, and ``vram`` on a device (else None).

    ``vram_limit``: what the user allows of the device, which torch's allocator then enforces; None where the user said
    nothing.
    """

    ram: int
    vram: int | None = None
    vram_limit: int | None = None


def budget_for(streaming: Streaming, device: torch.device) -> Budget:
    """What the user allows; where nothing is said, what is free, less a margin.

    Raises OptionError for a ``vram_budget`` where nothing is computed on a GPU.
    """
    ram = parse_bytes(streaming.ram_budget) if streaming.ram_budget is not None else int(free_ram() * (1 - MARGIN))
    if device.type == "cpu":
        if streaming.vram_budget is not None:
            raise OptionError(
                f"VRAM budget is {streaming.vram_budget}, but this run computes on the CPU; leave it out, or choose a "
                "CUDA device"
            )
        return Budget(ram)
    if streaming.vram_budget is not None:
        allowed = parse_bytes(streaming.vram_budget)
        return Budget(ram, allowed, allowed)
    return Budget(ram, int(free_vram(device) * (1 - MARGIN)))


def free_ram() -> int:
    """Bytes that can be had without taking any from another program: file pages that can be dropped count as free.

    In a control group with a limit, what the group has left counts, if it is less than what the machine has.
    """
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Of each limited group from this process's own up to the root: limit - use + file pages that can be dropped."""
    for folder, limit_file, usage_file in _memory_groups():
        limit, usage = _number(folder / limit_file), _number(folder / usage_file)
        if limit is None or usage is None or limit > 1 << 60:  # version 1 writes no limit as almost 2^63
            continue
        yield max(limit - usage + _droppable(folder / "memory.stat"), 0)


def group_usage() -> int | None:
    """Bytes that this process's own control group holds, page cache included; None outside of any but the root."""
    for folder, _, usage_file in _memory_groups():
        return None if folder in (_CGROUPS, _CGROUPS / "memory") else _number(folder / usage_file)
    return None


def _memory_groups() -> Iterator[tuple[Path, str, str]]:
    try:
        lines = _MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, files = _CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif number == "0":
            root, files = _CGROUPS, ("memory.max", "memory.current")
        else:
            continue
        folder = root / path.lstrip("/")
        for ancestor in [folder, *folder.parents]:
            if ancestor == root.parent:
                break
            yield ancestor, *files


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _droppable(stat: Path) -> int:
    try:
        fields = dict(line.split() for line in stat.read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return 0
    for prefix in ("total_", ""):  # version 1 counts subgroups under another name
        if f"{prefix}inactive_file" in fields:
            return int(fields[f"{prefix}inactive_file"]) + int(fields[f"{prefix}active_file"])
    return 0
