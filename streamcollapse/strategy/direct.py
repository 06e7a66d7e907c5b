"""Strategies that need no search: from a rule, or from what one pass over the original says of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from streamcollapse.merge.plan import Decision, PlanLayer, collapse, original_layers
from streamcollapse.strategy.collapse import Candidate, CollapseOptions
from streamcollapse.strategy.target import Target

Chosen = tuple[tuple[PlanLayer, ...], list[Decision]]


def groups_from_the_top(num_layers: int, options: CollapseOptions, target: Target) -> list[Candidate]:
    """The stack after each merge of C layers, the next group I layers below (paper, appendix B.7).

    The paper's groups (29-32), (21-24), (13-16) of 32 layers are C = 4, I = 4, L = 13.
    """
    fitted = options.for_model(num_layers)
    assert fitted.highest is not None
    variant, layers, found = fitted.variants[0], original_layers(num_layers), list[Candidate]()
    pointer = fitted.highest - fitted.layers_per_merge + 1
    while pointer >= fitted.lowest:
        merged = fitted.layers_per_merge - 1
        layers = collapse(layers, pointer - 1, merged, variant.rule, variant.scale)
        if target.is_set and not target.allows(layers):
            break
        found.append(Candidate(pointer, merged, layers, (variant.label,)))
        pointer -= fitted.layers_per_merge + fitted.interval
    return found


def drop_least_influence(influence: Sequence[float], options: CollapseOptions, target: Target) -> Chosen:
    """Without the layers of the least ``influence``, one for each source layer, as many as the target allows.

    Decisions come in that order, with 1 - influence as the similarity.
    """
    fitted = options.for_model(len(influence))
    assert fitted.highest is not None
    layers, decisions = original_layers(len(influence)), list[Decision]()
    for i in sorted(range(fitted.lowest - 1, fitted.highest), key=lambda i: (influence[i], -i)):
        without = tuple(layer for layer in layers if layer.base != i)
        dropped = bool(without) and target.allows(without)
        layers = without if dropped else layers
        decisions.append(Decision(i + 1, 0, 1.0 - influence[i], dropped))
    return layers, decisions


def drop_least_turning(
    distances: Callable[[int], Sequence[float]], num_layers: int, options: CollapseOptions, target: Target
) -> Chosen:
    """Without the longest block that the target allows: of those, the one with the least of ``distances(length)``, an
    entry for each source layer that a block can begin with.

    Decisions are the blocks of that length, from the bottom, with 1 - distance as the similarity.
    """
    fitted = options.for_model(num_layers)
    assert fitted.highest is not None
    whole = original_layers(num_layers)

    def without(start: int, length: int) -> tuple[PlanLayer, ...]:
        return whole[:start] + whole[start + length :]

    for length in range(num_layers - 1, 0, -1):
        starts = range(fitted.lowest - 1, fitted.highest - length + 1)
        allowed = [start for start in starts if target.allows(without(start, length))]
        if allowed:
            found = distances(length)
            best = min(allowed, key=lambda start: found[start])
            decisions = [Decision(s + 1, length, 1.0 - found[s], s == best) for s in starts]
            return without(best, length), decisions
    return whole, []
