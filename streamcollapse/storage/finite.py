"""The check that weights are numbers."""

from __future__ import annotations

import torch

from streamcollapse.errors import NonFiniteError


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` holds neither NaN nor infinity; integers and 8-bit floats always pass."""
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2 or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN propagates; far faster than isfinite().all(), which makes a mask
    return bool(torch.isfinite(low) and torch.isfinite(high))


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise NonFiniteError, naming the tensor, unless it ``is_finite``."""
    if not is_finite(tensor):
        count = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"tensor {name} has {count} NaN or infinite values; download the checkpoint again or repair it"
        )
