"""How alike two sets of last hidden states are."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def cosine_similarities(candidate_NTD: torch.Tensor, original_NTD: torch.Tensor, lengths: Sequence[int]) -> list[float]:
    """Per sample, the cosine between the flattened [tokens x hidden] states (paper, section 2.2), in float64.

    Row n counts its first ``lengths[n]`` tokens. NaN where a state is not finite or is all zero. The result is
    clamped to [-1, 1], so that equal states never exceed a threshold of 1 by rounding.
    """
    similarities = []
    for ours, theirs, length in zip(candidate_NTD, original_NTD, lengths, strict=True):
        a = ours[:length].flatten().double()
        b = theirs[:length].flatten().double()
        cosine = torch.dot(a, b) / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
        similarities.append(float(cosine.clamp(-1.0, 1.0)))
    return similarities
