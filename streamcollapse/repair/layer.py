"""One layer of the pruned stack while it is fitted: what enters it, what should leave it, and how far it is from that.

Tokens count by 1 / |target|^2, so that those with massive activations (the first, mostly) do not outweigh all others.
They are not left out: what they carry is large, and a fit that has not seen them destroys it (docs/decisions).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from streamcollapse.arch.skeleton import LayerCall
from streamcollapse.forward.batches import Batch
from streamcollapse.forward.model import LayerWeights, StreamedModel

Matrices = Mapping[str, torch.Tensor]  # by suffix, in the dtype in which they are stored


@dataclass(frozen=True)
class Tokens:
    """Hidden states by batch: ``entering`` the layer, ``targets`` that should leave it, [N, T, D] each; and
    the other arguments of the layer, ``calls``."""

    batches: Sequence[Batch]
    entering: Sequence[torch.Tensor]
    targets: Sequence[torch.Tensor]
    calls: Sequence[LayerCall]


@dataclass(frozen=True)
class FittedLayer:
    """Source layer ``base``'s code with ``weights``; ``fit`` is what it is fitted on, ``held_out`` what judges that.

    ``dtypes``: those in which its tensors are stored, by suffix; ``changed``: suffixes of those that were fitted;
    ``growth``: how many times as large the source's hidden states are where the layer begins, by which its output is
    compared.
    """

    model: StreamedModel
    base: int
    weights: LayerWeights
    dtypes: Mapping[str, torch.dtype]
    fit: Tokens
    held_out: Tokens
    changed: frozenset[str] = frozenset()
    growth: float = 1.0

    @property
    def writable(self) -> dict[str, str]:
        """The parameters that can be fitted: the suffix of each by its name."""
        return self.model.layout.stored_whole(self.base)

    @property
    def matrices(self) -> Matrices:
        """The tensors that were fitted, as they are stored."""
        return {suffix: self.weights.stored[suffix].to(self.dtypes[suffix]) for suffix in sorted(self.changed)}

    def run(self, tokens: Tokens) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Batch by batch, on the device: what leaves the layer, what should, [N, T, D]; and the weight of each token
        [N, T], in float32, 0 for padding."""
        device = self.model.placement.device
        for batch, entering, target, call in zip(
            tokens.batches, tokens.entering, tokens.targets, tokens.calls, strict=True
        ):
            left = self.model.run(self.base, self.weights, entering.to(device), call)
            wanted = target.to(device)
            yield left, wanted, token_weights(wanted, batch.lengths)

    @torch.no_grad()
    def error(self) -> float:
        """The mean over held-out tokens of |output - target|^2 / |target|^2."""
        total = count = 0.0
        for left, wanted, weight in self.run(self.held_out):
            away = (self.growth * left.float() - wanted.float()).square().sum(-1)
            total += float((weight * away).sum(dtype=torch.float64))
            count += int((weight > 0).sum())
        return total / max(count, 1.0)

    def holding(self, matrices: Matrices) -> FittedLayer:
        """The same with ``matrices``, by suffix, in the place of its own."""
        return self.but({name: matrices[suffix] for name, suffix in self.writable.items() if suffix in matrices})

    def but(self, fitted: Mapping[str, torch.Tensor]) -> FittedLayer:
        """The same with ``fitted`` in the place of ``writable`` parameters, by name, rounded as they are stored."""
        stored, parameters = dict(self.weights.stored), dict(self.weights.parameters)
        for name, value in fitted.items():
            suffix = self.writable[name]
            rounded = value.to(self.dtypes[suffix]).to(parameters[name])
            stored[suffix] = parameters[name] = rounded
        changed = self.changed | {self.writable[name] for name in fitted}
        return replace(self, weights=LayerWeights(stored, parameters), changed=changed)


def token_weights(target_NTD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """1 / |target|^2 of each real token, 0 for padding. [N, T], float32"""
    weight = 1.0 / target_NTD.float().square().sum(-1).clamp_min(1e-30)
    for row, length in enumerate(lengths):
        weight[row, length:] = 0.0
    return weight
