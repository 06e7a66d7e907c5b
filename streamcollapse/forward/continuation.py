"""Text that a model goes on with, streamed: every token is a pass over the weights, for all prompts together.

Without a cache: for a few tokens of models that do not fit into memory. Knows token ids, not tokenizers.
"""

from collections.abc import Sequence

import torch

from streamcollapse.forward.batches import make_batches
from streamcollapse.forward.model import StreamedModel, Weights
from streamcollapse.forward.walk import Passed, Stack, walk
from streamcollapse.merge.plan import PlanLayer


@torch.inference_mode()
def continuations(
    model: StreamedModel,
    layers: Sequence[PlanLayer],
    merge_norms: bool,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
) -> list[list[int]]:
    """The ``new_tokens`` token ids that the model of ``layers`` (with ``merge_norms``) of the source holds to be the
    most probable after each of ``prompts``, one after the other."""
    head = model.head(layers[-1].refits)
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))  # of rows: as batches have them
    texts = [list(prompts[n]) for n in order]
    for _ in range(new_tokens):
        for text, token in zip(
            texts, _next_tokens(model, Stack(tuple(layers), 0), merge_norms, texts, head), strict=True
        ):
            text.append(token)
    found = {n: text[len(prompts[n]) :] for n, text in zip(order, texts, strict=True)}
    return [found[n] for n in range(len(prompts))]


def _next_tokens(
    model: StreamedModel, stack: Stack, merge_norms: bool, texts: Sequence[Sequence[int]], head: Weights
) -> list[int]:
    """The most probable token after each of ``texts``, which come longest first."""
    batches, chosen = make_batches(texts), list[int]()
    recordings = model.record(batches)
    entering = [recording.hidden_NTD for recording in recordings]

    def watch(passed: Passed) -> None:
        if passed.step.finished:
            for hidden_NTD, batch in zip(passed.hidden, batches, strict=True):
                for row, length in enumerate(batch.lengths):
                    last = model.logits(head, hidden_NTD[row : row + 1, length - 1 : length])
                    chosen.append(int(last[0, 0].argmax()))

    calls = [recording.calls for recording in recordings]
    walk(model, [stack], lambda boundary: entering, calls, watch, merge_norms)
    return chosen
