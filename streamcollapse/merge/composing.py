"""Plans made by hand and of other plans, and plans in the words of other tools. Pure, like the plans themselves."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamcollapse.arch.layout import Layout
from streamcollapse.errors import PlanError
from streamcollapse.merge.plan import LARGEST_COEFFICIENT, Plan, PlanLayer, original_layers
from streamcollapse.merge.rules import RULES, Mix

_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


@dataclass(frozen=True)
class Group:
    """Neighbouring source layers ``first`` to ``last``, from 0, that become one by ``rule``."""

    first: int
    last: int
    rule: str
    scale: float = 1.0


def parse_layers(text: str) -> list[int]:
    """Layers from 0, as tensor names count them: ``21-29``, ``3`` or several with commas. Raises PlanError."""
    found: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise PlanError(f"layers {text!r} are not numbers or ranges such as 21-29, from 0")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first > 100_000:
            raise PlanError(f"layers {part.strip()} are no range; give the lower one first")
        found += range(first, last + 1)
    return found


def parse_group(text: str) -> Group:
    """``12-15:mean``, or ``12-15:rdsc:0.25`` with a scale. Raises PlanError."""
    layers, _, rule = text.partition(":")
    rule, _, scale = rule.partition(":")
    found = parse_layers(layers)
    if rule not in RULES:
        raise PlanError(f"merge {text!r} names no rule; give one of {', '.join(RULES)}, as in 12-15:mean")
    if "," in layers or len(found) < 2:
        raise PlanError(f"merge {text!r} takes a range of two layers or more, as in 12-15:{rule}")
    try:
        factor = float(scale or 1)
    except ValueError:
        factor = 0.0
    if not 0 < abs(factor) <= LARGEST_COEFFICIENT or (scale and rule != "rdsc"):
        raise PlanError(f"merge {text!r}: only rdsc takes a scale, a number other than 0")
    return Group(found[0], found[-1], rule, factor)


def hand_made(num_layers: int, drop: Iterable[int], groups: Sequence[Group]) -> tuple[PlanLayer, ...]:
    """The source's layers without those in ``drop``, and each of ``groups`` as one. Raises PlanError where they meet,
    or leave nothing."""
    dropped = list(drop)
    taken: dict[int, str] = {}
    named = [(number, "dropped") for number in dropped]
    named += [(number, "merged") for group in groups for number in range(group.first, group.last + 1)]
    for number, what in named:
        if not 0 <= number < num_layers:
            raise PlanError(f"layer {number} is {what}, but the source has layers 0 to {num_layers - 1}")
        if number in taken:
            raise PlanError(f"layer {number} is {taken[number]} and {what}; each layer can be in one place only")
        taken[number] = what
    merged = {group.first: group for group in groups}
    whole, layers = original_layers(num_layers), list[PlanLayer]()
    for layer in whole:
        if layer.base in merged:
            group = merged[layer.base]
            mixes = [x.mix for x in whole[group.first : group.last + 1]]
            layers.append(PlanLayer(layer.base, RULES[group.rule](mixes, group.scale)))
        elif layer.base not in taken:
            layers.append(layer)
    if not layers:
        raise PlanError("no layer is left")
    return tuple(layers)


def refuse_identity(plan: Plan) -> None:
    """Raise PlanError where ``plan`` leaves every layer as it is."""
    if plan.layers == original_layers(plan.num_source_layers):
        raise PlanError("the plan changes nothing: every layer of the source stays as it is")


def in_words(plan: Plan) -> str:
    """What ``plan`` does to its source's layers, from 0: which are dropped, scaled, or mixed of others."""
    used = {source for layer in plan.layers for source in layer.mix}
    dropped = [number for number in range(plan.num_source_layers) if number not in used]
    mixed = [_mixed(layer) for layer in plan.layers if dict(layer.mix) != {layer.base: 1.0}]
    repaired = [layer.base for layer in plan.layers if layer.refits]
    said = [f"layer{'s' * (len(dropped) > 1)} {_ranges(dropped)} dropped"] * bool(dropped) + mixed
    how = "repaired" if plan.heal is None else "healed"
    said += [f"layer{'s' * (len(repaired) > 1)} {_ranges(repaired)} {how}"] * bool(repaired)
    return "; ".join(said) or "nothing changed"


def _mixed(layer: PlanLayer) -> str:
    if list(layer.mix) == [layer.base]:
        return f"layer {layer.base} is scaled by {layer.mix[layer.base]:g}"
    return f"layer {layer.base} is a mix of {_ranges(sorted(layer.mix))}"


def _ranges(numbers: Sequence[int]) -> str:
    """``3, 5-9`` for 3, 5, 6, 7, 8, 9."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)


def compose(first: Plan, second: Plan) -> Plan:
    """One plan against the source of ``first`` for what ``second`` makes of its result.

    Raises PlanError where the second is for another number of layers, where norms follow the mix in one and the base
    in the other, or where a repaired layer is mixed further, which no single plan can say.
    """
    if second.num_source_layers != first.num_layers:
        raise PlanError(
            f"the second plan is for a source of {second.num_source_layers} layers, the first one leaves "
            f"{first.num_layers}"
        )
    mixing = [plan for plan in (first, second) if any(dict(one.mix) != {one.base: 1.0} for one in plan.layers)]
    if len({plan.merge_norms for plan in mixing}) > 1:
        raise PlanError("norms follow the mix in one plan and the base in the other; no single plan can say that")
    layers = []
    for position, layer in enumerate(second.layers):
        mix: dict[int, float] = {}
        repaired = [middle for middle in layer.mix if first.layers[middle].refits.keys() - first.layers[middle].after]
        is_whole = dict(layer.mix) == {layer.base: 1.0}
        if repaired and not is_whole:
            raise PlanError(
                f"layers[{position}] of the second plan mixes layer {repaired[0]}, which was repaired; apply the first "
                "plan, and search its result"
            )
        for middle, coefficient in layer.mix.items():
            for source, share in first.layers[middle].mix.items():
                mix[source] = mix.get(source, 0.0) + coefficient * share
        refits = {**first.layers[layer.base].refits, **layer.refits} if is_whole else layer.refits
        if position == second.num_layers - 1:
            refits = {**first.layers[-1].after, **refits}
        layers.append(PlanLayer(first.layers[layer.base].base, _without_zeros(mix), refits))
    merge_norms = any(plan.merge_norms for plan in mixing)
    return Plan(first.source_name, first.num_source_layers, first.fingerprint, tuple(layers), merge_norms)


def _without_zeros(mix: Mix) -> Mix:
    return {source: mix[source] for source in sorted(mix) if mix[source] != 0.0}


def to_mergekit(plan: Plan, layout: Layout, model: str, dtype: str) -> dict[str, Any]:
    """A ``linear`` merge with a slice for each layer of ``plan``, neighbours that are the source's own in one.

    Raises PlanError where a layer was repaired, which no merge of the source's tensors is.

    ``model`` is the directory of the source or its Hub id, ``dtype`` that of its weights. A source that takes part in a
    layer gives its coefficient to every tensor that is mixed; all others, and what lies outside of the layers, are the
    base's. mergekit knows its inputs by their names, so a directory that takes part twice has two names for itself.
    """
    slices: list[dict[str, Any]] = []
    for position, layer in enumerate(plan.layers):
        if layer.refits:
            raise PlanError(
                f"layers[{position}] was repaired: no merge of the source's tensors makes it; copy the result"
            )
        if layer.untouched:
            last = slices[-1]["sources"] if slices else []
            if len(last) == 1 and last[0]["parameters"] == _WHOLE and last[0]["layer_range"][1] == layer.base:
                last[0]["layer_range"][1] += 1
            else:
                slices.append({"sources": [_source(model, layer.base, _WHOLE)]})
        else:
            slices.append({"sources": _sources(layer, layout, plan.merge_norms, model)})
    return {"merge_method": "linear", "parameters": {"normalize": False}, "dtype": dtype, "slices": slices}


_WHOLE: Mapping[str, Any] = {"weight": 1.0}


def _sources(layer: PlanLayer, layout: Layout, merge_norms: bool, model: str) -> list[dict[str, Any]]:
    kept = layout.unmerged if merge_norms else {*layout.unmerged, *layout.norms}
    mixed = [suffix for suffix in layout.layers[layer.base] if suffix not in kept]
    found = []
    for number, source in enumerate(sorted({layer.base, *layer.mix})):
        weights: list[dict[str, Any]] = [{"filter": suffix, "value": layer.mix.get(source, 0.0)} for suffix in mixed]
        weights.append({"value": 1.0 if source == layer.base else 0.0})
        found.append(_source(model + "/." * number, source, {"weight": weights}))
    return found


def _source(model: str, layer: int, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": model, "layer_range": [layer, layer + 1], "parameters": dict(parameters)}
