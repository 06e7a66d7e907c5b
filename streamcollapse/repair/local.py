"""Local fit: all matrices of a layer by Adam on the source's states, from where they are.

With only that layer, its gradients and moments in memory (XMerge, 2026, fits a merged layer so; LLM-Streamline, Chen et
al. 2024, trains a layer in place of others). Masters are in float32; the layer runs in the compute dtype. Steps are in
units of each matrix's own size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from streamcollapse.forward.model import LayerWeights
from streamcollapse.healing.trained import step_unit
from streamcollapse.repair.layer import FittedLayer, token_weights

RATE = 0.01  # per step, in units of each matrix (step_unit)
ROUNDS = 8  # over the tokens
_BETAS = (0.9, 0.95)
_WARM_UP = 10  # steps
_SEED = 20


@dataclass(frozen=True)
class LocalFit:
    """The ``layer`` after the best of its rounds; ``error`` on held-out tokens, ``rounds`` that it took."""

    layer: FittedLayer
    rounds: int
    error: float


def local_fit(layer: FittedLayer, before: float, rounds: int = ROUNDS, rate: float = RATE) -> LocalFit | None:
    """The layer after up to ``rounds`` over its tokens; None where none makes its error on held-out tokens less than
    ``before``. Deterministic on one machine."""
    weights = layer.weights
    names = [name for name in layer.writable if weights.parameters[name].is_floating_point()]
    masters = {
        name: weights.parameters[name].float().clone().requires_grad_()
        for name in names
        if weights.parameters[name].dim() > 1
    }
    if not masters:
        return None
    # copies, since what a search has kept in memory may not be seen by autograd
    rest = {name: weight.clone() for name, weight in weights.parameters.items() if name not in masters}
    sizes = [step_unit(master.detach()) for master in masters.values()]
    groups = [{"params": [m], "lr": rate * size} for m, size in zip(masters.values(), sizes, strict=True)]
    adam = torch.optim.Adam(groups, betas=_BETAS, fused=True)
    generator, best = torch.Generator().manual_seed(_SEED), None
    count, step = len(layer.fit.batches), 0
    for number in range(1, rounds + 1):
        for which in torch.randperm(count, generator=generator).tolist():
            share = min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1.0 + math.cos(math.pi * step / (rounds * count)))
            for group, size in zip(adam.param_groups, sizes, strict=True):
                group["lr"] = rate * size * share
            adam.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss = _loss(layer, rest, masters, which)
                loss.backward()  # type: ignore[no-untyped-call]
            if not bool(torch.isfinite(loss)):
                return best
            adam.step()
            step += 1
        fitted = layer.but({name: master.detach() for name, master in masters.items()})
        error = fitted.error()
        if error < (before if best is None else best.error):
            best = LocalFit(fitted, number, error)
    return best


def _loss(
    layer: FittedLayer, rest: dict[str, torch.Tensor], masters: dict[str, torch.Tensor], which: int
) -> torch.Tensor:
    """The weighted mean of |output - target|^2 over the tokens of batch ``which``."""
    model, tokens = layer.model, layer.fit
    device, dtype = model.placement.device, model.placement.dtype
    parameters = rest | {name: master.to(dtype) for name, master in masters.items()}
    entering, target = tokens.entering[which].to(device), tokens.targets[which].to(device)
    left = model.run(layer.base, LayerWeights(layer.weights.stored, parameters), entering, tokens.calls[which])
    weight = token_weights(target, tokens.batches[which].lengths)
    return (weight * (left.float() - target.float()).square().sum(-1)).sum() / (weight > 0).sum()
