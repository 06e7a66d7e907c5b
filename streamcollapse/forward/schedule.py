"""The order of work of a sweep, without tensors: which layer is built when, and what passes through it.

Every candidate walks up its own stack, from where it begins to differ from the source to the top. Going up through the
**source** layers once, a layer of a candidate is due when the last source layer in it has been reached. Candidates that
share it share the visit; those that have come the same way so far share the hidden states too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamcollapse.merge.plan import LayerKey, PlanLayer


@dataclass(frozen=True)
class Stack:
    """A candidate to be evaluated: ``layers`` bottom first, the source's own below 0-based ``position``."""

    layers: tuple[PlanLayer, ...]
    position: int


@dataclass(frozen=True)
class Passage:
    """Hidden states that pass through a layer: those that left passage ``entering`` (None: the original model's, at
    the boundary below source layer ``start``), to be known as ``number``.

    ``onward`` passages go on from there; for the ``finished`` candidates it was the top.
    """

    number: int
    entering: int | None
    start: int
    onward: int
    finished: tuple[int, ...]


@dataclass(frozen=True)
class Visit:
    """One layer to build once, and what passes through it."""

    layer: PlanLayer
    passages: tuple[Passage, ...]

    @property
    def last_source(self) -> int:
        """The 0-based source layer that completes it."""
        return last_source(self.layer)


def last_source(layer: PlanLayer) -> int:
    """The highest source layer that ``layer`` needs."""
    return max(layer.base, *layer.mix)


class _Way:
    """What is known of a passage while all are being laid out."""

    def __init__(self, number: int, entering: _Way | None, start: int, layer: PlanLayer) -> None:
        self.number, self.entering, self.start, self.layer = number, entering, start, layer
        self.onward: dict[LayerKey, _Way] = {}
        self.finished: list[int] = []

    def passage(self) -> Passage:
        entering = None if self.entering is None else self.entering.number
        return Passage(self.number, entering, self.start, len(self.onward), tuple(self.finished))


def schedule(stacks: Sequence[Stack]) -> list[Visit]:
    """Visits in ascending order of their last source layer; each distinct layer appears once.

    Within a candidate the order is that of its stack, because groups of source layers follow each other. Passages are
    numbered in the order of ``stacks``, bottom first.
    """
    starts: dict[int, dict[LayerKey, _Way]] = {}
    ways: list[_Way] = []
    for candidate, stack in enumerate(stacks):
        way: _Way | None = None
        for layer in stack.layers[stack.position :]:
            reached = -1 if way is None else last_source(way.layer)
            assert last_source(layer) > reached, "the layers of a stack follow each other"
            known = starts.setdefault(stack.position, {}) if way is None else way.onward
            if layer.key not in known:
                known[layer.key] = _Way(len(ways), way, stack.position, layer)
                ways.append(known[layer.key])
            way = known[layer.key]
        if way is not None:
            way.finished.append(candidate)
    by_layer: dict[LayerKey, list[_Way]] = {}
    for way in ways:
        by_layer.setdefault(way.layer.key, []).append(way)
    visits = [Visit(found[0].layer, tuple(w.passage() for w in found)) for found in by_layer.values()]
    return sorted(visits, key=lambda visit: (visit.last_source, visit.layer.base, sorted(visit.layer.mix.items())))
