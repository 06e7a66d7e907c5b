"""The block of neighbouring layers between whose ends the last token turns least is dropped (Gromov et al., 2024)."""

from collections.abc import Callable, Sequence

from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.merge.record import Decision
from streamcollapse.searches.strategy import Found, OnePass, SearchContext, SearchSpace


class Angular(OnePass):
    """Gromov et al., 2024."""

    name = "angular"
    summary = "drops the block of neighbouring layers between whose ends the last token turns least"
    source = "Gromov et al. 2024 (arXiv 2403.17887)"

    def layers_of(self, decision: Decision) -> str:
        return f"layers {decision.l - 1}-{decision.l + decision.merged - 2}"

    def choose(self, context: SearchContext) -> Found:
        from streamcollapse.forward.metrics import angular_distances

        num_layers = context.space.num_layers
        return drop_least_turning(
            lambda length: angular_distances(context.reference, num_layers, length), context.space
        )


STRATEGY = Angular()


def drop_least_turning(distances: Callable[[int], Sequence[float]], space: SearchSpace) -> Found:
    """Without the longest block that the target allows: of those, the one with the least of ``distances(length)``, an
    entry for each source layer that a block can begin with.

    Decisions are the blocks of that length, from the bottom, with 1 - distance as the similarity.
    """
    whole = original_layers(space.num_layers)

    def without(start: int, length: int) -> tuple[PlanLayer, ...]:
        return whole[:start] + whole[start + length :]

    for length in range(space.num_layers - 1, 0, -1):
        starts = range(space.lowest - 1, space.highest - length + 1)
        allowed = [start for start in starts if space.target.allows(without(start, length))]
        if allowed:
            found = distances(length)
            best = min(allowed, key=lambda start: found[start])
            decisions = [Decision(s + 1, length, 1.0 - found[s], s == best) for s in starts]
            return without(best, length), decisions
    return whole, []
