"""Evaluated candidates: remembered by what they are, found by sweeps that look ahead."""

from __future__ import annotations

from dataclasses import dataclass

from streamcollapse.forward.model import StreamedModel
from streamcollapse.forward.reference import Reference
from streamcollapse.forward.schedule import Stack
from streamcollapse.forward.sweep import sweep
from streamcollapse.jobs.opening import Job
from streamcollapse.merge.plan import Decision, StackKey, stack_key
from streamcollapse.merge.view import mismatch
from streamcollapse.settings import Streaming
from streamcollapse.strategy.collapse import CollapseState
from streamcollapse.strategy.lookahead import Depth, Odds, likely_states

MOST_CANDIDATES = 8  # in one sweep on its own account: each holds hidden states, which no budget bounds yet


@dataclass(frozen=True)
class Evaluation:
    """What came of a candidate; ``reason`` says why where there is no similarity."""

    similarity: float | None
    reason: str | None = None


class Evaluator:
    """Evaluates the candidates of a search, as many to a sweep as ``streaming`` says."""

    def __init__(
        self, job: Job, model: StreamedModel, reference: Reference, merge_norms: bool, streaming: Streaming
    ) -> None:
        self._job, self._model, self._reference = job, model, reference
        self._merge_norms, self._lookahead = merge_norms, streaming.lookahead
        self._memory: dict[StackKey, Evaluation] = {}

    def evaluation(self, state: CollapseState, odds: Odds) -> Evaluation:
        """The evaluation of ``state``'s candidate, from memory or from a sweep that starts with it."""
        candidate = state.candidate()
        assert candidate is not None
        if (key := stack_key(candidate.layers)) not in self._memory:
            self._sweep(state, odds)
        return self._memory[key]

    def _known(self, state: CollapseState, threshold: float) -> bool | None:
        candidate = state.candidate()
        assert candidate is not None
        key = stack_key(candidate.layers)
        if key not in self._memory:
            reason = mismatch(self._job.source, self._job.architecture.layout, candidate.merged_layer)
            if reason is None:
                return None
            self._memory[key] = Evaluation(None, reason)
        return accepts(self._memory[key], threshold)

    def _depth(self) -> Depth:
        if self._lookahead is not None:
            return Depth(self._lookahead)
        return Depth(MOST_CANDIDATES, self._job.meter.pace.ratio())

    def _sweep(self, state: CollapseState, odds: Odds) -> None:
        threshold = state.options.threshold
        states = likely_states(state, odds, self._depth(), lambda s: self._known(s, threshold))
        candidates = [candidate for s in states if (candidate := s.candidate()) is not None]
        if not candidates:
            return  # all that follows is known
        similarities = sweep(
            self._model,
            self._job.source,
            self._job.architecture.layout,
            [Stack(candidate.layers, candidate.position) for candidate in candidates],
            self._merge_norms,
            self._reference,
            self._job.meter,
            self._job.listener,
        )
        for candidate, similarity in zip(candidates, similarities, strict=True):
            reason = None if similarity is not None else "its hidden states are not finite"
            self._memory[stack_key(candidate.layers)] = Evaluation(similarity, reason)


def accepts(evaluation: Evaluation, threshold: float) -> bool:
    """Line 7 of Algorithm 1: strictly above the threshold."""
    return evaluation.similarity is not None and evaluation.similarity > threshold


def decide(evaluation: Evaluation, pointer: int, merged: int, threshold: float) -> Decision:
    """The decision on the candidate with 1-based ``pointer`` and ``merged`` followers."""
    return Decision(pointer, merged, evaluation.similarity, accepts(evaluation, threshold), evaluation.reason)
