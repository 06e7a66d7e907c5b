"""Plans in the words of another tool: a configuration by which mergekit builds the same model."""

from collections.abc import Mapping
from typing import Any

from streamcollapse.arch.layout import Layout
from streamcollapse.merge.plan import Plan, PlanLayer


def to_mergekit(plan: Plan, layout: Layout, model: str, dtype: str) -> dict[str, Any]:
    """A ``linear`` merge with a slice for each layer of ``plan``, neighbours that are the source's own in one.

    ``model`` is the directory of the source or its Hub id, ``dtype`` that of its weights. A source that takes part in a
    layer gives its coefficient to every tensor that is mixed; all others, and what lies outside of the layers, are the
    base's. mergekit knows its inputs by their names, so a directory that takes part twice has two names for itself.
    """
    slices: list[dict[str, Any]] = []
    for layer in plan.layers:
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
