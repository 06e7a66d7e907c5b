"""The walk up the stack: many candidates in one upward pass over the source layers, each tensor read once.

Every candidate walks up its own stack, from where it begins to differ from the source to the top. Going up through the
**source** layers once, a layer of a candidate is due when the last source layer in it has been reached. Candidates that
share it share the visit; those that have come the same way so far share the hidden states too. That order of work is
laid out first, without tensors (``schedule``).

Reference pass, search and perplexity all go this way. Each candidate runs in calls of its own shape with the tensors
that the writer would write, so what comes of it is bit for bit the same whoever shares the walk, and whoever has come
the same way up to some layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from streamcollapse.arch.skeleton import LayerCall
from streamcollapse.forward.model import LayerWeights, StreamedModel
from streamcollapse.forward.stored import StoredLayers
from streamcollapse.merge.plan import LayerKey, PlanLayer
from streamcollapse.merge.view import MergedView
from streamcollapse.progress import LayerDone


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


@dataclass(frozen=True)
class Passed:
    """A step that has just been made: ``hidden`` [N, T, D] left layer ``position`` of ``view``, whose ``weights`` are
    at hand. An entry for each batch."""

    step: PathStep
    view: MergedView
    position: int
    weights: LayerWeights
    hidden: list[torch.Tensor]


@torch.inference_mode()
def walk(
    model: StreamedModel,
    stacks: Sequence[Stack],
    entering: Callable[[int], list[torch.Tensor]],
    calls: Sequence[Sequence[LayerCall]],
    watch: Callable[[Passed], None],
    merge_norms: bool = False,
    stored: StoredLayers | None = None,
) -> None:
    """Run every one of ``stacks`` from where it begins to the top.

    ``entering(i)``: hidden states at boundary i, in a list that may be emptied; ``calls[b][i]``: the other arguments of
    source layer i for batch b. ``watch`` is told of every step. Layers that ``stored`` has are read from there; those
    that it wants are stored on the way.
    """
    known = {} if stored is None else dict(stored.names)  # as it is now: what comes on this walk is for the next
    visits = schedule(stacks)
    reads = MergedView(model.stream.source, model.layout, [visit.layer for visit in visits], merge_norms, known)
    hidden: dict[int, list[torch.Tensor]] = {}  # by the number of the step that they left
    waiting: dict[int, int] = {}  # steps that have still to enter with them
    with model.stream.run([reads.source_names(position) for position in range(len(visits))]) as weights_pass:
        view = reads.over(weights_pass)
        for position, visit in enumerate(visits):
            base, before, waited = visit.layer.base, model.meter.bytes_read, model.meter.seconds_waiting
            start = time.perf_counter()
            runs = len(visit.steps)
            with weights_pass.step(), model.onload(view, position) as weights, model.meter.computing(runs):
                if stored is not None:
                    stored.store_if_wanted(view, position, weights.stored)
                for step in visit.steps:
                    if step.entering is None:
                        states, last = entering(step.start), True
                    else:
                        waiting[step.entering] -= 1
                        last = waiting[step.entering] == 0
                        states = hidden.pop(step.entering) if last else list(hidden[step.entering])
                    for b, call in enumerate(calls):  # one batch at a time, so that no second set of states is held
                        states[b] = model.run(base, weights, states[b], call[base])
                    if step.onward:
                        hidden[step.number], waiting[step.number] = states, step.onward
                    watch(Passed(step, view, position, weights, states))
            num_bytes, stood_still = model.meter.bytes_read - before, model.meter.seconds_waiting - waited
            seconds = time.perf_counter() - start
            model.listener(LayerDone(visit.last_source, model.num_layers, num_bytes, seconds, stood_still))
    assert not hidden, "every candidate reaches the top"
