"""Where and in which precision the forward pass runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamcollapse.errors import DeviceError
from streamcollapse.settings import Compute


def resolve(compute: Compute, weights_dtype: torch.dtype) -> Placement:
    """The device and dtype that ``compute`` means for a checkpoint of ``weights_dtype``. Raises DeviceError."""
    device = _device(compute.device)
    if compute.dtype != "auto":
        return Placement(device, getattr(torch, compute.dtype))
    if device.type == "cuda":
        native = weights_dtype in (torch.bfloat16, torch.float16)
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
        raise DeviceError(f"device {name}: no CUDA device is available; pass --device cpu")
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
