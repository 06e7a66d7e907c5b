"""The head at work: logits of a part of the vocabulary at a time, which stay in the cache of a processor.

With 262,144 words the logits of 64 tokens are 67 MB, and what is made of them waits for memory; and a head that is read
anew for every 64 tokens is the slower for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from streamcollapse.errors import is_of_device
from streamcollapse.forward.batches import logits_bytes, logits_tokens
from streamcollapse.forward.model import StreamedModel, Weights

BLOCK_TOKENS = 512  # whose logits are made of one reading of the head
PART_BYTES = 1 << 23  # of logits in float32, on a CPU; elsewhere there is no such cache, and each call costs a launch
_AGREE = 0.02  # of the largest logit: in 16 bits a part is not the whole bit for bit


class Head:
    """``weights`` of final norm and head of ``model``, with ``vocabulary`` rows. ``tokens``: how many to ask for at a
    time.

    Whether a part of the head makes a part of the logits is found by trial, on the state ``example_1D`` of a token: a
    model may do with logits what it likes. Where it does not, all are made at once, of fewer tokens.
    """

    def __init__(self, model: StreamedModel, weights: Weights, vocabulary: int, example_1D: torch.Tensor) -> None:
        self._model, self._weights, self._vocabulary = model, weights, vocabulary
        self._rows = model.head_rows(weights)
        is_cpu, grain = model.placement.device.type == "cpu", model.placement.grain
        self._part = PART_BYTES if is_cpu else logits_bytes(vocabulary, grain) // 2  # and as much again is made of it
        if not self._is_cut_at_will(example_1D):
            self._rows = ()
        self.tokens = grain * BLOCK_TOKENS if self._rows else logits_tokens(vocabulary, grain)

    def parts(self, tokens: int) -> Iterator[slice]:
        """Parts of the vocabulary, whose logits of ``tokens`` are small together."""
        size = max(self._part // (4 * tokens), 1) if self._rows else self._vocabulary
        for first in range(0, self._vocabulary, size):
            yield slice(first, min(first + size, self._vocabulary))

    def weights(self, words: slice) -> Weights:
        """What the logits of ``words`` are made with."""
        return {**self._weights, **{name: self._weights[name][self.rows(name, words)] for name in self._rows}}

    def rows(self, name: str, words: slice) -> slice:
        """The rows of the weight ``name`` that ``weights`` has for ``words``."""
        return words if name in self._rows else slice(None)

    def logits(self, hidden_TD: torch.Tensor, words: slice, weights: Weights | None = None) -> torch.Tensor:
        """Next-token logits of ``words`` of what leaves the top layer, in the compute dtype. [T, words] ``weights``:
        those for these words, if they are others by now."""
        found = self._of(weights or self.weights(words), hidden_TD)
        return found if self._rows else found[:, words]

    def put(self, name: str, values: torch.Tensor) -> None:
        """Give the weight ``name``, which has to be the caller's own, new values."""
        self._weights[name].copy_(values)

    def _of(self, weights: Weights, hidden_TD: torch.Tensor) -> torch.Tensor:
        # as samples of one token: learned positions end, and masks would grow with the square
        return self._model.logits(weights, hidden_TD.unsqueeze(1))[:, 0]

    def nll(self, hidden_TD: torch.Tensor, targets_T: torch.Tensor) -> float:
        """The sum over tokens of the negative log likelihood of ``targets_T``, in nats."""
        chosen_T, sum_T = torch.zeros(len(targets_T), dtype=torch.float64, device=hidden_TD.device), None
        for words in self.parts(len(hidden_TD)):
            logits = self.logits(hidden_TD, words).float()
            sum_T = log_sum(sum_T, logits)
            at_T, is_here_T = within(words, targets_T)
            chosen_T += torch.where(is_here_T, logits.gather(1, at_T.unsqueeze(1))[:, 0], 0.0).double()
        assert sum_T is not None
        return float((sum_T - chosen_T).sum())

    def most_probable(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """The word that comes next by ``hidden_TD``, of equals the first. [T], int64"""
        best_T = torch.full((len(hidden_TD),), -torch.inf, device=hidden_TD.device)
        word_T = torch.zeros(len(hidden_TD), dtype=torch.int64, device=hidden_TD.device)
        for words in self.parts(len(hidden_TD)):
            highest_T, where_T = self.logits(hidden_TD, words).float().max(-1)
            word_T = torch.where(highest_T > best_T, where_T + words.start, word_T)
            best_T = torch.maximum(best_T, highest_T)
        return word_T

    def likelihoods(
        self, hidden_TD: torch.Tensor, at_P: torch.Tensor, targets_P: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For pairs of a token ``at_P`` of ``hidden_TD`` and a word ``targets_P``: the log probability that it comes
        next, in nats, float64; and whether no other is more probable. [P]"""
        chosen_P = torch.zeros(len(at_P), dtype=torch.float64, device=hidden_TD.device)
        best_T = torch.full((len(hidden_TD),), -torch.inf, device=hidden_TD.device)
        word_T = torch.zeros(len(hidden_TD), dtype=torch.int64, device=hidden_TD.device)
        sum_T: torch.Tensor | None = None
        for words in self.parts(len(hidden_TD)):
            logits = self.logits(hidden_TD, words).float()
            sum_T = log_sum(sum_T, logits)
            highest_T, where_T = logits.max(-1)
            word_T = torch.where(highest_T > best_T, where_T + words.start, word_T)  # of equals the first
            best_T = torch.maximum(best_T, highest_T)
            among_P, is_here_P = within(words, targets_P)
            chosen_P += torch.where(is_here_P, logits[at_P, among_P], 0.0).double()
        assert sum_T is not None
        return chosen_P - sum_T[at_P], word_T[at_P] == targets_P

    def _is_cut_at_will(self, example_1D: torch.Tensor) -> bool:
        if not self._rows:
            return False
        middle = self._vocabulary // 2
        try:
            both = [self.logits(example_1D, words) for words in (slice(0, middle), slice(middle, self._vocabulary))]
            whole = self._of(self._weights, example_1D)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if is_of_device(error):
                raise
            return False
        found = torch.cat(both, dim=-1)
        return found.shape == whole.shape and bool((found - whole).abs().max() <= _AGREE * whole.abs().max())


def log_sum(known_T: torch.Tensor | None, logits_TW: torch.Tensor) -> torch.Tensor:
    """log of the sum of exp over all words of which logits came by, in float64: ``known_T`` of those before, and these.
    [T]"""
    of_these = torch.logsumexp(logits_TW.float(), dim=-1).double()
    return of_these if known_T is None else torch.logaddexp(known_T, of_these)


def inner(a_TW: torch.Tensor, b_TW: torch.Tensor) -> torch.Tensor:
    """The sum of ``a_TW * b_TW``, in float64, where they are. Not torch.dot: over 49k words, 80 tokens, it was seen to
    be wrong by 2e-4 of it, and the difference of two such sums is what is looked for."""
    products_T: torch.Tensor = torch.linalg.vecdot(a_TW, b_TW)
    return products_T.sum(dtype=torch.float64)


def within(words: slice, ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where ``ids_T`` are among ``words``, some place for those that are not; and which of them are. A device need not
    be waited for."""
    is_here_T = (ids_T >= words.start) & (ids_T < words.stop)
    return (ids_T - words.start).clamp(0, words.stop - words.start - 1), is_here_T
