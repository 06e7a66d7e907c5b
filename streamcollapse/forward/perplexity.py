"""Perplexity of any checkpoint, streamed: every window of the text shares each visit to a layer.

Knows token ids, not tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from streamcollapse.arch.layout import Layout
from streamcollapse.errors import CalibrationError, NonFiniteError
from streamcollapse.forward.batches import Batch, make_batches
from streamcollapse.forward.model import StreamedModel, Weights, overflow
from streamcollapse.merge.plan import original_layers
from streamcollapse.merge.view import MergedView
from streamcollapse.progress import LayerDone, Listener
from streamcollapse.storage.finite import check_finite, is_finite
from streamcollapse.stream.meters import Meter
from streamcollapse.stream.weights import WeightStream

MAX_HIDDEN_BYTES = 1 << 30  # hidden states held at once; a longer text takes several passes over the weights
MAX_CALL_TOKENS = 2048  # windows run together as long as they are short: fewer, larger calls
MAX_LOGITS_BYTES = 1 << 26  # logits made at once, in float32


@dataclass(frozen=True)
class Perplexity:
    """``nll`` is the mean negative log likelihood in nats per predicted token, ``tokens`` how many were predicted."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf


def make_windows(prefix: Sequence[int], token_ids: Sequence[int], window: int) -> list[list[int]]:
    """Cut ``token_ids`` into windows of at most ``window`` tokens, each opened by ``prefix`` (BOS, if any)."""
    step = window - len(prefix)
    if step < 1:
        raise CalibrationError(f"a window of {window} tokens leaves no room for text; pass a larger --window")
    windows = [[*prefix, *token_ids[i : i + step]] for i in range(0, len(token_ids), step)]
    return [w for w in windows if len(w) > 1]


@torch.inference_mode()
def streamed_perplexity(
    model: StreamedModel,
    stream: WeightStream,
    layout: Layout,
    windows: Sequence[Sequence[int]],
    hidden_size: int,
    vocabulary: int,
    meter: Meter,
    listener: Listener,
) -> Perplexity:
    """Perplexity over ``windows`` of token ids: every token but the first of a window is predicted.

    ``hidden_size`` and ``vocabulary`` bound what is held at once. Raises CalibrationError when nothing is predicted,
    NonFiniteError when a weight or the result is not finite.
    """
    batches = make_batches(windows, MAX_CALL_TOKENS)
    total, tokens = 0.0, 0
    head = model.head()
    for name, weight in head.items():
        check_finite(name, weight)
    chunk = max(MAX_LOGITS_BYTES // (4 * vocabulary), 1)
    for group in _groups(batches, hidden_size * model.placement.dtype.itemsize):
        hidden = _stream(model, stream, layout, group, meter, listener)
        for batch, hidden_NTD in zip(group, hidden, strict=True):
            for row, length in enumerate(batch.lengths):
                ids = batch.input_ids_NT[row, :length].to(hidden_NTD.device)
                total += _row_nll(model, head, hidden_NTD[row : row + 1, : length - 1], ids[1:], chunk)
                tokens += length - 1
    if tokens == 0:
        raise CalibrationError("the text has no token to predict; give a longer text")
    if not math.isfinite(total):
        raise NonFiniteError(overflow("the logits", model.placement.dtype_name))
    return Perplexity(total / tokens, tokens)


def _stream(
    model: StreamedModel,
    stream: WeightStream,
    layout: Layout,
    batches: Sequence[Batch],
    meter: Meter,
    listener: Listener,
) -> list[torch.Tensor]:
    """What leaves the top layer, per batch. [N, T, D]"""
    recordings = model.record(batches)
    hidden = [recording.hidden_NTD for recording in recordings]
    num_layers = layout.num_layers
    with stream.run([layout.layer_names(i) for i in range(num_layers)]) as weights_pass:
        view = MergedView(weights_pass, layout, original_layers(num_layers), merge_norms=False)
        for position in range(num_layers):
            before = meter.bytes_read
            with weights_pass.step(), model.onload(view, position) as weights:
                for i, recording in enumerate(recordings):
                    hidden[i] = model.run(position, weights, hidden[i], recording.calls[position])
                if not all(is_finite(h) for h in hidden):
                    model.check_weights(view, position, weights)
            listener(LayerDone(position, num_layers, meter.bytes_read - before))
    return hidden


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
