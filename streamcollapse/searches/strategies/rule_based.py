"""Groups of C layers merged from the top, I layers apart, without looking (LaCo, appendix B.7)."""

from collections.abc import Sequence

from streamcollapse.merge.plan import PlanLayer, collapse, original_layers
from streamcollapse.merge.record import Decision
from streamcollapse.searches.candidate import Candidate
from streamcollapse.searches.strategies.laco import no_group
from streamcollapse.searches.strategy import SearchContext, SearchResult, SearchSpace, Strategy
from streamcollapse.settings.search import SearchOptions


class RuleBased(Strategy):
    """Yang et al., 2024, appendix B.7."""

    name = "rule-based"
    summary = "merges groups of C layers from the top, I layers apart, without looking"
    source = "Yang et al. 2024, appendix B.7"
    cost = "1 for the reference, up to 1 to say how similar each step leaves the model"
    defaults = {  # noqa: RUF012 - a Mapping
        "layers_per_merge": 4,
        "interval": 2,
        "rule": "sequential",
        "metric": "cosine",
        "rescale": False,
    }
    one_rule = True

    def first_candidates(self, space: SearchSpace) -> Sequence[Candidate]:
        return groups_from_the_top(space)

    def must_fit(self, space: SearchSpace) -> Sequence[Candidate]:
        return groups_from_the_top(space)

    def fewest_layers(self, space: SearchSpace) -> tuple[PlanLayer, ...]:
        steps = groups_from_the_top(space)
        return steps[-1].layers if steps else original_layers(space.num_layers)

    def most_candidates(self, space: SearchSpace) -> int:
        return len(groups_from_the_top(space))

    def nothing_to_try(self, space: SearchSpace) -> str:
        together = space.options.layers_per_merge
        first = space.highest - together + 1
        if space.num_layers == 1:
            return super().nothing_to_try(space)
        if first < space.lowest:
            return no_group(space, together, first)
        return "no group of layers can be merged within the target; lower `layers_per_merge`, or let more go"

    def verdict_of(self, decision: Decision, options: SearchOptions) -> str:
        return ", merged"

    def run(self, context: SearchContext) -> SearchResult:
        steps, decisions = groups_from_the_top(context.space), list[Decision]()
        evaluations = context.evaluator.scores(steps, ())
        for number, (step, evaluation) in enumerate(zip(steps, evaluations, strict=True)):
            decision = Decision(step.pointer, step.merged, evaluation.similarity, True, evaluation.reason)
            context.record(decision, number, step.layers)
            decisions.append(decision)
        return SearchResult(context.space.options, steps[-1].layers, decisions)


STRATEGY = RuleBased()


def groups_from_the_top(space: SearchSpace) -> list[Candidate]:
    """The stack after each merge of C layers, the next group I layers below (paper, appendix B.7).

    The paper's groups (29-32), (21-24), (13-16) of 32 layers are C = 4, I = 4, L = 13.
    """
    options, target = space.options, space.target
    variant, layers, found = options.variants[0], original_layers(space.num_layers), list[Candidate]()
    pointer = space.highest - options.layers_per_merge + 1
    while pointer >= space.lowest:
        merged = options.layers_per_merge - 1
        layers = collapse(layers, pointer - 1, merged, variant.rule, variant.scale)
        if target.is_set and not target.allows(layers):
            break
        found.append(Candidate(pointer, merged, layers, (variant.label,)))
        pointer -= options.layers_per_merge + options.interval
    return found
