"""A sweep: many candidates in one upward pass over the source layers, each tensor read once.

Each candidate runs in calls of its own shape with the tensors that the writer would write, so its similarity is bit for
bit the same whoever shares the sweep, and whoever has come the same way up to some layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from streamcollapse.arch.layout import Layout
from streamcollapse.forward.kept import KeptLayers
from streamcollapse.forward.measure import Measure
from streamcollapse.forward.model import LayerWeights, StreamedModel
from streamcollapse.forward.reference import Reference
from streamcollapse.forward.schedule import Passage, Stack, schedule
from streamcollapse.merge.view import MergedView
from streamcollapse.progress import LayerDone, Listener
from streamcollapse.stream.meters import Meter
from streamcollapse.stream.weights import WeightStream


@dataclass(frozen=True)
class Passing:
    """A passage that has just been made: ``hidden`` left layer ``position`` of ``view``, whose ``weights`` are at
    hand."""

    passage: Passage
    view: MergedView
    position: int
    weights: LayerWeights
    hidden: Sequence[torch.Tensor]


@torch.inference_mode()
def sweep(
    model: StreamedModel,
    stream: WeightStream,
    layout: Layout,
    stacks: Sequence[Stack],
    merge_norms: bool,
    reference: Reference,
    measure: Measure,
    meter: Meter,
    listener: Listener,
    kept: KeptLayers | None = None,
    watch: Callable[[Passing], None] = lambda passing: None,
) -> list[float | None]:
    """How alike each of ``stacks`` is to the original by ``measure``, None where that is not finite.

    Layers that ``kept`` has are read from there; those that it wants are stored in it on the way. ``watch`` is told of
    every passage.
    """
    stored = {} if kept is None else dict(kept.names)  # as it is now: what comes during this sweep is for the next
    visits = schedule(stacks)
    layers = [visit.layer for visit in visits]
    reads = MergedView(stream.source, layout, layers, merge_norms, stored)
    steps = [reads.source_names(position) for position in range(len(visits))]
    hidden: dict[int, list[torch.Tensor]] = {}  # by the number of the passage that they left
    waiting: dict[int, int] = {}  # passages that have still to enter with them
    similarities: list[float | None] = [None] * len(stacks)
    with stream.run(steps) as weights_pass:
        view = reads.over(weights_pass)
        for position, visit in enumerate(visits):
            base, before = visit.layer.base, meter.bytes_read
            with weights_pass.step(), model.onload(view, position) as weights, meter.computing(len(visit.passages)):
                if kept is not None:
                    kept.offer(view, position, weights.stored)
                for passage in visit.passages:
                    if passage.entering is None:
                        entering = [h.to(model.placement.device) for h in reference.boundary(passage.start)]
                    else:
                        waiting[passage.entering] -= 1
                        last = waiting[passage.entering] == 0
                        entering = hidden.pop(passage.entering) if last else hidden[passage.entering]
                    calls = (call[base] for call in reference.calls)
                    states = [model.run(base, weights, h, c) for h, c in zip(entering, calls, strict=True)]
                    watch(Passing(passage, view, position, weights, states))
                    if passage.onward:
                        hidden[passage.number], waiting[passage.number] = states, passage.onward
                    if passage.finished:
                        similarity = measure(states)
                        for number in passage.finished:
                            similarities[number] = similarity
            listener(LayerDone(visit.last_source, layout.num_layers, meter.bytes_read - before))
    assert not hidden, "every candidate reaches the top"
    return similarities
