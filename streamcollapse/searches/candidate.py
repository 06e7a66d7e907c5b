"""A candidate: a merge to be tested, and the stack it leaves. Without tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from streamcollapse.errors import OptionError
from streamcollapse.merge.plan import PlanLayer


@dataclass(frozen=True)
class Candidate:
    """A merge to be tested: ``merged`` layers after 1-based layer ``pointer`` collapse into it, giving ``layers``,
    by any of ``rules``, which come to the same here."""

    pointer: int
    merged: int
    layers: tuple[PlanLayer, ...]
    rules: tuple[str, ...]

    @property
    def rule(self) -> str:
        """The first of its rules."""
        return self.rules[0]

    @property
    def position(self) -> int:
        """0-based position of the merged layer."""
        return self.pointer - 1

    @cached_property
    def start(self) -> int:
        """0-based position from which on it is run: the merged layer, or a lower one that is not the source's."""
        below = enumerate(self.layers[: self.position])
        return next((i for i, layer in below if layer.base != i or not layer.untouched), self.position)

    @property
    def merged_layer(self) -> PlanLayer:
        return self.layers[self.position]


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
