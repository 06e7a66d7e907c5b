"""The step after a search that drops layers: each run of layers that went is tried a layer higher and a layer lower.

A greedy search never takes a layer back, and the default one tells merges apart by a part of the tokens, which is not
enough where they are nearly alike: what lies together then ends up a layer off, or with one layer apart. So the end is
compared by four times as many tokens with its neighbours, and exchanged for the best of them as long as that is better
(EvoPress, Sieberling et al. 2024, exchanges levels of layers in the same way, at random).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.merge.record import Decision
from streamcollapse.progress import RoundStarted
from streamcollapse.searches.candidate import Candidate
from streamcollapse.searches.strategy import SearchContext, SearchResult, SearchSpace
from streamcollapse.searches.work import Round, layers_to_go, swept
from streamcollapse.settings.catalogue import EFFORTS
from streamcollapse.settings.search import SearchOptions

MOST = 3  # rounds
_EXPECTED = 5  # candidates: the end itself, and the neighbours of two runs


def is_exchanging(options: SearchOptions) -> bool:
    """Whether a search by ``options`` of a strategy that merges by rounds ends in exchanges: where layers are dropped,
    and the effort says so."""
    drops = {variant.rule for variant in options.variants} == {"first"}
    return drops and EFFORTS[options.effort].exchanges > 0 and options.merges_per_round == 1


def neighbours(layers: Sequence[PlanLayer], num_layers: int, bounds: tuple[int, int]) -> list[Candidate]:
    """The stacks in which one run of layers that went lies a layer higher or lower. ``bounds``: the lowest and the
    layer above the highest that may go, from 0."""
    stay = {layer.base for layer in layers}
    gone = [number for number in range(num_layers) if number not in stay]
    found: dict[frozenset[int], Candidate] = {}
    for first in (number for number in gone if number - 1 in stay or number == 0):
        last = next(number for number in range(first, num_layers + 1) if number + 1 not in gone)
        for back, instead in ((first, last + 1), (last, first - 1)):
            if instead in stay and bounds[0] <= instead < bounds[1]:
                key = frozenset({*gone} - {back} | {instead})
                found.setdefault(key, _candidate(key, num_layers, f"exchange: {instead} instead of {back}"))
    return list(found.values())


def _candidate(gone: frozenset[int], num_layers: int, words: str) -> Candidate:
    layers = tuple(layer for layer in original_layers(num_layers) if layer.base not in gone)
    return Candidate(max(min(gone), 1), 0, layers, (words,))


def exchanged(context: SearchContext, found: SearchResult) -> SearchResult:
    """``found``, whose layers are the source's own, with the exchanges that make it more similar by more tokens, and a
    decision for each."""
    space, evaluator, decisions = context.space, context.evaluator.by_more_tokens, list(found.decisions)
    count, layers = space.num_layers, found.layers
    assert space.options.highest is not None
    bounds = space.options.lowest, space.options.highest
    for number in range(1, MOST + 1):
        gone = frozenset(range(count)) - {layer.base for layer in layers}
        if not gone:
            break
        tried = [one for one in neighbours(layers, count, bounds) if _is_allowed(space, one)]
        tried = [_candidate(gone, count, "as it is"), *tried]
        context.run.listener(RoundStarted(number, MOST, len(tried)))
        scores = [one.similarity or -1.0 for one in evaluator.scores(tried, layers)]
        taken = tried[scores.index(max(scores))]
        if taken is tried[0] or (context.limit is not None and context.limit.refuses(taken.layers) is not None):
            break
        layers = taken.layers
        decision = Decision(taken.pointer, 0, max(scores), True, None, taken.rule)
        context.record(decision, len(decisions), layers)
        decisions.append(decision)
    return SearchResult(found.options, layers, decisions)


def _is_allowed(space: SearchSpace, candidate: Candidate) -> bool:
    return not space.target.is_set or space.target.allows(candidate.layers)


def exchange_rounds(space: SearchSpace, room: int, times: float) -> list[Round]:
    """What exchanges are expected to compute, where judging by more tokens takes ``times`` as long as usual."""
    count, gone = space.num_layers, layers_to_go(space)
    first = (count - gone) // 2
    middle = _candidate(frozenset(range(first, first + gone)), count, "")
    return [replace(swept([middle] * _EXPECTED, room), judgements=_EXPECTED * times)]
