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
class PathStep:
    """Hidden states that pass through a layer: those that left step ``entering`` (None: the original model's, at
    the boundary below source layer ``start``), to be known as ``number``.

    ``onward`` steps go on from there; for the ``finished`` candidates it was the top.
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
    steps: tuple[PathStep, ...]

    @property
    def last_source(self) -> int:
        """The 0-based source layer that completes it."""
        return last_source(self.layer)


def last_source(layer: PlanLayer) -> int:
    """The highest source layer that ``layer`` needs."""
    return max(layer.base, *layer.mix)


class _Path:
    """What is known of a step while all are being laid out."""

    def __init__(self, number: int, entering: _Path | None, start: int, layer: PlanLayer) -> None:
        self.number, self.entering, self.start, self.layer = number, entering, start, layer
        self.onward: dict[LayerKey, _Path] = {}
        self.finished: list[int] = []

    def step(self) -> PathStep:
        entering = None if self.entering is None else self.entering.number
        return PathStep(self.number, entering, self.start, len(self.onward), tuple(self.finished))


def schedule(stacks: Sequence[Stack]) -> list[Visit]:
    """Visits in ascending order of their last source layer; each distinct layer appears once.

    Within a candidate the order is that of its stack, because groups of source layers follow each other. Steps are
    numbered in the order of ``stacks``, bottom first.
    """
    starts: dict[int, dict[LayerKey, _Path]] = {}
    paths: list[_Path] = []
    for candidate, stack in enumerate(stacks):
        path: _Path | None = None
        for layer in stack.layers[stack.position :]:
            reached = -1 if path is None else last_source(path.layer)
            assert last_source(layer) > reached, "the layers of a stack follow each other"
            known = starts.setdefault(stack.position, {}) if path is None else path.onward
            if layer.key not in known:
                known[layer.key] = _Path(len(paths), path, stack.position, layer)
                paths.append(known[layer.key])
            path = known[layer.key]
        if path is not None:
            path.finished.append(candidate)
    by_layer: dict[LayerKey, list[_Path]] = {}
    for path in paths:
        by_layer.setdefault(path.layer.key, []).append(path)
    visits = [Visit(found[0].layer, tuple(w.step() for w in found)) for found in by_layer.values()]
    return sorted(visits, key=lambda visit: (visit.last_source, visit.layer.base, sorted(visit.layer.mix.items())))
