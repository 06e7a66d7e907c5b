"""What a plan says of the search that made it: its settings, and every decision in order. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from streamcollapse.errors import OptionError, PlanError
from streamcollapse.settings.declared import declared
from streamcollapse.settings.search import SearchOptions

# Settings of a search as plans say them: these first and always; the others where they are not what was usual before
# there was a choice. Settings that come later are left out where they have their default.
_ALWAYS = ("rule", "rdsc_scale", "layers_per_merge", "lowest", "highest", "interval", "threshold")
_USUAL: dict[str, Any] = {
    "strategy": "laco",
    "target_layers": None,
    "target_ratio": None,
    "metric": "cosine",
    "rescale": False,
    "merges_per_round": 1,
    "effort": "thorough",
}
OPTIONAL = ("reason", "rule", "tried")  # fields of a decision that not every search fills


@dataclass(frozen=True)
class Decision:
    """One candidate of the search: 1-based layer ``l``, its ``merged`` followers, and what came of it.

    ``similarity`` is None where it could not be computed; ``reason`` then says why. Where several rules competed,
    ``rule`` is the one whose similarity it is, and ``tried`` has those of all.
    """

    l: int  # noqa: E741 - the paper's letter
    merged: int
    similarity: float | None
    accepted: bool
    reason: str | None = None
    rule: str | None = None
    tried: Mapping[str, float | None] | None = None


@dataclass(frozen=True)
class SearchRecord:
    """The complete settings of the search that made a plan, what it was calibrated on and computed in, and its
    decisions in order. ``merge_norms`` of the settings is the plan's own."""

    options: SearchOptions
    calibration_sha256: str
    compute_dtype: str
    decisions: tuple[Decision, ...]

    def to_json(self) -> dict[str, Any]:
        """As a plan has it, made of JSON types."""
        said = {name: getattr(self.options, name) for name in _ALWAYS}
        said |= {"calibration_sha256": self.calibration_sha256, "compute_dtype": self.compute_dtype}
        said["decisions"] = [_said(asdict(d)) for d in self.decisions]
        for name, setting in declared(SearchOptions).items():
            value = getattr(self.options, name)
            if name not in said and name != "merge_norms" and value != _USUAL.get(name, setting.default):
                said[name] = value
        return said


def _said(decision: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in decision.items() if key not in OPTIONAL or value is not None}


def parse_search(search: Any, merge_norms: bool) -> SearchRecord:
    """The record that ``SearchRecord.to_json`` gave. Raises PlanError, naming the entry at fault."""
    known = declared(SearchOptions).keys() - {"merge_norms"}
    check_keys(search, "search", {*_ALWAYS, "calibration_sha256", "compute_dtype", "decisions"}, {*known})
    given = _USUAL | {name: search[name] for name in known & search.keys()}
    try:
        options = SearchOptions(**given, merge_norms=merge_norms)
    except OptionError as error:
        raise PlanError(f"search: {error}") from error
    entries = typed(search, "decisions", list, "search")
    return SearchRecord(
        options,
        typed(search, "calibration_sha256", str, "search"),
        typed(search, "compute_dtype", str, "search"),
        tuple(_parse_decision(entry, f"search.decisions[{i}]") for i, entry in enumerate(entries)),
    )


def _parse_decision(entry: Any, where: str) -> Decision:
    check_keys(entry, where, {"l", "merged", "similarity", "accepted"}, {*OPTIONAL})

    def given(value: dict[str, Any], key: str, kind: type) -> Any:
        return None if value.get(key) is None else typed(value, key, kind, where)

    tried = given(entry, "tried", dict)
    return Decision(
        typed(entry, "l", int, where),
        typed(entry, "merged", int, where),
        given(entry, "similarity", float),
        typed(entry, "accepted", bool, where),
        given(entry, "reason", str),
        given(entry, "rule", str),
        None if tried is None else {rule: given(tried, rule, float) for rule in tried},
    )


def check_keys(value: Any, where: str, required: set[str], optional: set[str]) -> None:
    """Raise PlanError unless ``value`` is an object with the ``required`` keys, and others only of ``optional``."""
    if not isinstance(value, dict):
        raise PlanError(f"{where} is not a JSON object")
    if missing := sorted(required - set(value)):
        raise PlanError(f"{where}: {missing[0]} is missing")
    if unknown := sorted(set(value) - required - optional):
        raise PlanError(f"{where}: {unknown[0]} is not known to this version")


def typed(value: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """``value[key]``, which must be of ``kind``; a number must be finite. Raises PlanError."""
    found = value[key]
    if kind is float and type(found) is int and abs(found) < 2**53:
        found = float(found)
    if type(found) is not kind or (isinstance(found, float) and not math.isfinite(found)):
        raise PlanError(f"{where}: {key} is {found}, expected {kind.__name__}")
    return found
