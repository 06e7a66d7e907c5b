"""A candidate: a merge to be tested, and the stack it leaves. Without tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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
