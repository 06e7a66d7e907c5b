"""Tensors that are not what a layout needs: packed weights, wrong shapes."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from streamcollapse.arch.stored import use_instead
from streamcollapse.errors import ModelError
from streamcollapse.storage.source import TensorSource

_ROWS_COMPARED = 64  # of two matrices that should be one
_PACKED = re.compile(r"\.(qweight|qzeros|g_idx|SCB|weight_packed|weight_scale|weight_scale_inv|absmax|quant_state.*)$")


def refuse_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise ModelError for tensor ``name``, whose shape is not the one that the config gives."""
    raise ModelError(
        f"tensor {name} has shape {list(found)}, the config gives {list(expected)}; "
        "config.json and weights do not belong together"
    )


def refuse_integers(name: str, source: TensorSource) -> None:
    """Raise ModelError if the weight ``name`` is stored in integers."""
    dtype = source.info(name).dtype
    if not dtype.is_floating_point:
        raise ModelError(_packed(name, dtype))


def refuse_packed(source: TensorSource) -> None:
    """Raise ModelError if a tensor's name or dtype says that it is quantised."""
    for name in source.names:
        dtype = source.info(name).dtype
        eight_bit = dtype.is_floating_point and dtype.itemsize == 1
        if eight_bit or _PACKED.search(name) or (dtype == torch.int8 and len(source.info(name).shape) > 1):
            raise ModelError(_packed(name, dtype))


def refuse_different_twins(names: Sequence[str], source: TensorSource) -> None:
    """Raise ModelError if matrices that the config says are one are stored apart and differ, in a few of their rows."""
    first = names[0]
    rows = torch.linspace(0, source.info(first).shape[0] - 1, _ROWS_COMPARED).round().long()
    for other in {*names} - {first}:
        pair = [source.read_rows(name, rows).view(torch.uint8) for name in (first, other)]
        if not torch.equal(*pair):
            raise ModelError(
                f"the config says that head and embedding are tied, but {first} and {other} "
                "differ; set tie_word_embeddings in config.json to false if the model has a head of its own"
            )


def _packed(name: str, dtype: torch.dtype) -> str:
    kind = str(dtype).removeprefix("torch.")
    return f"tensor {name} is packed or quantised ({kind}); {use_instead(kind)}"
