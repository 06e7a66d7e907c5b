"""Complete settings of a search, as a strategy gets them."""

from __future__ import annotations

from typing import Any

from streamcollapse.searches.registry import complete
from streamcollapse.settings.search import SearchOptions


def method(*values: Any, **given: Any) -> SearchOptions:
    """``SearchOptions`` with what the strategy fills in."""
    return complete(SearchOptions(*values, **given))
