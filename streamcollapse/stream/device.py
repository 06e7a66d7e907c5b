"""Where and in which precision the forward pass runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from streamcollapse.errors import DeviceError, OptionError

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """What the user asks for: ``device`` auto, cpu or cuda[:n]; ``dtype`` auto, float32, bfloat16 or float16."""

    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise OptionError(f"device {self.device!r} is unknown; choose auto, cpu, cuda or cuda:N")
        if self.dtype != "auto" and self.dtype not in COMPUTE_DTYPES:
            raise OptionError(f"compute dtype {self.dtype!r} is unknown; choose auto, {', '.join(COMPUTE_DTYPES)}")

    def resolve(self, weights_dtype: torch.dtype) -> Placement:
        """The device and dtype to use for a checkpoint of ``weights_dtype``. Raises DeviceError.

        ``auto`` computes in the checkpoint's dtype on CUDA; on a CPU only in bfloat16 and only where the processor
        multiplies it natively, else in float32: emulated half precision is slower and no more exact.
        """
        device = self._device()
        if self.dtype != "auto":
            return Placement(device, COMPUTE_DTYPES[self.dtype])
        if device.type == "cuda":
            native = weights_dtype in (torch.bfloat16, torch.float16)
        else:
            native = weights_dtype == torch.bfloat16 and _cpu_multiplies_bfloat16()
        return Placement(device, weights_dtype if native else torch.float32)

    def _device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        device = torch.device(self.device)
        if device.type == "cuda":
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if count == 0:
                raise DeviceError(f"device {self.device}: no CUDA device is available; pass --device cpu")
            if (device.index or 0) >= count:
                raise DeviceError(f"device {self.device}: this machine has {count} CUDA devices, numbered from 0")
            device = torch.device("cuda", device.index or 0)
        return device


@dataclass(frozen=True)
class Placement:
    """A device that is there, and the floating-point dtype to compute in."""

    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the device; floating-point values in the compute dtype. No copy where nothing changes."""
        if tensor.dtype.is_floating_point:
            return tensor.to(self.device, self.dtype)
        return tensor.to(self.device)


def _cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
