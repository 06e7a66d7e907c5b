"""Ridge regression of one matrix, from sums that are added up call by call.

W' = W + dW, where dW is the least of sum_t w_t |R_t - dW A_t|^2 + penalty |dW|^2: A_t [F] what enters the matrix for
token t, times the factor by which its output enters the layer's; R_t [D] what the layer's output lacks; w_t the token's
weight. The penalty pulls to the old weights (ReplaceMe, Shopkhoev et al. 2025, fits a map of the output instead, and
pulls to zero). Sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

PENALTIES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)  # of the mean diagonal of the Gram matrix
_ROWS = 1024  # of the Gram matrix that are made at once


@dataclass
class Sums:
    """``gram`` [F, F] = A^T w A, of which the lower triangle alone is filled, and ``cross`` [F, D] = A^T w R of the
    tokens that were added."""

    gram: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def zero(cls, inputs: int, outputs: int, device: torch.device) -> Sums:
        """Of no tokens, for a matrix from ``inputs`` to ``outputs`` channels."""
        gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        return cls(gram, torch.zeros(inputs, outputs, dtype=torch.float64, device=device))

    def add(self, entered: torch.Tensor, lacking: torch.Tensor, weight: torch.Tensor) -> None:
        """Add n tokens: ``entered`` [n, F], ``lacking`` [n, D], ``weight`` [n]. Products are in float32."""
        entered, lacking = entered.float(), lacking.float()
        weighted = (entered * weight.float()[:, None]).T
        for first in range(0, len(weighted), _ROWS):
            rows = weighted[first : first + _ROWS]
            end = first + len(rows)
            self.gram[first:end, :end] += rows @ entered[:, :end]  # symmetric: what is above repeats what is below
            self.cross[first : first + _ROWS] += rows @ lacking


def solve(sums: Sums, penalty: float) -> torch.Tensor | None:
    """The change dW^T [F, D], float64, by ``penalty`` in units of the mean diagonal; None where the damped matrix is
    not positive definite, or something is not finite."""
    damped = sums.gram.clone()
    damped.diagonal().add_(penalty * sums.gram.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(damped)  # reads the lower triangle alone
    if int(info):
        return None
    change = torch.cholesky_solve(sums.cross, factor)
    return change if bool(torch.isfinite(change).all()) else None


def best_change(
    sums: Sums, error: Callable[[torch.Tensor], float], before: float
) -> tuple[torch.Tensor, float, float] | None:
    """The change of least ``error`` on other tokens, its penalty, and that error; None where none is below ``before``.
    Penalties are tried from the largest down, until one is worse than the one before it."""
    best: tuple[torch.Tensor, float, float] | None = None
    for penalty in PENALTIES:
        change = solve(sums, penalty)
        if change is None:
            break
        left = error(change)
        if left < (before if best is None else best[2]):
            best = change, penalty, left
        elif best is not None:
            break
    return best
