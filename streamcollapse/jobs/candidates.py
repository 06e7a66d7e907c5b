"""Evaluated candidates: remembered by what they are, found by sweeps that look ahead."""

from __future__ import annotations

from streamcollapse.forward.model import StreamedModel
from streamcollapse.forward.reference import Reference
from streamcollapse.forward.schedule import Stack
from streamcollapse.forward.sweep import sweep
from streamcollapse.jobs.evaluations import Evaluation, Memory
from streamcollapse.jobs.opening import Job
from streamcollapse.jobs.streams import Means
from streamcollapse.merge.plan import Decision, stack_key
from streamcollapse.merge.view import mismatch
from streamcollapse.settings import Streaming
from streamcollapse.strategy.collapse import CollapseState
from streamcollapse.strategy.lookahead import Depth, likely_states
from streamcollapse.strategy.odds import Odds


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
    ) -> None:
        self._job, self._model, self._given, self._reference = job, model, given, reference
        self._memory, self._lookahead = memory, streaming.lookahead

    def evaluation(self, state: CollapseState, odds: Odds) -> Evaluation:
        """The evaluation of ``state``'s candidate, from memory or from a sweep that starts with it."""
        candidate = state.candidate()
        assert candidate is not None
        key = stack_key(candidate.layers)
        if self._memory.get(key) is None:
            self._sweep(state, odds)
        found = self._memory.get(key)
        assert found is not None
        return found

    def _known(self, state: CollapseState, threshold: float) -> bool | None:
        candidate = state.candidate()
        assert candidate is not None
        key = stack_key(candidate.layers)
        found = self._memory.get(key)
        if found is None:
            reason = mismatch(self._job.source, self._job.architecture.layout, candidate.merged_layer)
            if reason is None:
                return None
            found = Evaluation(None, reason)
            self._memory.add({key: found})
        return accepts(found, threshold)

    def _depth(self) -> Depth:
        if self._lookahead is not None:
            return Depth(self._lookahead)
        return Depth(self._given.choice.candidates, self._job.meter.pace.ratio())

    def _sweep(self, state: CollapseState, odds: Odds) -> None:
        threshold = state.options.threshold
        states = likely_states(state, odds, self._depth(), lambda s: self._known(s, threshold))
        candidates = [candidate for s in states if (candidate := s.candidate()) is not None]
        if not candidates:
            return  # all that follows is known
        self._given.kept.want(state.layers)
        similarities = sweep(
            self._model,
            self._given.stream,
            self._job.architecture.layout,
            [Stack(candidate.layers, candidate.position) for candidate in candidates],
            state.options.merge_norms,
            self._reference,
            self._job.meter,
            self._job.listener,
            self._given.kept,
        )
        self._job.checkpoint.check_unchanged()  # before anything is believed that was computed from it
        found = {}
        for candidate, similarity in zip(candidates, similarities, strict=True):
            reason = None if similarity is not None else "its hidden states are not finite"
            found[stack_key(candidate.layers)] = Evaluation(similarity, reason)
        self._memory.add(found)


def accepts(evaluation: Evaluation, threshold: float) -> bool:
    """Line 7 of Algorithm 1: strictly above the threshold."""
    return evaluation.similarity is not None and evaluation.similarity > threshold


def decide(evaluation: Evaluation, pointer: int, merged: int, threshold: float) -> Decision:
    """The decision on the candidate with 1-based ``pointer`` and ``merged`` followers."""
    return Decision(pointer, merged, evaluation.similarity, accepts(evaluation, threshold), evaluation.reason)
