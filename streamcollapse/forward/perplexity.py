"""Perplexity of any checkpoint, or of several plans of one, streamed: every window and every plan share each visit to a
layer.

Knows token ids, not tokenizers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from streamcollapse.errors import CalibrationError, NonFiniteError
from streamcollapse.forward.batches import MOST_CALL_TOKENS, Batch, groups, make_batches
from streamcollapse.forward.head import Head
from streamcollapse.forward.model import StreamedModel, Weights, overflow
from streamcollapse.forward.walk import Passed, Stack, walk
from streamcollapse.merge.plan import PlanLayer
from streamcollapse.storage.source import check_finite, is_finite

MAX_HIDDEN_BYTES = 1 << 30  # hidden states held at once; a longer text takes several passes over the weights


_States = Sequence[torch.Tensor]  # hidden states [N, T, D], for each batch
_Refits = tuple[tuple[str, str], ...]  # by name, what was fitted anew after a stack
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
    heads = _Heads(model, vocabulary, [stack[-1].after for stack in stacks])
    bytes_per_token = model.hidden_size * model.placement.dtype.itemsize * len(stacks)

    def score(group: Sequence[_Piece], numbers: Sequence[int], finished: Sequence[int], hidden: _States) -> None:
        for head, ones in heads.of([numbers[one] for one in finished], hidden[0][0, :1]):
            for hidden_NTD, (batch, predicted) in zip(hidden, group, strict=True):
                for nll in _row_nlls(head, hidden_NTD, batch, predicted):
                    for one in ones:
                        totals[one] += nll

    def num_bytes(piece: _Piece) -> int:
        return piece[0].input_ids_NT.numel() * bytes_per_token

    for group in groups(pieces, num_bytes, MAX_HIDDEN_BYTES):
        for norms, numbers in _walks(stacks, merge_norms):
            together = [Stack(tuple(stacks[n]), 0) for n in numbers]
            _climb(model, together, norms, [batch for batch, _ in group], partial(score, group, numbers))
    return [Perplexity(total / tokens if math.isfinite(total) else math.inf, tokens) for total in totals]


class _Heads:
    """The head of each stack, by what was fitted anew after it (``refits``). One is in memory at a time. Raises
    NonFiniteError for any of them, at once."""

    def __init__(self, model: StreamedModel, vocabulary: int, refits: Sequence[dict[str, str]]) -> None:
        self._model, self._vocabulary = model, vocabulary
        self._keys = [tuple(sorted(one.items())) for one in refits]
        self._weights: tuple[_Refits, Weights] | None = None
        self._head: tuple[_Refits, Head] | None = None
        for key in reversed(dict.fromkeys(self._keys)):
            for name, weight in self._read(key).items():
                check_finite(name, weight)

    def of(self, stacks: Sequence[int], example_1D: torch.Tensor) -> Iterator[tuple[Head, list[int]]]:
        """Each head with those of ``stacks``, by number, that have it. ``example_1D``: the state of a token."""
        for key in dict.fromkeys(self._keys[one] for one in stacks):
            if self._head is None or self._head[0] != key:
                self._head = None
                self._head = key, Head(self._model, self._read(key), self._vocabulary, example_1D)
            yield self._head[1], [one for one in stacks if self._keys[one] == key]

    def _read(self, key: _Refits) -> Weights:
        if self._weights is None or self._weights[0] != key:
            self._weights = None
            self._weights = key, self._model.head(dict(key))
        return self._weights[1]


def _walks(stacks: Sequence[Sequence[PlanLayer]], merge_norms: Sequence[bool]) -> list[tuple[bool, list[int]]]:
    """The walks that are needed: how norms are treated in each, and the numbers of its stacks. One whose layers are
    the source's own goes with either."""
    plain = [all(layer.untouched for layer in layers) for layers in stacks]
    mixed = {norms for norms, is_plain in zip(merge_norms, plain, strict=True) if not is_plain}
    usual = min(mixed, default=False)
    ways = [usual if is_plain else norms for norms, is_plain in zip(merge_norms, plain, strict=True)]
    return [(way, [n for n, own in enumerate(ways) if own is way]) for way in sorted(set(ways))]


def _climb(
    model: StreamedModel,
    stacks: Sequence[Stack],
    merge_norms: bool,
    batches: Sequence[Batch],
    score: Callable[[Sequence[int], _States], None],
) -> None:
    """One walk: ``score`` is given the numbers of stacks and what leaves their top layer, [N, T, D] per batch."""
    recordings = model.record(batches)
    entering = [recording.hidden_NTD for recording in recordings]
    calls = [recording.calls for recording in recordings]
    del recordings
    branches = len({stack.layers[0].key for stack in stacks})  # which enter, one after the other

    def enter(boundary: int) -> list[torch.Tensor]:
        nonlocal branches
        branches -= 1
        return list(entering) if branches else entering  # the last lets go of them as the first layer sees them

    def watch(passed: Passed) -> None:
        if not all(is_finite(h) for h in passed.hidden):
            model.check_weights(passed.view, passed.position, passed.weights)
        if passed.step.finished:
            score(passed.step.finished, passed.hidden)

    walk(model, stacks, enter, calls, watch, merge_norms)


def _row_nlls(head: Head, hidden_NTD: torch.Tensor, batch: Batch, predicted: Sequence[int]) -> Iterator[float]:
    """The negative log likelihood, in nats, of the last ``predicted`` tokens of each row."""
    for row, (length, count) in enumerate(zip(batch.lengths, predicted, strict=True)):
        ids = batch.input_ids_NT[row, length - count : length].to(hidden_NTD.device)
        left = hidden_NTD[row, length - 1 - count : length - 1]
        yield sum(head.nll(left[at], ids[at]) for at in _slices(count, head.tokens))


def _slices(count: int, most: int) -> Iterator[slice]:
    return (slice(first, first + most) for first in range(0, count, most))
