"""Evaluated candidates: remembered by what they are, found by sweeps that look ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from streamcollapse.forward.measure import Measure, make_measure
from streamcollapse.forward.model import StreamedModel
from streamcollapse.forward.reference import Reference
from streamcollapse.forward.schedule import Stack
from streamcollapse.forward.sweep import sweep
from streamcollapse.jobs.evaluations import Evaluation, EvaluationKey, Memory
from streamcollapse.jobs.opening import Job
from streamcollapse.jobs.streams import Means
from streamcollapse.merge.plan import Decision, PlanLayer, stack_key
from streamcollapse.merge.view import mismatch
from streamcollapse.progress import WarningRaised
from streamcollapse.settings import Streaming
from streamcollapse.strategy.collapse import Candidate, CollapseOptions, CollapseState
from streamcollapse.strategy.lookahead import Depth, Outcome, likely_states
from streamcollapse.strategy.odds import Odds
from streamcollapse.stream.device import give_back_memory


class Evaluator:
    """Evaluates the candidates of a search, as many in a sweep as ``streaming`` says and there is memory for."""

    def __init__(
        self,
        job: Job,
        model: StreamedModel,
        given: Means,
        reference: Reference,
        memory: Memory,
        streaming: Streaming,
        options: CollapseOptions,
    ) -> None:
        self._job, self._model, self._given, self._reference = job, model, given, reference
        self._memory, self._lookahead = memory, streaming.lookahead
        self._most = streaming.lookahead or given.choice.candidates  # in a sweep; fewer where the device has no room
        self._merge_norms, self._metric = options.merge_norms, options.metric
        self._measure: Measure | None = None  # made when there is something to measure

    def evaluations(self, state: CollapseState, odds: Odds) -> list[Evaluation]:
        """The evaluations of ``state``'s candidates, from memory or from a sweep that starts with them."""
        found = [self._remembered(candidate) for candidate in state.candidates]
        while None in found:
            self._sweep(state, odds)
            found = [self._remembered(candidate) for candidate in state.candidates]
        return [one for one in found if one is not None]

    def _key(self, candidate: Candidate) -> EvaluationKey:
        return self._metric, stack_key(candidate.layers)

    def _remembered(self, candidate: Candidate) -> Evaluation | None:
        """What is known of ``candidate``: it was evaluated, or cannot be."""
        key = self._key(candidate)
        found = self._memory.get(key)
        if found is None:
            reason = mismatch(self._job.source, self._job.architecture.layout, candidate.merged_layer)
            if reason is not None:
                found = Evaluation(None, reason)
                self._memory.add({key: found})
        return found

    def _known(self, state: CollapseState, threshold: float) -> Outcome | None:
        found = [self._remembered(candidate) for candidate in state.candidates]
        if None in found:
            return None
        best = most_similar([one for one in found if one is not None])
        evaluation = found[best]
        assert evaluation is not None
        return (state.candidates[best] if accepts(evaluation, threshold) else None,)

    def _depth(self) -> Depth:
        if self._lookahead is not None:
            return Depth(min(self._lookahead, self._most))
        return Depth(self._most, self._job.meter.pace.ratio())

    def _sweep(self, state: CollapseState, odds: Odds) -> None:
        threshold = state.options.threshold
        states = likely_states(state, odds, self._depth(), lambda s: self._known(s, threshold))
        new = {stack_key(c.layers): c for s in states for c in s.candidates if self._remembered(c) is None}
        candidates = list(new.values())
        if not candidates:
            return  # all that follows is known
        self._evaluate(candidates, state.layers)

    def scores(self, candidates: Sequence[Candidate], layers: Sequence[PlanLayer]) -> list[Evaluation]:
        """The evaluations of ``candidates``, from memory or from as few sweeps as there is memory for.

        ``layers``: the stack that they would change, whose mixed layers the next candidates will have too.
        """
        new = [candidate for candidate in candidates if self._remembered(candidate) is None]
        while new:
            self._evaluate(new[: self._most], layers)
            new = [candidate for candidate in new if self._remembered(candidate) is None]
        return [one for candidate in candidates if (one := self._remembered(candidate)) is not None]

    def _evaluate(self, candidates: Sequence[Candidate], layers: Sequence[PlanLayer]) -> None:
        """Evaluate ``candidates`` in one sweep; where the device has not the memory for all, as many as it has."""
        self._given.kept.want(layers)
        while (similarities := self._try_sweep(candidates)) is None:
            candidates = candidates[: max(len(candidates) // 2, 1)]
            self._most = min(self._most, len(candidates))
        self._job.checkpoint.check_unchanged()  # before anything is believed that was computed from it
        self.learn(candidates, similarities)

    def _try_sweep(self, candidates: Sequence[Candidate]) -> list[float | None] | None:
        """The similarities of ``candidates``; None where the device's memory ran out and less can be asked of it."""
        try:
            if self._measure is None:
                self._measure = make_measure(self._metric, self._model, self._reference, self._job.vocabulary)
            return sweep(
                self._model,
                self._given.stream,
                self._job.architecture.layout,
                [Stack(candidate.layers, candidate.start) for candidate in candidates],
                self._merge_norms,
                self._reference,
                self._measure,
                self._job.meter,
                self._job.listener,
                self._given.kept,
            )
        except torch.OutOfMemoryError:
            if len(candidates) == 1 and not self._given.stream.keep_none():
                raise
        # Not before the error is gone, whose traceback holds what the sweep had made.
        give_back_memory(self._model.placement.device)
        self._job.listener(WarningRaised("GPU memory ran out; going on with fewer candidates in a pass"))
        return None

    def learn(self, candidates: Sequence[Candidate], similarities: Sequence[float | None]) -> None:
        """What a sweep has said of ``candidates``."""
        found = {}
        for candidate, similarity in zip(candidates, similarities, strict=True):
            reason = None if similarity is not None else f"its similarity by {self._metric} is not finite"
            found[self._key(candidate)] = Evaluation(similarity, reason)
        self._memory.add(found)


def accepts(evaluation: Evaluation, threshold: float) -> bool:
    """Line 7 of Algorithm 1: strictly above the threshold."""
    return evaluation.similarity is not None and evaluation.similarity > threshold


def most_similar(evaluations: Sequence[Evaluation]) -> int:
    """Which of ``evaluations`` has the highest similarity; the first of equal ones."""
    return max(range(len(evaluations)), key=lambda i: (_similarity(evaluations[i]), -i))


def _similarity(evaluation: Evaluation) -> float:
    return -math.inf if evaluation.similarity is None else evaluation.similarity


def decide(
    state: CollapseState, evaluations: Sequence[Evaluation], threshold: float
) -> tuple[Decision, Candidate | None]:
    """The decision on the candidates of ``state``, the most similar of which counts; and it, if it is accepted."""
    best = most_similar(evaluations)
    candidate, evaluation = state.candidates[best], evaluations[best]
    accepted = accepts(evaluation, threshold)
    rule, tried = None, None
    if len(state.options.variants) > 1:
        rule = candidate.rule
        pairs = zip(state.candidates, evaluations, strict=True)
        tried = {label: one.similarity for tested, one in pairs for label in tested.rules}
        tried = {variant.label: tried[variant.label] for variant in state.options.variants}
    decision = Decision(
        candidate.pointer, candidate.merged, evaluation.similarity, accepted, evaluation.reason, rule, tried
    )
    return decision, candidate if accepted else None
