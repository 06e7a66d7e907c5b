"""The settings of a search, under the paper's letters.

What is not given is filled in by the strategy that will run (searches/registry.py): thresholds, rules and metrics are
on scales of their own, and their defaults belong to whoever walks by them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from streamcollapse.errors import OptionError
from streamcollapse.settings.catalogue import BEST, EFFORTS, METRICS, RULES
from streamcollapse.settings.declared import FROM_STRATEGY, BudgetSize, OneOf, Setting, Whole, settings, unknown

CACHE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "float8": 8, "int8": 8, "int4": 4}
_TARGETS = ("target_layers", "target_ratio", "target_memory")


def _rule(text: str) -> str:
    names = _names(text)
    for name in names:
        if name not in RULES:
            raise OptionError(f"rule {unknown(name, [*RULES, BEST], quoted=True)}, or several with commas")
    if len({*names}) < len(names):
        raise OptionError(f"rule is {text}, which names a rule twice")
    return text


def _metric(name: str) -> str:
    if name not in METRICS:
        raise OptionError(f"metric {unknown(name, METRICS, quoted=True)}")
    return name


def as_layer_count(value: Any, label: str = "target layers") -> int | str:
    """A number of layers, how many fewer (below 0), or a share of them as text with %."""
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"-?\d{1,6}( ?%)?", text) or not text.strip("-% 0"):
        raise OptionError(
            f"{label} is {str(value)[:40]!r}; give how many stay (24), how many fewer (-8), or a share of the "
            "layers (75%)"
        )
    return text.replace(" ", "") if text.endswith("%") else int(text)


def layer_count(asked: int | str, num_layers: int, label: str = "target layers") -> int:
    """How many of ``num_layers`` stay where ``asked`` is a number of them, how many fewer (below 0), or a share (75%).

    Raises OptionError, naming ``label``, where that is none of them.
    """
    if isinstance(asked, str):
        share = int(asked.removesuffix("%"))
        kept = share if share > 0 else 100 + share
        found = (2 * kept * num_layers + 100) // 200 if kept <= 100 else num_layers + 1  # half a layer stays
    else:
        found = asked if asked > 0 else num_layers + asked
    if not 1 <= found <= num_layers:
        raise OptionError(f"{label} is {asked}, but the model has {num_layers} layers, of which 1 to all can stay")
    return found


def layers_in_words(asked: int | str) -> str:
    """A number of layers as ``layer_count`` takes it."""
    if isinstance(asked, str):
        return f"{asked} of the layers"
    return f"{asked} layers" if asked > 0 else f"{-asked} layers fewer"


def _scales(value: Any) -> Any:
    """One number, or a tuple of several; also from text with commas."""
    if isinstance(value, str):
        try:
            value = tuple(float(part) for part in value.split(","))
        except ValueError:
            raise OptionError(f"rdsc scale is {value!r}, not a number, or several with commas") from None
    several = isinstance(value, tuple | list)
    for scale in value if several else (value,):
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or scale == 0:
            raise OptionError(f"rdsc scale is {scale}; it must be a finite number other than 0")
    scales = tuple(float(scale) for scale in value) if several else (float(value),)
    return scales[0] if len(scales) == 1 else scales


@settings("The method")
class SearchOptions:
    """The settings of a search. ``lowest`` and ``highest`` are counted from 1, as in the paper."""

    layers_per_merge: Annotated[Whole, Field(ge=2), Setting("Layers combined in each merge.", "C")] = FROM_STRATEGY
    interval: Annotated[Whole, Field(ge=1), Setting("Layers the pointer moves down after a merge.", "I")] = (
        FROM_STRATEGY
    )
    lowest: Annotated[
        Whole, Field(ge=1), Setting("Lowest layer to merge into, counted from 1 as in the paper.", "L")
    ] = 1
    highest: Annotated[
        Annotated[Whole, Field(ge=1)] | None,
        Setting("Layer at which the range ends, counted from 1 as in the paper.", "H", default="all layers"),
    ] = None
    threshold: Annotated[
        float,
        Field(ge=-1.0),
        Setting("Keep a merge if its similarity is above this; 1 is the same as the original.", "T"),
    ] = FROM_STRATEGY
    rule: Annotated[
        str,
        AfterValidator(_rule),
        Setting(
            "How a group of layers becomes one. first: drop the followers. sequential: its last layer, with the norms "
            "of its first: what the authors' released code computes. rdsc: the paper's Eq. (1), base + sum of "
            "differences, which usually destroys trained models. mean: equal weights. Of several with commas, or best "
            "(all of them), the most similar counts for each candidate.",
            metavar="RULE,..",
        ),
    ] = FROM_STRATEGY
    rdsc_scale: Annotated[
        float | tuple[float, ...],
        BeforeValidator(_scales),
        Setting("Factor of the differences under rule rdsc; 1 is Eq. (1). Several compete.", metavar="NUMBER,.."),
    ] = 1.0
    merge_norms: Annotated[
        bool, Setting("Merge normalisation weights too, or keep those of the first layer.", off="--keep-norms")
    ] = False
    strategy: Annotated[
        str,
        Setting(
            "How the layers are found. The verb strategies says what each does, and costs.",
            default="greedy, or laco where C or I is given",
            metavar="NAME",
        ),
    ] = FROM_STRATEGY
    target_layers: Annotated[
        Annotated[int | str, BeforeValidator(as_layer_count)] | None,
        Setting(
            "Prune to this many layers, whatever the threshold: a number (24), how many fewer (-8), or a share of the "
            "layers (75%).",
            default="as far as the threshold allows",
            metavar="N|-N|N%",
        ),
    ] = None
    target_ratio: Annotated[
        Annotated[float, Field(gt=0.0, lt=1.0)] | None,
        Setting(
            "Remove up to this fraction of the parameters (0.25 = 25 %).", default="as far as the threshold allows"
        ),
    ] = None
    target_memory: Annotated[
        BudgetSize | None,
        Setting(
            "Prune until the weights, and the keys and values of one sequence of context tokens, fit into this.",
            default="as far as the threshold allows",
            metavar="SIZE",
        ),
    ] = None
    context: Annotated[Whole, Field(ge=1), Setting("Tokens of the sequence that must fit into the target memory.")] = (
        4096
    )
    kv_dtype: Annotated[
        str, OneOf(tuple(CACHE_BITS)), Setting("What keys and values are kept in, in the target memory.")
    ] = "bfloat16"
    max_loss: Annotated[
        Annotated[float, Field(gt=0.0)] | None,
        Setting(
            "Prune as far as the loss on held-out text rises by no more than this, in nats per token, before a repair. "
            "With a target: how much that of the result may rise, else the exit code is 3.",
            default="no limit",
            metavar="NATS",
        ),
    ] = None
    metric: Annotated[
        str,
        AfterValidator(_metric),
        Setting(
            "What similarity is: of last hidden states (cosine, token-cosine, cka-linear, cka-kernel), or of what the "
            "head makes of them (nll, kl). 1 is the same.",
            metavar="NAME",
        ),
    ] = FROM_STRATEGY
    rescale: Annotated[
        bool,
        Setting(
            "At the end, find a scale for each layer that stays, so that the result is most similar.",
            off="--no-rescale",
        ),
    ] = FROM_STRATEGY
    effort: Annotated[
        str,
        OneOf(tuple(EFFORTS)),
        Setting(
            "How much greedy search and scales compute. quick: 64 tokens of each sample, no exchanges and no repair; "
            "standard: exchanges at the end; thorough: every merge in every round, on all tokens, no exchanges."
        ),
    ] = FROM_STRATEGY
    merges_per_round: Annotated[
        Whole, Field(ge=1), Setting("Merges taken in a round of greedy search, if they have no layer in common.")
    ] = FROM_STRATEGY

    def __post_init__(self) -> None:
        if self.highest is not None and self.lowest > self.highest:
            raise OptionError(f"lowest (L) is {self.lowest}, above highest (H), {self.highest}")
        aims = [name.replace("_", " ") for name in _TARGETS if getattr(self, name) is not None]
        if len(aims) > 1:
            raise OptionError(f"{aims[0]} and {aims[1]} are both given; choose one")
        if self.target_memory is None and (self.context, self.kv_dtype) != (4096, "bfloat16"):
            raise OptionError("`context` and `kv_dtype` say what must fit into `target_memory`; give that as well")
        self._check_scales()

    def _check_scales(self) -> None:
        if not self.scales or len({*self.scales}) < len(self.scales):
            raise OptionError("rdsc scale is empty or names a number twice")
        if self.rdsc_scale != 1.0 and self.rule is not None and "rdsc" not in _names(self.rule):
            raise OptionError(f"rdsc scale is {self.rdsc_scale}, but the rule is {self.rule}; it applies to rdsc only")

    @property
    def has_target(self) -> bool:
        """Whether it is said how far to prune."""
        return self.max_loss is not None or self.has_size

    @property
    def has_size(self) -> bool:
        """Whether it is said how large the result is to be."""
        return any(getattr(self, name) is not None for name in _TARGETS)

    @property
    def scales(self) -> tuple[float, ...]:
        """The factors of the differences under ``rdsc``."""
        return self.rdsc_scale if isinstance(self.rdsc_scale, tuple) else (self.rdsc_scale,)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The rules that compete, in order; with several scales ``rdsc`` counts once for each."""
        return variants(self.rule, self.scales)

    @property
    def given(self) -> dict[str, Any]:
        """The settings that have a value, by field; those that have none are the strategy's to fill in."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def but(self, **changes: Any) -> SearchOptions:
        """The same settings but for ``changes``."""
        return SearchOptions(**{**self.given, **changes})

    def for_model(self, num_layers: int) -> SearchOptions:
        """The options with ``highest`` filled in and ``target_layers`` as a number of layers. Raises OptionError where
        they do not fit ``num_layers``."""
        highest = num_layers if self.highest is None else self.highest
        if highest > num_layers:
            raise OptionError(f"highest (H) is {highest}, but the model has {num_layers} layers")
        if self.target_layers is None:
            return self.but(highest=highest)
        return self.but(highest=highest, target_layers=layer_count(self.target_layers, num_layers))


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


def _names(rule: str) -> list[str]:
    return list(RULES) if rule == BEST else [part.strip() for part in rule.split(",")]
