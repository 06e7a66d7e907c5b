"""Several stacks of one source in one walk, each judged by what leaves its top layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from streamcollapse.arch.skeleton import LayerCall
from streamcollapse.forward.head import Head
from streamcollapse.forward.model import StreamedModel, Weights
from streamcollapse.forward.walk import Passed, Stack, walk
from streamcollapse.merge.plan import PlanLayer
from streamcollapse.storage.source import check_finite, is_finite

States = Sequence[torch.Tensor]  # hidden states [N, T, D], for each batch
_Refits = tuple[tuple[str, str], ...]  # by name, what was fitted anew after a stack


class Heads:
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


def walks_of(stacks: Sequence[Sequence[PlanLayer]], merge_norms: Sequence[bool]) -> list[tuple[bool, list[int]]]:
    """The walks that are needed: how norms are treated in each, and the numbers of its stacks. One whose layers are
    the source's own goes with either."""
    plain = [all(layer.untouched for layer in layers) for layers in stacks]
    mixed = {norms for norms, is_plain in zip(merge_norms, plain, strict=True) if not is_plain}
    usual = min(mixed, default=False)
    ways = [usual if is_plain else norms for norms, is_plain in zip(merge_norms, plain, strict=True)]
    return [(way, [n for n, own in enumerate(ways) if own is way]) for way in sorted(set(ways))]


def climb(
    model: StreamedModel,
    stacks: Sequence[Stack],
    merge_norms: bool,
    text: tuple[list[torch.Tensor], Sequence[Sequence[LayerCall]]],
    score: Callable[[Sequence[int], States], None],
) -> None:
    """One walk: ``score`` is given the numbers of stacks and what leaves their top layer, [N, T, D] per batch.
    ``text``: what enters layer 0, which is let go of on the way, and how layers are called, by batch. Raises
    NonFiniteError where a weight is not finite."""
    entering, calls = text
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
