"""Options that several verbs share, as groups: each makes one of the library's settings.

A verb that is ``grouped`` takes the settings; the command line that it becomes has the options that make them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, get_type_hints

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import one_line_errors
from streamcollapse.settings import Calibration, Compute, Output, Streaming
from streamcollapse.strategy.collapse import CollapseOptions


def _method(
    strategy: o.Strategy = None,
    target_layers: o.TargetLayers = None,
    target_ratio: o.TargetRatio = None,
    rule: o.Rule = None,
    metric: o.MetricName = None,
    rescale: o.Rescale = None,
    merges_per_round: o.MergesPerRound = o.COLLAPSE.merges_per_round,
    layers_per_merge: o.LayersPerMerge = None,
    interval: o.Interval = None,
    lowest: o.Lowest = o.COLLAPSE.lowest,
    highest: o.Highest = o.COLLAPSE.highest,
    threshold: o.Threshold = o.COLLAPSE.threshold,
    rdsc_scale: o.RdscScale = "1",
    merge_norms: o.MergeNorms = o.COLLAPSE.merge_norms,
) -> CollapseOptions:
    return CollapseOptions(  # None is what the library fills in
        layers_per_merge,  # type: ignore[arg-type]
        interval,  # type: ignore[arg-type]
        lowest,
        highest,
        threshold,
        rule or "",
        CollapseOptions.parse_scales(rdsc_scale),
        merge_norms,
        strategy or "",
        target_layers,
        target_ratio,
        metric or "",
        rescale,  # type: ignore[arg-type]
        merges_per_round,
    )


def _calibration(calibration: o.Samples = None, max_tokens: o.MaxTokens = o.CALIBRATION.max_tokens) -> Calibration:
    return Calibration(calibration, max_tokens)


def _compute(device: o.Device = o.COMPUTE.device, compute_dtype: o.ComputeDtype = o.COMPUTE.dtype) -> Compute:
    return Compute(device, compute_dtype)


def _streaming(
    lookahead: o.Lookahead = "auto",
    prefetch: o.Prefetch = o.STREAMING.prefetch,
    io: o.Io = o.STREAMING.io,
    ram_budget: o.RamBudget = None,
    vram_budget: o.VramBudget = None,
    work_dir: o.WorkDir = None,
) -> Streaming:
    return Streaming(Streaming.parse_lookahead(lookahead), prefetch, io, ram_budget, vram_budget, work_dir)


def _output(
    max_shard_size: o.MaxShardSize = str(o.OUTPUT.max_shard_size), overwrite: o.Overwrite = o.OUTPUT.overwrite
) -> Output:
    return Output(max_shard_size, overwrite)


_GROUPS: dict[Any, Callable[..., Any]] = {
    CollapseOptions: _method,
    Calibration: _calibration,
    Compute: _compute,
    Streaming: _streaming,
    Output: _output,
}


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """``verb`` with options in the place of each parameter that is one of the settings, and with errors in one line."""
    hints = get_type_hints(verb, include_extras=True)
    made: dict[str, Callable[..., Any]] = {}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(verb).parameters.items():
        if hints[name] in _GROUPS:
            made[name] = _GROUPS[hints[name]]
            parameters |= _parameters(made[name])
        else:
            parameters[name] = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)

    @wraps(verb)
    def run(**given: Any) -> None:
        with one_line_errors():
            settings = {
                name: make(**{option: given.pop(option) for option in _parameters(make)}) for name, make in made.items()
            }
            verb(**given, **settings)

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return run


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of ``function``, with types in the place of their names; by keyword, so that any order will do."""
    hints = get_type_hints(function, include_extras=True)
    found = inspect.signature(function).parameters.items()
    return {n: p.replace(annotation=hints[n], kind=inspect.Parameter.KEYWORD_ONLY) for n, p in found}
