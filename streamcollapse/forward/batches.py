"""Samples of token ids, put together into calls of the model."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

MAX_CALL_TOKENS = 256  # whatever the model: with a feed-forward of 28672, 29 MB for each activation in float32
MOST_CALL_TOKENS = 2048  # where layers are narrow: the cost of a call is then mostly that of making it
CALL_COST = 64  # padded tokens that cost as much as one more call, by benchmarks/bench_calls.py
LOGITS_BYTES = 1 << 24  # logits made at once, in float32, but those of LOGITS_TOKENS at the least:
LOGITS_TOKENS = 64  # of fewer tokens the time goes into reading the head
KEPT_BYTES = 5 << 27  # of the original's logits; where they are more they are made anew for every candidate

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """``input_ids_NT`` (int64, on the CPU) padded on the right with zeros; ``lengths[n]`` tokens of row n are real.

    Padding comes after every real token, so causal attention never sees it and no mask is needed.
    """

    input_ids_NT: torch.Tensor
    lengths: tuple[int, ...]


def call_tokens(width: int, grain: int = 1) -> int:
    """How many tokens a call of a layer takes whose widest matrix has ``width`` columns: activations of like size.
    ``grain``: of the device (Placement)."""
    return grain * min(max(MAX_CALL_TOKENS * 28_672 // width, MAX_CALL_TOKENS), MOST_CALL_TOKENS)


def make_batches(samples: Sequence[Sequence[int]], max_tokens: int = MAX_CALL_TOKENS) -> list[Batch]:
    """Group samples, longest first, so that rows times the longest row stays within ``max_tokens`` (one row at least).

    Of all ways to cut them into groups the one that costs least: a call costs its tokens, padding included, and
    ``CALL_COST`` for being made.
    """
    longest_first = sorted(samples, key=len, reverse=True)
    cost, begin = [0], [0]  # of the best groups of the first n samples: their cost, and where the last of them begins
    for end in range(1, len(longest_first) + 1):
        ways = []
        for start in range(end - 1, -1, -1):
            tokens = (end - start) * len(longest_first[start])
            if tokens > max_tokens and start < end - 1:
                break  # longer rows, and more of them
            ways.append((cost[start] + tokens + CALL_COST, start))
        best, start = min(ways)
        cost.append(best)
        begin.append(start)
    batches: list[Batch] = []
    end = len(longest_first)
    while end:
        batches.insert(0, _pad(longest_first[begin[end] : end]))
        end = begin[end]
    return batches


def step_batches(samples: Sequence[Sequence[int]], a_step: int, max_tokens: int) -> tuple[list[Batch], list[list[int]]]:
    """Samples as calls of ``max_tokens``, those of ``a_step`` together, and the numbers of the calls of each step."""
    batches, steps = list[Batch](), list[list[int]]()
    for first in range(0, len(samples), a_step):
        new = make_batches(samples[first : first + a_step], max_tokens)
        steps.append(list(range(len(batches), len(batches) + len(new))))
        batches += new
    return batches, steps


def groups(items: Sequence[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """``items`` in order, as many together as come to ``most`` by ``size``; one at the least."""
    group, held = list[Item](), 0
    for item in items:
        if group and held + size(item) > most:
            yield group
            group, held = [], 0
        group.append(item)
        held += size(item)
    if group:
        yield group


def one_in(lengths: Sequence[Sequence[int]], tokens: int | None) -> int:
    """One in how many tokens of samples of ``lengths``, batch by batch, comes to about ``tokens`` (None: all), and to
    one of each sample at the least."""
    if tokens is None:
        return 1
    return max(min(math.ceil(sum(map(sum, lengths)) / tokens), min(map(min, lengths))), 1)


def distributions_bytes(lengths: Sequence[Sequence[int]], vocabulary: int, every: int, itemsize: int) -> int:
    """Bytes of the logits of one in ``every`` token of samples of ``lengths``, batch by batch, of ``itemsize`` each."""
    return itemsize * vocabulary * sum(len(range(every // 2, length, every)) for batch in lengths for length in batch)


def logits_tokens(vocabulary: int, grain: int) -> int:
    """The tokens whose logits are made at once. ``grain``: of the device (Placement)."""
    return grain * max(LOGITS_BYTES // (4 * vocabulary), LOGITS_TOKENS)


def _pad(group: Sequence[Sequence[int]]) -> Batch:
    input_ids = torch.zeros(len(group), max(len(s) for s in group), dtype=torch.int64)
    for row, sample in enumerate(group):
        input_ids[row, : len(sample)] = torch.tensor(sample)
    return Batch(input_ids, tuple(len(s) for s in group))


def logits_bytes(vocabulary: int, grain: int) -> int:
    """Bytes of the logits that are made at once, in float32. ``grain``: of the device (Placement)."""
    return 4 * vocabulary * logits_tokens(vocabulary, grain)


def activation_bytes(shapes: Sequence[tuple[int, ...]], hidden_size: int, call: tuple[int, int], itemsize: int) -> int:
    """Six states of the model's width (residual, norm, query, key, value, attended) and four of the widest matrix
    (gate, up, their product, one temporary) for each token. Attention scores are never whole in memory."""
    widest = max((max(shape[-2:]) for shape in shapes if len(shape) > 1), default=hidden_size)
    return call[0] * call[1] * (6 * hidden_size + 4 * widest) * itemsize
