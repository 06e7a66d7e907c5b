"""Text that a model goes on with, streamed: every new token of all texts is one pass over the weights.

Prompts stand in packed rows, so what they begin with alike is computed and kept once. Keys and values of each layer are
in a scratch, in memory or in files, and layers are given them as a cache; whether their code takes that is found by
trial. Knows token ids, not tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from streamcollapse.arch.skeleton import LayerCall
from streamcollapse.errors import ModelError, is_of_device
from streamcollapse.forward.batches import MOST_CALL_TOKENS, make_batches
from streamcollapse.forward.by_position import CallsByPosition, MadeCalls, alone
from streamcollapse.forward.head import Head
from streamcollapse.forward.model import LayerWeights, StreamedModel
from streamcollapse.forward.packed import AGREE, PackedRow, pack, packed_entry
from streamcollapse.forward.walk import Passed, Stack, walk
from streamcollapse.merge.plan import PlanLayer
from streamcollapse.storage.scratch import Scratch

_TRIAL = ((0, 1, 2, 3, 4), (0, 1, 5))  # which tokens of those at hand, in two prompts


@dataclass(frozen=True)
class Wanted:
    """A ``prompt`` of token ids, to be gone on with by at most ``most`` tokens; fewer where ``goes_on``, given those so
    far, says no."""

    prompt: tuple[int, ...]
    most: int
    goes_on: Callable[[Sequence[int]], bool] = lambda found: True


class _Row:
    """The tokens of a packed row with all that was generated after its prompts, and what layers keep of them."""

    def __init__(
        self, model: StreamedModel, name: str, row: PackedRow, texts: dict[int, Wanted], scratch: Scratch
    ) -> None:
        self._name, self._scratch, self._device = name, scratch, model.placement.device
        self.paths = {number: list(columns) for number, columns in row.columns.items()}
        self._positions = list(row.positions)
        self._room = len(row.token_ids) + sum(texts[number].most for number in self.paths)
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        longest = max(len(texts[number].prompt) + texts[number].most for number in self.paths)
        self._calls = CallsByPosition.of(model, [row.token_ids[0]] * longest)
        self._queries = list(range(len(row.token_ids)))  # the columns that go up now
        self._attends = row.tree()

    @property
    def calls(self) -> Sequence[LayerCall]:
        """How layers are called for the tokens that go up now, each with what it keeps of those before."""
        return MadeCalls(len(self._calls), self.call)

    def call(self, base: int) -> LayerCall:
        """That of source layer ``base``."""
        positions = torch.tensor(self._positions, device=self._device)
        queries = positions[torch.tensor(self._queries, device=self._device)]
        return self._calls.at(base, queries, positions, self._attends.to(self._device), _Cache(self, base))

    def follow(self, numbers: Sequence[int]) -> None:
        """A token more of each of the texts with ``numbers`` goes up next."""
        first = len(self._positions)
        self._queries = [*range(first, first + len(numbers))]
        for column, number in zip(self._queries, numbers, strict=True):
            self._positions.append(len(self.paths[number]))
            self.paths[number].append(column)
        self._attends = torch.zeros(len(numbers), len(self._positions), dtype=torch.bool)
        for row, number in enumerate(numbers):
            self._attends[row, torch.tensor(self.paths[number])] = True

    def keep(self, base: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the tokens that go up now, [1, H, Q, size]; gives those of all tokens so far."""
        end, begin = len(self._positions), len(self._positions) - keys.shape[-2]
        if base not in self._kept:
            self._kept[base] = self._made(base, "keys", keys), self._made(base, "values", values)
        for kept, new in zip(self._kept[base], (keys, values), strict=True):
            kept[:, :, begin:end].copy_(new)
        found = tuple(kept[:, :, :end].to(keys.device) for kept in self._kept[base])
        for kept in self._kept[base]:
            self._scratch.page_out(kept)
        return found[0], found[1]

    @property
    def bytes_per_token(self) -> int | None:
        """Of all layers that have kept something; None where none has."""
        kept = [one for both in self._kept.values() for one in both]
        return sum(one.nbytes for one in kept) // self._room if kept else None

    def _made(self, base: int, what: str, like: torch.Tensor) -> torch.Tensor:
        shape = (*like.shape[:-2], self._room, like.shape[-1])
        return self._scratch.allocate(f"{what}-{self._name}-{base}", tuple(shape), like.dtype)


class _Cache:
    """What the code of a layer takes for a cache of keys and values: of one row, in that layer."""

    def __init__(self, row: _Row, base: int) -> None:
        self._row, self._base = row, base

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int = 0, *more: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the tokens at hand; gives those of all."""
        return self._row.keep(self._base, keys, values)


@dataclass(frozen=True)
class _Call:
    """What goes up together: what is ``entering`` layer 0 [N, T, D], how layers are called, and where the last token of
    each text is, by its number: row and column."""

    entering: torch.Tensor
    calls: Sequence[LayerCall]
    places: dict[int, tuple[int, int]]


class _Kept:
    """Texts whose keys and values are kept: the prompts first, then a token of each at a time."""

    def __init__(self, model: StreamedModel, texts: Sequence[Wanted], most_tokens: int, scratch: Scratch) -> None:
        self._model, self._texts = model, texts
        self._prompts = [text.prompt for text in texts]
        self._packed = pack(self._prompts, most_tokens)
        by_number = dict(enumerate(texts))
        self._rows = [_Row(model, f"{n}", row, by_number, scratch) for n, row in enumerate(self._packed)]
        self._has_begun = False

    def calls(self, going: Sequence[int], found: Sequence[Sequence[int]]) -> Iterator[_Call]:
        """For the texts with the numbers ``going``, after what was ``found`` of each."""
        for packed, row in zip(self._packed, self._rows, strict=True):
            if not self._has_begun:
                entering = packed_entry(self._model, packed, self._prompts)[0]
                yield _Call(entering, row.calls, {number: (0, path[-1]) for number, path in row.paths.items()})
            elif on := [number for number in row.paths if number in going]:
                row.follow(on)
                entering = _last(self._model, [(*self._prompts[number], *found[number]) for number in on])
                yield _Call(entering, row.calls, {number: (0, column) for column, number in enumerate(on)})
        self._has_begun = True


class _Whole:
    """Texts that go up whole for every token, where nothing can be kept of them."""

    def __init__(self, model: StreamedModel, texts: Sequence[Wanted], most_tokens: int) -> None:
        self._model, self._texts, self._most = model, texts, most_tokens

    def calls(self, going: Sequence[int], found: Sequence[Sequence[int]]) -> Iterator[_Call]:
        """For the texts with the numbers ``going``, after what was ``found`` of each."""
        so_far = {number: (*self._texts[number].prompt, *found[number]) for number in going}
        order = iter(sorted(going, key=lambda number: -len(so_far[number])))  # as batches have them
        for batch in make_batches([so_far[n] for n in sorted(going, key=lambda n: -len(so_far[n]))], self._most):
            recording = self._model.record([batch])[0]
            places = {next(order): (row, length - 1) for row, length in enumerate(batch.lengths)}
            yield _Call(recording.hidden_NTD, recording.calls, places)


@torch.inference_mode()
def streamed_generation(
    model: StreamedModel,
    stack: tuple[Sequence[PlanLayer], bool],
    texts: Sequence[Wanted],
    vocabulary: int,
    sizes: tuple[int, Scratch | None],
    done: Callable[[int, list[int]], None] = lambda number, found: None,
) -> list[list[int]]:
    """What the model of ``stack`` (layers of the source, and whether norms are mixed) goes on with after each of
    ``texts``, always the most probable token. ``sizes``: how many tokens of prompts a row has, and where keys and
    values are kept; None where layers take no cache, so that texts go up whole for every token. ``done`` is told of
    each text that has come to its end."""
    (layers, norms), (most_tokens, scratch) = stack, sizes
    kind = _Whole(model, texts, most_tokens) if scratch is None else _Kept(model, texts, most_tokens, scratch)
    found: list[list[int]] = [[] for _ in texts]
    going, head = [*range(len(texts))], None
    while going:
        calls = list(kind.calls(going, found))
        entering, places = [call.entering for call in calls], [call.places for call in calls]
        head = head or Head(model, model.head(layers[-1].refits), vocabulary, entering[0][0, :1])
        tops = _passed(model, Stack(tuple(layers), 0), norms, entering, [call.calls for call in calls])
        for top, its in zip(tops, places, strict=True):
            rows, columns = (torch.tensor(one, device=top.device) for one in zip(*its.values(), strict=True))
            for number, word in zip(its, head.most_probable(top[rows, columns]).tolist(), strict=True):
                found[number].append(word)
        on = [n for n in going if len(found[n]) < texts[n].most and texts[n].goes_on(found[n])]
        for number in going:
            if number not in on:
                done(number, found[number])
        going = on
    return found


def _passed(
    model: StreamedModel,
    stack: Stack,
    merge_norms: bool,
    entering: list[torch.Tensor],
    calls: Sequence[Sequence[LayerCall]],
) -> list[torch.Tensor]:
    """What leaves the top of ``stack``, row by row."""
    tops = list[torch.Tensor]()

    def watch(passed: Passed) -> None:
        if passed.step.finished:
            tops.extend(passed.hidden)

    walk(model, [stack], lambda boundary: entering, calls, watch, merge_norms)
    return tops


def _last(model: StreamedModel, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """What enters layer 0 for the last token of each of ``texts``. [1, texts, D]"""
    order = sorted(range(len(texts)), key=lambda n: -len(texts[n]))  # as batches have them
    found: dict[int, torch.Tensor] = {}
    numbers = iter(order)
    for batch in make_batches([texts[n] for n in order], MOST_CALL_TOKENS):
        hidden = model.record([batch])[0].hidden_NTD
        for row, length in enumerate(batch.lengths):
            found[next(numbers)] = hidden[row, length - 1]
    return torch.stack([found[n] for n in range(len(texts))]).unsqueeze(0)


def kept_bytes(model: StreamedModel, base: int, weights: LayerWeights, token_ids: Sequence[int]) -> int | None:
    """Bytes of keys and values of a token that source layer ``base``, with ``weights``, keeps; None where it does not
    give for tokens that follow what it kept what it gives for them in whole sequences. Tried with six ``token_ids``."""
    whole = [tuple(token_ids[n] for n in some) for some in _TRIAL]
    texts = {number: Wanted(text[:-1], 1) for number, text in enumerate(whole)}
    prompts = [texts[number].prompt for number in texts]
    (packed,) = pack(prompts, 1 << 10)
    try:
        row = _Row(model, "trial", packed, texts, Scratch(model.placement.device))
        model.run(base, weights, packed_entry(model, packed, prompts)[0], row.call(base))
        row.follow([*texts])
        found = model.run(base, weights, _last(model, whole), row.call(base))[0]
        wanted = [_alone(model, base, weights, text) for text in whole]
    except (ModelError, RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if is_of_device(error):
            raise
        return None
    allowed = AGREE[model.placement.dtype] * max(float(one.abs().max()) for one in wanted)
    agree = all(bool((ours - one).abs().max() <= allowed) for ours, one in zip(found, wanted, strict=True))
    return row.bytes_per_token if agree else None


def _alone(model: StreamedModel, base: int, weights: LayerWeights, text: Sequence[int]) -> torch.Tensor:
    one = model.record([alone(text)])[0]
    return model.run(base, weights, one.hidden_NTD, one.calls[base])[0, -1]
