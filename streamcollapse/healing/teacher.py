"""What the original makes of the healing text, and what the layers make of it that do not learn: hidden states that are
made once and kept for as long as the student learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streamcollapse.forward.batches import Batch, groups
from streamcollapse.forward.model import StreamedModel
from streamcollapse.forward.walk import Passed, Stack, walk
from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.storage.scratch import Scratch

MOST_TOKENS = 1 << 17  # that go up together


@dataclass(frozen=True)
class Layers:
    """The stack ``layers`` of the source of a model, from its lowest layer on."""

    layers: tuple[PlanLayer, ...]
    merge_norms: bool = False


def teacher_states(
    model: StreamedModel, batches: Sequence[Batch], room: tuple[Scratch, str], most_tokens: int = MOST_TOKENS
) -> list[torch.Tensor]:
    """``states_above`` the whole source of ``model``."""
    return states_above(model, Layers(original_layers(model.num_layers)), batches, room, most_tokens)


def states_above(
    model: StreamedModel,
    stack: Layers,
    batches: Sequence[Batch],
    room: tuple[Scratch, str],
    most_tokens: int = MOST_TOKENS,
) -> list[torch.Tensor]:
    """What leaves the top layer of ``stack`` for each of ``batches``, [N, T, D], in ``room``: a scratch, and the name
    there before its number; in passes of ``most_tokens`` at the most (a call at the least). Raises NonFiniteError,
    OutputError."""
    found: list[torch.Tensor] = []
    scratch, name = room
    for group in groups(batches, lambda batch: batch.input_ids_NT.numel(), most_tokens):
        recordings = model.record(group)
        entering = [recording.hidden_NTD for recording in recordings]
        calls = [recording.calls for recording in recordings]
        del recordings

        def keep(passed: Passed) -> None:
            if passed.step.finished:
                for hidden in passed.hidden:
                    kept = scratch.allocate(f"{name}-{len(found)}", tuple(hidden.shape), hidden.dtype)
                    kept.copy_(hidden)
                    scratch.page_out(kept)
                    found.append(kept)

        walk(
            model,
            [Stack(stack.layers, 0)],
            lambda boundary, entering=entering: entering,  # type: ignore[misc]
            calls,
            keep,
            stack.merge_norms,
        )
    return found
