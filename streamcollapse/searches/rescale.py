"""The last step of a search: scales for the layers that stay. What is left of a pruned stack, each layer a little
stronger or weaker.

The layers that stay add to a stream that now lacks what others added; a layer whose matrices are 1.1 times its own adds
more. All matrices of a layer are scaled alike, so that the result is a plan like any other: a mix {21: 1.1}.
A round scores every layer a step up and a step down; the changes that help are then tried together. The state is
without tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.merge.record import Decision
from streamcollapse.progress import RoundStarted
from streamcollapse.searches.candidate import Candidate
from streamcollapse.searches.strategy import SearchContext, SearchResult, SearchSpace, loss
from streamcollapse.searches.work import Round, layers_to_go, swept
from streamcollapse.settings.catalogue import EFFORTS
from streamcollapse.settings.search import SearchOptions

STEP = 0.05
LEAST, MOST = 0.5, 2.0
BOLDEST = 4  # steps at once
_ROUNDS = {True: 2, False: 6}  # expected, by whether one goes further than a step
_JOINT = {True: 5, False: 3}  # expected of the ways to take changes together
TOGETHER = 6  # ways to take several changes at once, at the most
_MOST_ROUNDS = {True: 6, False: 24}  # so that a screen can say how far it is
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

    def boldly_joint(self, similarities: Sequence[float | None]) -> tuple[Candidate, ...]:
        """Every layer at once as far as a parabola through its three losses says, then half, then a quarter as far."""
        losses: dict[int, dict[int, float]] = {}
        for candidate, similarity in zip(self.candidates, similarities, strict=True):
            losses.setdefault(candidate.position, {})[self._step(candidate)] = loss(similarity)
        steps = {position: _lowest(loss(self.similarity), found) for position, found in losses.items()}
        ways = [{position: round(step * share) for position, step in steps.items()} for share in (1.0, 0.5, 0.25)]
        changes = [{position: step for position, step in way.items() if step} for way in ways]
        return tuple(self._changed(way) for way in changes if way)

    def after(self, taken: Candidate, similarity: float) -> RescaleState:
        """The state in which ``taken``, of what was tried together, is the stack."""
        steps = tuple(
            next(n for n in range(before - BOLDEST, before + BOLDEST + 1) if _scaled(layer, n) == new)
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
        steps = [_within(step + changes.get(position, 0)) for position, step in enumerate(self.steps)]
        lowest = min(changes)
        return Candidate(lowest + 1, 0, tuple(map(_scaled, self.found, steps)), (f"scale {scale(steps[lowest]):g}",))


def _lowest(here: float, losses: dict[int, float]) -> float:
    """The steps to the least of the parabola through the loss ``here``, a step up, and a step down; BOLDEST at most."""
    if len(losses) < 2:
        return 0.0
    slope, bend = (losses[1] - losses[-1]) / 2.0, losses[1] + losses[-1] - 2.0 * here
    far = -slope / bend if bend > 0.0 else -math.copysign(BOLDEST, slope)
    return min(max(far, -float(BOLDEST)), float(BOLDEST))


def _within(steps: int) -> int:
    return min(max(steps, round((LEAST - 1.0) / STEP)), round((MOST - 1.0) / STEP))


def scale(steps: int) -> float:
    """The factor that ``steps`` stand for."""
    return round(1.0 + steps * STEP, 6)


def _scaled(layer: PlanLayer, steps: int) -> PlanLayer:
    if steps == 0:
        return layer
    return PlanLayer(layer.base, {source: weight * scale(steps) for source, weight in layer.mix.items()})


def rescaled(context: SearchContext, found: SearchResult) -> SearchResult:
    """``found`` with the scales that make it most similar, and a decision for each layer that a round changes.

    A round takes two sweeps: every change alone, by the scout if there is one; then several together. It is the last if
    it takes less off the loss than the effort says is worth its time, or if it is one of too many.
    """
    evaluator, decisions = context.evaluator, list(found.decisions)
    scout, effort = evaluator.scout or evaluator, EFFORTS[context.space.options.effort]
    whole = Candidate(len(found.layers), 0, found.layers, ())
    similarity = evaluator.scores([whole], found.layers)[0].similarity
    scouted = scout.scores([whole], found.layers)[0].similarity
    if similarity is None or scouted is None:
        return found
    state = RescaleState.start(found.layers, scouted, context.space.options)
    most = _MOST_ROUNDS[effort.lazy]
    for number in range(1, most + 1):
        context.run.listener(RoundStarted(number, most, len(state.candidates) + TOGETHER))
        alone = [one.similarity for one in scout.scores(state.candidates, state.layers)]
        together = state.best_joint(alone) + (state.boldly_joint(alone) if effort.lazy else ())
        joint = [one.similarity or -1.0 for one in evaluator.scores(together, state.layers)]
        if not joint or max(joint) <= similarity:
            break
        best = max(range(len(joint)), key=lambda i: joint[i])
        scouted = scout.scores([together[best]], state.layers)[0].similarity
        after = state.after(together[best], scouted or -1.0)
        for position, steps in state.changes(after):
            decision = Decision(position + 1, 0, joint[best], True, None, f"scale {scale(steps):g}")
            context.record(decision, len(decisions), after.layers)
            decisions.append(decision)
        is_last = loss(joint[best]) > (1.0 - effort.least_gain) * loss(similarity)
        state, similarity = after, joint[best]
        if is_last:
            break
    return SearchResult(found.options, state.layers, decisions)


def scale_rounds(space: SearchSpace, room: int, has_scout: bool) -> list[Round]:
    """The rounds of scales at the end of a search of ``space``."""
    lazy = EFFORTS[space.options.effort].lazy
    layers = original_layers(space.num_layers)[: space.num_layers - layers_to_go(space)]
    state = RescaleState.start(layers, 1.0, space.options)
    whole = Candidate(1, 0, layers, ())
    first, joint = swept([whole], 1), swept([whole] * _JOINT[lazy], 1)
    alone = swept(state.candidates, room, by_scout=has_scout)
    if has_scout:
        told = swept([whole], 1, by_scout=True)
        first, joint = first + told, joint + told
    rounds = [alone + joint] * _ROUNDS[lazy]
    return [first + rounds[0], *rounds[1:]]
