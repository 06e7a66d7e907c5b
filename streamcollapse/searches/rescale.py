"""The last step of a search: scales for the layers that stay. What is left of a pruned stack, each layer a little
stronger or weaker.

The layers that stay add to a stream that now lacks what others added; a layer whose matrices are 1.1 times its own adds
more. All matrices of a layer are scaled alike, so that the result is a plan like any other: a mix {21: 1.1}.
A round scores every layer a step up and a step down; the changes that help are then tried together. The state is
without tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from streamcollapse.merge.plan import Decision, PlanLayer
from streamcollapse.searches.candidate import Candidate
from streamcollapse.searches.strategy import SearchContext, SearchResult
from streamcollapse.settings.search import SearchOptions

STEP = 0.05
LEAST, MOST = 0.5, 2.0
GAIN = 1e-4  # of similarity; rounds that bring less are not worth their reading


@dataclass(frozen=True)
class RescaleState:
    """The stack ``found``, of which layer i has the scale 1 + ``steps[i]`` * STEP; ``similarity`` of that."""

    options: SearchOptions
    found: tuple[PlanLayer, ...]
    steps: tuple[int, ...]
    similarity: float

    @classmethod
    def start(cls, found: tuple[PlanLayer, ...], similarity: float, options: SearchOptions) -> RescaleState:
        """No layer scaled; ``options`` are fitted to the model."""
        return cls(options, found, (0,) * len(found), similarity)

    @property
    def layers(self) -> tuple[PlanLayer, ...]:
        return tuple(map(_scaled, self.found, self.steps))

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """Every layer between ``lowest`` and ``highest`` a step up, and a step down."""
        return tuple(
            self._changed({position: step})
            for position, layer in enumerate(self.found)
            if layer.base >= self.options.lowest - 1 and self._below(layer)
            for step in (1, -1)
            if LEAST <= 1.0 + (self.steps[position] + step) * STEP <= MOST
        )

    def _below(self, layer: PlanLayer) -> bool:
        assert self.options.highest is not None
        return max(layer.base, *layer.mix) < self.options.highest

    def best_joint(self, similarities: Sequence[float | None]) -> tuple[Candidate, ...]:
        """The best change alone, then with half of the others that help, then with all; empty if none does.

        ``similarities`` of the candidates, in order.
        """
        helping: dict[int, tuple[float, int]] = {}
        for candidate, similarity in zip(self.candidates, similarities, strict=True):
            best = helping.get(candidate.position, (self.similarity + GAIN, 0))
            if similarity is not None and similarity > best[0]:
                helping[candidate.position] = similarity, self._step(candidate)
        order = sorted(helping, key=lambda position: (-helping[position][0], position))
        counts = dict.fromkeys((1, (len(order) + 1) // 2, len(order))) if order else {}
        return tuple(self._changed({position: helping[position][1] for position in order[:n]}) for n in counts)

    def after(self, taken: Candidate, similarity: float) -> RescaleState:
        """The state in which ``taken``, of ``together``, is the stack."""
        steps = tuple(
            next(n for n in range(before - 1, before + 2) if _scaled(layer, n) == new)
            for layer, before, new in zip(self.found, self.steps, taken.layers, strict=True)
        )
        return replace(self, steps=steps, similarity=similarity)

    def changes(self, after: RescaleState) -> list[tuple[int, int]]:
        """The positions whose scale ``after`` changes, and their steps from then on."""
        pairs = enumerate(zip(self.steps, after.steps, strict=True))
        return [(position, now) for position, (before, now) in pairs if now != before]

    def _step(self, candidate: Candidate) -> int:
        up = _scaled(self.found[candidate.position], self.steps[candidate.position] + 1)
        return 1 if candidate.merged_layer == up else -1

    def _changed(self, changes: dict[int, int]) -> Candidate:
        steps = [step + changes.get(position, 0) for position, step in enumerate(self.steps)]
        lowest = min(changes)
        return Candidate(lowest + 1, 0, tuple(map(_scaled, self.found, steps)), (f"scale {scale(steps[lowest]):g}",))


def scale(steps: int) -> float:
    """The factor that ``steps`` stand for."""
    return round(1.0 + steps * STEP, 6)


def _scaled(layer: PlanLayer, steps: int) -> PlanLayer:
    if steps == 0:
        return layer
    return PlanLayer(layer.base, {source: weight * scale(steps) for source, weight in layer.mix.items()})


def rescaled(context: SearchContext, found: SearchResult) -> SearchResult:
    """``found`` with the scales that make it most similar, and a decision for each layer that a round changes.

    A round takes two sweeps: every change alone, then those that help together.
    """
    evaluator, decisions = context.evaluator, list(found.decisions)
    whole = Candidate(len(found.layers), 0, found.layers, ())
    similarity = evaluator.scores([whole], found.layers)[0].similarity
    if similarity is None:
        return found
    state = RescaleState.start(found.layers, similarity, context.space.options)
    while True:
        alone = [one.similarity for one in evaluator.scores(state.candidates, state.layers)]
        together = state.best_joint(alone)
        if not together:
            return SearchResult(found.options, state.layers, decisions)
        joint = [one.similarity or -1.0 for one in evaluator.scores(together, state.layers)]
        best = max(range(len(joint)), key=lambda i: joint[i])
        after = state.after(together[best], joint[best])
        for position, steps in state.changes(after):
            decision = Decision(position + 1, 0, joint[best], True, None, f"scale {scale(steps):g}")
            context.record(decision, len(decisions), after.layers)
            decisions.append(decision)
        state = after
