"""Entries of a config that speak of layers by their position, and what they become when layers go.

Lists with one entry per layer are found by their length. The other kinds cannot be told from other numbers, so they are
known by name; that nothing was overlooked is proved on the model that the edited config makes (likeness.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Lists that are never one entry per layer, however long they happen to be.
_NOT_PER_LAYER = {"architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id"}

# Numbers of layers, 0-based, that have something the others have not.
_NUMBERS = (
    "mlp_only_layers",
    "moe_layers",
    "cross_attention_layers",
    "hybrid_layer_ids",
    "ple_layer_ids",
    "full_attn_idxs",
)

# How many layers, from the lowest on, are of one kind; the rest are of another.
_LOWEST = ("first_k_dense_replace", "max_window_layers", "num_dense_layers", "moe_layer_start_index")


def per_layer(key: str, value: Any, num_layers: int) -> bool:
    """Whether ``value`` is a list with one entry for each layer."""
    known = key in _NOT_PER_LAYER or key in _NUMBERS
    return isinstance(value, list) and len(value) == num_layers and not known


def cut(entries: Mapping[str, Any], num_layers: int, bases: Sequence[int]) -> dict[str, Any]:
    """Those of ``entries``, a config of ``num_layers`` layers, that are others if only ``bases`` are left."""
    edited: dict[str, Any] = {k: [v[b] for b in bases] for k, v in entries.items() if per_layer(k, v, num_layers)}
    for key in _NUMBERS:
        value = entries.get(key)
        if isinstance(value, list) and value:
            edited[key] = [position for position, base in enumerate(bases) if base in value]
    for key in _LOWEST:
        value = entries.get(key)
        if type(value) is int and 0 < value < num_layers:
            edited[key] = sum(base < value for base in bases)
    return edited | _without_period(entries, bases)


def _without_period(entries: Mapping[str, Any], bases: Sequence[int]) -> dict[str, Any]:
    """Every n-th layer is sparse, but for those in a list: the list says it all, once layers have gone."""
    step, dense = entries.get("decoder_sparse_step"), entries.get("mlp_only_layers")
    if type(step) is not int or step < 2 or not isinstance(dense, list):
        return {}
    positions = [position for position, base in enumerate(bases) if base in dense or (base + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": positions}
