"""Perplexity of any checkpoint, or of several plans of one, streamed: every window and every plan share each visit to a
layer.

Knows token ids, not tokenizers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from streamcollapse.errors import CalibrationError, NonFiniteError
from streamcollapse.forward.batches import MOST_CALL_TOKENS, Batch, groups, make_batches
from streamcollapse.forward.head import Head
from streamcollapse.forward.model import StreamedModel, overflow
from streamcollapse.forward.stacks import Heads, States, climb, walks_of
from streamcollapse.forward.walk import Stack
from streamcollapse.merge.plan import PlanLayer

MAX_HIDDEN_BYTES = 1 << 30  # hidden states held at once; a longer text takes several passes over the weights


_Piece = tuple[Batch, list[int]]  # and how many tokens of each row are predicted


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
    model: StreamedModel,
    layers: Sequence[PlanLayer],
    merge_norms: bool,
    windows: Sequence[Window],
    vocabulary: int,
    call_tokens: int = MOST_CALL_TOKENS,
) -> Perplexity:
    """Perplexity over ``windows`` of the model whose layers are ``layers`` (with ``merge_norms``) of the source.

    Raises what ``streamed_perplexities`` raises, and NonFiniteError when the result is not finite.
    """
    (found,) = streamed_perplexities(model, [layers], [merge_norms], windows, vocabulary, call_tokens)
    if not math.isfinite(found.nll):
        raise NonFiniteError(overflow("the logits", model.placement.dtype_name))
    return found


@torch.inference_mode()
def streamed_perplexities(
    model: StreamedModel,
    stacks: Sequence[Sequence[PlanLayer]],
    merge_norms: Sequence[bool],
    windows: Sequence[Window],
    vocabulary: int,
    call_tokens: int = MOST_CALL_TOKENS,
) -> list[Perplexity]:
    """Perplexity over ``windows`` of each of ``stacks`` of the source's layers, with the ``merge_norms`` of each, in
    one walk; in two where both ways of treating norms are wanted.

    Each is what it is alone, bit for bit, and infinite where what is finite in the checkpoint overflows the compute
    dtype. ``call_tokens`` go through a layer at once (one window at the least); ``vocabulary`` bounds the logits that
    are made at once. Raises CalibrationError when nothing is predicted, NonFiniteError when a weight is not finite.
    """
    longest_first = sorted(windows, key=lambda window: -len(window.token_ids))  # the order of batches
    batches = make_batches([window.token_ids for window in longest_first], call_tokens)
    counts = iter(window.predicted for window in longest_first)
    pieces = [(batch, [next(counts) for _ in batch.lengths]) for batch in batches]
    tokens = sum(window.predicted for window in windows)
    if tokens == 0:
        raise CalibrationError("the text has no token to predict; give a longer text")
    totals = [0.0] * len(stacks)
    heads = Heads(model, vocabulary, [stack[-1].after for stack in stacks])
    bytes_per_token = model.hidden_size * model.placement.dtype.itemsize * len(stacks)

    def score(group: Sequence[_Piece], numbers: Sequence[int], finished: Sequence[int], hidden: States) -> None:
        for head, ones in heads.of([numbers[one] for one in finished], hidden[0][0, :1]):
            for hidden_NTD, (batch, predicted) in zip(hidden, group, strict=True):
                for nll in _row_nlls(head, hidden_NTD, batch, predicted):
                    for one in ones:
                        totals[one] += nll

    def num_bytes(piece: _Piece) -> int:
        return piece[0].input_ids_NT.numel() * bytes_per_token

    for group in groups(pieces, num_bytes, MAX_HIDDEN_BYTES):
        for norms, numbers in walks_of(stacks, merge_norms):
            together = [Stack(tuple(stacks[n]), 0) for n in numbers]
            recordings = model.record([batch for batch, _ in group])
            entering, calls = [one.hidden_NTD for one in recordings], [one.calls for one in recordings]
            del recordings
            climb(model, together, norms, (entering, calls), partial(score, group, numbers))
    return [Perplexity(total / tokens if math.isfinite(total) else math.inf, tokens) for total in totals]


def _row_nlls(head: Head, hidden_NTD: torch.Tensor, batch: Batch, predicted: Sequence[int]) -> Iterator[float]:
    """The negative log likelihood, in nats, of the last ``predicted`` tokens of each row."""
    for row, (length, count) in enumerate(zip(batch.lengths, predicted, strict=True)):
        ids = batch.input_ids_NT[row, length - count : length].to(hidden_NTD.device)
        left = hidden_NTD[row, length - 1 - count : length - 1]
        yield sum(head.nll(left[at], ids[at]) for at in _slices(count, head.tokens))


def _slices(count: int, most: int) -> Iterator[slice]:
    return (slice(first, first + most) for first in range(0, count, most))
