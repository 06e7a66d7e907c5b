"""Which matrix of a layer can be solved for: found by trial on the model's own code, not by a table of names.

A matrix W whose output A W^T enters the layer's output linearly, by some factor c (Granite's residual multiplier),
can be fitted in closed form. So W is changed, and the change of the layer's output is compared with c A dW^T. It fails,
as it must, where a norm follows the sub-layer, for what other sub-layers read, and for experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from streamcollapse.arch.skeleton import LayerCall
from streamcollapse.forward.model import LayerWeights
from streamcollapse.repair.layer import FittedLayer

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the change of the output
_HALF = 0.03  # where 16 bits round the output
_SEED = 20


@dataclass(frozen=True)
class Writer:
    """The matrix of ``module``, a path inside the layer, whose output enters that of the layer by ``factor``.
    ``is_transposed``: it is [inputs, outputs], as GPT-2 has it."""

    module: str
    factor: float
    is_transposed: bool

    @property
    def parameter(self) -> str:
        """The name of the matrix in the layer's module."""
        return f"{self.module}.weight"


@contextmanager
def inputs_of(layer: nn.Module, path: str) -> Iterator[list[torch.Tensor]]:
    """What enters the module ``path`` of ``layer`` while the body runs, call by call."""
    found: list[torch.Tensor] = []
    hook = layer.get_submodule(path).register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    try:
        yield found
    finally:
        hook.remove()


def find_writer(layer: FittedLayer, hidden_NTD: torch.Tensor, call: LayerCall) -> Writer | None:
    """The matrix of ``layer`` that can be solved for, tried on ``hidden_NTD``; of several the largest, None where there
    is none."""
    before, best = layer.model.run(layer.base, layer.weights, hidden_NTD, call), None
    for path in _candidates(layer, before.shape[-1]):
        if best is None or _size(layer, path) > _size(layer, best.module):
            best = _tried(layer, path, hidden_NTD, call, before) or best
    return best


def _size(layer: FittedLayer, path: str) -> int:
    return layer.weights.parameters[f"{path}.weight"].numel()


def _candidates(layer: FittedLayer, width: int) -> list[str]:
    """Paths of the modules that are a matrix with ``width`` rows or columns, and that can be written back."""
    writable, modules = layer.writable, layer.model.module(layer.base).named_modules()
    return [
        path
        for path, module in modules
        if not list(module.children())
        and f"{path}.weight" in writable
        and layer.weights.parameters[f"{path}.weight"].dim() == 2
        and width in layer.weights.parameters[f"{path}.weight"].shape
    ]


def _tried(layer: FittedLayer, path: str, hidden: torch.Tensor, call: LayerCall, before: torch.Tensor) -> Writer | None:
    """What a random change of the matrix of ``path`` tells of it; None where the layer's output, ``before``, does not
    follow it linearly."""
    model, base, name = layer.model, layer.base, f"{path}.weight"
    weight = layer.weights.parameters[name]
    with inputs_of(model.module(base), path) as seen:
        model.run(base, layer.weights, hidden, call)
    random = torch.randn(weight.shape, generator=torch.Generator().manual_seed(_SEED)).to(weight.device)
    for is_transposed in (False, True):
        outputs, inputs = weight.shape[::-1] if is_transposed else weight.shape
        if outputs != before.shape[-1] or len(seen) != 1 or seen[0].numel() * outputs != before.numel() * inputs:
            continue  # experts see a part of the tokens, or are not called
        entered = seen[0].reshape(*before.shape[:2], inputs).float()
        size = before.float().norm() / _times(entered, random, is_transposed).norm().clamp_min(1e-30)
        changed = (weight.float() + size * random).to(weight.dtype)
        parameters = {**layer.weights.parameters, name: changed}
        after = model.run(base, LayerWeights(layer.weights.stored, parameters), hidden, call)
        moved = after.float() - before.float()
        expected = _times(entered, changed.float() - weight.float(), is_transposed)
        factor = float((moved * expected).sum() / expected.square().sum())
        if factor and _relative(moved - factor * expected, moved) < _TOLERANCE.get(before.dtype, _HALF):
            return Writer(path, factor, is_transposed)
    return None


def _times(entered: torch.Tensor, matrix: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    return entered @ (matrix if is_transposed else matrix.T)


def _relative(difference: torch.Tensor, whole: torch.Tensor) -> float:
    """The root of the mean over tokens of |difference|^2 / |whole|^2: no token outweighs the others."""
    sizes = whole.square().sum(-1).clamp_min(1e-30)
    return float((difference.square().sum(-1) / sizes).mean().sqrt())
