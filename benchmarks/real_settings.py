"""What bench_real.py searches with: every strategy of the tool, every effort, with scales and without; and how far."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from streamcollapse.merge.plan import PlanLayer
from streamcollapse.merge.record import Decision, SearchRecord
from streamcollapse.searches.registry import complete, strategies
from streamcollapse.searches.strategy import Strategy
from streamcollapse.settings.catalogue import EFFORTS
from streamcollapse.settings.search import SearchOptions

SHARES = (0.10, 0.20, 0.25, 0.33, 0.50)
SCALED = (0.20, 0.25)  # scales need a search for each size


@dataclass(frozen=True)
class Setting:
    """A way to search: ``method`` of SearchOptions, without a target."""

    name: str
    method: dict[str, Any]

    @property
    def is_nested(self) -> bool:
        """Whether a search passes the result for every other size on its way."""
        return type(self._strategy).course is not Strategy.course

    @property
    def has_effort(self) -> bool:
        """Whether it is a search that efforts differ in: greedy search."""
        return "effort" in self.method

    @property
    def _strategy(self) -> Strategy:
        return strategies()[self.method["strategy"]]

    def options(self, layers: int) -> SearchOptions:
        """The search for ``layers`` layers."""
        return SearchOptions(**self.method, target_layers=layers)

    def stack(self, layers: tuple[PlanLayer, ...], decisions: list[dict[str, Any]]) -> tuple[PlanLayer, ...]:
        """What a nested search had made of ``layers`` after accepted ``decisions``."""
        made = tuple(Decision(one["l"], one["merged"], one["similarity"], accepted=True) for one in decisions)
        record = SearchRecord(complete(self.options(1)), "", "", made)
        return self._strategy.course(record, layers)[-1]


@dataclass(frozen=True)
class Group:
    """Settings that evaluate the same candidates: ``plain``, what exchanges make of that, and scales of that, if
    anything."""

    plain: Setting
    exchanged: Setting | None = None
    scaled: Setting | None = None


def groups() -> Iterator[Group]:
    """Every strategy: those that have an effort with each of them, the others, which come first, by their defaults."""
    for name in sorted(strategies(), key=lambda name: "effort" in strategies()[name].defaults):
        if "effort" not in strategies()[name].defaults:
            yield Group(Setting(name, {"strategy": name}))
            continue
        for effort in EFFORTS:
            method: dict[str, Any] = {"strategy": name, "effort": effort, "rescale": False}
            plain = Setting(f"{name} {effort}", method)
            exchanged = Setting(f"{plain.name}, exchanges", method) if EFFORTS[effort].exchanges else None
            yield Group(plain, exchanged, Setting(f"{plain.name}, scales", method | {"rescale": True}))


def sizes(num_layers: int, shares: tuple[float, ...] = SHARES) -> list[int]:
    """The layers that stay where about each of ``shares`` goes; never the same number twice."""
    found: list[int] = []
    for share in shares:
        nearest = math.floor(num_layers * (1.0 - share) + 0.5)
        found.append(max(min(nearest, found[-1] - 1 if found else num_layers - 1), 1))
    return found
