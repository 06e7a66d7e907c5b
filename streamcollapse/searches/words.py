"""What searches did, in words for people."""

from streamcollapse.errors import printable
from streamcollapse.merge.plan import Plan
from streamcollapse.merge.record import Decision, SearchRecord
from streamcollapse.searches.registry import strategies
from streamcollapse.searches.strategy import Strategy, method_line
from streamcollapse.settings.search import SearchOptions


def spoken_strategy(options: SearchOptions) -> Strategy:
    """The strategy of ``options``; where this machine does not have it, the default speaks for it."""
    known = strategies()
    return known.get(options.strategy or "", next(iter(known.values())))


def method_of(options: SearchOptions) -> str:
    """The settings that make a difference to the result, in one line."""
    strategy = strategies().get(options.strategy or "")
    return printable(options.strategy if strategy is None else method_line(strategy, options))


def said_of(plan: Plan) -> str:
    """How ``plan`` came about, in one line: its search and what mended the result, or what it does."""
    from streamcollapse.merge.composing import in_words  # which imports torch

    if plan.search is None:
        return in_words(plan)
    is_repaired = plan.repair is not None and plan.repair.is_kept
    return method_of(plan.search.options) + ", repaired" * is_repaired + ", healed" * (plan.heal is not None)


def decision_line(decision: Decision, search: SearchRecord) -> str:
    """One decision in words."""
    if is_exchange(decision):
        return f"{decision.rule}: similarity {decision.similarity or 0.0:.4f} by more tokens"
    if is_scale(decision):
        return f"layer {decision.l - 1}: {decision.rule}, similarity {decision.similarity or 0.0:.4f}"
    strategy = spoken_strategy(search.options)
    layers = strategy.layers_of(decision)
    if decision.similarity is None:
        return f"{layers}: skipped, {printable(decision.reason)}"
    by = "" if decision.rule is None else f" by {printable(decision.rule)}"
    return f"{layers}: similarity {decision.similarity:.4f}{strategy.verdict_of(decision, search.options)}{by}"


def is_exchange(decision: Decision) -> bool:
    """Whether a layer went in the place of another."""
    return decision.rule is not None and decision.rule.startswith("exchange: ")


def is_scale(decision: Decision) -> bool:
    """Whether it is about the scale of a layer, not a merge."""
    return decision.rule is not None and decision.rule.startswith("scale ")
