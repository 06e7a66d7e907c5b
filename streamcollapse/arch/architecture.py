"""A checkpoint understood as a decoder: config, skeleton and layout together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamcollapse.arch.config import ModelConfig, load_config
from streamcollapse.arch.layout import Layout, build_layout
from streamcollapse.arch.skeleton import Skeleton, build_skeleton
from streamcollapse.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class Architecture:
    """What the code needs to know of a model to run and cut it."""

    config: ModelConfig
    skeleton: Skeleton
    layout: Layout
    weights_dtype: torch.dtype


def understand(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Architecture:
    """Config, skeleton and layout of ``checkpoint``; reads headers only. Raises ModelError, CheckpointError."""
    config = load_config(checkpoint.directory, trust_remote_code)
    dtype = _weights_dtype(checkpoint)
    skeleton = build_skeleton(config, dtype, trust_remote_code)
    return Architecture(config, skeleton, build_layout(skeleton, checkpoint), dtype)


def _weights_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating-point dtype that most of the checkpoint's bytes have."""
    totals: dict[torch.dtype, int] = {}
    for name in checkpoint.names:
        info = checkpoint.info(name)
        if info.dtype.is_floating_point:
            totals[info.dtype] = totals.get(info.dtype, 0) + info.num_bytes
    return max(totals, key=lambda dtype: totals[dtype]) if totals else torch.float32
