"""One step of healing: the pruned stack upward with what enters each layer kept, then downward with gradients.

The weights of a layer come twice, once on the way up and once on the way down, where the layer is run again for its
gradient (Chen et al. 2016, checkpoints at every layer). So one layer is in memory with its graph, and between layers
only hidden states and their gradients, of all calls of the step. Where weights are used in place and there is memory
for the graphs of all layers, these are kept instead, and no layer is run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from streamcollapse.arch.skeleton import LayerCall
from streamcollapse.forward.batches import Batch
from streamcollapse.forward.model import LayerWeights, StreamedModel
from streamcollapse.healing.trained import Trained
from streamcollapse.merge.plan import PlanLayer
from streamcollapse.merge.view import MergedView
from streamcollapse.progress import LayerDone
from streamcollapse.storage.scratch import Scratch

# From the number of a call, what leaves the top layer in it [N, T, D], and whether a gradient is wanted, to a loss that
# is to be added up, and its gradient.
Objective = Callable[[int, torch.Tensor, bool], tuple[float, torch.Tensor | None]]
# What enters the lowest layer that is trained in each call [N, T, D]; None: begin with the embedding.
Entering = Sequence[torch.Tensor] | None


@dataclass(frozen=True)
class Student:
    """The stack ``layers`` of the source of ``model``, and what of it is ``trained``. ``scratch``: where hidden states
    between layers are; none are needed if it ``keeps_graphs``, for which the model has its layers in place."""

    model: StreamedModel
    layers: tuple[PlanLayer, ...]
    merge_norms: bool
    trained: Trained
    scratch: Scratch = field(default_factory=Scratch)
    keeps_graphs: bool = False

    def view(self) -> MergedView:
        """The tensors of the stack as it was before healing."""
        return MergedView(self.model.stream.source, self.model.layout, self.layers, self.merge_norms)

    @property
    def lowest(self) -> int:
        """The position of the lowest layer that is trained."""
        return self.trained.positions[0]

    def losses(self, batches: Sequence[Batch], entering: Entering, objective: Objective) -> float:
        """The sum of ``objective`` over ``batches``, from one pass upward from what is ``entering``."""
        first = 0 if entering is None else self.lowest
        calls, states = self._entering(batches, entering)

        def up(position: int, weights: LayerWeights) -> None:
            for b, hidden in enumerate(states):
                self._put(states, b, self._run(position, weights, hidden, calls[b]))

        with torch.no_grad():
            visit(self.model, self.layers, self.merge_norms, range(first, len(self.layers)), up)
            return sum(objective(b, self._placed(hidden), False)[0] for b, hidden in enumerate(states))

    def gradients(self, batches: Sequence[Batch], entering: Entering, objective: Objective) -> float:
        """The sum of ``objective`` over ``batches``; its gradients are added to those of the masters."""
        if self.keeps_graphs:
            return self._gradients_of_graphs(batches, entering, objective)
        calls, states = self._entering(batches, entering)
        lowest, top = self.lowest, len(self.layers) - 1
        first = 0 if entering is None else lowest
        kept = {boundary: self._room(boundary, states) for boundary in range(lowest + 1, top + 1)}

        def up(position: int, weights: LayerWeights) -> None:
            entering = kept.get(position, states)
            for b, hidden in enumerate(entering):
                self._put(kept.get(position + 1, states), b, self._run(position, weights, hidden, calls[b]))

        with torch.no_grad():
            visit(self.model, self.layers, self.merge_norms, range(first, top), up)
        total, coming_down = 0.0, self._room(len(self.layers), states)

        def down(position: int, weights: LayerWeights) -> None:
            nonlocal total
            for b, hidden in enumerate(kept.pop(position, states)):
                entering = self._placed(hidden).detach().requires_grad_(position > lowest)
                with torch.enable_grad():
                    left = self._run(position, weights, entering, calls[b])
                gradient = coming_down[b]
                if position == top:
                    loss, wanted = objective(b, left.detach(), True)
                    assert wanted is not None
                    total, gradient = total + loss, wanted
                if left.requires_grad:
                    left.backward(self._placed(gradient))  # type: ignore[no-untyped-call]
                if entering.grad is not None:
                    self._put(coming_down, b, entering.grad)

        visit(self.model, self.layers, self.merge_norms, range(top, lowest - 1, -1), down)
        return total

    def _gradients_of_graphs(self, batches: Sequence[Batch], entering: Entering, objective: Objective) -> float:
        """``gradients`` with the graphs of all layers that are trained, and those above, from one pass upward."""
        calls, states = self._entering(batches, entering)
        lowest, top, total = self.lowest, len(self.layers) - 1, 0.0
        graphs: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in batches]

        def up(position: int, weights: LayerWeights) -> None:
            nonlocal total
            for b, hidden in enumerate(states):
                entering = hidden.detach().requires_grad_(position > lowest)
                with torch.set_grad_enabled(position >= lowest):
                    left = self._run(position, weights, entering, calls[b])
                graphs[b] += [(entering, left)] if position >= lowest else []
                states[b] = left.detach()
            if position == top:  # while the weights of all layers are held
                total = sum(self._down(graphs[b], b, objective) for b in range(len(batches)))

        with torch.no_grad():
            first = 0 if entering is None else lowest
            visit(self.model, self.layers, self.merge_norms, range(first, top + 1), up)
        return total

    def _down(self, graph: list[tuple[torch.Tensor, torch.Tensor]], b: int, objective: Objective) -> float:
        """The loss of call ``b``; its gradients go down the ``graph`` of what enters and leaves each layer."""
        loss, gradient = objective(b, graph[-1][1].detach(), True)
        while graph:
            self.model.stream.loader.check()
            entering, left = graph.pop()
            if left.requires_grad:
                left.backward(gradient)  # type: ignore[no-untyped-call]
            gradient = entering.grad
        return loss

    def _entering(
        self, batches: Sequence[Batch], entering: Entering
    ) -> tuple[list[Sequence[LayerCall]], list[torch.Tensor]]:
        with torch.no_grad():
            recordings = self.model.record(batches)
            hidden = [one.hidden_NTD for one in recordings] if entering is None else entering
            states = self._room(0, hidden)
            for b, one in enumerate(hidden):
                self._put(states, b, one)
        return [one.calls for one in recordings], states

    def _room(self, boundary: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Room for the states of every call at ``boundary``."""
        names = (f"heal-{boundary}-{b}" for b in range(len(like)))
        return [self.scratch.allocate(name, tuple(h.shape), h.dtype) for name, h in zip(names, like, strict=True)]

    def _put(self, states: list[torch.Tensor], b: int, hidden: torch.Tensor) -> None:
        states[b].copy_(hidden)
        self.scratch.page_out(states[b])

    def _placed(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.to(self.model.placement.device)

    def _run(
        self, position: int, weights: LayerWeights, hidden: torch.Tensor, calls: Sequence[LayerCall]
    ) -> torch.Tensor:
        base, model = self.layers[position].base, self.model
        with self.trained.within(model.module(base), position, weights) as changed:
            return model.run(base, changed, self._placed(hidden), calls[base])


def visit(
    model: StreamedModel,
    layers: Sequence[PlanLayer],
    merge_norms: bool,
    positions: Sequence[int],
    see: Callable[[int, LayerWeights], None],
) -> None:
    """Have ``see`` look at the layers at ``positions`` of ``layers``, in this order, each with its weights."""
    reads = MergedView(model.stream.source, model.layout, [layers[p] for p in positions], merge_norms)
    with model.stream.run([reads.source_names(n) for n in range(len(positions))]) as weights_pass:
        view = reads.over(weights_pass)
        for number, position in enumerate(positions):
            before, waited, began = model.meter.bytes_read, model.meter.seconds_waiting, time.perf_counter()
            with weights_pass.step(), model.onload(view, number) as weights, model.meter.computing(1):
                see(position, weights)
            seconds, still = time.perf_counter() - began, model.meter.seconds_waiting - waited
            num_bytes = model.meter.bytes_read - before
            model.listener(LayerDone(layers[position].base, model.num_layers, num_bytes, seconds, still))
