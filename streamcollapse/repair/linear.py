"""The closed form: the matrix that a layer's output is linear in, by ridge regression on the source's hidden states.

Where the Gram matrix of all inputs would not fit, blocks of input channels are solved for one after the other, each
with the others as they are by then (block Gauss-Seidel). Every block takes another run of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamcollapse.forward.model import LayerWeights
from streamcollapse.repair.layer import FittedLayer
from streamcollapse.repair.ridge import Sums, best_change
from streamcollapse.repair.writer import Writer, find_writer, inputs_of

_SWEEPS = 2  # over the blocks, where there are several


@dataclass(frozen=True)
class LinearFit:
    """The ``layer`` with the matrix ``suffix`` solved for by ``penalty``; ``error`` on held-out tokens."""

    layer: FittedLayer
    suffix: str
    penalty: float
    error: float


@torch.no_grad()
def linear_fit(layer: FittedLayer, before: float, block: int | None = None) -> LinearFit | None:
    """The layer after solving for the matrix that can be solved for, ``block`` input channels at a time (None: all).
    None where there is no such matrix, or no penalty makes its error on held-out tokens less than ``before``."""
    tokens = layer.held_out
    hidden = tokens.entering[0].to(layer.model.placement.device)
    writer = find_writer(layer, hidden, tokens.calls[0])
    if writer is None:
        return None
    width = _matrix(layer.weights, writer).shape[1]
    size = width if block is None else min(block, width)
    best: LinearFit | None = None
    for _ in range(1 if size == width else _SWEEPS):
        for first in range(0, width, size):
            found = _block(layer, writer, slice(first, first + size), before)
            if found is not None:
                best, layer, before = found, found.layer, found.error
    return best


def _matrix(weights: LayerWeights, writer: Writer) -> torch.Tensor:
    """The matrix as [outputs, inputs]."""
    found = weights.parameters[writer.parameter]
    return found.T if writer.is_transposed else found


def _block(layer: FittedLayer, writer: Writer, channels: slice, before: float) -> LinearFit | None:
    """The columns ``channels`` of the matrix, with all others as they are."""
    matrix = _matrix(layer.weights, writer)
    columns = matrix[:, channels]
    sums = Sums.zero(columns.shape[1], columns.shape[0], columns.device)
    with inputs_of(layer.model.module(layer.base), writer.module) as seen:
        for left, wanted, weight in layer.run(layer.fit):
            entered = seen.pop().reshape(-1, matrix.shape[1])[:, channels]
            lacking = (wanted.float() - left.float()).flatten(0, 1)
            sums.add(writer.factor * entered.float(), lacking, weight.flatten())

    def changed(change: torch.Tensor) -> FittedLayer:
        made = matrix.float().clone()
        made[:, channels] += change.T.to(made)
        return layer.but({writer.parameter: made.T.contiguous() if writer.is_transposed else made})

    found = best_change(sums, lambda change: changed(change).error(), before)
    if found is None:
        return None
    change, penalty, error = found
    return LinearFit(changed(change), layer.writable[writer.parameter], penalty, error)
