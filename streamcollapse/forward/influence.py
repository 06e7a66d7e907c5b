"""How much layers do, from the hidden states between them."""

import math

import torch

from streamcollapse.forward.metrics import cosine_similarities, mean
from streamcollapse.forward.model import LayerWeights
from streamcollapse.forward.reference import Reference


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
