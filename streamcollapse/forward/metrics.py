"""How alike two models are, from their last hidden states, and what layers do, from the hidden states between them.

Of models higher is more alike, and 1 is the same. Shapes: hidden states are [N samples, T tokens, D]; row n counts its
first ``lengths[n]`` tokens. Sums are in float64. NaN where a state is not finite, or where there is nothing to compare.
"""

import math
from collections.abc import Callable, Sequence

import torch

from streamcollapse.forward.model import LayerWeights
from streamcollapse.forward.reference import Reference

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


@torch.inference_mode()
def block_influence(reference: Reference, num_layers: int) -> list[float]:
    """1 - the mean over tokens of the cosine between what enters a layer and what leaves it, for each layer (ShortGPT,
    arXiv 2403.03853, Eq. 1). In float64. ``reference`` has the boundaries 0 to ``num_layers``."""
    influence = []
    for i in range(num_layers):
        cosines = _cosines(reference, i, i + 1)
        influence.append(1.0 - math.fsum(value for row in cosines for value in row) / sum(map(len, cosines)))
    return influence


@torch.inference_mode()
def neighbour_cosines(reference: Reference, num_layers: int) -> list[float]:
    """For each layer the cosine between what enters it and what leaves it, a sample flattened, the mean over samples
    (paper, Figure 5a, of layer i and the one below it)."""
    found = []
    for i in range(num_layers):
        pairs = zip(reference.boundary(i), reference.boundary(i + 1), reference.batches, strict=True)
        values = [v for below, above, batch in pairs for v in cosine_similarities(above, below, batch.lengths)]
        found.append(mean(values))
    return found


@torch.inference_mode()
def angular_distances(reference: Reference, num_layers: int, length: int) -> list[float]:
    """For each first layer of a block of ``length``: the angle between what enters the block and what leaves it at the
    last token of a sample, over pi, averaged over samples (Gromov et al., arXiv 2403.17887, section 3.2)."""
    found = []
    for start in range(num_layers - length + 1):
        angles = [math.acos(min(max(row[-1], -1.0), 1.0)) for row in _cosines(reference, start, start + length)]
        found.append(math.fsum(angles) / len(angles) / math.pi)
    return found


def _cosines(reference: Reference, lower: int, upper: int) -> list[list[float]]:
    """For each sample the cosine of each of its tokens between two boundaries."""
    rows = []
    pairs = zip(reference.boundary(lower), reference.boundary(upper), reference.batches, strict=True)
    for below_NTD, above_NTD, batch in pairs:
        cosine_NT = torch.nn.functional.cosine_similarity(below_NTD.double(), above_NTD.double(), dim=-1)
        rows += [row[:length].tolist() for row, length in zip(cosine_NT, batch.lengths, strict=True)]
    return rows


_ROWS = 1024  # of a matrix at a time, so that no second matrix is made


class NeighbourDistances:
    """L2 (Frobenius) distances between the matrices of each layer and their counterparts in the next (paper, Figure 4).

    ``distances[suffix][i]``: between layers i and i + 1; None where one of them has no such matrix, or one of another
    shape. Holds the matrices of one layer.
    """

    def __init__(self) -> None:
        self.distances: dict[str, list[float | None]] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._count = 0

    def add(self, weights: LayerWeights) -> None:
        """The next layer, bottom first."""
        matrices = {s: w for s, w in weights.stored.items() if w.dim() > 1 and w.is_floating_point()}
        for suffix in matrices:
            self.distances.setdefault(suffix, [None] * max(self._count - 1, 0))
        if self._count:
            for suffix, row in self.distances.items():
                pair = self._before.get(suffix), matrices.get(suffix)
                row.append(_distance(*pair))
        for suffix, matrix in matrices.items():
            kept = self._before.get(suffix)
            if kept is not None and kept.shape == matrix.shape:
                kept.copy_(matrix)
            else:
                self._before[suffix] = matrix.clone()
        for suffix in self._before.keys() - matrices.keys():
            del self._before[suffix]
        self._count += 1


def _distance(lower: torch.Tensor | None, upper: torch.Tensor | None) -> float | None:
    if lower is None or upper is None or lower.shape != upper.shape:
        return None
    a, b = lower.flatten(0, -2), upper.flatten(0, -2)
    squares = torch.zeros((), dtype=torch.float64, device=lower.device)
    for row in range(0, len(a), _ROWS):
        squares += (a[row : row + _ROWS].float() - b[row : row + _ROWS].float()).square().sum()
    return float(squares.sqrt())
