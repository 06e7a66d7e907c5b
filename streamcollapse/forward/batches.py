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
    """Group samples, longest first, so that rows times the longest row stays within ``max_tokens`` (one row at least).

    Samples of like length share a call, so that little is padded.
    """
    batches: list[Batch] = []
    group: list[Sequence[int]] = []
    for sample in sorted(samples, key=len, reverse=True):
        if group and len(group[0]) * (len(group) + 1) > max_tokens:
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
