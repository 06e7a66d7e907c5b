"""Algorithm 1 of the paper as a state machine without tensors: what to try next, and what follows from the outcome.

States are immutable, so both outcomes of a candidate can be looked at before either is known.
``l``, ``lowest`` (L) and ``highest`` (H) are 1-based, as in the paper.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from streamcollapse.errors import OptionError, printable
from streamcollapse.merge.plan import LayerKey, PlanLayer, collapse, original_layers
from streamcollapse.strategy.catalogue import METRICS, STRATEGIES
from streamcollapse.strategy.variants import BEST, Variant, check_rules, variants

_NOT_FOR_ALL: dict[
    str, tuple[str, Any]
] = {  # settings that only some strategies go by: what they are called, their usual values
    "layers_per_merge": ("layers per merge (C)", 4),
    "interval": ("interval (I)", 2),
    "threshold": ("threshold (T)", 0.65),
    "merges_per_round": ("merges per round", 1),
}


@dataclass(frozen=True)
class CollapseOptions:
    """The settings of layer collapse under the paper's letters.

    ``layers_per_merge`` C (4) and ``interval`` I (2), ``lowest`` L, ``highest`` H (None: all layers), ``threshold`` T.
    ``rule``: one of merge/rules.py, several with commas, or ``best`` for all of them: each is tried for every
    candidate, and the most similar counts. ``rdsc_scale`` is the factor of the differences under the rule ``rdsc``, or
    several, which compete as well. ``merge_norms``: norms follow the mix instead of staying the base's.
    ``strategy``: one of strategy/catalogue.py; where it is empty, ``laco`` if C or I is given, which it alone walks by,
    else ``greedy``. ``target_layers`` or ``target_ratio`` (pruned parameters over all): how far to prune, instead of
    the threshold. ``metric``: what similarity is, one of strategy/catalogue.py. ``rescale``: search scales for the
    layers that stay (strategy/rescale.py). The strategy's own ``rule``, ``metric`` and ``rescale`` count where none is
    given. ``merges_per_round``: of ``greedy``. What was not given is filled in when the settings are made.
    """

    layers_per_merge: int = None  # type: ignore[assignment]
    interval: int = None  # type: ignore[assignment]
    lowest: int = 1
    highest: int | None = None
    threshold: float = _NOT_FOR_ALL["threshold"][1]
    rule: str = ""
    rdsc_scale: float | tuple[float, ...] = 1.0
    merge_norms: bool = False
    strategy: str = ""
    target_layers: int | None = None
    target_ratio: float | None = None
    metric: str = ""
    rescale: bool = None  # type: ignore[assignment]
    merges_per_round: int = _NOT_FOR_ALL["merges_per_round"][1]

    def __post_init__(self) -> None:
        walks = self.layers_per_merge is not None or self.interval is not None
        self._default("strategy", "laco" if walks else "greedy")
        self._check_strategy()
        for name in ("layers_per_merge", "interval"):
            self._default(name, _NOT_FOR_ALL[name][1])
        self._default("rule", STRATEGIES[self.strategy].rule or "first")
        self._default("metric", STRATEGIES[self.strategy].metric or "cosine")
        self._default("rescale", STRATEGIES[self.strategy].rescale)
        if self.metric not in METRICS:
            name, choices = printable(repr(self.metric)), ", ".join(METRICS)
            raise OptionError(f"metric {name} is unknown; choose one of {choices}")
        for name in ("layers_per_merge", "interval", "lowest", "highest", "target_layers", "merges_per_round"):
            value = getattr(self, name)
            if value is not None or name not in ("highest", "target_layers"):
                object.__setattr__(self, name, _whole(name, value))
        for name in ("merge_norms", "rescale"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name.replace('_', ' ')} is {getattr(self, name)!r}, neither True nor False")
        if self.merges_per_round < 1:
            raise OptionError(f"merges per round is {self.merges_per_round}; a round takes at least 1")
        if self.layers_per_merge < 2:
            raise OptionError(f"layers per merge (C) is {self.layers_per_merge}; merging takes at least 2 layers")
        if self.interval < 1:
            raise OptionError(f"interval (I) is {self.interval}; it must be at least 1, or the search never ends")
        if self.lowest < 1:
            raise OptionError(f"lowest (L) is {self.lowest}; layers are counted from 1")
        if self.highest is not None and self.lowest > self.highest:
            raise OptionError(f"lowest (L) is {self.lowest}, above highest (H), {self.highest}")
        if not -1.0 <= self.threshold <= METRICS[self.metric].highest:
            raise OptionError(
                f"threshold (T) is {self.threshold}; similarity by {self.metric} lies between -1 and "
                f"{METRICS[self.metric].highest:g}"
            )
        check_rules(self.rule, self.scales)
        object.__setattr__(self, "rdsc_scale", self.scales[0] if len(self.scales) == 1 else self.scales)

    def _default(self, name: str, value: object) -> None:
        if getattr(self, name) in (None, ""):
            object.__setattr__(self, name, value)

    def _check_strategy(self) -> None:
        if self.strategy not in STRATEGIES:
            name, choices = printable(repr(self.strategy)), ", ".join(STRATEGIES)
            raise OptionError(f"strategy {name} is unknown; choose one of {choices}")
        if self.target_layers is not None and self.target_ratio is not None:
            raise OptionError("target layers and target ratio are both given; choose one")
        ratio = self.target_ratio
        if ratio is not None and (not isinstance(ratio, int | float) or not 0.0 < ratio < 1.0):
            raise OptionError(f"target ratio is {printable(ratio)}; it is a share of the parameters, between 0 and 1")
        if STRATEGIES[self.strategy].needs_target and self.target_layers is None and ratio is None:
            raise OptionError(
                f"strategy {self.strategy} goes on until a target; give --target-layers or --target-ratio"
            )
        if self.strategy == "rule-based" and "," in self.rule + ("," if self.rule == BEST else ""):
            raise OptionError(f"rule is {self.rule}, but strategy rule-based takes one rule: it compares none")

    def not_taken(self) -> list[str]:
        """A line for each setting that is not the usual one and makes no difference to the strategy."""
        idle = [name for name in _NOT_FOR_ALL if name not in STRATEGIES[self.strategy].takes]
        lines = [
            f"{_NOT_FOR_ALL[name][0]} is {getattr(self, name)}, which makes no difference to strategy {self.strategy}"
            for name in idle
            if getattr(self, name) != _NOT_FOR_ALL[name][1]
        ]
        aims = self.target_layers is not None or self.target_ratio is not None
        if aims and "threshold" not in idle and self.threshold != _NOT_FOR_ALL["threshold"][1]:
            lines.append(f"threshold (T) is {self.threshold}, which makes no difference where there is a target")
        return lines

    @staticmethod
    def parse_scales(text: str) -> tuple[float, ...]:
        """Numbers with commas, as ``rdsc_scale``. Raises OptionError."""
        try:
            return tuple(float(part) for part in text.split(","))
        except ValueError:
            raise OptionError(f"rdsc scale is {printable(repr(text))}, not a number, or several with commas") from None

    @property
    def scales(self) -> tuple[float, ...]:
        """The factors of the differences under ``rdsc``."""
        if isinstance(self.rdsc_scale, tuple | list):
            return tuple(self.rdsc_scale)
        return (self.rdsc_scale,)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The rules that compete, in order; with several scales ``rdsc`` counts once for each."""
        return variants(self.rule, self.scales)

    def for_model(self, num_layers: int) -> CollapseOptions:
        """The options with ``highest`` filled in. Raises OptionError where they do not fit ``num_layers``."""
        highest = num_layers if self.highest is None else self.highest
        if highest > num_layers:
            raise OptionError(f"highest (H) is {highest}, but the model has {num_layers} layers")
        return replace(self, highest=highest)


@dataclass(frozen=True)
class Candidate:
    """A merge to be tested: ``merged`` layers after 1-based layer ``pointer`` collapse into it, giving ``layers``,
    by any of ``rules``, which come to the same here."""

    pointer: int
    merged: int
    layers: tuple[PlanLayer, ...]
    rules: tuple[str, ...]

    @property
    def rule(self) -> str:
        """The first of its rules."""
        return self.rules[0]

    @property
    def position(self) -> int:
        """0-based position of the merged layer."""
        return self.pointer - 1

    @cached_property
    def start(self) -> int:
        """0-based position from which on it is run: the merged layer, or a lower one that is not the source's."""
        below = enumerate(self.layers[: self.position])
        return next((i for i, layer in below if layer.base != i or not layer.untouched), self.position)

    @property
    def merged_layer(self) -> PlanLayer:
        return self.layers[self.position]


@dataclass(frozen=True)
class CollapseState:
    """The state of Algorithm 1 before line 3: the stack so far and the pointer l."""

    options: CollapseOptions
    layers: tuple[PlanLayer, ...]
    pointer: int

    @classmethod
    def start(cls, num_layers: int, options: CollapseOptions) -> CollapseState:
        """Lines 1 and 2: the whole model, l = H - C."""
        fitted = options.for_model(num_layers)
        assert fitted.highest is not None
        return cls(fitted, original_layers(num_layers), fitted.highest - fitted.layers_per_merge)

    def candidate(self) -> Candidate | None:
        """Lines 3 to 5: the next merge to test, by the first of the rules, or None when l has passed L."""
        return next(iter(self.candidates), None)

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """The next merge by each of the rules; those that come to the same layer are one. Empty when l has passed L.

        Made once: looking ahead asks a state for them several times.
        """
        if self.pointer < self.options.lowest:
            return ()
        merged = min(self.options.layers_per_merge - 1, len(self.layers) - self.pointer)
        found: dict[LayerKey, Candidate] = {}
        for variant in self.options.variants:
            layers = collapse(self.layers, self.pointer - 1, merged, variant.rule, variant.scale)
            key = layers[self.pointer - 1].key
            rules = (*found[key].rules, variant.label) if key in found else (variant.label,)
            found[key] = Candidate(self.pointer, merged, layers, rules)
        return tuple(found.values())

    def after(self, accepted: Candidate | None) -> CollapseState:
        """Lines 7 to 15: the state that follows when ``accepted`` of the candidates is, or none."""
        assert self.candidates, "the search has ended"
        if accepted is None:
            return replace(self, pointer=self.pointer - 1)
        pointer = after_merge(self.pointer, len(accepted.layers), self.options)
        return replace(self, layers=accepted.layers, pointer=pointer)


def after_merge(pointer: int, num_layers: int, options: CollapseOptions) -> int:
    """Lines 9 to 12: the pointer after a merge at ``pointer`` that left ``num_layers`` layers.

    Starting at H - C with I >= 1, a merge always has a follower (K >= 1) and l - I never exceeds the layers left, so
    the reset of lines 10 and 11 does not occur; the paper has it, so it stays.
    """
    lowered = pointer - options.interval
    return num_layers - options.layers_per_merge if lowered > num_layers else lowered


def _whole(name: str, value: object) -> int:
    """``value`` as an int; whole numbers of other libraries are taken, anything else is refused."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise OptionError(f"{name.replace('_', ' ')} is {value!r}, not a whole number") from None


def most_candidates(num_layers: int, options: CollapseOptions) -> int:
    """An upper bound on the candidates of a search: one per value of the pointer, which only moves down."""
    return max(CollapseState.start(num_layers, options).pointer - options.lowest + 1, 0)
