"""How a layer is called for tokens at any positions, in one row: from how the model calls it for one long sequence.

All that the arguments say of a position goes to the tokens that have it; which tokens each attends to is the caller's,
within what the model's own mask lets a token at its position see of one at another (a window, say).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import nn

from streamcollapse.arch.skeleton import LayerCall
from streamcollapse.forward.batches import Batch
from streamcollapse.forward.model import StreamedModel

# The names of arguments of layers, which the families agree on.
_MASK = ("attention_mask",)
_CACHE = ("past_key_values", "layer_past", "past_key_value")
_OF_KEYS = ("alibi", "position_bias")  # what these say of a position is about what is attended to


def alone(token_ids: Sequence[int]) -> Batch:
    """A batch of one sequence."""
    return Batch(torch.tensor([list(token_ids)]), (len(token_ids),))


class MadeCalls(Sequence[LayerCall]):
    """The arguments of each of ``count`` layers, made by ``make`` when they are asked for: masks grow with the square
    of a row."""

    def __init__(self, count: int, make: Callable[[int], LayerCall]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, base: int) -> LayerCall: ...
    @overload
    def __getitem__(self, base: slice) -> Sequence[LayerCall]: ...
    def __getitem__(self, base: int | slice) -> LayerCall | Sequence[LayerCall]:
        if isinstance(base, slice):
            return [self[n] for n in range(*base.indices(len(self)))]
        return self._make(base)


@dataclass(frozen=True)
class CallsByPosition:
    """``longer`` are the arguments of each layer for a sequence, ``shorter`` those for it without its last token: what
    differs in shape goes by position. ``places``: where the mask of each is, and a cache of keys and values, if layers
    take one."""

    longer: Sequence[LayerCall]
    shorter: Sequence[LayerCall]
    masks: Sequence[int | str]
    caches: Sequence[int | str | None]
    device: torch.device

    @classmethod
    def of(cls, model: StreamedModel, token_ids: Sequence[int]) -> CallsByPosition:
        """For positions up to those of ``token_ids``. Raises ValueError where layers take no mask."""
        ids = list(token_ids)
        pair = (ids, ids[:-1]) if len(ids) > 1 else (ids * 2, ids)
        longer, shorter = (model.record([alone(some)])[0].calls for some in pair)
        modules = [model.module(base) for base in range(len(longer))]
        masks = [_place(module, call, _MASK) for module, call in zip(modules, longer, strict=True)]
        caches = [_place(module, call, _CACHE) for module, call in zip(modules, longer, strict=True)]
        known = [mask for mask in masks if mask is not None]
        if len(known) < len(masks):
            raise ValueError("layers take no mask")
        return cls(longer, shorter, known, caches, model.placement.device)

    def __len__(self) -> int:
        return len(self.longer)

    def at(
        self, base: int, queries_Q: torch.Tensor, keys_K: torch.Tensor, attends_QK: torch.Tensor, cache: Any = None
    ) -> LayerCall:
        """The arguments of source layer ``base`` for tokens at positions ``queries_Q``, which attend to those at
        ``keys_K`` that ``attends_QK`` says. ``cache`` has the keys and values of those that are not in the row."""
        call, other = self.longer[base], self.shorter[base]
        to = queries_Q, keys_K
        args = [_at(one, two, to) for one, two in zip(call.args, other.args, strict=True)]
        kwargs = {
            name: _at(value, other.kwargs[name], to[1:] * 2 if name in _OF_KEYS else to)
            for name, value in call.kwargs.items()
        }
        both: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        place = self.masks[base]
        whole: dict[Any, Any] = {**dict(enumerate(call.args)), **call.kwargs}
        own = whole[place]
        # the first token attends to itself: where that is False, True hides
        hides = own is not None and own.dtype == torch.bool and not bool(own.flatten()[0])
        both[place] = _mask(both[place], attends_QK, hides)
        if cache is not None and self.caches[base] is not None:
            both[self.caches[base]] = cache
        args = [both.pop(number) for number in range(len(args))]
        return LayerCall(tuple(args), both, call.hidden_by_name)


def _at(value: Any, shorter: Any, to: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """What ``value`` says of each position, as far as it goes by position: of the first of ``to``, and in a second
    dimension of the second."""
    if isinstance(value, torch.Tensor):
        dims = [dim for dim, size in enumerate(value.shape) if size != shorter.shape[dim]]
        for dim, positions in zip(dims, to, strict=False):
            value = value.index_select(dim, positions)
        return value
    if isinstance(value, tuple | list):
        return type(value)(_at(one, other, to) for one, other in zip(value, shorter, strict=True))
    if isinstance(value, dict):
        return {name: _at(one, shorter[name], to) for name, one in value.items()}
    return value


def _mask(known: torch.Tensor | None, attends_QK: torch.Tensor, hides: bool) -> torch.Tensor:
    """``known``, a model's own mask, where True may hide, for tokens that attend as they should. [1, 1, Q, K]"""
    attends = attends_QK[None, None]
    if known is None:
        return attends
    if known.dtype != torch.bool:
        return torch.where(attends, known, torch.finfo(known.dtype).min)
    return known | ~attends if hides else known & attends


def _place(layer: nn.Module, call: LayerCall, names: Sequence[str]) -> int | str | None:
    """Where the ``call`` of ``layer`` has the argument with one of ``names``: its number or its name."""
    for name in names:
        if name in call.kwargs:
            return name
    parameters = [name for name in inspect.signature(type(layer).forward).parameters if name != "self"]
    for name in names:
        place = parameters.index(name) - (0 if call.hidden_by_name else 1) if name in parameters else -1
        if 0 <= place < len(call.args):
            return place
        if name in parameters:
            return name
    return None
