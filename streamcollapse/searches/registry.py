"""The strategies there are, and a search's settings made complete.

A strategy is found where it is: every module of searches/strategies/, and what installed packages name under the entry
point ``streamcollapse.strategies``. Listing them needs no torch.
"""

import pkgutil
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from streamcollapse.errors import OptionError
from streamcollapse.searches import strategies as _folder
from streamcollapse.searches.candidate import Target
from streamcollapse.searches.strategy import Strategy
from streamcollapse.settings.catalogue import BEST, EFFORTS, METRICS
from streamcollapse.settings.declared import declared, unknown
from streamcollapse.settings.search import SearchOptions

ENTRY_POINTS = "streamcollapse.strategies"
# settings that only some strategies go by, and what a plan says of them where the strategy does not
OWNED: dict[str, Any] = {
    "layers_per_merge": 4,
    "interval": 2,
    "threshold": 0.65,
    "rule": "first",
    "metric": "cosine",
    "rescale": False,
    "merges_per_round": 1,
    "effort": "thorough",
}


@cache
def strategies() -> dict[str, Strategy]:
    """Every strategy by name, the default first."""
    modules = [import_module(f"{_folder.__name__}.{module.name}") for module in pkgutil.iter_modules(_folder.__path__)]
    found: list[Strategy] = [module.STRATEGY for module in modules]
    found += [point.load() for point in entry_points(group=ENTRY_POINTS)]
    return {one.name: one for one in sorted(found, key=lambda one: (not one.is_default, one.name))}


def strategy_of(options: SearchOptions) -> Strategy:
    """The strategy that ``options`` name or imply. Raises OptionError for one that does not exist."""
    if options.strategy is None:
        return implied(options)
    found = strategies().get(options.strategy)
    if found is None:
        raise OptionError(f"strategy {unknown(options.strategy, strategies(), quoted=True)}")
    return found


def implied(options: SearchOptions) -> Strategy:
    """The strategy where none is named: one whose own settings are given, else the default."""
    given = options.given
    meant = (one for one in strategies().values() if any(name in given for name in one.implied_by))
    return next(meant, next(iter(strategies().values())))


def complete(options: SearchOptions) -> SearchOptions:
    """``options`` with the strategy named and its defaults filled in. Raises OptionError where they contradict each
    other."""
    strategy = strategy_of(options)
    filled = options.but(**{**OWNED, **strategy.defaults, **options.given, "strategy": strategy.name})
    if strategy.needs_target and not filled.has_target:
        ways = ["target_layers", "target_ratio", "target_memory", *["max_loss"] * strategy.goes_by_loss]
        raise OptionError(
            f"strategy {strategy.name} goes on until a target; give `{'`, `'.join(ways[:-1])}` or `{ways[-1]}`"
        )
    if filled.max_loss is not None and not filled.has_size and not strategy.goes_by_loss:
        able = ", ".join(one.name for one in strategies().values() if one.goes_by_loss)
        raise OptionError(
            f"strategy {strategy.name} cannot go by the loss; give `target_layers` with `max_loss`, or one of {able}"
        )
    if strategy.one_rule and ("," in filled.rule or filled.rule == BEST):
        raise OptionError(f"rule is {filled.rule}, but strategy {strategy.name} takes one rule: it compares none")
    highest = METRICS[filled.metric].highest
    if filled.threshold > highest:
        raise OptionError(
            f"threshold (T) is {filled.threshold}; similarity by {filled.metric} lies between -1 and {highest:g}"
        )
    return filled


def usual_repair(options: SearchOptions) -> str:
    """How what the complete ``options`` prune to is repaired where nobody says it: a method of settings/run.py."""
    return EFFORTS[options.effort].repair if strategy_of(options).has_effort else "none"


def ignored_settings(options: SearchOptions) -> list[str]:
    """A line for each setting of the complete ``options`` that is not the usual one and makes no difference."""
    strategy, known = strategy_of(options), declared(SearchOptions)
    lines = []
    for name in ("layers_per_merge", "interval", "threshold", "merges_per_round", "effort"):
        value = getattr(options, name)
        if value == strategy.defaults.get(name, OWNED[name]) or strategy.uses(name, options):
            continue
        why = "where there is a target" if name in strategy.defaults else f"by strategy {strategy.name}"
        lines.append(f"{known[name].label} = {value} is ignored {why}")
    return lines


def describe() -> dict[str, dict[str, Any]]:
    """What each strategy says of itself, as JSON types."""
    return {
        name: {
            "summary": one.summary,
            "source": one.source,
            "reads": one.cost,
            "defaults": dict(one.defaults),
            "samples": one.samples,
            "needs_target": one.needs_target,
        }
        for name, one in strategies().items()
    }


def make_target(options: SearchOptions, parameters: tuple[int, ...], total: int) -> Target:
    """The target of ``options`` in terms of a model: ``parameters`` of each layer, ``total`` of the whole. Raises
    OptionError where it is none for it."""
    layers = options.target_layers
    assert layers is None or isinstance(layers, int), "fitted to the model"
    return Target(layers, options.target_ratio, parameters, total)
