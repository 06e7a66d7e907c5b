"""Magnitudes: where layers were cut out, the stream is smaller than the source's; what the layers above add is made as
much smaller.

A model with norms before its sub-layers does not see the size of the stream, only what a layer adds in proportion to
it. Prune&Comp (2025) multiplies the embedding and what the layers below a cut add by s, the growth across the cut; what
the layers above add divided by s is the same model, and leaves an embedding that is the head as well alone. Growth is
taken token by token, so that those with massive activations count like others.
"""

from __future__ import annotations

from itertools import combinations

import torch

from streamcollapse.forward.model import LayerWeights
from streamcollapse.repair.layer import FittedLayer

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of what the layer adds
_HALF = 0.03  # where 16 bits round the output


class Magnitudes:
    """A fit for the layers above cuts, which come bottom first: what they add, divided by the growth across all cuts
    below."""

    def __init__(self) -> None:
        self._growth, self._next = 1.0, -1
        self._names: list[str] | None = None  # of the layer before: mostly of this one as well

    def __call__(self, layer: FittedLayer, before: float) -> tuple[FittedLayer, str, float] | None:
        """None where no tensors of ``layer`` do nothing but scale what it adds."""
        if layer.base != self._next:  # a cut ends here
            self._growth = layer.growth
        self._next = layer.base + 1
        self._names = stream_writers(layer, self._names)
        if self._names is None:
            return None
        fitted = layer.but({name: layer.weights.parameters[name].float() / self._growth for name in self._names})
        return fitted, f"magnitude: divided by {self._growth:.4g}", fitted.error()


@torch.no_grad()
def stream_writers(layer: FittedLayer, first: list[str] | None = None) -> list[str] | None:
    """The parameters that scale what ``layer`` adds to the stream and do nothing else, found by trial: twice as large
    and with twice the input, they make twice the output. ``first``: are tried first. None where there are none, as with
    norms after the sub-layers."""
    hidden, call = layer.held_out.entering[0].to(layer.model.placement.device), layer.held_out.calls[0]
    out = layer.model.run(layer.base, layer.weights, hidden, call).float()
    added = (out - hidden.float()).norm(dim=-1).mean().clamp_min(1e-30)

    def away(names: list[str]) -> float:
        twice = {name: 2 * layer.weights.parameters[name] for name in names}
        weights = LayerWeights(layer.weights.stored, {**layer.weights.parameters, **twice})
        left = layer.model.run(layer.base, weights, 2 * hidden, call).float()
        return float((left - 2 * out).norm(dim=-1).mean() / (2 * added))

    least = _TOLERANCE.get(hidden.dtype, _HALF)
    if first is not None and away(first) < least:
        return first
    best, groups = None, _candidates(layer, hidden.shape[-1])
    for group in [*((one,) for one in groups), *combinations(groups, 2)]:
        names = [name for one in group for name in one]
        found = away(names)
        if found < least:
            best, least = names, found
    return best


def _candidates(layer: FittedLayer, width: int) -> list[tuple[str, ...]]:
    """Matrices, and those of experts, that may write ``width`` channels, each with its bias."""
    parameters = layer.weights.parameters
    found = [name for name in layer.writable if parameters[name].dim() > 1 and width in parameters[name].shape]
    return [(name, *(b for b in (_bias(name),) if b in layer.writable)) for name in found]


def _bias(name: str) -> str:
    return f"{name.removesuffix('weight')}bias" if name.endswith("weight") else f"{name}_bias"
