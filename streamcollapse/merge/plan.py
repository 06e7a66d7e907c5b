"""A plan: the whole pruned model as a small document. Every layer is a mix of source layers.

The file format is ``streamcollapse.plan/1`` (docs/plan_format.md). Pure: knows no tensors and no files but its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from streamcollapse.errors import PlanError
from streamcollapse.merge.healed import HealRecord
from streamcollapse.merge.record import SearchRecord, check_keys, parse_search, typed
from streamcollapse.merge.repaired import RepairRecord
from streamcollapse.merge.rules import RULES, Mix
from streamcollapse.storage.disk import write_whole
from streamcollapse.storage.staging import make_parents

FORMAT = "streamcollapse.plan/1"
PLAN_FILE = "streamcollapse_plan.json"  # in the directory of a pruned model
LARGEST_COEFFICIENT = 1e6  # float32 weights stay finite with room to spare


LayerKey = tuple[int, tuple[tuple[int, float], ...], tuple[tuple[str, str], ...]]
StackKey = tuple[LayerKey, ...]


NO_REFITS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class PlanLayer:
    """A layer of the pruned model. ``base`` (0-based source layer) gives the norms and all that depends on position.

    ``refits``: tensors that were fitted anew, instead of mixed; by suffix, the sha256 of their bytes as stored. Those
    of the top layer may name tensors outside the stack that come after it, each with a slash before its name.
    """

    base: int
    mix: Mix
    refits: Mapping[str, str] = field(default_factory=lambda: NO_REFITS)

    @property
    def untouched(self) -> bool:
        """Whether the layer is its base, byte for byte."""
        return dict(self.mix) == {self.base: 1.0} and not self.refits

    @property
    def after(self) -> dict[str, str]:
        """Those of ``refits`` that are outside the stack."""
        return {name: digest for name, digest in self.refits.items() if name.startswith("/")}

    @cached_property
    def key(self) -> LayerKey:
        """What the layer is, for comparing and looking up; made once."""
        return self.base, tuple(sorted(self.mix.items())), tuple(sorted(self.refits.items()))

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class Plan:
    """A pruned model in terms of its source. ``merge_norms``: norms follow the mix instead of the base. ``origin``: the
    file that it was read from, beside which the tensors of repaired and healed layers are."""

    source_name: str
    num_source_layers: int
    fingerprint: str
    layers: tuple[PlanLayer, ...]
    merge_norms: bool = False
    search: SearchRecord | None = None
    repair: RepairRecord | None = None
    heal: HealRecord | None = None
    origin: Path | None = field(default=None, compare=False, repr=False)

    def __hash__(self) -> int:
        return hash((self.fingerprint, self.layers, self.merge_norms))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def to_json(self) -> dict[str, Any]:
        """The document, made of JSON types only."""
        layers = [_layer_said(layer) for layer in self.layers]
        source = {
            "name": self.source_name,
            "num_hidden_layers": self.num_source_layers,
            "fingerprint": self.fingerprint,
        }
        document: dict[str, Any] = {"format": FORMAT, "source": source, "layers": layers}
        document["merge_norms"] = self.merge_norms
        if self.search is not None:
            document["search"] = self.search.to_json()
        if self.repair is not None:
            document["repair"] = self.repair.to_json()
        if self.heal is not None:
            document["heal"] = self.heal.to_json()
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
        """Write the document to ``path``, whole or not at all; directories above it are made. Raises OutputError."""
        make_parents(Path(path))
        write_whole(Path(path), _laid_out(self.to_json()))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read and parse ``path``, or the plan in the directory of a pruned model. Raises PlanError."""
        try:
            if Path(path).is_dir():
                path = Path(path) / PLAN_FILE
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path}: not JSON: {error}") from error
        try:
            return replace(cls.from_json(document), origin=Path(path))
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


_LISTS = {"search": "decisions", "repair": "layers"}  # what of them has a line for each entry


def _laid_out(document: dict[str, Any]) -> str:
    """JSON with a line for each layer and each decision, so that people can read it and diffs are small."""

    def entries(items: list[Any], indent: str) -> str:
        lines = [f"{indent}  {json.dumps(item, allow_nan=False)}" for item in items]
        return "[\n" + ",\n".join(lines) + f"\n{indent}]" if lines else "[]"

    parts = []
    for key, value in document.items():
        if key == "layers":
            parts.append(f'  "layers": {entries(value, "  ")}')
        elif key in _LISTS:
            listed = _LISTS[key]
            settings = [f'    "{k}": {json.dumps(v)}' for k, v in value.items() if k != listed]
            settings.append(f'    "{listed}": {entries(value[listed], "    ")}')
            parts.append(f'  "{key}": {{\n' + ",\n".join(settings) + "\n  }")
        else:
            parts.append(f'  "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _layer_said(layer: PlanLayer) -> dict[str, Any]:
    said: dict[str, Any] = {"base": layer.base, "mix": {str(s): layer.mix[s] for s in sorted(layer.mix)}}
    return said | ({"refits": {s: layer.refits[s] for s in sorted(layer.refits)}} if layer.refits else {})


def _parse_plan(document: Any) -> Plan:
    check_keys(document, "the plan", {"format", "source", "layers"}, {"merge_norms", "search", "repair", "heal"})
    if document["format"] != FORMAT:
        raise PlanError(f"format is {document['format']}, this version reads {FORMAT}")
    source = document["source"]
    check_keys(source, "source", {"name", "num_hidden_layers", "fingerprint"}, set())
    name = typed(source, "name", str, "source")
    num_layers = typed(source, "num_hidden_layers", int, "source")
    fingerprint = typed(source, "fingerprint", str, "source")
    entries = typed(document, "layers", list, "the plan")
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
    record = None if search is None else parse_search(search, merge_norms)
    repair = None if document.get("repair") is None else RepairRecord.from_json(document["repair"])
    heal = None if document.get("heal") is None else HealRecord.from_json(document["heal"])
    return Plan(name, num_layers, fingerprint, layers, merge_norms, record, repair, heal)


def _parse_layer(entry: Any, where: str, num_layers: int) -> PlanLayer:
    check_keys(entry, where, {"base", "mix"}, {"refits"})
    base = typed(entry, "base", int, where)
    mix: dict[int, float] = {}
    for key, value in typed(entry, "mix", dict, where).items():
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
    return PlanLayer(base, {layer: mix[layer] for layer in sorted(mix)}, _parse_refits(entry, where))


def _parse_refits(entry: dict[str, Any], where: str) -> Mapping[str, str]:
    if "refits" not in entry:
        return NO_REFITS
    found = typed(entry, "refits", dict, where)
    for suffix, digest in found.items():
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise PlanError(f"{where}: the refit of {suffix} is no sha256")
    return {suffix: found[suffix] for suffix in sorted(found)}
