"""The stacks that a nested search passed on its way: one search gives every size."""

from dataclasses import replace

from streamcollapse.errors import PlanError
from streamcollapse.merge.plan import Plan, PlanLayer, original_layers
from streamcollapse.searches.registry import strategies
from streamcollapse.searches.words import is_exchange
from streamcollapse.settings.search import as_layer_count, layer_count


def course(plan: Plan) -> tuple[tuple[PlanLayer, ...], ...]:
    """The stacks on the way to ``plan``, the whole model first, its own without scales last; empty where there are
    none: a plan by hand, or a search that finds each size anew."""
    if plan.search is None or plan.search.options.strategy not in strategies():
        return ()
    strategy, whole = strategies()[plan.search.options.strategy], original_layers(plan.num_source_layers)
    stacks = [whole, *strategy.course(plan.search, whole)]
    if len(stacks[-1]) == plan.num_layers and any(is_exchange(d) for d in plan.search.decisions):
        stacks[-1] = tuple(whole[layer.base] for layer in plan.layers)
    ends_there = [layer.base for layer in stacks[-1]] == [layer.base for layer in plan.layers]
    return tuple(stacks) if len(stacks) > 1 and ends_there else ()


def sized_plan(plan: Plan, layers: int | str) -> Plan:
    """The plan of the stack of so many ``layers`` that the search of ``plan`` passed on its way; scales were found for
    its end alone. ``layers``: how many stay, how many fewer than the source has (below 0), or a share (``75%``).

    Raises OptionError where that is no number of layers, PlanError where the search passed no such stack.
    """
    num_layers = layer_count(as_layer_count(layers, "layers"), plan.num_source_layers, "layers")
    if num_layers == plan.num_layers:
        return plan
    stacks, given = {len(layers): layers for layers in course(plan)}, plan.search
    if num_layers == plan.num_source_layers:
        raise PlanError(f"{num_layers} layers are all of the source's: nothing would be pruned")
    if not stacks or given is None:
        raise PlanError(f"the plan is for {plan.num_layers} layers alone: its search passed no other sizes on its way")
    if num_layers not in stacks:
        sizes = sorted(stacks.keys() - {plan.num_source_layers})
        raise PlanError(
            f"the plan's search passed {sizes[0]} to {sizes[-1]} layers, not {num_layers}; give one of these, or "
            "search again with `target_layers`"
        )
    accepted = [number for number, decision in enumerate(given.decisions, 1) if decision.accepted]
    decisions = given.decisions[: accepted[plan.num_source_layers - num_layers - 1]]
    options = given.options.but(target_layers=num_layers, rescale=False)
    return replace(plan, layers=stacks[num_layers], search=replace(given, options=options, decisions=decisions))
