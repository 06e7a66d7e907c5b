"""Algorithm 1 of LaCo: walk down the stack and keep each merge of C layers whose similarity is above T.

With a target, the threshold is found by bisection.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from streamcollapse.merge.plan import PlanLayer, stack_key
from streamcollapse.merge.record import Decision
from streamcollapse.progress import CandidateStarted, RoundStarted, WarningRaised
from streamcollapse.searches.algorithm1 import SearchState, most_candidates
from streamcollapse.searches.candidate import Candidate
from streamcollapse.searches.lookahead import AcceptModel, Depth, Outcome, likely_states
from streamcollapse.searches.strategy import SearchContext, SearchResult, SearchSpace, Strategy, competition
from streamcollapse.searches.work import Round, layers_to_go, swept
from streamcollapse.settings.catalogue import METRICS
from streamcollapse.settings.search import SearchOptions

if TYPE_CHECKING:
    from streamcollapse.run.evaluations import Evaluation

# Counted on a real model of 30 layers: 13 candidates, 25, then 21, 22, 19, 17, 16, 11, 3 in tries between the two ends.
TRIES, MORE, NEW = 7, 3.0, 0.75


PAPERS_LOWEST = 0.45  # T of the settings behind Table 1; an ablation on T goes to 0.25


class Laco(Strategy):
    """Yang et al., 2024."""

    name = "laco"
    summary = "walks down the stack and keeps each merge of C layers whose similarity is above the threshold"
    source = "Yang et al. 2024, Algorithm 1 (arXiv 2402.11187)"
    cost = "1 for the reference, and as few sweeps as look-ahead can make of the candidates"
    defaults = {  # noqa: RUF012 - a Mapping
        "layers_per_merge": 4,
        "interval": 2,
        "threshold": 0.65,
        "rule": "sequential",
        "metric": "cosine",
        "rescale": False,
    }
    implied_by = ("layers_per_merge", "interval")

    def boundaries(self, space: SearchSpace) -> range:
        if space.options.rescale:  # scales start from any layer
            return super().boundaries(space)
        return range(space.lowest - 1, max(self._start(space).pointer, 0))

    def _start(self, space: SearchSpace) -> SearchState:
        return SearchState.start(space.num_layers, space.options)

    def first_candidates(self, space: SearchSpace) -> Sequence[Candidate]:
        return self._start(space).candidates

    def fewest_layers(self, space: SearchSpace) -> tuple[PlanLayer, ...]:
        state = self._start(space)
        while candidate := state.candidate():
            state = state.after(candidate)
        return state.layers

    def most_candidates(self, space: SearchSpace) -> int:
        return most_candidates(space.num_layers, space.options) * len(space.options.variants)

    def nothing_to_try(self, space: SearchSpace) -> str:
        if space.num_layers == 1:
            return super().nothing_to_try(space)
        size = space.options.layers_per_merge
        return no_group(space, size, space.highest - size)

    def rounds(self, space: SearchSpace, room: int, has_scout: bool) -> list[Round]:
        """One candidate a sweep: looking ahead only pays where it saves time. As many are accepted as take away what is
        to go; with a target, a try where all are, one where none is, and TRIES more, where MORE times as many are
        accepted, and most of the candidates are NEW."""
        start = self._start(space)
        none = _met(start, 0)
        accepted = max(layers_to_go(space) / (space.options.layers_per_merge - 1), 1.0)
        every = len(none) / len(space.options.variants) / accepted
        if not space.target.is_set:
            return [swept(_met(start, max(round(every), 1)), 1)]
        between = swept(_met(start, max(round(every / MORE), 1)), 1)
        return [swept(_met(start, 1), 1), swept(none, 1), *[between * NEW] * TRIES]

    def run(self, context: SearchContext) -> SearchResult:
        options = context.space.options
        return _to_target(context) if context.space.target.is_set else _walk(context, options, record=True)


STRATEGY = Laco()


def _met(state: SearchState, every: int) -> list[Candidate]:
    """The candidates that are met where one in ``every`` is accepted, 0: none."""
    met, number = list[Candidate](), 0
    while state.candidates:
        number += 1
        met += state.candidates
        state = state.after(state.candidates[0] if every and number % every == 0 else None)
    return met


def no_group(space: SearchSpace, size: int, first: int) -> str:
    """The line that says that the ``first`` merge of C = ``size`` layers would lie below L."""
    return (
        f"the first merge of {size} layers (C) below layer {space.highest} (H) would be into layer {first}, below "
        f"{space.lowest} (L), counted from 1; lower `layers_per_merge` or `lowest`, or raise `highest`"
    )


def _walk(context: SearchContext, options: SearchOptions, record: bool) -> SearchResult:
    """Algorithm 1; decisions go into the journal if they are to be recorded."""
    state, model = SearchState.start(context.space.num_layers, options), AcceptModel(options.threshold)
    while candidate := state.candidate():
        context.run.listener(CandidateStarted(candidate.pointer, candidate.merged, model.threshold))
        decision, accepted = _decide(state, _evaluations(context, state, model), model.threshold)
        if record:
            context.work.decided(len(model.decisions), decision)
        model.learn(decision)
        state = state.after(accepted)
        context.tell(decision, state.layers)
    return SearchResult(state.options, state.layers, model.decisions)


def _evaluations(context: SearchContext, state: SearchState, model: AcceptModel) -> list[Evaluation]:
    """The evaluations of ``state``'s candidates, from memory or from a sweep that starts with them and looks ahead."""
    evaluator, threshold = context.evaluator, state.options.threshold

    def known(other: SearchState) -> Outcome | None:
        found = [evaluator.known(candidate) for candidate in other.candidates]
        if None in found:
            return None
        best = _most_similar([one for one in found if one is not None])
        evaluation = found[best]
        assert evaluation is not None
        return (other.candidates[best] if _accepts(evaluation, threshold) else None,)

    while None in (found := [evaluator.known(candidate) for candidate in state.candidates]):
        depth = Depth(evaluator.room) if evaluator.is_fixed else Depth(evaluator.room, context.run.meter.pace.ratio())
        states = likely_states(state, model, depth, known)
        new = {stack_key(c.layers): c for s in states for c in s.candidates if evaluator.known(c) is None}
        evaluator.evaluate(list(new.values()), state.layers)
    return [one for one in found if one is not None]


def _accepts(evaluation: Evaluation, threshold: float) -> bool:
    """Line 7 of Algorithm 1: strictly above the threshold."""
    return evaluation.similarity is not None and evaluation.similarity > threshold


def _most_similar(evaluations: Sequence[Evaluation]) -> int:
    """Which of ``evaluations`` has the highest similarity; the first of equal ones."""
    return max(range(len(evaluations)), key=lambda i: (_similarity(evaluations[i]), -i))


def _similarity(evaluation: Evaluation) -> float:
    return float("-inf") if evaluation.similarity is None else evaluation.similarity


def _decide(
    state: SearchState, evaluations: Sequence[Evaluation], threshold: float
) -> tuple[Decision, Candidate | None]:
    """The decision on the candidates of ``state``, the most similar of which counts; and it, if it is accepted."""
    best = _most_similar(evaluations)
    candidate, evaluation = state.candidates[best], evaluations[best]
    accepted = _accepts(evaluation, threshold)
    rule, tried = competition(candidate, state.candidates, evaluations, state.options)
    similarity, reason = evaluation.similarity, evaluation.reason
    decision = Decision(candidate.pointer, candidate.merged, similarity, accepted, reason, rule, tried)
    return decision, candidate if accepted else None


def _to_target(context: SearchContext) -> SearchResult:
    """Algorithm 1 with the lowest threshold whose result the target allows, found by bisection.

    A result stays what it is for all thresholds from the highest similarity that was not above it to below the lowest
    that was; evaluated candidates are remembered, so that each try reads only what is new.
    """
    options, target, tries = context.space.options, context.space.target, itertools.count(1)

    def tried_with(threshold: float) -> SearchResult:
        context.run.listener(RoundStarted(next(tries), threshold=threshold))
        return _walk(context, options.but(threshold=threshold), record=False)

    fewer = tried_with(-1.0)
    if target.allows(fewer.layers):
        return _walk(context, _said_if_low(context, fewer.options), record=True)
    more = tried_with(METRICS[options.metric].highest)
    while (low := _lowest_merged(fewer)) < (high := _highest_apart(more)):
        middle = (low + high) / 2
        if not low <= middle < high:
            break
        tried = tried_with(middle)
        if target.allows(tried.layers):
            more = tried
        else:
            fewer = tried
    wanted = target.layers if target.layers is not None else target.fewest()
    if len(more.layers) != wanted:
        context.run.listener(
            WarningRaised(
                f"no threshold gives exactly {wanted} layers: using {len(more.layers)} "
                f"(T = {more.options.threshold:.6g}); the next lower is {len(fewer.layers)} "
                f"(T = {fewer.options.threshold:.6g})"
            )
        )
    return _walk(context, _said_if_low(context, more.options), record=True)


def _said_if_low(context: SearchContext, options: SearchOptions) -> SearchOptions:
    """``options``, after a word on a threshold that the paper does not go down to."""
    if options.metric == "cosine" and options.threshold < PAPERS_LOWEST:
        text = f"T = {options.threshold:.6g}, found for the target, is below {PAPERS_LOWEST}, the lowest of the paper's"
        context.run.listener(WarningRaised(f"{text} main results: expect a poor model"))
    return options


def _lowest_merged(found: SearchResult) -> float:
    return min((d.similarity for d in found.decisions if d.accepted and d.similarity is not None), default=-1.0)


def _highest_apart(found: SearchResult) -> float:
    return max((d.similarity for d in found.decisions if not d.accepted and d.similarity is not None), default=-1.0)
