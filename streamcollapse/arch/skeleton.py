"""The model's own code without its weights: built from the config, parameters on the meta device, buffers real.

No table of architectures: the decoder stack is the ModuleList of ``num_hidden_layers``.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from streamcollapse.arch.config import THEIR_ERRORS, ModelConfig, first_line
from streamcollapse.errors import ModelError


@dataclass(frozen=True)
class Skeleton:
    """``model`` predicts tokens, ``decoder`` is its part from token ids to last hidden states, ``layers`` the stack.

    ``decoder_path`` and ``layers_path`` are module paths inside ``model`` (empty for the model itself).
    """

    model: PreTrainedModel
    decoder: PreTrainedModel
    layers: nn.ModuleList
    decoder_path: str
    layers_path: str


def build_skeleton(config: ModelConfig, dtype: torch.dtype, trust_remote_code: bool) -> Skeleton:
    """The causal language model of ``config`` with parameters of ``dtype`` on the meta device, in eval mode.

    Raises ModelError when transformers has no causal language model for it or its stack cannot be told apart.
    """
    wrapper = type(config.loaded) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind = AutoModelForImageTextToText if wrapper else AutoModelForCausalLM
    try:
        with _parameters_on_meta():
            model = kind.from_config(copy.deepcopy(config.loaded), dtype=dtype, trust_remote_code=trust_remote_code)
    except THEIR_ERRORS as error:
        raise ModelError(f"no causal language model can be built for {config.family}: {first_line(error)}") from error
    model.eval()
    path, layers = _find_stack(model, config.num_layers)
    decoder_path, decoder = _owner(model, path)
    return Skeleton(model, decoder, layers, decoder_path, path)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device as it is registered, before anything initialises it.

    Buffers stay real, because rotary frequencies and the like are computed by the constructor and stored nowhere.
    A large ``torch.empty`` is address space only, so nothing is ever allocated for the parameters.
    """
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None and not param.is_meta:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _find_stack(model: PreTrainedModel, num_layers: int) -> tuple[str, nn.ModuleList]:
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    # Experts and heads are lists inside a layer; the stack is inside no other list of its length.
    outer = [(n, m) for n, m in found if not any(n.startswith(f"{other}.") for other, _ in found)]
    if len(outer) > 1:  # an encoder of images may be as deep; what the model calls its decoder tells them apart
        inside = set(model.get_decoder().modules())
        outer = [(n, m) for n, m in outer if m in inside]
    if len(outer) != 1:
        names = ", ".join(name for name, _ in outer) or "none"
        raise ModelError(
            f"{type(model).__name__}: expected one list of {num_layers} decoder layers, found: {names}; "
            "this architecture is not supported"
        )
    return outer[0]


def _owner(model: PreTrainedModel, path: str) -> tuple[str, PreTrainedModel]:
    """The nearest model around the stack: the one that embeds, runs the layers and applies the final norm."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        owner_path = ".".join(parts[:depth])
        owner = model.get_submodule(owner_path)
        if isinstance(owner, PreTrainedModel) and owner is not model:
            return owner_path, owner
    raise ModelError(f"{type(model).__name__}: no decoder around {path}; this architecture is not supported")


def place_buffers(skeleton: Skeleton, device: torch.device) -> None:
    """Move the buffers that the constructor computed to ``device``; parameters stay on the meta device."""
    for module in skeleton.model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
