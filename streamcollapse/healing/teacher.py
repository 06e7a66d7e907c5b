"""What the original makes of the healing text: what leaves its top layer, kept for as long as the student learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from streamcollapse.forward.batches import Batch
from streamcollapse.forward.model import StreamedModel
from streamcollapse.forward.walk import Passed, Stack, walk
from streamcollapse.merge.plan import original_layers
from streamcollapse.storage.scratch import Scratch

MOST_TOKENS = 1 << 17  # that go up together


def teacher_states(
    model: StreamedModel, batches: Sequence[Batch], scratch: Scratch, most_tokens: int = MOST_TOKENS
) -> list[torch.Tensor]:
    """What leaves the top layer of the whole source of ``model`` for each of ``batches``, [N, T, D], in ``scratch``;
    in passes of ``most_tokens`` at the most (a call at the least). Raises NonFiniteError, OutputError."""
    found: list[torch.Tensor] = []
    whole = Stack(original_layers(model.num_layers), 0)
    for group in _groups(batches, most_tokens):
        recordings = model.record(group)
        entering = [recording.hidden_NTD for recording in recordings]
        calls = [recording.calls for recording in recordings]
        del recordings

        def keep(passed: Passed) -> None:
            if passed.step.finished:
                for hidden in passed.hidden:
                    room = scratch.allocate(f"teacher-{len(found)}", tuple(hidden.shape), hidden.dtype)
                    room.copy_(hidden)
                    scratch.page_out(room)
                    found.append(room)

        walk(model, [whole], lambda boundary, entering=entering: entering, calls, keep)  # type: ignore[misc]
    return found


def _groups(batches: Sequence[Batch], most_tokens: int) -> Iterator[list[Batch]]:
    group, held = list[Batch](), 0
    for batch in batches:
        size = batch.input_ids_NT.numel()
        if group and held + size > most_tokens:
            yield group
            group, held = [], 0
        group.append(batch)
        held += size
    if group:
        yield group
