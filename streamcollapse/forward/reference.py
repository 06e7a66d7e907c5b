"""The reference pass: the original model once, layer by layer, keeping the hidden states at layer boundaries.

Boundary i (0-based) is the point before source layer i. Algorithm 1 only moves down, so below a candidate's merge the
model is always the original, and the candidate starts from the boundary there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streamcollapse.arch.layout import Layout
from streamcollapse.arch.replay import LayerCall
from streamcollapse.errors import NonFiniteError
from streamcollapse.forward.batches import Batch
from streamcollapse.forward.model import LayerWeights, StreamedModel, overflow
from streamcollapse.merge.plan import original_layers
from streamcollapse.merge.view import MergedView
from streamcollapse.progress import LayerDone, Listener
from streamcollapse.storage.finite import is_finite
from streamcollapse.storage.rooms import InMemory, Room
from streamcollapse.stream.meters import Meter
from streamcollapse.stream.weights import WeightStream


@dataclass(frozen=True)
class Reference:
    """What candidates are measured against, a list entry for each batch.

    ``boundaries[b][i]`` are the hidden states [N, T, D] before source layer ``first + i``, on the CPU; ``last_hidden``
    the original model's last hidden states [N, T, D'] and ``top`` what leaves its top layer, before the final norm
    [N, T, D], both on the compute device; ``calls[b][i]`` the other arguments of layer i.
    """

    batches: Sequence[Batch]
    calls: list[tuple[LayerCall, ...]]
    first: int
    boundaries: list[torch.Tensor]
    last_hidden: list[torch.Tensor]
    top: list[torch.Tensor]

    def boundary(self, layer_index: int) -> list[torch.Tensor]:
        """The hidden states before 0-based source layer ``layer_index``, per batch; it must be one that was kept."""
        assert layer_index >= self.first
        return [states[layer_index - self.first] for states in self.boundaries]


@torch.inference_mode()
def reference_pass(
    model: StreamedModel,
    stream: WeightStream,
    layout: Layout,
    batches: Sequence[Batch],
    kept: range,
    meter: Meter,
    listener: Listener,
    room: Room = InMemory(),  # noqa: B008 - holds nothing
) -> Reference:
    """Stream the original model once over ``batches``, keeping the boundaries in ``kept`` (step 1); the last one there
    is what leaves the top layer.

    The boundaries are kept in ``room``.

    Raises OutputError when ``room`` has no space, NonFiniteError, naming layer and tensor, when a weight that is
    reached is NaN or infinite, or when the hidden states overflow the compute dtype.
    """
    recordings = model.record(batches)
    hidden = [recording.hidden_NTD for recording in recordings]
    calls = [recording.calls for recording in recordings]
    # One block per batch, allocated before anything else: kept states scattered among short-lived activations would
    # leave the heap full of holes.
    boundaries = [room.make(f"boundaries-{b}", (len(kept), *h.shape), h.dtype) for b, h in enumerate(hidden)]
    layers = original_layers(layout.num_layers)
    steps = [layout.layer_names(i) for i in range(layout.num_layers)]
    with stream.run(steps) as weights_pass:
        view = MergedView(weights_pass, layout, layers, merge_norms=False)
        for position in range(len(layers)):
            _keep(position, hidden, boundaries, kept, room)
            before = meter.bytes_read
            with weights_pass.step(), model.onload(view, position) as weights:
                with meter.computing(1):
                    pairs = zip(hidden, calls, strict=True)
                    hidden = [model.run(position, weights, h, c[position]) for h, c in pairs]
                check_finite(model, view, position, weights, hidden, batches)
            listener(LayerDone(position, len(layers), meter.bytes_read - before))
    _keep(len(layers), hidden, boundaries, kept, room)
    return Reference(batches, calls, kept.start, boundaries, [model.last_hidden(h) for h in hidden], hidden)


def _keep(
    boundary: int, hidden: Sequence[torch.Tensor], boundaries: Sequence[torch.Tensor], kept: range, room: Room
) -> None:
    if boundary in kept:
        for states, h in zip(boundaries, hidden, strict=True):
            states[boundary - kept.start].copy_(h)
            room.settle(states[boundary - kept.start])


def check_finite(
    model: StreamedModel,
    view: MergedView,
    position: int,
    weights: LayerWeights,
    hidden: Sequence[torch.Tensor],
    batches: Sequence[Batch],
) -> None:
    """Raise NonFiniteError, naming what is to blame, where ``hidden``, which left layer ``position``, is not finite."""
    if not _finite(hidden, batches):
        model.check_weights(view, position, weights)
        dtype = str(hidden[0].dtype).removeprefix("torch.")
        raise NonFiniteError(overflow(f"the hidden states after layer {position}", dtype))


def _finite(hidden: Sequence[torch.Tensor], batches: Sequence[Batch]) -> bool:
    """Whether what real tokens have become is finite. A weight that is not makes hidden states that are not."""
    return all(
        is_finite(hidden_NTD)  # of what padding became as well: one look where all is well
        or all(is_finite(row[:length]) for row, length in zip(hidden_NTD, batch.lengths, strict=True))
        for hidden_NTD, batch in zip(hidden, batches, strict=True)
    )
