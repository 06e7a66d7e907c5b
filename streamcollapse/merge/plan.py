"""A plan: the whole pruned model as a small document. Every layer is a mix of source layers.

The file format is ``streamcollapse.plan/1`` (docs/plan_format.md). Pure: knows no tensors and no files but its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from streamcollapse.errors import OptionError, PlanError
from streamcollapse.merge.rules import RULES, Mix
from streamcollapse.settings.declared import declared
from streamcollapse.settings.search import SearchOptions
from streamcollapse.storage.disk import write_whole

FORMAT = "streamcollapse.plan/1"
LARGEST_COEFFICIENT = 1e6  # float32 weights stay finite with room to spare


LayerKey = tuple[int, tuple[tuple[int, float], ...]]
StackKey = tuple[LayerKey, ...]


@dataclass(frozen=True)
class PlanLayer:
    """A layer of the pruned model. ``base`` (0-based source layer) gives the norms and all that depends on position."""

    base: int
    mix: Mix

    @property
    def untouched(self) -> bool:
        """Whether the layer is its base, byte for byte."""
        return dict(self.mix) == {self.base: 1.0}

    @cached_property
    def key(self) -> LayerKey:
        """What the layer is, for comparing and looking up; made once."""
        return self.base, tuple(sorted(self.mix.items()))

    def __hash__(self) -> int:
        return hash(self.key)


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


@dataclass(frozen=True)
class Plan:
    """A pruned model in terms of its source. ``merge_norms``: norms follow the mix instead of the base."""

    source_name: str
    num_source_layers: int
    fingerprint: str
    layers: tuple[PlanLayer, ...]
    merge_norms: bool = False
    search: SearchRecord | None = None

    def __hash__(self) -> int:
        return hash((self.fingerprint, self.layers, self.merge_norms))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def to_json(self) -> dict[str, Any]:
        """The document, made of JSON types only."""
        layers = [{"base": x.base, "mix": {str(s): x.mix[s] for s in sorted(x.mix)}} for x in self.layers]
        source = {
            "name": self.source_name,
            "num_hidden_layers": self.num_source_layers,
            "fingerprint": self.fingerprint,
        }
        document: dict[str, Any] = {"format": FORMAT, "source": source, "layers": layers}
        document["merge_norms"] = self.merge_norms
        if self.search is not None:
            document["search"] = self.search.to_json()
        return document

    @classmethod
    def from_json(cls, document: Any) -> Plan:
        """Parse a document. Raises PlanError, naming the entry at fault."""
        return _parse_plan(document)

    @property
    def digest(self) -> str:
        """sha256 of the document, in hexadecimal."""
        return hashlib.sha256(_laid_out(self.to_json()).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the document to ``path``, whole or not at all. Raises OutputError."""
        write_whole(Path(path), _laid_out(self.to_json()))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read and parse ``path``. Raises PlanError."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path}: not JSON: {error}") from error
        try:
            return cls.from_json(document)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def original_layers(num_layers: int) -> tuple[PlanLayer, ...]:
    """The untouched stack."""
    return tuple(PlanLayer(i, {i: 1.0}) for i in range(num_layers))


def stack_key(layers: Sequence[PlanLayer]) -> StackKey:
    """What a stack is, whatever merges led to it; equal stacks have equal keys."""
    return tuple(layer.key for layer in layers)


def collapse(
    layers: Sequence[PlanLayer], position: int, followers: int, rule: str, scale: float
) -> tuple[PlanLayer, ...]:
    """Merge ``followers`` layers after 0-based ``position`` into it by ``rule``; the rest is unchanged."""
    group = layers[position : position + followers + 1]
    merged = PlanLayer(group[0].base, RULES[rule]([layer.mix for layer in group], scale))
    return (*layers[:position], merged, *layers[position + followers + 1 :])


def _laid_out(document: dict[str, Any]) -> str:
    """JSON with a line for each layer and each decision, so that people can read it and diffs are small."""

    def entries(items: list[Any], indent: str) -> str:
        lines = [f"{indent}  {json.dumps(item, allow_nan=False)}" for item in items]
        return "[\n" + ",\n".join(lines) + f"\n{indent}]" if lines else "[]"

    parts = []
    for key, value in document.items():
        if key == "layers":
            parts.append(f'  "layers": {entries(value, "  ")}')
        elif key == "search":
            settings = [f'    "{k}": {json.dumps(v)}' for k, v in value.items() if k != "decisions"]
            settings.append(f'    "decisions": {entries(value["decisions"], "    ")}')
            parts.append('  "search": {\n' + ",\n".join(settings) + "\n  }")
        else:
            parts.append(f'  "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _said(decision: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in decision.items() if key not in OPTIONAL or value is not None}


def _parse_plan(document: Any) -> Plan:
    _keys(document, "the plan", {"format", "source", "layers"}, {"merge_norms", "search"})
    if document["format"] != FORMAT:
        raise PlanError(f"format is {document['format']}, this version reads {FORMAT}")
    source = document["source"]
    _keys(source, "source", {"name", "num_hidden_layers", "fingerprint"}, set())
    name = _typed(source, "name", str, "source")
    num_layers = _typed(source, "num_hidden_layers", int, "source")
    fingerprint = _typed(source, "fingerprint", str, "source")
    entries = _typed(document, "layers", list, "the plan")
    if num_layers < 1 or not entries:
        raise PlanError("a plan needs at least one source layer and one layer")
    layers = tuple(_parse_layer(entry, f"layers[{i}]", num_layers) for i, entry in enumerate(entries))
    for i, (lower, upper) in enumerate(pairwise(layers), 1):
        if upper.base <= lower.base:
            raise PlanError(f"layers[{i}]: base {upper.base} does not lie above base {lower.base} of the layer below")
    merge_norms = document.get("merge_norms", False)
    if not isinstance(merge_norms, bool):
        raise PlanError("merge_norms is neither true nor false")
    search = document.get("search")
    record = None if search is None else _parse_search(search, merge_norms)
    return Plan(name, num_layers, fingerprint, layers, merge_norms, record)


def _parse_layer(entry: Any, where: str, num_layers: int) -> PlanLayer:
    _keys(entry, where, {"base", "mix"}, set())
    base = _typed(entry, "base", int, where)
    mix: dict[int, float] = {}
    for key, value in _typed(entry, "mix", dict, where).items():
        if not re.fullmatch(r"0|[1-9][0-9]{0,8}", key):
            raise PlanError(f"{where}: mix names {key}, not a source layer")
        if type(value) not in (int, float) or not 0 < abs(value) <= LARGEST_COEFFICIENT:
            raise PlanError(f"{where}: the coefficient of layer {key} is {value}, not a number other than 0 up to 1e6")
        mix[int(key)] = float(value)
    if not mix:
        raise PlanError(f"{where}: mix is empty")
    beyond = [layer for layer in (base, *mix) if not 0 <= layer < num_layers]
    if beyond:
        raise PlanError(f"{where}: source layer {beyond[0]} is not among the {num_layers} layers of the source")
    return PlanLayer(base, {layer: mix[layer] for layer in sorted(mix)})


def _parse_search(search: Any, merge_norms: bool) -> SearchRecord:
    known = declared(SearchOptions).keys() - {"merge_norms"}
    _keys(search, "search", {*_ALWAYS, "calibration_sha256", "compute_dtype", "decisions"}, {*known})
    given = _USUAL | {name: search[name] for name in known & search.keys()}
    try:
        options = SearchOptions(**given, merge_norms=merge_norms)
    except OptionError as error:
        raise PlanError(f"search: {error}") from error
    entries = _typed(search, "decisions", list, "search")
    return SearchRecord(
        options,
        _typed(search, "calibration_sha256", str, "search"),
        _typed(search, "compute_dtype", str, "search"),
        tuple(_parse_decision(entry, f"search.decisions[{i}]") for i, entry in enumerate(entries)),
    )


def _parse_decision(entry: Any, where: str) -> Decision:
    _keys(entry, where, {"l", "merged", "similarity", "accepted"}, {*OPTIONAL})

    def given(value: dict[str, Any], key: str, kind: type) -> Any:
        return None if value.get(key) is None else _typed(value, key, kind, where)

    tried = given(entry, "tried", dict)
    return Decision(
        _typed(entry, "l", int, where),
        _typed(entry, "merged", int, where),
        given(entry, "similarity", float),
        _typed(entry, "accepted", bool, where),
        given(entry, "reason", str),
        given(entry, "rule", str),
        None if tried is None else {rule: given(tried, rule, float) for rule in tried},
    )


def _keys(value: Any, where: str, required: set[str], optional: set[str]) -> None:
    if not isinstance(value, dict):
        raise PlanError(f"{where} is not a JSON object")
    if missing := sorted(required - set(value)):
        raise PlanError(f"{where}: {missing[0]} is missing")
    if unknown := sorted(set(value) - required - optional):
        raise PlanError(f"{where}: {unknown[0]} is not known to this version")


def _typed(value: dict[str, Any], key: str, kind: type, where: str) -> Any:
    found = value[key]
    if kind is float and type(found) is int and abs(found) < 2**53:
        found = float(found)
    if type(found) is not kind or (isinstance(found, float) and not math.isfinite(found)):
        raise PlanError(f"{where}: {key} is {found}, expected {kind.__name__}")
    return found
