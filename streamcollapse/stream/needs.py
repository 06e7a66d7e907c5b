"""What a run needs in memory, from headers alone: each figure with the argument that gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streamcollapse.arch.layout import Layout
from streamcollapse.storage.source import TensorSource
from streamcollapse.stream.slots import carved_bytes


@dataclass(frozen=True)
class Need:
    """``num_bytes`` of memory that ``phase`` holds at its peak for ``what``."""

    phase: str
    what: str
    num_bytes: int


def layer_slot_bytes(source: TensorSource, layout: Layout, dtype: torch.dtype) -> int:
    """Bytes of the slot that holds any one layer in the compute ``dtype``."""

    def placed(name: str) -> int:
        info = source.info(name)
        return carved_bytes(info.num_elements * (dtype if info.dtype.is_floating_point else info.dtype).itemsize)

    return max(sum(placed(name) for name in layout.layer_names(i)) for i in range(layout.num_layers))


def memory_needs(source: TensorSource, layout: Layout, dtype: torch.dtype, tokens: int, hidden_size: int) -> list[Need]:
    """Memory held by each phase of pruning ``source`` computing in ``dtype`` with ``tokens`` calibration tokens.

    File pages of the mapped checkpoint are not counted: the kernel drops them when it needs to.
    """
    infos = [source.info(name) for i in range(layout.num_layers) for name in layout.layer_names(i)]
    slot = layer_slot_bytes(source, layout, dtype)
    in_place = all(info.dtype == dtype for info in infos if info.dtype.is_floating_point)
    largest = max(info.num_bytes for info in infos)
    boundaries = (layout.num_layers + 1) * tokens * hidden_size * dtype.itemsize
    return [
        Need("reference", "one layer, converted (0: used in the file)", 0 if in_place else slot),
        Need("reference", "hidden states at layer boundaries", boundaries),
        Need("search", "one layer, mixed or converted", slot),
        Need("search", "hidden states at layer boundaries", boundaries),
        Need("write", "one tensor, mixed", largest),
    ]


def peak_bytes(needs: Sequence[Need]) -> int:
    """The most that any phase holds."""
    return max(sum(n.num_bytes for n in needs if n.phase == phase) for phase in {n.phase for n in needs})
