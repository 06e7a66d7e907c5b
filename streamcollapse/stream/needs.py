"""What a run needs in memory, from headers alone: each figure with the argument that gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streamcollapse.arch.layout import Layout
from streamcollapse.storage.source import TensorSource


@dataclass(frozen=True)
class Need:
    """``num_bytes`` of memory that ``phase`` holds at its peak for ``what``."""

    phase: str
    what: str
    num_bytes: int


def memory_needs(source: TensorSource, layout: Layout, dtype: torch.dtype, tokens: int, hidden_size: int) -> list[Need]:
    """Memory held by each phase of pruning ``source`` computing in ``dtype`` with ``tokens`` calibration tokens.

    File pages of the mapped checkpoint are not counted: the kernel drops them when it needs to.
    """
    layers = [[source.info(name) for name in layout.layer_names(i)] for i in range(layout.num_layers)]
    infos = [info for layer in layers for info in layer]
    stored_layer = max(sum(info.num_bytes for info in layer) for layer in layers)
    compute_layer = max(sum(info.num_elements for info in layer) for layer in layers) * dtype.itemsize
    converted = any(info.dtype.is_floating_point and info.dtype != dtype for info in infos)
    largest = max(info.num_elements for info in infos)
    # A mix holds its float32 accumulator and one source tensor in float32 while it is added.
    mixing = 2 * 4 * largest
    boundaries = (layout.num_layers + 1) * tokens * hidden_size * dtype.itemsize
    return [
        Need(
            "reference",
            "one layer in the compute dtype (none where the file is used in place)",
            compute_layer if converted else 0,
        ),
        Need("reference", "hidden states at every layer boundary", boundaries),
        Need("search", "one layer, mixed and in the compute dtype", compute_layer if converted else stored_layer),
        Need("search", "mixing one tensor in float32", mixing),
        Need("write", "one tensor: mixed in float32, then rounded", mixing + 4 * largest),
    ]


def peak_bytes(needs: Sequence[Need]) -> int:
    """The most that any phase holds; boundary states stay from the reference pass through the search."""
    boundaries = sum(n.num_bytes for n in needs if "boundary" in n.what)
    phases = {n.phase for n in needs}
    totals = {p: sum(n.num_bytes for n in needs if n.phase == p) for p in phases}
    totals["search"] = totals.get("search", 0) + boundaries
    return max(totals.values())
