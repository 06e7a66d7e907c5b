"""What strategies have in common that drop layers by what one pass over the original says of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from streamcollapse.merge.plan import Decision, PlanLayer, original_layers
from streamcollapse.searches.candidate import Candidate
from streamcollapse.searches.strategy import Found, SearchContext, SearchResult, SearchSpace, Strategy
from streamcollapse.settings.search import SearchOptions


class OnePass(Strategy):
    """Drops layers, and evaluates no candidate: it goes by the hidden states at every boundary, to a target."""

    cost = "1"
    defaults = {"rescale": False}  # noqa: RUF012 - a Mapping
    needs_target = True
    verdict = "dropped"

    def boundaries(self, space: SearchSpace) -> range:
        return range(space.num_layers + 1)

    def first_candidates(self, space: SearchSpace) -> Sequence[Candidate]:
        count = space.num_layers  # without its last layer: like those that it may come to
        return [Candidate(count - 1, 0, original_layers(count)[:-1], ())] if count > 1 else []

    def fewest_layers(self, space: SearchSpace) -> tuple[PlanLayer, ...]:
        return original_layers(1)

    def most_candidates(self, space: SearchSpace) -> int:
        return 0

    def verdict_of(self, decision: Decision, options: SearchOptions) -> str:
        return ", dropped" if decision.accepted else ", kept"

    @abstractmethod
    def choose(self, context: SearchContext) -> Found:
        """The layers that stay, and the decisions in order."""

    def run(self, context: SearchContext) -> SearchResult:
        layers, decisions = self.choose(context)
        for number, decision in enumerate(decisions):
            context.record(decision, number, layers)
        return SearchResult(context.space.options, layers, decisions)
