"""The layers that change their input least are dropped (ShortGPT)."""

from collections.abc import Sequence

from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.merge.record import Decision, SearchRecord
from streamcollapse.searches.strategy import Found, OnePass, SearchContext, SearchSpace


class BlockInfluence(OnePass):
    """Men et al., 2024."""

    name = "block-influence"
    summary = "drops the layers that change their input least, by the cosine of each token"
    source = "Men et al. 2024, ShortGPT (arXiv 2403.03853)"

    def layers_of(self, decision: Decision) -> str:
        return f"layer {decision.l - 1}"

    def course(self, record: SearchRecord, layers: tuple[PlanLayer, ...]) -> Sequence[tuple[PlanLayer, ...]]:
        stacks = list[tuple[PlanLayer, ...]]()
        for decision in record.decisions:
            if decision.accepted and not decision.merged and not decision.rule:
                layers = tuple(layer for layer in layers if layer.base != decision.l - 1)
                stacks.append(layers)
        return stacks

    def choose(self, context: SearchContext) -> Found:
        from streamcollapse.forward.metrics import block_influence

        influence = block_influence(context.reference, context.space.num_layers)
        return drop_least_influence(influence, context.space)


STRATEGY = BlockInfluence()


def drop_least_influence(influence: Sequence[float], space: SearchSpace) -> Found:
    """Without the layers of the least ``influence``, one for each source layer, as many as the target allows.

    Decisions come in that order, with 1 - influence as the similarity.
    """
    layers, decisions = original_layers(space.num_layers), list[Decision]()
    for i in sorted(range(space.lowest - 1, space.highest), key=lambda i: (influence[i], -i)):
        without = tuple(layer for layer in layers if layer.base != i)
        dropped = bool(without) and space.target.allows(without)
        layers = without if dropped else layers
        decisions.append(Decision(i + 1, 0, 1.0 - influence[i], dropped))
    return layers, decisions
