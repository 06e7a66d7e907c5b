"""A strategy for tests, as somebody else would write one: every other layer of the range goes, from the top."""

from __future__ import annotations

from collections.abc import Sequence

from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.merge.record import Decision
from streamcollapse.searches.candidate import Candidate
from streamcollapse.searches.strategy import SearchContext, SearchResult, SearchSpace, Strategy


class EveryOther(Strategy):
    """Drops layers L + 1, L + 3, ... as long as a target allows, and says how similar each step leaves the model."""

    name = "every-other"
    summary = "drops every other layer, from the top"
    source = "nobody"
    cost = "2"
    defaults = {"metric": "token-cosine", "rescale": False}  # noqa: RUF012
    verdict = "dropped"

    def first_candidates(self, space: SearchSpace) -> Sequence[Candidate]:
        return _steps(space)

    def fewest_layers(self, space: SearchSpace) -> tuple[PlanLayer, ...]:
        return _steps(space)[-1].layers

    def most_candidates(self, space: SearchSpace) -> int:
        return len(_steps(space))

    def run(self, context: SearchContext) -> SearchResult:
        steps, decisions = _steps(context.space), list[Decision]()
        for step, found in zip(steps, context.evaluator.scores(steps, ()), strict=True):
            decision = Decision(step.pointer, step.merged, found.similarity, True, found.reason)
            context.record(decision, len(decisions), step.layers)
            decisions.append(decision)
        return SearchResult(context.space.options, steps[-1].layers, decisions)


STRATEGY = EveryOther()


def _steps(space: SearchSpace) -> list[Candidate]:
    layers, found = original_layers(space.num_layers), list[Candidate]()
    for position in range(space.highest - 1, space.lowest - 1, -2):
        layers = layers[:position] + layers[position + 1 :]
        if space.target.is_set and not space.target.allows(layers):
            break
        found.append(Candidate(position, 1, layers, ("first",)))
    return found
