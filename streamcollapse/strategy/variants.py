"""Merge rules in competition: what a user names, and the rules that it stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from streamcollapse.errors import OptionError, printable
from streamcollapse.merge.rules import RULES

BEST = "best"


@dataclass(frozen=True)
class Variant:
    """A rule of merge/rules.py with its scale, and the ``label`` by which decisions name it."""

    label: str
    rule: str
    scale: float


def variants(rule: str, scales: Sequence[float]) -> tuple[Variant, ...]:
    """The rules that ``rule`` names, in order: one, several with commas, or ``best``, which is all of them."""
    found = []
    for name in _names(rule):
        for scale in scales if name == "rdsc" else (1.0,):
            label = f"{name}:{scale!r}" if name == "rdsc" and len(scales) > 1 else name
            found.append(Variant(label, name, scale))
    return tuple(found)


def check_rules(rule: str, scales: Sequence[float]) -> None:
    """Raise OptionError unless ``variants`` can be made of them."""
    names = _names(rule)
    for name in names:
        if name not in RULES:
            choices = ", ".join([*RULES, BEST])
            raise OptionError(
                f"rule {printable(repr(name))} is unknown; choose one of {choices}, or several with commas"
            )
    if len({*names}) < len(names):
        raise OptionError(f"rule is {rule}, which names a rule twice")
    for scale in scales:
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or scale == 0:
            raise OptionError(f"rdsc scale is {printable(scale)}; it must be a finite number other than 0")
    if not scales or len({*scales}) < len(scales):
        raise OptionError("rdsc scale is empty or names a number twice")
    if tuple(scales) != (1.0,) and "rdsc" not in names:
        raise OptionError(f"rdsc scale is {scales[0]}, but the rule is {rule}; it applies to rdsc only")


def _names(rule: str) -> tuple[str, ...]:
    if not isinstance(rule, str):
        raise OptionError(f"rule is {printable(repr(rule))}, not a name")
    return tuple(RULES) if rule == BEST else tuple(part.strip() for part in rule.split(","))
