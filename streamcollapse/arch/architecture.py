"""A checkpoint understood as a decoder: config, skeleton and layout together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamcollapse.arch.config import ModelConfig, load_config
from streamcollapse.arch.layout import Layout, build_layout
from streamcollapse.arch.skeleton import Skeleton, build_skeleton
from streamcollapse.arch.stored import CONFIG_FILE
from streamcollapse.errors import ModelError
from streamcollapse.storage.checkpoint import Checkpoint

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MOST_EXPERTS = 1 << 16


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
    _check_counts(config, checkpoint)
    dtype = _weights_dtype(checkpoint)
    skeleton = build_skeleton(config, dtype, trust_remote_code)
    return Architecture(config, skeleton, build_layout(skeleton, checkpoint), dtype)


def _check_counts(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise ModelError for counts that no such checkpoint can have, which would take minutes and gigabytes to build."""
    text = config.text
    limits = {"num_hidden_layers": (len(checkpoint.names), f"the checkpoint has {len(checkpoint.names)} tensors")}
    limits |= dict.fromkeys(_EXPERT_COUNTS, (_MOST_EXPERTS, f"at most {_MOST_EXPERTS} can be"))
    for key, (most, why) in limits.items():
        count = getattr(text, key, None)
        if isinstance(count, int) and count > most:
            where = checkpoint.directory / CONFIG_FILE
            raise ModelError(f"{where}: {key} is {count}, but {why}; restore the checkpoint's config.json")


def _weights_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating-point dtype that most of the checkpoint's bytes have."""
    totals: dict[torch.dtype, int] = {}
    for name in checkpoint.names:
        info = checkpoint.info(name)
        if info.dtype.is_floating_point:
            totals[info.dtype] = totals.get(info.dtype, 0) + info.num_bytes
    return max(totals, key=lambda dtype: totals[dtype]) if totals else torch.float32
