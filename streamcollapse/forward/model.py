"""StreamedModel: a decoder that holds no weights. Each call reads what it needs and lets go of it.

Shapes: hidden states are [N samples, T tokens, D model] in the compute dtype, on the compute device.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from streamcollapse.arch.architecture import Architecture
from streamcollapse.arch.skeleton import DecoderStack, LayerCall, Recording, place_buffers
from streamcollapse.errors import NonFiniteError
from streamcollapse.forward.batches import Batch
from streamcollapse.merge.plan import NO_REFITS
from streamcollapse.merge.view import MergedView, refit_name
from streamcollapse.progress import Listener, silent
from streamcollapse.resources.device import Placement
from streamcollapse.storage.source import check_finite, is_finite
from streamcollapse.stream.slots import LayerSlot, layer_slot_bytes
from streamcollapse.stream.weights import WeightStream

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LayerWeights:
    """One layer in the compute dtype: ``stored`` tensors by suffix, as the checkpoint names them, and the
    ``parameters`` that the module makes of them, by name."""

    stored: Weights
    parameters: Weights


class StreamedModel:
    """The forward pass of ``architecture`` with weights from ``stream``, placed by ``placement``.

    ``listener`` is told of every layer; what is read counts into the stream's meter.
    """

    def __init__(
        self, architecture: Architecture, stream: WeightStream, placement: Placement, listener: Listener = silent
    ) -> None:
        self._skeleton = architecture.skeleton
        self.layout, self.stream, self.listener = architecture.layout, stream, listener
        self._source = source = stream.source
        self._stack = DecoderStack(architecture.skeleton)
        self.placement = placement
        self.meter = stream.meter
        layers = [[source.info(name) for name in self.layout.layer_names(i)] for i in range(self.num_layers)]
        place_buffers(architecture.skeleton, placement.device)
        self._slot = LayerSlot(layer_slot_bytes(layers, placement.dtype), placement.device)

    @property
    def num_layers(self) -> int:
        return self.layout.num_layers

    @property
    def hidden_size(self) -> int:
        """D, the width of what goes from layer to layer."""
        return int(self._skeleton.model.get_input_embeddings().weight.shape[-1])

    def record(self, batches: Sequence[Batch]) -> list[Recording]:
        """Embed each batch and record how the decoder calls its layers for it."""
        weights = self._outside(within_decoder=True)
        token_ids = torch.unique(torch.cat([batch.input_ids_NT.flatten() for batch in batches]))
        weights[self._in_decoder(self._embedding_name())] = self._embedding(token_ids)
        return [self._stack.record(weights, batch.input_ids_NT.to(self.placement.device)) for batch in batches]

    def module(self, base: int) -> nn.Module:
        """The code of source layer ``base``, without weights, to be looked at while it runs."""
        return self._skeleton.layers[base]

    @contextmanager
    def onload(self, view: MergedView, position: int) -> Iterator[LayerWeights]:
        """The weights of 0-based layer ``position`` of ``view`` for as long as the body runs.

        Where a tensor can be used in place, in the mapped file, it is; all others share one slot. Parameters that are
        put together from several tensors take memory of their own.
        """
        assemblies = self.layout.assemblies[view.layers[position].base]
        names = view.layer_names(position)
        with self._slot.lease() as slot:
            with self.meter.loading():
                stored = {s: self._load(view, names[s], slot) for assembly in assemblies for s in assembly.parts}
                parameters: Weights = {}
                for assembly in assemblies:
                    parameters |= assembly.make(stored)
            yield LayerWeights(stored, parameters)

    def _load(self, view: MergedView, name: str, slot: LayerSlot) -> torch.Tensor:
        if self._is_used_as_it_is(view, name):
            return view.read(name, self.placement.device)
        info = view.info(name)
        weight = slot.carve(info.shape, self.placement.dtype if info.dtype.is_floating_point else info.dtype)
        view.read_into(weight, name)
        return weight

    def is_in_place(self, view: MergedView, position: int) -> bool:
        """Whether all tensors of layer ``position`` of ``view`` are used as they are, none in the slot."""
        return all(self._is_used_as_it_is(view, name) for name in view.layer_names(position).values())

    def _is_used_as_it_is(self, view: MergedView, name: str) -> bool:
        dtype = view.info(name).dtype
        same = not dtype.is_floating_point or dtype == self.placement.dtype
        return view.untouched(name) and same and self.placement.device.type == "cpu"

    def check_weights(self, view: MergedView, position: int, weights: LayerWeights) -> None:
        """Raise NonFiniteError, naming the tensor of the source, if a weight of layer ``position`` is not finite in
        either dtype."""
        for suffix, name in view.layer_names(position).items():
            if suffix in weights.stored and not is_finite(weights.stored[suffix]):
                for part in view.sources_of(name):
                    check_finite(part, self._source.read(part, self.placement.device))
                raise NonFiniteError(overflow(f"tensor {name}", self.placement.dtype_name))

    def run(self, base: int, weights: LayerWeights, hidden_NTD: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """One decoder layer: the code of source layer ``base`` with ``weights``."""
        return self._stack.run(base, weights.parameters, hidden_NTD, call)

    def last_hidden(self, hidden_NTD: torch.Tensor) -> torch.Tensor:
        """Last hidden states, after the final norm."""
        return self._stack.last_hidden(self._outside(within_decoder=True), hidden_NTD)

    def head(self, refits: Mapping[str, str] = NO_REFITS) -> Weights:
        """The weights that ``logits`` needs: final norm and head, held by the caller as long as it likes. What the
        ``refits`` of a top layer name is read as it was fitted."""
        weights = self._outside(within_decoder=False, refits=refits)
        embedding = self._skeleton.model.get_input_embeddings()
        output = self._skeleton.model.get_output_embeddings()
        if output is not None and output.weight is embedding.weight:
            name = self._embedding_name()
            weights[name] = self.placement.place(self._source.read(self.layout.stored[name], self.placement.device))
        return weights

    def head_rows(self, head: Weights) -> tuple[str, ...]:
        """The names in ``head`` of what has a row for each word; empty where the head is no linear module."""
        output = self._skeleton.model.get_output_embeddings()
        if not isinstance(output, nn.Linear):
            return ()
        named = self._skeleton.model.named_parameters(remove_duplicate=False)
        return tuple(name for name, one in named if name in head and (one is output.weight or one is output.bias))

    def logits(self, head: Weights, hidden_NTD: torch.Tensor) -> torch.Tensor:
        """Next-token logits of what leaves the top layer. [N, T, vocabulary]"""
        return self._stack.logits(head, hidden_NTD)

    def _outside(self, within_decoder: bool, refits: Mapping[str, str] = NO_REFITS) -> Weights:
        """Weights outside the stack, without the input embedding and what is tied to it."""

        def read(stored: str) -> torch.Tensor:
            digest = refits.get(f"/{stored}")
            return self._source.read(stored if digest is None else refit_name(digest), self.placement.device)

        parameters = dict(self._skeleton.model.named_parameters(remove_duplicate=False))
        embedding = self._skeleton.model.get_input_embeddings().weight
        names: Iterable[str] = (n for n in self.layout.stored if parameters.get(n) is not embedding)
        if within_decoder:
            names = (n for n in names if n.startswith(f"{self._skeleton.decoder_path}."))
        weights = {n: self.placement.place(read(self.layout.stored[n])) for n in names}
        return {self._in_decoder(n): w for n, w in weights.items()} if within_decoder else weights

    def _in_decoder(self, name: str) -> str:
        return name.removeprefix(f"{self._skeleton.decoder_path}.")

    def _embedding_name(self) -> str:
        embedding = self._skeleton.model.get_input_embeddings().weight
        named: Iterable[tuple[str, torch.Tensor]] = self._skeleton.decoder.named_parameters(self._skeleton.decoder_path)
        return next(name for name, parameter in named if parameter is embedding)

    def _embedding(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The embedding table with the rows of ``token_ids`` filled in, at the cost of those rows.

        The rest of the table is address space (on a CPU) that is never touched.
        """
        name = self.layout.stored[self._embedding_name()]
        rows = self._source.read_rows(name, token_ids)
        check_finite(name, rows)
        table = torch.empty(self._source.info(name).shape, dtype=self.placement.dtype, device=self.placement.device)
        table[token_ids.to(table.device)] = self.placement.place(rows)
        return table


def overflow(what: str, dtype: str) -> str:
    """The line for values that are finite in the checkpoint and not in the compute ``dtype``."""
    return f"{what} overflow {dtype}; pass `compute_dtype=float32` or bfloat16"
