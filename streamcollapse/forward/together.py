"""The reference pass and a sweep in one: candidates branch off the original model while it goes up.

For whoever wants every candidate of the original anyway: the weights are streamed once instead of twice. What comes out
is bit for bit what the two come to one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from streamcollapse.arch.layout import Layout
from streamcollapse.forward.batches import Batch
from streamcollapse.forward.measure import Measure
from streamcollapse.forward.model import LayerWeights, StreamedModel
from streamcollapse.forward.reference import Reference, check_finite
from streamcollapse.forward.schedule import Stack
from streamcollapse.forward.sweep import Passing, sweep
from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.progress import Listener
from streamcollapse.storage.rooms import Room
from streamcollapse.stream.meters import Meter
from streamcollapse.stream.weights import WeightStream


@torch.inference_mode()
def reference_sweep(
    model: StreamedModel,
    stream: WeightStream,
    layout: Layout,
    batches: Sequence[Batch],
    stacks: Sequence[tuple[PlanLayer, ...]],
    merge_norms: bool,
    measured: Callable[[Reference], Measure],
    look: Callable[[LayerWeights], None],
    meter: Meter,
    listener: Listener,
    room: Room,
) -> tuple[Reference, list[float | None]]:
    """Stream the model once over ``batches``: the reference with every boundary, kept in ``room``, and how alike each
    of ``stacks`` is by what ``measured`` makes of it, None where that is not finite.

    ``look`` is shown the weights of each layer of the original, bottom first. Raises what ``reference_pass`` raises.
    """
    num_layers, recordings = layout.num_layers, model.record(batches)
    calls, entering = [r.calls for r in recordings], [r.hidden_NTD for r in recordings]
    boundaries = [room.make(f"boundaries-{b}", (num_layers + 1, *h.shape), h.dtype) for b, h in enumerate(entering)]
    reference = Reference(batches, calls, 0, boundaries, [], [])

    def keep(boundary: int, hidden: Sequence[torch.Tensor]) -> None:
        for states, h in zip(boundaries, hidden, strict=True):
            states[boundary].copy_(h)
            room.settle(states[boundary])

    def watch(passing: Passing) -> None:
        if passing.passage.finished and not made:  # they are at the top before the original is
            early[passing.passage.finished] = passing.hidden
        number = passing.passage.number
        if number >= num_layers:
            return
        look(passing.weights)
        check_finite(model, passing.view, passing.position, passing.weights, passing.hidden, batches)
        keep(number + 1, passing.hidden)
        if number == num_layers - 1:
            reference.top.extend(passing.hidden)
            reference.last_hidden.extend(model.last_hidden(h) for h in passing.hidden)
            made.append(measured(reference))

    keep(0, entering)
    made: list[Measure] = []
    early: dict[tuple[int, ...], Sequence[torch.Tensor]] = {}
    # The original is the first stack, so its passages bear the numbers of the source layers (forward/schedule.py).
    together = [Stack(layers, 0) for layers in (original_layers(num_layers), *stacks)]
    similarities = sweep(
        model,
        stream,
        layout,
        together,
        merge_norms,
        reference,
        lambda hidden: made[0](hidden) if made else None,
        meter,
        listener,
        watch=watch,
    )
    for finished, hidden in early.items():
        similarity = made[0](hidden)
        for number in finished:
            similarities[number] = similarity
    return reference, similarities[1:]
