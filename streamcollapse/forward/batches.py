"""Samples of token ids, put together into calls of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_CALL_TOKENS = 256  # bounds activations: with a feed-forward of 28672, 29 MB for each of them in float32


@dataclass(frozen=True)
class Batch:
    """``input_ids_NT`` (int64, on the CPU) padded on the right with zeros; ``lengths[n]`` tokens of row n are real.

    Padding comes after every real token, so causal attention never sees it and no mask is needed.
    """

    input_ids_NT: torch.Tensor
    lengths: tuple[int, ...]


def make_batches(samples: Sequence[Sequence[int]], max_tokens: int = MAX_CALL_TOKENS) -> list[Batch]:
    """Group neighbouring samples so that rows times the longest row stays within ``max_tokens`` (one row at least)."""
    batches: list[Batch] = []
    group: list[Sequence[int]] = []
    for sample in samples:
        longest = max(len(s) for s in [*group, sample])
        if group and longest * (len(group) + 1) > max_tokens:
            batches.append(_pad(group))
            group = []
        group.append(sample)
    if group:
        batches.append(_pad(group))
    return batches


def _pad(group: Sequence[Sequence[int]]) -> Batch:
    input_ids = torch.zeros(len(group), max(len(s) for s in group), dtype=torch.int64)
    for row, sample in enumerate(group):
        input_ids[row, : len(sample)] = torch.tensor(sample)
    return Batch(input_ids, tuple(len(s) for s in group))
