"""How far the weights of neighbouring layers are from each other, as they come by in a pass."""

from __future__ import annotations

import torch

from streamcollapse.forward.model import LayerWeights

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
