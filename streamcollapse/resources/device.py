"""Where and in which precision the forward pass runs, and what memory of this process goes back to the system.

glibc raises its threshold for mapped blocks, and with it the amount that may stay free at the top of the heap, whenever
a large block is freed: how much stays resident then depends on what happened before. Fixed thresholds make the resident
memory of a pass flat and repeatable. While layers run they are large enough that activations come from the heap:
mapping each of them anew costs a page fault for every 4 KiB of every activation (docs/decisions/0006-allocator.md has
the measurements).
"""

from __future__ import annotations

import ctypes
import gc
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from streamcollapse.errors import BudgetError, DeviceError, DeviceFailedError, is_of_device
from streamcollapse.settings.run import Compute
from streamcollapse.units import format_bytes

GPU_GRAIN = 8  # tokens of a call, and logits at once, beside those on a CPU


def resolve(compute: Compute, weights_dtype: torch.dtype) -> Placement:
    """The device and dtype that ``compute`` means for a checkpoint of ``weights_dtype``. Raises DeviceError."""
    device = _device(compute.device)
    if compute.dtype != "auto":
        return Placement(device, getattr(torch, compute.dtype))
    if device.type == "cuda":
        wide = weights_dtype == torch.bfloat16 and not _gpu_multiplies_bfloat16(device)
        native = weights_dtype in (torch.bfloat16, torch.float16) and not wide
    else:  # emulated half precision is slower than float32 and less exact
        native = weights_dtype == torch.bfloat16 and _cpu_multiplies_bfloat16()
    return Placement(device, weights_dtype if native else torch.float32)


def _device(name: str) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if count else torch.device("cpu")
    if name == "cpu":
        return torch.device(name)
    if count == 0:
        raise DeviceError(f"device {name}: no CUDA device is available; pass `device=cpu`")
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        raise DeviceError(f"device {name}: this machine has {count} CUDA devices, numbered from 0")
    return torch.device("cuda", index)


@dataclass(frozen=True)
class Placement:
    """A device that is there, and the floating-point dtype to compute in."""

    device: torch.device
    dtype: torch.dtype

    @property
    def grain(self) -> int:
        """How many times as much as on a CPU is computed at once: a GPU has done little before it is told more."""
        return 1 if self.device.type == "cpu" else GPU_GRAIN

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the device; floating-point values in the compute dtype. No copy where nothing changes."""
        if tensor.dtype.is_floating_point:
            return tensor.to(self.device, self.dtype)
        return tensor.to(self.device)


def _cpu_multiplies_bfloat16() -> bool:
    ask = getattr(torch.cpu, "get_capabilities", None)  # where torch does not tell, float32 is always right
    capabilities = ask() if ask else {}
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _gpu_multiplies_bfloat16(device: torch.device) -> bool:
    with torch.cuda.device(device):  # the question is always about the current one
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


@contextmanager
def in_fixed_order(device: torch.device) -> Iterator[None]:
    """While the body runs, gradients on a CUDA ``device`` are added up in the same order every time, so that training
    ends in the same bits, where torch has such kernels; that of attention has to be asked for. Nothing changes for a
    CPU, where it is so."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    kernels: Any = torch.utils.deterministic
    filling = kernels.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Deterministic behavior was enabled|.*deterministic")
        kernels.fill_uninitialized_memory = False  # a debugging aid, of every new tensor
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            kernels.fill_uninitialized_memory = filling


def free_vram(device: torch.device) -> int:
    """Bytes of a CUDA ``device`` that this process can have: free ones, and those that it holds and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


@contextmanager
def within_vram(device: torch.device, num_bytes: int | None) -> Iterator[None]:
    """While the body runs, this process takes at most ``num_bytes`` of ``device`` beyond what is in use now: the
    allocator then gives back what it holds unused before it asks for more. Nothing changes for None or a CPU."""
    if num_bytes is None or device.type != "cuda":
        yield
        return
    total = torch.cuda.mem_get_info(device)[1]
    before = torch.cuda.get_per_process_memory_fraction(device)
    allowed = torch.cuda.memory_allocated(device) + num_bytes
    torch.cuda.empty_cache()  # what is held unused would count
    torch.cuda.set_per_process_memory_fraction(min(allowed / total, before), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def give_back_memory(device: torch.device) -> None:
    """Give what this process no longer uses of ``device`` back to it, after an attempt that took too much."""
    gc.collect()  # an error and the frames it came through may hold each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Turn what torch raises for ``device`` into one line.

    Raises BudgetError where its memory ran out, DeviceFailedError for all else.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_of_device(error):
            raise
        if isinstance(error, torch.OutOfMemoryError):
            raise BudgetError(f"{device}: GPU memory ran out{_who_has_it(device)}") from error
        what = (str(error).splitlines() or ["no reason given"])[0]
        raise DeviceFailedError(
            f"{device}: the device failed: {what}; this process cannot use it any more, begin again in a new one"
        ) from error


def _who_has_it(device: torch.device) -> str:
    advice = "; pass a smaller `vram_budget`, or end what else uses the device"
    if device.type != "cuda":
        return advice
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    return (
        f": of {format_bytes(total)} this run held {format_bytes(ours)}, others {format_bytes(total - free - ours)}"
        f"{advice}"
    )


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_MAPPED_BYTES = 6 << 20  # blocks of at least this size are mapped, and leave when they are freed
_TOP_BYTES = 8 << 20  # free memory at the top of the heap that is kept for the next activation
_LARGEST_MAPPED, _LARGEST_TOP = 32 << 20, 256 << 20  # glibc takes no larger threshold; a bound of our own


def steady_heap(activations: int = 0) -> bool:
    """Set the thresholds for this process, so that ``activations`` bytes, of which one takes a quarter at most, come
    from the heap. Returns whether the allocator took them; elsewhere nothing changes."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    mapped = min(max(_MAPPED_BYTES, activations // 4 + 4096), _LARGEST_MAPPED)
    top = min(max(_TOP_BYTES, activations), _LARGEST_TOP)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, mapped)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, top))


@contextmanager
def heap_for(activations: int) -> Iterator[None]:
    """While the body runs, the ``activations`` bytes of a call of a layer come from the heap; then they leave it."""
    steady_heap(activations)
    try:
        yield
    finally:
        if steady_heap():
            ctypes.CDLL(None).malloc_trim(0)
