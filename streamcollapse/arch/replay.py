"""Running the decoder layers of a skeleton one by one, with weights given from outside.

The model's own forward is run once per batch with layers that only **record** the arguments they are called with
(masks, rotary embeddings, ...); any layer can then be **replayed** with any weights. The tail (final norm, head)
is the model's own forward too, with a stack that returns the given hidden states. Nothing here names an architecture.

Shapes: hidden states are [N samples, T tokens, D model].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call

from streamcollapse.arch.skeleton import Skeleton
from streamcollapse.errors import ModelError

Tensors = Mapping[str, torch.Tensor]
_Forward = Callable[..., Any]
_KINDS: tuple[Callable[[torch.Tensor], Any], ...] = (lambda hidden: hidden, lambda hidden: (hidden,))


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
        self._wrap = _KINDS[0]

    def record(self, tensors: Tensors, input_ids_NT: torch.Tensor) -> Recording:
        """Embed ``input_ids_NT`` and record how the decoder calls its layers.

        ``tensors`` are the decoder's weights outside the stack, named relative to it. No attention mask is passed:
        samples of a batch are padded on the right, and causal attention never looks there.
        Raises ModelError when layers hand each other more than hidden states.
        """
        for wrap in _KINDS:
            self._wrap = wrap
            recording = self._try_record(tensors, input_ids_NT)
            if recording is not None:
                return recording
        name = type(self._skeleton.decoder).__name__
        raise ModelError(f"{name}: its layers return neither hidden states nor a tuple that starts with them; not supported")

    def _try_record(self, tensors: Tensors, input_ids_NT: torch.Tensor) -> Recording | None:
        """One recording under the assumption that layers return what ``self._wrap`` makes; None if they do not."""
        calls: list[LayerCall] = []
        hiddens: list[torch.Tensor] = []

        def layer(*args: Any, **kwargs: Any) -> Any:
            by_name = not args
            hidden = kwargs.pop("hidden_states") if by_name else args[0]
            self._refuse_shared_state(hiddens[1:], (*args[1:], *kwargs.values()))
            calls.append(LayerCall(args[1:], kwargs, by_name))
            hiddens.append(hidden)
            return self._wrap(hidden.clone())

        count = len(self._skeleton.layers)
        try:
            with self._layers_run([layer] * count):
                output = functional_call(
                    self._skeleton.decoder, dict(tensors), (), {"input_ids": input_ids_NT, "use_cache": False}
                )
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            if self._wrap is _KINDS[-1]:
                raise
            return None
        expected = (*input_ids_NT.shape, hiddens[0].shape[-1])
        if len(calls) != count or any(hidden.shape != expected for hidden in hiddens) or output[0].shape[:2] != expected[:2]:
            return None
        return Recording(hiddens[0], tuple(calls))

    def _refuse_shared_state(self, earlier: list[torch.Tensor], arguments: tuple[Any, ...]) -> None:
        if any(argument is hidden for argument in arguments for hidden in earlier):
            name = type(self._skeleton.decoder).__name__
            raise ModelError(f"{name}: its layers see the output of layers other than the one below; not supported")

    def run(self, layer_index: int, tensors: Tensors, hidden_NTD: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """The output of 0-based ``layer_index`` with weights ``tensors``, named relative to the layer. [N, T, D]"""
        layer = self._skeleton.layers[layer_index]
        if call.hidden_by_name:
            output = functional_call(layer, dict(tensors), call.args, {**call.kwargs, "hidden_states": hidden_NTD})
        else:
            output = functional_call(layer, dict(tensors), (hidden_NTD, *call.args), call.kwargs)
        hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
        return hidden

    def last_hidden(self, tensors: Tensors, hidden_NTD: torch.Tensor) -> torch.Tensor:
        """Last hidden states (after the final norm) of what leaves the top layer. [N, T, D']"""
        output: torch.Tensor = self._tail(self._skeleton.decoder, tensors, hidden_NTD)[0]
        return output

    def logits(self, tensors: Tensors, hidden_NTD: torch.Tensor) -> torch.Tensor:
        """Logits of what leaves the top layer; ``tensors`` are named relative to the whole model. [N, T, vocabulary]"""
        output: torch.Tensor = self._tail(self._skeleton.model, tensors, hidden_NTD).logits
        return output

    def _tail(self, module: torch.nn.Module, tensors: Tensors, hidden_NTD: torch.Tensor) -> Any:
        def below(*args: Any, **kwargs: Any) -> Any:
            return self._wrap(args[0] if args else kwargs["hidden_states"])

        def top(*args: Any, **kwargs: Any) -> Any:
            return self._wrap(hidden_NTD)

        embedding = self._skeleton.model.get_input_embeddings()
        unused = hidden_NTD.new_zeros(*hidden_NTD.shape[:2], embedding.weight.shape[-1])
        with self._layers_run([below] * (len(self._skeleton.layers) - 1) + [top]):
            return functional_call(module, dict(tensors), (), {"inputs_embeds": unused, "use_cache": False})

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
