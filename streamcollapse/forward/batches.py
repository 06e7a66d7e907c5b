"""Samples of token ids, put together into calls of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_CALL_TOKENS = 256  # whatever the model: with a feed-forward of 28672, 29 MB for each activation in float32
MOST_CALL_TOKENS = 2048  # where layers are narrow: the cost of a call is then mostly that of making it
LIKE_LENGTH = 0.75  # of the longest row, that a row has at the least to share its call without much padding


@dataclass(frozen=True)
class Batch:
    """``input_ids_NT`` (int64, on the CPU) padded on the right with zeros; ``lengths[n]`` tokens of row n are real.

    Padding comes after every real token, so causal attention never sees it and no mask is needed.
    """

    input_ids_NT: torch.Tensor
    lengths: tuple[int, ...]


def call_tokens(width: int) -> int:
    """How many tokens a call of a layer takes whose widest matrix has ``width`` columns: activations of like size."""
    return min(max(MAX_CALL_TOKENS * 28_672 // width, MAX_CALL_TOKENS), MOST_CALL_TOKENS)


def make_batches(
    samples: Sequence[Sequence[int]], max_tokens: int = MAX_CALL_TOKENS, like_length: float = 0.0
) -> list[Batch]:
    """Group samples, longest first, so that rows times the longest row stays within ``max_tokens`` (one row at least).

    Samples of like length share a call, so that little is padded: none shorter than ``like_length`` times the longest.
    """
    batches: list[Batch] = []
    group: list[Sequence[int]] = []
    for sample in sorted(samples, key=len, reverse=True):
        if group and (len(group[0]) * (len(group) + 1) > max_tokens or len(sample) < like_length * len(group[0])):
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
