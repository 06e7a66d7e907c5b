"""The pass of a repair: source and pruned stack go up side by side, and on the way layers before cuts are fitted.

What leaves a fitted layer is computed with the tensors that were stored, so the layers above it are fitted to what the
repaired model will do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from streamcollapse.forward.batches import Batch
from streamcollapse.forward.model import LayerWeights, StreamedModel
from streamcollapse.merge.plan import PlanLayer
from streamcollapse.merge.view import MergedView
from streamcollapse.progress import LayerDone
from streamcollapse.repair.climb import Step, plan_climb
from streamcollapse.repair.layer import FittedLayer, Matrices, Tokens, token_weights
from streamcollapse.storage.scratch import Scratch


@dataclass(frozen=True)
class Mended:
    """What was done to the layer at 0-based ``position`` of the pruned stack: ``how``, and the error that the fit is
    by, on held-out tokens, ``before`` and ``after``. ``how`` is None where nothing made it less."""

    position: int
    how: str | None
    before: float
    after: float


@dataclass(frozen=True)
class Known:
    """How a layer was ``mended`` by an earlier run that did not come to its end: digests of its tensors by suffix, and
    the ``matrices`` themselves."""

    mended: Mended
    refits: dict[str, str]
    matrices: Matrices


# From a layer and its error before to the fitted one, how that was done, and the error after; None: it does not fall.
Fit = Callable[[FittedLayer, float], tuple[FittedLayer, str, float] | None]


@dataclass(frozen=True)
class How:
    """``fit`` is what is done with a layer; ``keep`` keeps what came of it and gives the digests of its tensors, and
    ``known`` says what was kept of the layer at a position. ``to_top``: the
    source goes on to its top, for what comes after the fits. ``above``: the layers above cuts are fitted, and told how
    much larger the source's hidden states are."""

    fit: Fit
    keep: Callable[[Mended, Matrices], dict[str, str]]
    known: Callable[[int], Known | None] = lambda position: None
    merge_norms: bool = False
    to_top: bool = False
    above: bool = False


@dataclass(frozen=True)
class Climbed:
    """``layers`` after the fits, and what was ``done``. Where the source went to its top, hidden states of each of the
    batches: ``entering`` the lowest layer that was fitted, and those that left the ``top`` of the source."""

    layers: tuple[PlanLayer, ...]
    done: list[Mended]
    entering: list[torch.Tensor]
    top: list[torch.Tensor]


class _States:
    """Hidden states [N, T, D] of each batch at one boundary, in ``scratch``."""

    def __init__(self, scratch: Scratch, name: str, hidden: Sequence[torch.Tensor]) -> None:
        self._scratch = scratch
        self.tensors = [scratch.allocate(f"{name}-{b}", tuple(h.shape), h.dtype) for b, h in enumerate(hidden)]
        for number, one in enumerate(hidden):
            self.put(number, one)

    def put(self, number: int, hidden: torch.Tensor) -> None:
        """Batch ``number`` has come to the next boundary."""
        self.tensors[number].copy_(hidden)
        self._scratch.page_out(self.tensors[number])


@torch.no_grad()
def mend(
    model: StreamedModel,
    layers: tuple[PlanLayer, ...],
    batches: tuple[Sequence[Batch], Sequence[Batch]],
    how: How,
    scratch: Scratch = Scratch(),  # noqa: B008 - holds nothing
) -> Climbed:
    """``layers`` with those before cuts fitted on the first of ``batches``, judged on the second. Each weight is read
    once. Raises OutputError, NonFiniteError."""
    climb = plan_climb(layers, model.num_layers, how.to_top, how.above)
    if not climb.steps:
        return Climbed(layers, [], [], [])
    going = _Going(model, batches, how, scratch)
    reads = MergedView(model.stream.source, model.layout, [step.layer for step in climb.steps], how.merge_norms)
    with model.stream.run([reads.source_names(n) for n in range(len(climb.steps))]) as weights_pass:
        view = reads.over(weights_pass)
        for number, step in enumerate(climb.steps):
            if step.position is None and step.layer.base == climb.start:
                going.part()
            before, waited, began = model.meter.bytes_read, model.meter.seconds_waiting, time.perf_counter()
            with weights_pass.step(), model.onload(view, number) as weights, model.meter.computing(1):
                going.through(step, weights, {s: view.info(n).dtype for s, n in view.layer_names(number).items()})
            seconds, still = time.perf_counter() - began, model.meter.seconds_waiting - waited
            num_bytes = model.meter.bytes_read - before
            model.listener(LayerDone(step.layer.base, model.num_layers, num_bytes, seconds, still))
    repaired = [replace(x, refits=going.refits.get(position, x.refits)) for position, x in enumerate(layers)]
    return Climbed(tuple(repaired), going.done, going.entering, going.top)


class _Going:
    """Where source and pruned stack are, and what was done so far."""

    def __init__(
        self, model: StreamedModel, batches: tuple[Sequence[Batch], Sequence[Batch]], how: How, scratch: Scratch
    ) -> None:
        self._model, self._how, self._scratch = model, how, scratch
        self._batches = [*batches[0], *batches[1]]
        self._parts = slice(0, len(batches[0])), slice(len(batches[0]), None)
        recordings = model.record(self._batches)
        self._calls = [recording.calls for recording in recordings]
        self._source = _States(scratch, "source", [recording.hidden_NTD for recording in recordings])
        self._pruned: _States | None = None
        self._sizes: dict[int, list[torch.Tensor]] = {}  # 1 / |h|^2 of the source's, by boundary
        self.refits: dict[int, dict[str, str]] = {}
        self.done: list[Mended] = []
        self.entering: list[torch.Tensor] = []

    @property
    def top(self) -> list[torch.Tensor]:
        """What left the top of the source, if it went there."""
        return self._source.tensors if self._how.to_top else []

    def part(self) -> None:
        """Here the pruned stack parts from the source."""
        self._pruned = _States(self._scratch, "pruned", self._source.tensors)

    def through(self, step: Step, weights: LayerWeights, dtypes: Mapping[str, torch.dtype]) -> None:
        """Fit the layer of ``step`` if it is to be, and run it."""
        states = self._source if step.position is None else self._pruned
        assert states is not None
        base = step.layer.base
        if self._how.above and step.position is None:
            self._sizes[base] = self._weights(states)
        if step.is_mended:
            assert step.position is not None
            if self._how.to_top and not self.entering:
                self.entering = _States(self._scratch, "entering", states.tensors).tensors
            fit, held_out = (self._tokens(base, states, part) for part in self._parts)
            growth = self._growth(base, states) if self._how.above else 1.0
            layer = FittedLayer(self._model, base, weights, dtypes, fit, held_out, growth=growth)
            weights = self._fitted(layer, step).weights
        for number, entering in enumerate(states.tensors):
            placed = entering.to(self._model.placement.device)
            states.put(number, self._model.run(base, weights, placed, self._calls[number][base]))

    def _fitted(self, layer: FittedLayer, step: Step) -> FittedLayer:
        """``layer`` as it is from now on, from an earlier run where that is known."""
        assert step.position is not None
        if (known := self._how.known(step.position)) is not None:
            mended, refits, fitted = known.mended, known.refits, layer.holding(known.matrices)
        else:
            before = layer.error()
            fitted, words, after = self._how.fit(layer, before) or (layer, None, before)
            mended = Mended(step.position, words, before, after)
            refits = self._how.keep(mended, fitted.matrices)
        self.done.append(mended)
        if refits:
            self.refits[step.position] = {**step.layer.refits, **refits}
        return fitted

    def _weights(self, states: _States) -> list[torch.Tensor]:
        """``token_weights`` of each batch."""
        pairs = zip(states.tensors, self._batches, strict=True)
        return [token_weights(hidden, batch.lengths) for hidden, batch in pairs]

    def _growth(self, boundary: int, states: _States) -> float:
        """How many times as long the source's hidden states are at ``boundary`` as ``states``: the mean over tokens."""
        total = count = 0.0
        for source, ours in zip(self._sizes[boundary], self._weights(states), strict=True):
            total += float((ours / source.clamp_min(1e-30)).sqrt().sum(dtype=torch.float64))
            count += int((ours > 0).sum())
        return total / max(count, 1.0)

    def _tokens(self, base: int, entering: _States, part: slice) -> Tokens:
        calls = [call[base] for call in self._calls[part]]
        return Tokens(self._batches[part], entering.tensors[part], self._source.tensors[part], calls)
