"""The model's own code without its weights: built from the config, and its decoder layers run one by one.

No table of architectures. Parameters are on the meta device, buffers are real, and the decoder stack is the ModuleList
of ``num_hidden_layers``. The model's own forward is run once per batch with layers that only **record** the arguments
they are called with (masks, rotary embeddings, ...); any layer can then be **replayed** with any weights. The tail
(final norm, head) is the model's own forward too, with a stack that returns the given hidden states.

Shapes: hidden states are [N samples, T tokens, D model].
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from streamcollapse.arch.config import THEIR_ERRORS, ModelConfig, first_line
from streamcollapse.arch.substitute import Substitute
from streamcollapse.errors import ModelError, is_of_device


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


Tensors = Mapping[str, torch.Tensor]
_Forward = Callable[..., Any]
_Wrap = Callable[[torch.Tensor], Any]
_Result = TypeVar("_Result")
_KINDS: tuple[_Wrap, ...] = (lambda hidden: hidden, lambda hidden: (hidden,))


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one layer, without its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_by_name: bool


@dataclass(frozen=True)
class Recording:
    """``hidden_NTD`` enters layer 0; ``calls[i]`` are the other arguments of layer i."""

    hidden_NTD: torch.Tensor
    calls: tuple[LayerCall, ...]


class DecoderStack:
    """The stack of a skeleton, driven from outside. The skeleton itself is never changed."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._model, self._decoder = Substitute(skeleton.model), Substitute(skeleton.decoder)
        self._layers = [Substitute(layer) for layer in skeleton.layers]
        self._kind: _Wrap | None = None  # what the layers of this architecture return, once it is known

    def record(self, tensors: Tensors, input_ids_NT: torch.Tensor) -> Recording:
        """Embed ``input_ids_NT`` and record how the decoder calls its layers.

        ``tensors`` are the decoder's weights outside the stack, named relative to it. No attention mask is passed:
        samples of a batch are padded on the right, and causal attention never looks there.
        Raises ModelError when layers hand each other more than hidden states.
        """
        return self._in_the_right_kind(lambda wrap: self._try_record(wrap, tensors, input_ids_NT))

    def _in_the_right_kind(self, attempt: Callable[[_Wrap], _Result | None]) -> _Result:
        """``attempt`` with what layers return: hidden states, or a tuple that starts with them.

        Which of the two a decoder expects shows in the shapes that come of it: ``attempt`` gives None if they are off.
        """
        if self._kind is not None:
            result = attempt(self._kind)
            assert result is not None, "the kind of a layer's output does not change"
            return result
        problem: Exception | None = None
        for wrap in _KINDS:
            try:
                result = attempt(wrap)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
                if is_of_device(error):
                    raise
                problem = error
                continue
            if result is not None:
                self._kind = wrap
                return result
        name = type(self._skeleton.decoder).__name__
        why = f": {str(problem).splitlines()[0]}" if str(problem or "") else ""
        raise ModelError(f"{name}: its layers cannot be run one by one{why}; not supported") from problem

    def _try_record(self, wrap: _Wrap, tensors: Tensors, input_ids_NT: torch.Tensor) -> Recording | None:
        calls: list[LayerCall] = []
        hiddens: list[torch.Tensor] = []

        def layer(*args: Any, **kwargs: Any) -> Any:
            by_name = not args
            hidden = kwargs.pop("hidden_states") if by_name else args[0]
            self._refuse_shared_state(hiddens[1:], (*args[1:], *kwargs.values()))
            calls.append(LayerCall(args[1:], kwargs, by_name))
            hiddens.append(hidden)
            return wrap(hidden.view_as(hidden))  # another tensor, to tell layers apart; the same memory

        with self._layers_run([layer] * len(self._skeleton.layers)), self._decoder.holding(tensors) as decoder:
            output = decoder(input_ids=input_ids_NT, use_cache=False)
        expected = (*input_ids_NT.shape, hiddens[0].shape[-1])
        all_called = len(calls) == len(self._skeleton.layers)
        if all_called and all(h.shape == expected for h in hiddens) and output[0].shape[:2] == expected[:2]:
            return Recording(hiddens[0], tuple(calls))
        return None

    def _refuse_shared_state(self, earlier: list[torch.Tensor], arguments: tuple[Any, ...]) -> None:
        if any(argument is hidden for argument in arguments for hidden in earlier):
            name = type(self._skeleton.decoder).__name__
            raise ModelError(f"{name}: its layers see the output of layers other than the one below; not supported")

    def run(self, layer_index: int, tensors: Tensors, hidden_NTD: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """The output of 0-based ``layer_index`` with weights ``tensors``, named relative to the layer. [N, T, D]"""
        layer = self._skeleton.layers[layer_index]
        args, kwargs = (hidden_NTD, *call.args), call.kwargs
        if call.hidden_by_name:
            args, kwargs = call.args, {**call.kwargs, "hidden_states": hidden_NTD}
        try:
            with self._layers[layer_index].holding(tensors):
                output = layer(*args, **kwargs)
        except RuntimeError as error:
            if is_of_device(error):
                raise
            raise ModelError(_why_not(layer_index, layer, tensors, error)) from error
        hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
        return hidden

    def last_hidden(self, tensors: Tensors, hidden_NTD: torch.Tensor) -> torch.Tensor:
        """Last hidden states (after the final norm) of what leaves the top layer. [N, T, D']"""
        return self._tail(self._decoder, tensors, hidden_NTD, lambda output: output[0])

    def logits(self, tensors: Tensors, hidden_NTD: torch.Tensor) -> torch.Tensor:
        """Logits of what leaves the top layer; ``tensors`` are named relative to the model. [N, T, vocabulary]"""
        return self._tail(self._model, tensors, hidden_NTD, lambda output: output.logits)

    def _tail(
        self, substitute: Substitute, tensors: Tensors, hidden_NTD: torch.Tensor, pick: Callable[[Any], torch.Tensor]
    ) -> torch.Tensor:
        width = self._skeleton.model.get_input_embeddings().weight.shape[-1]
        unused = hidden_NTD.new_zeros(*hidden_NTD.shape[:2], width)

        def attempt(wrap: _Wrap) -> torch.Tensor | None:
            def below(*args: Any, **kwargs: Any) -> Any:
                return wrap(args[0] if args else kwargs["hidden_states"])

            def top(*args: Any, **kwargs: Any) -> Any:
                return wrap(hidden_NTD)

            forwards = [below] * (len(self._skeleton.layers) - 1) + [top]
            with self._layers_run(forwards), substitute.holding(tensors) as module:
                result = pick(module(inputs_embeds=unused, use_cache=False))
            return result if result.dim() == 3 and result.shape[:2] == hidden_NTD.shape[:2] else None

        return self._in_the_right_kind(attempt)

    @contextmanager
    def _layers_run(self, forwards: list[_Forward]) -> Iterator[None]:
        """Replace the forward of each layer while the body runs."""
        for layer, forward in zip(self._skeleton.layers, forwards, strict=True):
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self._skeleton.layers:
                del layer.forward


def _why_not(layer_index: int, layer: torch.nn.Module, tensors: Tensors, error: RuntimeError) -> str:
    """Why a layer cannot be run with ``tensors``: the first that has not the shape of the config, if there is one."""
    for suffix, expected in layer.state_dict(keep_vars=True).items():
        if suffix in tensors and tensors[suffix].shape != expected.shape:
            return (
                f"layer {layer_index}: {suffix} has shape {list(tensors[suffix].shape)}, the config gives "
                f"{list(expected.shape)}; config.json and weights do not belong together"
            )
    return f"layer {layer_index} cannot be run: {str(error).splitlines()[0]}"
