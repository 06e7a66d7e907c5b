"""Whether each layer of a pruned model is built like the source layer that it is made of.

The kind of a layer (its attention, dense or sparse, constants that follow from its depth) comes from the config and
from its position. A pruned config that lost one of them would load, and compute something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from streamcollapse.arch.architecture import Architecture
from streamcollapse.arch.config import as_pruned
from streamcollapse.arch.skeleton import Skeleton, build_skeleton
from streamcollapse.errors import ModelError

_Traits = dict[str, Any]


def check_likeness(source: Skeleton, pruned: Skeleton, bases: Sequence[int]) -> None:
    """Raise ModelError unless layer i of ``pruned`` is like layer ``bases[i]`` (0-based) of ``source``.

    Compared are the classes of all modules and their plain attributes, but for those that are the layer's own number.
    """
    for position, (layer, base) in enumerate(zip(pruned.layers, bases, strict=True)):
        ours, theirs = _traits(layer), _traits(source.layers[base])
        for name in sorted({*ours, *theirs}):
            found, wanted = ours.get(name), theirs.get(name)
            if found != wanted and (found, wanted) != (position, base):
                raise ModelError(
                    f"layer {position} of the pruned model would not be like layer {base} of the source: "
                    f"{name} is {found}, not {wanted}; the kind of a layer follows from its "
                    "position in this architecture, and its config cannot say otherwise: not supported"
                )


def check_prunable(source: Architecture, bases: Sequence[int], trust_remote_code: bool) -> None:
    """``check_likeness`` for the model of the config that is left with ``bases``, before there is one."""
    config = as_pruned(source.config, bases)
    check_likeness(source.skeleton, build_skeleton(config, source.weights_dtype, trust_remote_code), bases)


def _traits(layer: nn.Module) -> _Traits:
    traits: _Traits = {}
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        traits[f"{prefix}__class__"] = type(module).__name__
        for name, value in vars(module).items():
            if not name.startswith("_") and isinstance(value, bool | int | float | str):
                traits[prefix + name] = value
    return traits
