"""Calls of a module with tensors in the place of its parameters.

As torch.func.functional_call, which goes through all modules of a model for every call: for the logits of a part of a
vocabulary that is a large share of the time (docs/decisions/0005-forward-pass.md). Here it is found once where each
tensor belongs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_Place = tuple[dict[str, Any], str]  # of a module: its parameters or buffers, and the name of one there


class Substitute:
    """``module`` with other tensors. Parameters that are one (tied) get what any of their names is given."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._places: dict[str, list[_Place]] = {}
        tied = defaultdict[int, list[_Place]](list)
        for path, owner in module.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    places = tied[id(parameter)]
                    places.append((owner._parameters, name))
                    self._places[prefix + name] = places
            self._places |= {prefix + name: [(owner._buffers, name)] for name in owner._buffers}

    @contextmanager
    def holding(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[nn.Module]:
        """The module while the body runs, with ``tensors`` by the names of parameters and buffers. Raises KeyError for
        a name that it has not."""
        before = [(at, name, at[name]) for given in tensors for at, name in self._places[given]]
        try:
            for given, tensor in tensors.items():
                for at, name in self._places[given]:
                    at[name] = tensor
            yield self.module
        finally:
            for at, name, original in before:
                at[name] = original
