"""Perplexity of any checkpoint, streamed: every window of the text shares each visit to a layer.

Knows token ids, not tokenizers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from streamcollapse.errors import CalibrationError, NonFiniteError
from streamcollapse.forward.batches import MOST_CALL_TOKENS, Batch, logits_tokens, make_batches
from streamcollapse.forward.model import StreamedModel, Weights, overflow
from streamcollapse.forward.walk import Passed, Stack, walk
from streamcollapse.merge.plan import PlanLayer
from streamcollapse.storage.source import check_finite, is_finite

MAX_HIDDEN_BYTES = 1 << 30  # hidden states held at once; a longer text takes several passes over the weights


@dataclass(frozen=True)
class Perplexity:
    """``nll`` is the mean negative log likelihood in nats per predicted token, ``tokens`` how many were predicted."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf


@dataclass(frozen=True)
class Window:
    """Token ids that run together; the last ``predicted`` of them count."""

    token_ids: list[int]
    predicted: int


def make_windows(
    prefix: Sequence[int], token_ids: Sequence[int], window: int, stride: int | None = None
) -> list[Window]:
    """Cut ``token_ids`` into windows of at most ``window`` tokens, each opened by ``prefix`` (BOS, if any).

    A window begins ``stride`` tokens after the one before it, and predicts what that one has not (None: they do not
    overlap). Raises CalibrationError where they would leave no room for text, or leave some of it out.
    """
    room = window - len(prefix)
    if room < 1:
        raise CalibrationError(f"a window of {window} tokens leaves no room for text; pass a larger `window`")
    step = room if stride is None else stride
    if not 1 <= step <= room:
        raise CalibrationError(f"stride is {step}; with windows of {window} tokens it must be from 1 to {room}")
    windows, reached = [], 0
    for start in range(0, len(token_ids), step):
        ids = [*prefix, *token_ids[start : start + room]]
        end = min(start + room, len(token_ids))
        windows.append(Window(ids, min(end - reached, len(ids) - 1)))
        reached = end
        if end == len(token_ids):
            break
    return [window for window in windows if window.predicted > 0]


@torch.inference_mode()
def streamed_perplexity(
    model: StreamedModel, layers: Sequence[PlanLayer], merge_norms: bool, windows: Sequence[Window], vocabulary: int
) -> Perplexity:
    """Perplexity over ``windows`` of the model whose layers are ``layers`` (with ``merge_norms``) of the source.

    ``vocabulary`` bounds the logits that are made at once. Raises CalibrationError when nothing is predicted,
    NonFiniteError when a weight or the result is not finite.
    """
    longest_first = sorted(windows, key=lambda window: -len(window.token_ids))  # the order of batches
    batches = make_batches([window.token_ids for window in longest_first], MOST_CALL_TOKENS)
    predicted = iter(longest_first)
    total, tokens = 0.0, 0
    head = model.head()
    for name, weight in head.items():
        check_finite(name, weight)
    chunk = logits_tokens(vocabulary)
    for group in _groups(batches, model.hidden_size * model.placement.dtype.itemsize):
        hidden = _top(model, layers, merge_norms, group)
        for batch, hidden_NTD in zip(group, hidden, strict=True):
            for row, length in enumerate(batch.lengths):
                ids = batch.input_ids_NT[row, :length].to(hidden_NTD.device)
                count = next(predicted).predicted
                states = hidden_NTD[row : row + 1, length - 1 - count : length - 1]
                total += _row_nll(model, head, states, ids[length - count :], chunk)
                tokens += count
    if tokens == 0:
        raise CalibrationError("the text has no token to predict; give a longer text")
    if not math.isfinite(total):
        raise NonFiniteError(overflow("the logits", model.placement.dtype_name))
    return Perplexity(total / tokens, tokens)


def _top(
    model: StreamedModel, layers: Sequence[PlanLayer], merge_norms: bool, batches: Sequence[Batch]
) -> list[torch.Tensor]:
    """What leaves the top layer, per batch. [N, T, D]"""
    recordings = model.record(batches)
    entering, top = [recording.hidden_NTD for recording in recordings], list[torch.Tensor]()

    def watch(passed: Passed) -> None:
        if not all(is_finite(h) for h in passed.hidden):
            model.check_weights(passed.view, passed.position, passed.weights)
        if passed.step.finished:
            top.extend(passed.hidden)

    calls = [recording.calls for recording in recordings]
    del recordings  # what enters goes as soon as the first layer has seen it
    walk(model, [Stack(tuple(layers), 0)], lambda boundary: entering, calls, watch, merge_norms)
    return top


def _row_nll(
    model: StreamedModel, head: Weights, hidden_1TD: torch.Tensor, targets_T: torch.Tensor, chunk: int
) -> float:
    total = 0.0
    for start in range(0, len(targets_T), chunk):
        logits = model.logits(head, hidden_1TD[:, start : start + chunk])[0].float()
        total += float(functional.cross_entropy(logits, targets_T[start : start + chunk], reduction="sum"))
    return total


def _groups(batches: Sequence[Batch], bytes_per_token: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    held = 0
    for batch in batches:
        size = batch.input_ids_NT.numel() * bytes_per_token
        if group and held + size > MAX_HIDDEN_BYTES:
            yield group
            group, held = [], 0
        group.append(batch)
        held += size
    if group:
        yield group
