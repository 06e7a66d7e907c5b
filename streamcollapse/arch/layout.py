"""Tensor names on disk <-> decoder layers: which tensors a layer has and how each of them may be merged."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from streamcollapse.arch.skeleton import Skeleton
from streamcollapse.errors import ModelError, printable
from streamcollapse.storage.source import TensorSource

_PACKED = re.compile(r"\.(qweight|qzeros|g_idx|SCB|weight_packed|weight_scale|weight_scale_inv|absmax|quant_state.*)$")


@dataclass(frozen=True)
class Layout:
    """Where the decoder layers lie among the names of a checkpoint.

    ``stack`` is the prefix on disk (``model.layers``); ``layers[i]`` the suffixes of source layer i (0-based);
    ``outside`` every other name on disk. ``norms`` are suffixes of normalisation weights; ``unmerged`` suffixes
    of stored tensors that are not learned (masks, frequencies): both are taken from a layer's base.
    ``stored`` maps each parameter and stored buffer of the skeleton outside the stack to its name on disk.
    """

    stack: str
    layers: tuple[tuple[str, ...], ...]
    outside: tuple[str, ...]
    norms: frozenset[str]
    unmerged: frozenset[str]
    stored: Mapping[str, str]
    tied_head: bool

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def name(self, layer_index: int, suffix: str) -> str:
        """The name on disk of a tensor of a 0-based layer."""
        return f"{self.stack}.{layer_index}.{suffix}"

    def layer_names(self, layer_index: int) -> list[str]:
        """Every name on disk of a 0-based source layer."""
        return [self.name(layer_index, suffix) for suffix in self.layers[layer_index]]


def build_layout(skeleton: Skeleton, source: TensorSource) -> Layout:
    """Match the names of ``source`` with the modules of ``skeleton``.

    Raises ModelError when a parameter has no tensor, a layer is one too many, or a weight is packed.
    """
    names = source.names
    _refuse_packed(source)
    prefix = _disk_prefix(skeleton, names)
    stack = skeleton.layers_path.removeprefix(prefix)
    pattern = re.compile(re.escape(stack) + r"\.(0|[1-9][0-9]{0,8})\.(.+)")
    num_layers = len(skeleton.layers)
    suffixes: list[list[str]] = [[] for _ in range(num_layers)]
    outside: list[str] = []
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            outside.append(name)
        elif int(match[1]) < num_layers:
            suffixes[int(match[1])].append(match[2])
        else:
            raise ModelError(
                f"tensor {printable(name)} belongs to a layer beyond the {num_layers} that the config gives"
            )
    norms: set[str] = set()
    unmerged: set[str] = set()
    unlike: Counter[str] = Counter()
    for index, layer in enumerate(skeleton.layers):
        parameters = dict(layer.named_parameters())
        expected = [*parameters, *_stored_buffers(layer)]
        for suffix in expected:
            if suffix not in suffixes[index]:
                raise ModelError(
                    f"tensor {stack}.{index}.{suffix} is missing; "
                    f"the checkpoint's names do not match {type(skeleton.model).__name__}"
                )
            name = f"{stack}.{index}.{suffix}"
            if suffix in parameters:
                _refuse_integers(name, source)
                unlike[suffix] += source.info(name).shape != tuple(parameters[suffix].shape)
        unmerged.update(suffix for suffix in suffixes[index] if suffix not in parameters)
        norms.update(suffix for suffix in parameters if _is_norm(layer, suffix))
    for suffix, count in unlike.items():
        if count == num_layers:  # a single odd layer is one that merges pass over; all of them are a wrong config
            expected_shape = tuple(skeleton.layers[0].get_parameter(suffix).shape)
            _refuse_shape(f"{stack}.0.{suffix}", source.info(f"{stack}.0.{suffix}").shape, expected_shape)
    stored, tied_head = _outside_names(skeleton, set(outside), prefix, source)
    return Layout(
        stack, tuple(map(tuple, suffixes)), tuple(outside), frozenset(norms), frozenset(unmerged), stored, tied_head
    )


def _disk_prefix(skeleton: Skeleton, names: Sequence[str]) -> str:
    """The leading part of the skeleton's names that the names on disk lack: some families store the bare decoder."""
    first = f"{skeleton.layers_path}.0."
    for prefix in ("", f"{skeleton.model.base_model_prefix}."):
        if any(name.startswith(first.removeprefix(prefix)) for name in names):
            return prefix
    raise ModelError(
        f"no tensor is named {first}…; the checkpoint's names do not match {type(skeleton.model).__name__}"
    )


def _is_norm(layer: torch.nn.Module, suffix: str) -> bool:
    owner = layer.get_submodule(suffix.rpartition(".")[0])
    return "norm" in type(owner).__name__.lower()


def _stored_buffers(module: torch.nn.Module) -> list[str]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return [name for name in module.state_dict(keep_vars=True) if name not in parameters]


def _outside_names(
    skeleton: Skeleton, disk: set[str], prefix: str, source: TensorSource
) -> tuple[dict[str, str], bool]:
    """Skeleton name -> disk name for everything outside the stack, and whether the head shares the embedding."""
    inside = f"{skeleton.layers_path}."
    parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
    stored = {name: name.removeprefix(prefix) for name in [*parameters, *_stored_buffers(skeleton.model)]}
    stored = {name: on_disk for name, on_disk in stored.items() if not name.startswith(inside)}
    tied_head = False
    for name, on_disk in list(stored.items()):
        if on_disk in disk:
            continue
        twin = next((t for t in stored if parameters.get(t) is parameters.get(name) and stored[t] in disk), None)
        if name not in parameters or twin is None:
            raise ModelError(
                f"tensor {on_disk} is missing; the checkpoint's names do not match {type(skeleton.model).__name__}"
            )
        stored[name] = stored[twin]
    _check_shapes(skeleton, stored, source)
    head, embedding = skeleton.model.get_output_embeddings(), skeleton.model.get_input_embeddings()
    if head is not None and embedding is not None:
        tied_head = getattr(head, "weight", None) is getattr(embedding, "weight", None)
    return stored, tied_head


def _check_shapes(skeleton: Skeleton, stored: Mapping[str, str], source: TensorSource) -> None:
    expected = skeleton.model.state_dict(keep_vars=True)
    for name, on_disk in stored.items():
        if expected[name].dtype.is_floating_point:
            _refuse_integers(on_disk, source)
        if source.info(on_disk).shape != tuple(expected[name].shape):
            _refuse_shape(on_disk, source.info(on_disk).shape, tuple(expected[name].shape))


def _refuse_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    raise ModelError(
        f"tensor {printable(name)} has shape {list(found)}, the config gives {list(expected)}; "
        "config.json and weights do not belong together"
    )


def _refuse_integers(name: str, source: TensorSource) -> None:
    dtype = source.info(name).dtype
    if not dtype.is_floating_point:
        raise ModelError(_packed(name, dtype))


def _packed(name: str, dtype: torch.dtype) -> str:
    kind = str(dtype).removeprefix("torch.")
    return (
        f"tensor {printable(name)} is packed or quantised ({kind}); prune the original weights and quantise the result"
    )


def _refuse_packed(source: TensorSource) -> None:
    for name in source.names:
        dtype = source.info(name).dtype
        eight_bit = dtype.is_floating_point and dtype.itemsize == 1
        if eight_bit or _PACKED.search(name) or (dtype == torch.int8 and len(source.info(name).shape) > 1):
            raise ModelError(_packed(name, dtype))
