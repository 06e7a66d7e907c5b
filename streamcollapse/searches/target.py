"""How far to prune, said directly: a number of layers, or a share of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamcollapse.errors import OptionError
from streamcollapse.merge.plan import PlanLayer


@dataclass(frozen=True)
class Target:
    """At least ``layers`` layers stay, and no more than ``ratio`` of all parameters go; None: as many as it gets.

    ``parameters`` of each source layer, ``total`` of the whole model. A merged layer has those of its base.
    """

    layers: int | None
    ratio: float | None
    parameters: tuple[int, ...]
    total: int

    def __post_init__(self) -> None:
        count = len(self.parameters)
        if self.layers is not None and not 1 <= self.layers <= count:
            raise OptionError(f"target layers is {self.layers}, but the model has {count} layers")

    @property
    def is_set(self) -> bool:
        """Whether there is anything to aim at."""
        return self.layers is not None or self.ratio is not None

    def pruned(self, layers: Sequence[PlanLayer]) -> float:
        """Pruned parameters over all parameters, as in the paper's Table 1."""
        return (sum(self.parameters) - sum(self.parameters[layer.base] for layer in layers)) / self.total

    def allows(self, layers: Sequence[PlanLayer]) -> bool:
        """Whether ``layers`` are not fewer than what is aimed at."""
        if self.layers is not None and len(layers) < self.layers:
            return False
        return self.ratio is None or self.pruned(layers) <= self.ratio + 1e-12

    def fewest(self) -> int:
        """The number of layers to end with where all layers have the same parameters, as most models' have; of others
        no fewer than that may be allowed."""
        if self.ratio is None:
            return self.layers or 1
        by_size = sorted(self.parameters)
        gone = count = 0
        while count < len(by_size) - 1 and gone + by_size[count] <= (self.ratio + 1e-12) * self.total:
            gone, count = gone + by_size[count], count + 1
        return max(len(by_size) - count, self.layers or 1)
