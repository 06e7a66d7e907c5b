"""The walk up the stack: many candidates in one upward pass over the source layers, each tensor read once.

Reference pass, search and perplexity all go this way. Each candidate runs in calls of its own shape with the tensors
that the writer would write, so what comes of it is bit for bit the same whoever shares the walk, and whoever has come
the same way up to some layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from streamcollapse.arch.replay import LayerCall
from streamcollapse.forward.model import LayerWeights, StreamedModel
from streamcollapse.forward.schedule import PathStep, Stack, schedule
from streamcollapse.forward.stored import StoredLayers
from streamcollapse.merge.view import MergedView
from streamcollapse.progress import LayerDone


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
            base, before = visit.layer.base, model.meter.bytes_read
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
            model.listener(LayerDone(visit.last_source, model.num_layers, model.meter.bytes_read - before))
    assert not hidden, "every candidate reaches the top"
