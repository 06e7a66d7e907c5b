"""A sweep: how alike many candidates are to the original, in one walk up the stack."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streamcollapse.forward.measure import Measure
from streamcollapse.forward.model import StreamedModel
from streamcollapse.forward.reference import Reference
from streamcollapse.forward.schedule import Stack
from streamcollapse.forward.stored import StoredLayers
from streamcollapse.forward.walk import Passed, walk


@torch.inference_mode()
def sweep(
    model: StreamedModel,
    stacks: Sequence[Stack],
    merge_norms: bool,
    reference: Reference,
    measure: Measure,
    stored: StoredLayers | None = None,
) -> list[float | None]:
    """How alike each of ``stacks`` is to the original by ``measure``, None where that is not finite."""
    similarities: list[float | None] = [None] * len(stacks)

    def watch(passed: Passed) -> None:
        if passed.step.finished:
            similarity = measure(passed.hidden)
            for number in passed.step.finished:
                similarities[number] = similarity

    def entering(boundary: int) -> list[torch.Tensor]:
        return [h.to(model.placement.device) for h in reference.boundary(boundary)]

    walk(model, stacks, entering, reference.calls, watch, merge_norms, stored)
    return similarities
