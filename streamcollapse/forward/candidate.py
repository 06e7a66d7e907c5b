"""Evaluating a candidate: from the boundary below its merge to the last hidden states, weights streamed."""

from __future__ import annotations

import math

import torch

from streamcollapse.forward.metrics import cosine_similarities
from streamcollapse.forward.model import StreamedModel
from streamcollapse.forward.reference import Reference
from streamcollapse.merge.view import MergedView
from streamcollapse.progress import LayerDone, Listener
from streamcollapse.stream.meters import Meter


@torch.inference_mode()
def candidate_similarity(
    model: StreamedModel,
    view: MergedView,
    position: int,
    reference: Reference,
    meter: Meter,
    listener: Listener,
) -> float | None:
    """Mean cosine similarity of ``view`` to the original; None when its hidden states are not finite.

    ``view`` must be the original below 0-based ``position``: the forward pass starts there.
    """
    hidden = [h.to(model.placement.device) for h in reference.boundary(position)]
    for index in range(position, len(view.layers)):
        base = view.layers[index].base
        before = meter.bytes_read
        with model.onload(view, index) as weights:
            hidden = [model.run(base, weights, h, c[base]) for h, c in zip(hidden, reference.calls, strict=True)]
        listener(LayerDone(index, len(view.layers), meter.bytes_read - before))
    similarities: list[float] = []
    for h, original, batch in zip(hidden, reference.last_hidden, reference.batches, strict=True):
        similarities += cosine_similarities(model.last_hidden(h), original, batch.lengths)
    mean = math.fsum(similarities) / len(similarities)
    return mean if math.isfinite(mean) else None
