"""Complete settings of a search, as a strategy gets them."""

from __future__ import annotations

from typing import Any

from streamcollapse.merge.plan import Plan, original_layers
from streamcollapse.searches.registry import complete
from streamcollapse.settings.search import SearchOptions


def method(*values: Any, **given: Any) -> SearchOptions:
    """``SearchOptions`` with what the strategy fills in."""
    return complete(SearchOptions(*values, **given))


def without_last(source_name: str, num_layers: int, fingerprint: str) -> Plan:
    """The plan that drops the last layer."""
    return Plan(source_name, num_layers, fingerprint, original_layers(num_layers)[:-1])


def unchanged(source_name: str, num_layers: int, fingerprint: str) -> Plan:
    """The plan that keeps every layer as it is."""
    return Plan(source_name, num_layers, fingerprint, original_layers(num_layers))
