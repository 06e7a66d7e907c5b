"""The search of a job: from the reference pass to the layers of the pruned model, by any of the strategies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from streamcollapse.forward.influence import angular_distances, block_influence
from streamcollapse.forward.reference import Reference
from streamcollapse.jobs.candidates import Evaluator, decide
from streamcollapse.jobs.evaluations import Evaluation
from streamcollapse.jobs.finding import Found, Search
from streamcollapse.jobs.opening import Job
from streamcollapse.jobs.rescaling import rescaled
from streamcollapse.jobs.targets import target_of
from streamcollapse.jobs.workplace import WorkPlace
from streamcollapse.merge.plan import Decision, PlanLayer
from streamcollapse.progress import CandidateStarted, StackChanged, WarningRaised
from streamcollapse.strategy.catalogue import METRICS
from streamcollapse.strategy.collapse import Candidate, CollapseOptions, CollapseState
from streamcollapse.strategy.direct import drop_least_influence, drop_least_turning, groups_from_the_top
from streamcollapse.strategy.greedy import GreedyState
from streamcollapse.strategy.odds import Odds


def run_search(
    job: Job, options: CollapseOptions, reference: Reference, evaluator: Evaluator, place: WorkPlace
) -> Found:
    """Find the layers of the pruned model. Raises OptionError where the target is none for this model."""
    fitted = options.for_model(job.num_layers)
    search = Search(job, fitted, target_of(job, options), reference, evaluator, place)
    job.listener(StackChanged(tuple(1 for _ in range(job.num_layers))))
    found = _STRATEGIES[options.strategy](search)
    if len(found.layers) == job.num_layers:
        job.listener(WarningRaised("no merge was accepted: the result is the source as it is"))
        return found
    return rescaled(search, found) if fitted.rescale else found


def _laco(search: Search) -> Found:
    return _to_target(search) if search.target.is_set else _collapse(search, search.options, keep=True)


def _collapse(search: Search, options: CollapseOptions, keep: bool) -> Found:
    """Algorithm 1; decisions go into the journal if they are to be kept."""
    state, odds = CollapseState.start(search.job.num_layers, options), Odds(options.threshold)
    while candidate := state.candidate():
        search.job.listener(CandidateStarted(candidate.pointer, candidate.merged, odds.threshold))
        decision, accepted = decide(state, search.evaluator.evaluations(state, odds), odds.threshold)
        if keep:
            search.place.decided(len(odds.decisions), decision)
        odds.learn(decision)
        state = state.after(accepted)
        search.tell(decision, state.layers)
    return Found(state.options, state.layers, odds.decisions)


def _to_target(search: Search) -> Found:
    """Algorithm 1 with the lowest threshold whose result the target allows, found by bisection.

    A result stays what it is for all thresholds from the highest similarity that was not above it to below the lowest
    that was; evaluated candidates are remembered, so that each try reads only what is new.
    """
    options, target = search.options, search.target
    fewer = _collapse(search, replace(options, threshold=-1.0), keep=False)
    if target.allows(fewer.layers):
        return _collapse(search, fewer.options, keep=True)
    more = _collapse(search, replace(options, threshold=METRICS[options.metric].highest), keep=False)
    while (low := _lowest_merged(fewer)) < (high := _highest_apart(more)):
        middle = (low + high) / 2
        if not low <= middle < high:
            break
        tried = _collapse(search, replace(options, threshold=middle), keep=False)
        if target.allows(tried.layers):
            more = tried
        else:
            fewer = tried
    wanted = target.layers if target.layers is not None else target.fewest()
    if len(more.layers) != wanted:
        search.job.listener(
            WarningRaised(
                f"no threshold gives {wanted} layers: {len(more.layers)} at T = {more.options.threshold:.6g}, "
                f"{len(fewer.layers)} at {fewer.options.threshold:.6g}; the former is taken"
            )
        )
    return _collapse(search, more.options, keep=True)


def _lowest_merged(found: Found) -> float:
    return min((d.similarity for d in found.decisions if d.accepted and d.similarity is not None), default=-1.0)


def _highest_apart(found: Found) -> float:
    return max((d.similarity for d in found.decisions if not d.accepted and d.similarity is not None), default=-1.0)


def _greedy(search: Search) -> Found:
    target, options, decisions = search.target, search.options, list[Decision]()
    state = GreedyState.start(search.job.num_layers, options, target)
    threshold = -math.inf if target.is_set else options.threshold
    while state.candidates:
        search.job.listener(CandidateStarted(state.candidates[0].pointer, 1, None if target.is_set else threshold))
        evaluations = search.evaluator.scores(state.candidates, state.layers)
        together = state.together([one.similarity for one in evaluations], options.merges_per_round)
        if not together:
            first, why = state.candidates[0], evaluations[0].reason
            decision = Decision(first.pointer, first.merged, None, False, why)
            search.keep(decision, len(decisions), state.layers)
            return Found(options, state.layers, [*decisions, decision])
        stacks = [stack for _, stack in together]
        joint = [one.similarity for one in search.evaluator.scores(stacks, state.layers)]
        good = [s is not None and s > threshold for s in joint]
        taken = good.index(False) if False in good else len(good)
        told = together[:taken] or together[:1]
        for (candidate, stack), similarity in zip(told, joint, strict=False):
            rule, tried = _competition(candidate, state.candidates, evaluations, options)
            decision = Decision(candidate.pointer, candidate.merged, similarity, taken > 0, None, rule, tried)
            search.keep(decision, len(decisions), stack.layers if taken else state.layers)
            decisions.append(decision)
        state = state.after(together[taken - 1][1] if taken else None)
    return Found(options, state.layers, decisions)


def _competition(
    taken: Candidate, candidates: Sequence[Candidate], evaluations: Sequence[Evaluation], options: CollapseOptions
) -> tuple[str | None, dict[str, float | None] | None]:
    """Where rules compete, the one of ``taken``, and how similar each of them is at its place alone."""
    if len(options.variants) == 1:
        return None, None
    pairs = zip(candidates, evaluations, strict=True)
    there = {label: e.similarity for c, e in pairs if c.pointer == taken.pointer for label in c.rules}
    return taken.rule, {v.label: there[v.label] for v in options.variants if v.label in there}


def _rule_based(search: Search) -> Found:
    steps = groups_from_the_top(search.job.num_layers, search.options, search.target)
    decisions = []
    evaluations = search.evaluator.scores(steps, ())
    for number, (step, evaluation) in enumerate(zip(steps, evaluations, strict=True)):
        decision = Decision(step.pointer, step.merged, evaluation.similarity, True, evaluation.reason)
        search.keep(decision, number, step.layers)
        decisions.append(decision)
    return Found(search.options, steps[-1].layers, decisions)


def _block_influence(search: Search) -> Found:
    influence = block_influence(search.reference, search.job.num_layers)
    return _chosen(search, *drop_least_influence(influence, search.options, search.target))


def _angular(search: Search) -> Found:
    num_layers = search.job.num_layers

    def distances(length: int) -> list[float]:
        return angular_distances(search.reference, num_layers, length)

    return _chosen(search, *drop_least_turning(distances, num_layers, search.options, search.target))


def _chosen(search: Search, layers: tuple[PlanLayer, ...], decisions: list[Decision]) -> Found:
    for number, decision in enumerate(decisions):
        search.keep(decision, number, layers)
    return Found(search.options, layers, decisions)


_STRATEGIES: dict[str, Callable[[Search], Found]] = {
    "laco": _laco,
    "greedy": _greedy,
    "rule-based": _rule_based,
    "block-influence": _block_influence,
    "angular": _angular,
}
