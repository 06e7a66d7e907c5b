"""How alike two models are, from their last hidden states. Higher is more alike, and 1 is the same.

Shapes: hidden states are [N samples, T tokens, D]; row n counts its first ``lengths[n]`` tokens. All in float64. NaN
where a state is not finite, or where there is nothing to compare.
"""

import math
from collections.abc import Callable, Sequence

import torch

_Kernel = Callable[[torch.Tensor], torch.Tensor]  # [T tokens, D] -> [T, T]


def cosine_similarities(candidate_NTD: torch.Tensor, original_NTD: torch.Tensor, lengths: Sequence[int]) -> list[float]:
    """Per sample, the cosine between the flattened [tokens x hidden] states (paper, section 2.2).

    NaN where a state is all zero. The result is clamped to [-1, 1], so that equal states never exceed a threshold of 1
    by rounding.
    """
    similarities = []
    for ours, theirs, length in zip(candidate_NTD, original_NTD, lengths, strict=True):
        a = ours[:length].flatten().double()
        b = theirs[:length].flatten().double()
        cosine = torch.dot(a, b) / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
        similarities.append(float(cosine.clamp(-1.0, 1.0)))
    return similarities


def token_cosines(candidate_NTD: torch.Tensor, original_NTD: torch.Tensor, lengths: Sequence[int]) -> list[float]:
    """Of every token, row by row, the cosine between its two states, clamped to [-1, 1]."""
    cosines: list[float] = []
    for ours, theirs, length in zip(candidate_NTD, original_NTD, lengths, strict=True):
        a_TD, b_TD = ours[:length].double(), theirs[:length].double()
        norms = torch.linalg.vector_norm(a_TD, dim=-1) * torch.linalg.vector_norm(b_TD, dim=-1)
        cosines += ((a_TD * b_TD).sum(-1) / norms).clamp(-1.0, 1.0).tolist()
    return cosines


def linear_cka(candidate_NTD: torch.Tensor, original_NTD: torch.Tensor, lengths: Sequence[int]) -> list[float]:
    """Per sample, centred kernel alignment with the linear kernel, the tokens being the examples (Kornblith et al.
    2019, arXiv 1905.00414, section 3). Samples of one token are left out: they have nothing to align."""
    return _alignments(candidate_NTD, original_NTD, lengths, lambda x_TD: x_TD @ x_TD.T)


def kernel_cka(candidate_NTD: torch.Tensor, original_NTD: torch.Tensor, lengths: Sequence[int]) -> list[float]:
    """As ``linear_cka``, with the RBF kernel exp(-d^2 / 2 sigma^2), sigma being the median distance of two tokens."""
    return _alignments(candidate_NTD, original_NTD, lengths, _rbf)


def _alignments(
    candidate_NTD: torch.Tensor, original_NTD: torch.Tensor, lengths: Sequence[int], kernel: _Kernel
) -> list[float]:
    found = []
    for ours, theirs, length in zip(candidate_NTD, original_NTD, lengths, strict=True):
        if length > 1:
            k, l_ = (_centred(kernel(x[:length].double())) for x in (ours, theirs))
            aligned = (k * l_).sum() / (torch.linalg.matrix_norm(k) * torch.linalg.matrix_norm(l_))
            found.append(float(aligned.clamp(-1.0, 1.0)))
    return found


def _rbf(x_TD: torch.Tensor) -> torch.Tensor:
    squares_TT = torch.cdist(x_TD, x_TD, compute_mode="donot_use_mm_for_euclid_dist").square()
    below, right = torch.triu_indices(len(x_TD), len(x_TD), offset=1)
    return torch.exp(-squares_TT / (2.0 * squares_TT[below, right].median()))


def _centred(kernel_TT: torch.Tensor) -> torch.Tensor:
    """H K H with the centring matrix H."""
    return kernel_TT - kernel_TT.mean(0, keepdim=True) - kernel_TT.mean(1, keepdim=True) + kernel_TT.mean()


def mean(values: Sequence[float]) -> float:
    """The mean, by an exact sum; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
