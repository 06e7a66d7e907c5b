"""Running the decoder layers of a skeleton one by one, with weights given from outside.

The model's own forward is run once per batch with layers that only **record** the arguments they are called with
(masks, rotary embeddings, ...); any layer can then be **replayed** with any weights. The tail (final norm, head)
is the model's own forward too, with a stack that returns the given hidden states. Nothing here names an architecture.

Shapes: hidden states are [N samples, T tokens, D model].
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.func import functional_call

from streamcollapse.arch.skeleton import Skeleton
from streamcollapse.errors import ModelError, is_of_device

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

        with self._layers_run([layer] * len(self._skeleton.layers)):
            inputs = {"input_ids": input_ids_NT, "use_cache": False}
            output = functional_call(self._skeleton.decoder, dict(tensors), (), inputs)
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
            output = functional_call(layer, dict(tensors), args, kwargs)
        except RuntimeError as error:
            if is_of_device(error):
                raise
            raise ModelError(_why_not(layer_index, layer, tensors, error)) from error
        hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
        return hidden

    def last_hidden(self, tensors: Tensors, hidden_NTD: torch.Tensor) -> torch.Tensor:
        """Last hidden states (after the final norm) of what leaves the top layer. [N, T, D']"""
        return self._tail(self._skeleton.decoder, tensors, hidden_NTD, lambda output: output[0])

    def logits(self, tensors: Tensors, hidden_NTD: torch.Tensor) -> torch.Tensor:
        """Logits of what leaves the top layer; ``tensors`` are named relative to the model. [N, T, vocabulary]"""
        return self._tail(self._skeleton.model, tensors, hidden_NTD, lambda output: output.logits)

    def _tail(
        self, module: torch.nn.Module, tensors: Tensors, hidden_NTD: torch.Tensor, pick: Callable[[Any], torch.Tensor]
    ) -> torch.Tensor:
        width = self._skeleton.model.get_input_embeddings().weight.shape[-1]
        unused = hidden_NTD.new_zeros(*hidden_NTD.shape[:2], width)

        def attempt(wrap: _Wrap) -> torch.Tensor | None:
            def below(*args: Any, **kwargs: Any) -> Any:
                return wrap(args[0] if args else kwargs["hidden_states"])

            def top(*args: Any, **kwargs: Any) -> Any:
                return wrap(hidden_NTD)

            with self._layers_run([below] * (len(self._skeleton.layers) - 1) + [top]):
                inputs = {"inputs_embeds": unused, "use_cache": False}
                result = pick(functional_call(module, dict(tensors), (), inputs))
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
