"""Tensor names on disk <-> decoder layers: which tensors a layer has and how each of them may be merged."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from streamcollapse.arch.naming import Assembly, Destination, Naming, assemblies_of
from streamcollapse.arch.skeleton import Skeleton
from streamcollapse.arch.stored import refuse_different_twins, refuse_integers, refuse_packed, refuse_shape
from streamcollapse.errors import ModelError
from streamcollapse.storage.source import TensorSource


@dataclass(frozen=True)
class Layout:
    """Where the decoder layers lie among the names of a checkpoint.

    ``stack`` is the prefix on disk (``model.layers``); ``layers[i]`` the suffixes of source layer i (0-based);
    ``outside`` every other name on disk that goes into the output. ``norms`` are suffixes of normalisation weights;
    ``unmerged`` suffixes of stored tensors that are not learned (masks, frequencies): both are taken from a layer's
    base. ``assemblies[i]`` say how the stored tensors of layer i become the parameters of its module. ``stored`` maps
    each parameter and stored buffer of the skeleton outside the stack to its name on disk.
    """

    stack: str
    layers: tuple[tuple[str, ...], ...]
    outside: tuple[str, ...]
    norms: frozenset[str]
    unmerged: frozenset[str]
    assemblies: tuple[tuple[Assembly, ...], ...]
    stored: Mapping[str, str]
    tied_head: bool

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def name(self, layer_index: int, suffix: str) -> str:
        """The name on disk of a tensor of a 0-based layer; after a slash, that of one outside the stack."""
        return suffix[1:] if suffix.startswith("/") else f"{self.stack}.{layer_index}.{suffix}"

    def layer_names(self, layer_index: int) -> list[str]:
        """Every name on disk of a 0-based source layer."""
        return [self.name(layer_index, suffix) for suffix in self.layers[layer_index]]

    def stored_whole(self, layer_index: int) -> dict[str, str]:
        """The learned parameters of a 0-based source layer that are one stored tensor each, as it is: its suffix by the
        parameter's name. What is made anew of them can be written back."""
        single = (one for one in self.assemblies[layer_index] if one.naming is None and len(one.shapes) == 1)
        return {next(iter(one.shapes)): one.parts[0] for one in single if one.parts[0] not in self.unmerged}


def build_layout(skeleton: Skeleton, source: TensorSource) -> Layout:
    """Match the names of ``source`` with the modules of ``skeleton``.

    Raises ModelError when a parameter has no tensor, a layer is one too many, or a weight is packed.
    """
    refuse_packed(source)
    naming = Naming(skeleton.model)
    targets = {name: naming.target(name) for name in source.names}
    stack = _disk_stack(skeleton, targets)
    suffixes, outside = _sorted_out(stack, len(skeleton.layers), naming, source.names)
    norms: set[str] = set()
    unmerged: set[str] = set()
    unlike: Counter[str] = Counter()
    built: list[tuple[Assembly, ...]] = []
    for index, layer in enumerate(skeleton.layers):
        inside = f"{skeleton.layers_path}.{index}."
        placed = {s: t for s in suffixes[index] if (t := _within(inside, targets[f"{stack}.{index}.{s}"]))}
        parameters = dict(layer.named_parameters())
        for suffix, target in placed.items():
            if target.name in parameters:
                refuse_integers(f"{stack}.{index}.{suffix}", source)
        infos = {suffix: source.info(f"{stack}.{index}.{suffix}") for suffix in placed}
        assemblies = assemblies_of(naming, inside, placed, infos)
        made = {name: shape for assembly in assemblies for name, shape in assembly.shapes.items()}
        for name in [*parameters, *stored_buffers(layer)]:
            if name not in made:
                raise ModelError(
                    f"tensor {stack}.{index}.{name} is missing; "
                    f"the checkpoint's names do not match {type(skeleton.model).__name__}"
                )
            unlike[name] += name in parameters and made[name] != tuple(parameters[name].shape)
        for assembly in assemblies:
            learned = [name for name in assembly.shapes if name in parameters]
            unmerged.update(() if learned else assembly.parts)
            norms.update(assembly.parts if any(_is_norm(layer, name) for name in learned) else ())
        unmerged.update(suffix for suffix in suffixes[index] if suffix not in placed)
        built.append(assemblies)
    _refuse_unlike(skeleton, stack, unlike, built[0])
    stored, tied_head = _outside_names(skeleton, {name: targets[name] for name in outside}, source)
    layers = tuple(map(tuple, suffixes))
    return Layout(stack, layers, tuple(outside), frozenset(norms), frozenset(unmerged), tuple(built), stored, tied_head)


def _disk_stack(skeleton: Skeleton, targets: Mapping[str, Destination | None]) -> str:
    """What the names of the decoder layers begin with on disk, before the number of the layer."""
    inside = re.compile(re.escape(skeleton.layers_path) + r"\.(\d+)\.")
    stacks: dict[str, str] = {}
    for name, target in targets.items():
        match = inside.match(target.name) if target else None
        if match is not None:
            stacks.setdefault(name.partition(f".{match[1]}.")[0], name)
    if not stacks:
        raise ModelError(
            f"no tensor is named {skeleton.layers_path}.0.…; the checkpoint's names do not match "
            f"{type(skeleton.model).__name__}"
        )
    if len(stacks) > 1:
        first, second, *_ = stacks.values()
        raise ModelError(f"the decoder layers are stored under several names ({first}, {second}); not supported")
    return next(iter(stacks))


def _sorted_out(stack: str, num_layers: int, naming: Naming, names: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """The suffixes of each layer, and the names outside the stack.

    Layers above the stack are left out where the model does not load them either (heads for several tokens at once,
    which speak of the layer below them). Raises ModelError where it would.
    """
    pattern = re.compile(re.escape(stack) + r"\.(0|[1-9][0-9]{0,8})\.(.+)")
    suffixes: list[list[str]] = [[] for _ in range(num_layers)]
    outside: list[str] = []
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            outside.append(name)
        elif int(match[1]) < num_layers:
            suffixes[int(match[1])].append(match[2])
        elif not naming.ignores(name):
            raise ModelError(f"tensor {name} belongs to a layer beyond the {num_layers} that the config gives")
    return suffixes, outside


def _within(inside: str, target: Destination | None) -> Destination | None:
    """``target`` relative to the layer whose names begin with ``inside``; None where it is none of its own."""
    if target is None or not target.name.startswith(inside):
        return None
    return Destination(target.name.removeprefix(inside), target.rule)


def _refuse_unlike(skeleton: Skeleton, stack: str, unlike: Counter[str], first: Sequence[Assembly]) -> None:
    """A single odd layer is one that merges pass over; all of them are a wrong config."""
    for name, count in unlike.items():
        if count == len(skeleton.layers):
            found = next(assembly.shapes[name] for assembly in first if name in assembly.shapes)
            refuse_shape(f"{stack}.0.{name}", found, tuple(skeleton.layers[0].get_parameter(name).shape))


def _is_norm(layer: torch.nn.Module, name: str) -> bool:
    owner = layer.get_submodule(name.rpartition(".")[0])
    return "norm" in type(owner).__name__.lower()


def stored_buffers(module: torch.nn.Module) -> list[str]:
    """The buffers of ``module`` that a checkpoint holds."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return [name for name in module.state_dict(keep_vars=True) if name not in parameters]


def _outside_names(
    skeleton: Skeleton, targets: Mapping[str, Destination | None], source: TensorSource
) -> tuple[dict[str, str], bool]:
    """Skeleton name -> disk name for everything outside the stack, and whether the head shares the embedding."""
    inside = f"{skeleton.layers_path}."
    parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
    on_disk: dict[str, str] = {}
    for name, target in targets.items():
        if target is not None and target.rule is not None:
            raise ModelError(f"tensor {name}, outside the decoder layers, needs a conversion; not supported")
        if target is not None:
            on_disk[target.name] = name
    stored: dict[str, str] = {}
    for name in [*parameters, *stored_buffers(skeleton.model)]:
        if name.startswith(inside):
            continue
        twins = (twin for twin in on_disk if parameters.get(twin) is parameters.get(name))
        twin = name if name in on_disk else next(twins, None) if name in parameters else None
        if twin is None:
            raise ModelError(
                f"tensor {name} is missing; the checkpoint's names do not match {type(skeleton.model).__name__}"
            )
        stored[name] = on_disk[twin]
    _check_shapes(skeleton, stored, source)
    head, embedding = skeleton.model.get_output_embeddings(), skeleton.model.get_input_embeddings()
    tied_head = (
        head is not None and embedding is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)
    )
    if tied_head:
        shared = [stored[name] for name, parameter in parameters.items() if parameter is embedding.weight]
        refuse_different_twins(shared, source)
    return stored, tied_head


def _check_shapes(skeleton: Skeleton, stored: Mapping[str, str], source: TensorSource) -> None:
    expected = skeleton.model.state_dict(keep_vars=True)
    for name, on_disk in stored.items():
        if expected[name].dtype.is_floating_point:
            refuse_integers(on_disk, source)
        if source.info(on_disk).shape != tuple(expected[name].shape):
            refuse_shape(on_disk, source.info(on_disk).shape, tuple(expected[name].shape))
