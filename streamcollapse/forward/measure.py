"""A metric at work: how alike a candidate is to the original, from what leaves its top layer; and a sweep, which asks
that of many candidates in one walk up the stack."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from streamcollapse.errors import CalibrationError
from streamcollapse.forward import metrics
from streamcollapse.forward.batches import KEPT_BYTES, Batch, distributions_bytes, one_in
from streamcollapse.forward.head import Head, inner, log_sum
from streamcollapse.forward.model import StreamedModel, Weights
from streamcollapse.forward.reference import Reference
from streamcollapse.forward.stored import StoredLayers
from streamcollapse.forward.walk import Passed, Stack, walk
from streamcollapse.storage.source import check_finite

Measure = Callable[[Sequence[torch.Tensor]], float | None]
_OfStates = Callable[[torch.Tensor, torch.Tensor, Sequence[int]], list[float]]

_OF_STATES: dict[str, _OfStates] = {
    "cosine": metrics.cosine_similarities,
    "token-cosine": metrics.token_cosines,
    "cka-linear": metrics.linear_cka,
    "cka-kernel": metrics.kernel_cka,
}


def make_measure(
    metric: str,
    model: StreamedModel,
    reference: Reference,
    vocabulary: int,
    tokens: int | None = None,
    head: Callable[[], Weights] | None = None,
) -> Measure:
    """The measure by ``metric`` (settings/catalogue.py): of what leaves the top layer of a candidate, [N, T, D] for
    each batch, how alike it is to the original; None where that is no finite number. A metric of next-token
    distributions looks at about ``tokens`` of all tokens (None: at each), with what ``head`` gives (None: the model's).

    Raises CalibrationError where the samples are too short for the metric, NonFiniteError for a head that is not
    finite.
    """
    longest = max(max(batch.lengths) for batch in reference.batches)
    if longest < 2 and metric in ("nll", "cka-linear", "cka-kernel"):
        raise CalibrationError(f"metric {metric} needs samples of two tokens or more, and all have one")
    if metric in _OF_STATES:
        return _OfHiddenStates(_OF_STATES[metric], model, reference)
    by_logits = _OfLogits(model, reference, vocabulary, tokens, (head or model.head)())
    return by_logits.divergence if metric == "kl" else by_logits.likelihood


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


class _OfHiddenStates:
    """The mean of ``similarities`` of the last hidden states."""

    def __init__(self, similarities: _OfStates, model: StreamedModel, reference: Reference) -> None:
        self._similarities, self._model, self._reference = similarities, model, reference

    def __call__(self, hidden: Sequence[torch.Tensor]) -> float | None:
        values: list[float] = []
        for h, original, batch in zip(hidden, self._reference.last_hidden, self._reference.batches, strict=True):
            values += self._similarities(self._model.last_hidden(h), original, batch.lengths)
        return _finite(metrics.mean(values))


class _OfLogits:
    """Metrics of the next-token distributions of about ``tokens``. The head is held; logits are made a block of tokens
    and a part of the vocabulary at a time."""

    def __init__(
        self, model: StreamedModel, reference: Reference, vocabulary: int, tokens: int | None, head: Weights
    ) -> None:
        self._reference = reference
        lengths = [batch.lengths for batch in reference.batches]
        self._every = one_in(lengths, tokens)
        for name, weight in head.items():
            check_finite(name, weight)
        self._head = Head(model, head, vocabulary, reference.top[0][0, :1])
        size = distributions_bytes(lengths, vocabulary, self._every, model.placement.dtype.itemsize)
        self._is_kept = size <= KEPT_BYTES
        self._kept: dict[tuple[int, int, int], _Original] = {}

    def likelihood(self, hidden: Sequence[torch.Tensor]) -> float | None:
        """exp(loss of the original - loss), the loss being the mean over predicted tokens in nats: the perplexity of
        the original over the candidate's."""
        return _finite(_exp(self._loss - self._mean_loss(hidden)))

    def divergence(self, hidden: Sequence[torch.Tensor]) -> float | None:
        """exp(-KL), KL(original || candidate) of the next-token distributions being the mean over all tokens in
        nats."""
        total, tokens = 0.0, 0
        for number, (h, batch) in enumerate(zip(hidden, self._reference.batches, strict=True)):
            for block, real in _blocks(batch, self._head.tokens, 0, self._every):
                key = number, block[0].start, block[1].start
                total += self._divergence(key, h[block][real], self._reference.top[number][block][real])
                tokens += int(real.sum())
        return _finite(_exp(-total / tokens))

    def _divergence(self, key: tuple[int, int, int], ours_TD: torch.Tensor, theirs_TD: torch.Tensor) -> float:
        """The sum over tokens of sum p (log p - log q), with log p = t - log_sum t of the original's logits t."""
        original = self._of_original(key, theirs_TD)
        total, sum_T = torch.zeros((), dtype=torch.float64, device=ours_TD.device), None
        for number, words in enumerate(self._head.parts(len(ours_TD))):
            ours = self._head.logits(ours_TD, words).float()
            theirs = original.logits[number] if original.logits else self._head.logits(theirs_TD, words)
            theirs = theirs.float()
            probabilities = (theirs - original.sum_T.float().unsqueeze(-1)).exp_()
            sum_T = log_sum(sum_T, ours)
            total += inner(probabilities, theirs - ours)
        assert sum_T is not None
        return float(total + (sum_T - original.sum_T).sum())

    def _of_original(self, key: tuple[int, int, int], hidden_TD: torch.Tensor) -> _Original:
        """What is kept of the original for the block ``key``, where ``hidden_TD`` left its top layer."""
        if key not in self._kept:
            sum_T, made = None, list[torch.Tensor]()
            for words in self._head.parts(len(hidden_TD)):
                logits = self._head.logits(hidden_TD, words)
                sum_T = log_sum(sum_T, logits)
                made += [logits] if self._is_kept else []
            assert sum_T is not None
            self._kept[key] = _Original(made, sum_T)
        return self._kept[key]

    @cached_property
    def _loss(self) -> float:
        return self._mean_loss(self._reference.top)

    def _mean_loss(self, hidden: Sequence[torch.Tensor]) -> float:
        total, tokens = 0.0, 0
        for h, batch in zip(hidden, self._reference.batches, strict=True):
            following_NT = batch.input_ids_NT.roll(-1, dims=1)
            for block, real in _blocks(batch, self._head.tokens, 1, self._every):
                targets_T = following_NT[block][real].to(h.device)
                total += self._head.nll(h[block][real], targets_T)
                tokens += len(targets_T)
        return total / tokens if tokens else math.nan


@dataclass(frozen=True)
class _Original:
    """Of a block of tokens: the original's ``logits`` by parts of the vocabulary, none where there is no room, and the
    log of the sum of their exp, [T] in float64."""

    logits: list[torch.Tensor]
    sum_T: torch.Tensor


_Block = tuple[slice, slice]  # rows and tokens of a batch


def _blocks(batch: Batch, most: int, short: int, every: int) -> Iterator[tuple[_Block, torch.Tensor]]:
    """Parts of ``batch`` of at most ``most`` tokens (one at least), and which of their tokens count, [n, t]: the real
    ones but the last ``short`` of each row. One token in ``every``, from the middle of the first so many on."""
    rows, width = batch.input_ids_NT.shape
    lengths_N1 = torch.tensor(batch.lengths).unsqueeze(1)
    real_NT = torch.arange(width).unsqueeze(0) < lengths_N1 - short
    down, along = max(most // math.ceil(width / every), 1), min(most, width) * every
    for row in range(0, rows, down):
        for token in range(every // 2, width, along):
            block = slice(row, row + down), slice(token, token + along, every)
            if real_NT[block].any():
                yield block, real_NT[block]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
