"""The order of work of a sweep, without tensors: which layer is built when, and who passes through it.

Every candidate walks up its own stack, from its merge to the top. Going up through the **source** layers once, a layer
of a candidate is due when the last source layer in it has been reached; candidates that share it share the visit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamcollapse.merge.plan import PlanLayer


@dataclass(frozen=True)
class Stack:
    """A candidate to be evaluated: ``layers`` bottom first, the source's own below 0-based ``position``."""

    layers: tuple[PlanLayer, ...]
    position: int


@dataclass(frozen=True)
class Visit:
    """One layer to build once, and the candidates (by number) whose hidden states pass through it."""

    layer: PlanLayer
    candidates: tuple[int, ...]

    @property
    def last_source(self) -> int:
        """The 0-based source layer that completes it."""
        return last_source(self.layer)


def last_source(layer: PlanLayer) -> int:
    """The highest source layer that ``layer`` needs."""
    return max(layer.base, *layer.mix)


def schedule(stacks: Sequence[Stack]) -> list[Visit]:
    """Visits in ascending order of their last source layer; each distinct layer appears once.

    Within a candidate the order is that of its stack, because groups of source layers follow each other.
    """
    users: dict[tuple[int, tuple[tuple[int, float], ...]], tuple[PlanLayer, list[int]]] = {}
    for number, stack in enumerate(stacks):
        reached = -1
        for layer in stack.layers[stack.position :]:
            assert last_source(layer) > reached, "the layers of a stack follow each other"
            reached = last_source(layer)
            key = (layer.base, tuple(sorted(layer.mix.items())))
            users.setdefault(key, (layer, []))[1].append(number)
    visits = [Visit(layer, tuple(numbers)) for layer, numbers in users.values()]
    return sorted(visits, key=lambda visit: (visit.last_source, visit.layer.base, sorted(visit.layer.mix.items())))
