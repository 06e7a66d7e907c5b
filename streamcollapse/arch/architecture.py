"""A checkpoint understood as a decoder: config, skeleton and layout together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from streamcollapse.arch.config import ModelConfig, as_pruned, load_config
from streamcollapse.arch.layout import Layout, build_layout
from streamcollapse.arch.naming import Assembly
from streamcollapse.arch.skeleton import Skeleton, build_skeleton
from streamcollapse.arch.survey import Survey
from streamcollapse.errors import ModelError
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.index import CONFIG_FILE

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MOST_EXPERTS = 1 << 16


@dataclass(frozen=True)
class Architecture:
    """What the code needs to know of a model to run and cut it."""

    config: ModelConfig
    skeleton: Skeleton
    layout: Layout
    weights_dtype: torch.dtype

    @property
    def embedding_names(self) -> set[str]:
        """The names on disk of the input embedding, and of a head that is the same tensor."""
        embedding = self.skeleton.model.get_input_embeddings().weight
        named = self.skeleton.model.named_parameters(remove_duplicate=False)
        return {self.layout.stored[name] for name, parameter in named if parameter is embedding}

    @property
    def survey(self) -> Survey:
        """The model in figures."""
        config, layout, model = self.config, self.layout, self.skeleton.model
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        return Survey(
            family=config.family,
            model_type=str(config.raw.get("model_type")),
            layers=[layout.layer_names(i) for i in range(layout.num_layers)],
            outside=layout.outside,
            tied_head=layout.tied_head,
            hidden_size=int(config.text.hidden_size),
            vocabulary=int(embedding.shape[0]),
            embedding=int(embedding.numel()),
            head=0 if head is None else int(head.weight.numel()),
            fused=max(map(_fused, layout.assemblies)),
        )


def load_architecture(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Architecture:
    """Config, skeleton and layout of ``checkpoint``; reads headers only. Raises ModelError, CheckpointError."""
    config = load_config(checkpoint.directory, trust_remote_code)
    _check_counts(config, checkpoint)
    dtype = checkpoint.weights_dtype
    skeleton = build_skeleton(config, dtype, trust_remote_code)
    return Architecture(config, skeleton, build_layout(skeleton, checkpoint), dtype)


def _fused(assemblies: Sequence[Assembly]) -> int:
    made = [math.prod(shape) for each in assemblies if each.rules for shape in each.shapes.values()]
    return sum(made) + max(made, default=0)


def _check_counts(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise ModelError for counts that no such checkpoint can have, which would take minutes and gigabytes to build."""
    text = config.text
    limits = {"num_hidden_layers": (len(checkpoint.names), f"the checkpoint has {len(checkpoint.names)} tensors")}
    limits |= dict.fromkeys(_EXPERT_COUNTS, (_MOST_EXPERTS, f"at most {_MOST_EXPERTS} can be"))
    for key, (most, why) in limits.items():
        count = getattr(text, key, None)
        if isinstance(count, int) and count > most:
            where = checkpoint.directory / CONFIG_FILE
            raise ModelError(f"{where}: {key} is {count}, but {why}; restore the checkpoint's config.json")


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
