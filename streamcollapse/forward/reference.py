"""The reference pass: the original model once, layer by layer, keeping the hidden states at layer boundaries.

Boundary i (0-based) is the point before source layer i. Algorithm 1 only moves down, so below a candidate's merge the
model is always the original, and the candidate starts from the boundary there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from streamcollapse.arch.skeleton import LayerCall
from streamcollapse.errors import NonFiniteError
from streamcollapse.forward.batches import Batch
from streamcollapse.forward.model import LayerWeights, StreamedModel, overflow
from streamcollapse.forward.walk import Passed, Stack, walk
from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.storage.scratch import Scratch
from streamcollapse.storage.source import is_finite


@dataclass(frozen=True)
class Reference:
    """What candidates are measured against, a list entry for each batch.

    ``boundaries[b][i]`` are the hidden states [N, T, D] before source layer ``first + i``, on the CPU; ``last_hidden``
    the original model's last hidden states [N, T, D'] and ``top`` what leaves its top layer, before the final norm
    [N, T, D], both on the compute device; ``calls[b][i]`` the other arguments of layer i.
    """

    batches: Sequence[Batch]
    calls: list[tuple[LayerCall, ...]]
    first: int
    boundaries: list[torch.Tensor]
    last_hidden: list[torch.Tensor]
    top: list[torch.Tensor]

    def boundary(self, layer_index: int) -> list[torch.Tensor]:
        """The hidden states before 0-based source layer ``layer_index``, per batch; it must be one that was kept."""
        assert layer_index >= self.first
        return [states[layer_index - self.first] for states in self.boundaries]


@dataclass(frozen=True)
class Branches:
    """Candidates that branch off the original while it goes up, for whoever wants every one of them anyway: the weights
    are streamed once instead of twice. ``measured`` makes of the reference what tells how alike a candidate is;
    ``look`` is shown the weights of each layer of the original, bottom first."""

    stacks: Sequence[tuple[PlanLayer, ...]]
    merge_norms: bool
    measured: Callable[[Reference], Callable[[Sequence[torch.Tensor]], float | None]]
    look: Callable[[LayerWeights], None]


@torch.inference_mode()
def beginning(model: StreamedModel, reference: Reference, tokens: int) -> Reference:
    """``reference`` for the first ``tokens`` of each sample alone. No layer is run: what is before a token of a causal
    model does not depend on what is after it."""
    batches = [
        Batch(batch.input_ids_NT[:, :tokens], tuple(min(length, tokens) for length in batch.lengths))
        for batch in reference.batches
    ]
    calls = [recording.calls for recording in model.record(batches)]
    boundaries = [states[:, :, :tokens] for states in reference.boundaries]
    last_hidden, top = ([h[:, :tokens] for h in states] for states in (reference.last_hidden, reference.top))
    return Reference(batches, calls, reference.first, boundaries, last_hidden, top)


@torch.inference_mode()
def reference_pass(
    model: StreamedModel,
    batches: Sequence[Batch],
    kept: range,
    scratch: Scratch = Scratch(),  # noqa: B008 - holds nothing
) -> Reference:
    """Stream the original model once over ``batches``, keeping the boundaries in ``kept`` (step 1) in ``scratch``; the
    last one there is what leaves the top layer.

    Raises OutputError when ``scratch`` has no space, NonFiniteError, naming layer and tensor, when a weight that is
    reached is NaN or infinite, or when the hidden states overflow the compute dtype.
    """
    return _climb(model, batches, kept, scratch, None)[0]


@torch.inference_mode()
def reference_sweep(
    model: StreamedModel, batches: Sequence[Batch], scratch: Scratch, branches: Branches
) -> tuple[Reference, list[float | None]]:
    """The reference pass, with every boundary, and how alike each of ``branches`` is, None where that is not finite.
    Bit for bit what a reference pass and a sweep come to one after the other. Raises what ``reference_pass`` raises."""
    return _climb(model, batches, range(model.num_layers + 1), scratch, branches)


def _climb(
    model: StreamedModel, batches: Sequence[Batch], kept: range, scratch: Scratch, branches: Branches | None
) -> tuple[Reference, list[float | None]]:
    num_layers, recordings = model.num_layers, model.record(batches)
    entering = [recording.hidden_NTD for recording in recordings]
    # One block per batch, allocated before anything else: kept states scattered among short-lived activations would
    # leave the heap full of holes.
    boundaries = [scratch.allocate(f"boundaries-{b}", (len(kept), *h.shape), h.dtype) for b, h in enumerate(entering)]
    reference = Reference(batches, [r.calls for r in recordings], kept.start, boundaries, [], [])
    stacks = [] if branches is None else list(branches.stacks)
    finished: dict[tuple[int, ...], list[torch.Tensor]] = {}  # what left the top of a candidate, until it is measured
    similarities: list[float | None] = [None] * (len(stacks) + 1)
    measures: list[Callable[[Sequence[torch.Tensor]], float | None]] = []

    def keep(boundary: int, hidden: Sequence[torch.Tensor]) -> None:
        if boundary in kept:
            for states, h in zip(boundaries, hidden, strict=True):
                states[boundary - kept.start].copy_(h)
                scratch.page_out(states[boundary - kept.start])

    def watch(passed: Passed) -> None:
        number = passed.step.number
        if number < num_layers:
            check_finite(model, passed, batches)
            keep(number + 1, passed.hidden)
            if branches is not None:
                branches.look(passed.weights)
        if number == num_layers - 1:
            reference.top.extend(passed.hidden)
            reference.last_hidden.extend(model.last_hidden(h) for h in passed.hidden)
            if branches is not None:
                measures.append(branches.measured(reference))
        if others := tuple(one for one in passed.step.finished if one):
            finished[others] = list(passed.hidden)
        for numbers in list(finished) if measures else ():  # some are at the top before the original is
            similarity = measures[0](finished.pop(numbers))
            for one in numbers:
                similarities[one] = similarity

    keep(0, entering)
    # The original is the first stack, so its steps bear the numbers of the source layers (forward/walk.py).
    together = [Stack(layers, 0) for layers in (original_layers(num_layers), *stacks)]
    merge_norms = branches is not None and branches.merge_norms
    walk(model, together, lambda boundary: list(entering), reference.calls, watch, merge_norms)
    return reference, similarities[1:]


def check_finite(model: StreamedModel, passed: Passed, batches: Sequence[Batch]) -> None:
    """Raise NonFiniteError, naming what is to blame, where what has ``passed`` is not finite."""
    if not _finite(passed.hidden, batches):
        model.check_weights(passed.view, passed.position, passed.weights)
        dtype = str(passed.hidden[0].dtype).removeprefix("torch.")
        raise NonFiniteError(overflow(f"the hidden states after layer {passed.position}", dtype))


def _finite(hidden: Sequence[torch.Tensor], batches: Sequence[Batch]) -> bool:
    """Whether what real tokens have become is finite. A weight that is not makes hidden states that are not."""
    return all(
        is_finite(hidden_NTD)  # of what padding became as well: one look where all is well
        or all(is_finite(row[:length]) for row, length in zip(hidden_NTD, batch.lengths, strict=True))
        for hidden_NTD, batch in zip(hidden, batches, strict=True)
    )
