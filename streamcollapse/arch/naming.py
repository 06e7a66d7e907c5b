"""The names of a checkpoint and those of the model's modules: transformers' own mapping from one to the other.

Most families store tensors under their modules' names. Some have been renamed since, or have modules that hold in one
parameter what is stored in many (experts); transformers converts them on load by rules that it keeps for each family.
The same rules are applied here, to one layer at a time. transformers 4 has renamings of a model's own at most: there,
modules are as stored.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from streamcollapse.arch.config import THEIR_ERRORS, first_line
from streamcollapse.errors import ModelError
from streamcollapse.storage.source import TensorInfo

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
except ImportError:  # transformers 4
    get_model_conversion_mapping = None


@dataclass(frozen=True)
class Destination:
    """Where a stored tensor goes: parameter or buffer ``name`` of the model. ``rule`` names the conversion that makes
    ``name``, and perhaps others, of this and other tensors; None where the tensor is used as it is."""

    name: str
    rule: str | None = None


class Naming:
    """How transformers would load the tensors of a checkpoint into ``model`` (on the meta device)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._parameters = model.state_dict(keep_vars=True)
        rules: list[Any] = [] if get_model_conversion_mapping is None else get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}

    def target(self, name: str) -> Destination | None:
        """Where the tensor stored as ``name`` goes; None where the model has no place for it."""
        if self._renamings or self._converters:
            prefix = self._model.base_model_prefix
            found, rule = rename_source_key(name, self._renamings, self._converters, prefix, self._parameters)
            if found in self._parameters:
                return Destination(found, rule)
        prefix = f"{self._model.base_model_prefix}."
        for plain in (name, self._renamed(name), prefix + name, name.removeprefix(prefix)):
            if plain in self._parameters:
                return Destination(plain)
        return None

    def _renamed(self, name: str) -> str:
        """``name`` by the renamings that a model of transformers 4 has of its own: the first that matches."""
        own = getattr(self._model, "_checkpoint_conversion_mapping", None) or {}
        renamed = (re.subn(pattern, new, name) for pattern, new in own.items())
        return next((found for found, count in renamed if count), name)

    def ignores(self, name: str) -> bool:
        """Whether the model itself leaves out what is stored as ``name``."""
        patterns = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, name) for pattern in patterns)

    def convert(self, target: str, parts: Iterable[tuple[str, str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Parameters of the model by name: what the conversion that goes to ``target`` makes of ``parts``.

        Each part is a stored name, the ``rule`` of its destination, and the tensor; in natural order of their names.
        Nothing is computed, only put together or taken apart: the meta device does as well. Raises ModelError.
        """
        rule: Any = None
        for name, pattern, tensor in parts:
            rule = rule or copy.deepcopy(self._by_pattern[pattern])
            rule.add_tensor(target, name, pattern, tensor)
        try:
            made = rule.convert(target, model=self._model, config=self._model.config)
        except THEIR_ERRORS as error:
            raise ModelError(f"{target} cannot be put together: {first_line(error)}") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts ``experts.10`` after ``experts.9``, as the conversions expect."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class Assembly:
    """Stored tensors ``parts`` (suffixes on disk) make the parameters or buffers ``shapes`` of the layer, by name.

    ``rules`` (one for each part) and ``inside``, what the layer's names begin with, are what ``naming`` converts by;
    without rules the single part is the parameter.
    """

    parts: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    rules: tuple[str, ...] = ()
    inside: str = field(default="", repr=False)
    naming: Naming | None = field(default=None, repr=False, compare=False)

    def make(self, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters by name, from the stored tensors by suffix. Raises ModelError."""
        if self.naming is None:
            return dict.fromkeys(self.shapes, stored[self.parts[0]])
        target = self.inside + next(iter(self.shapes))
        parts = [(part, rule, stored[part]) for part, rule in zip(self.parts, self.rules, strict=True)]
        return {name.removeprefix(self.inside): made for name, made in self.naming.convert(target, parts).items()}


def assemblies_of(
    naming: Naming, inside: str, placed: Mapping[str, Destination], infos: Mapping[str, TensorInfo]
) -> tuple[Assembly, ...]:
    """The assemblies of one layer, whose names in the model begin with ``inside``.

    ``placed`` says where its stored tensors go, ``infos`` what they are, both by suffix. Raises ModelError.
    """
    found = [Assembly((s,), {t.name: infos[s].shape}) for s, t in placed.items() if t.rule is None]
    groups: dict[str, list[str]] = {}
    for suffix in sorted(placed, key=natural_key):
        if placed[suffix].rule is not None:
            groups.setdefault(placed[suffix].name, []).append(suffix)
    for first, parts in groups.items():
        rules = [rule for part in parts if (rule := placed[part].rule) is not None]
        empty = {part: torch.empty(infos[part].shape, dtype=infos[part].dtype, device="meta") for part in parts}
        plain = Assembly(tuple(parts), {first: ()}, tuple(rules), inside, naming)
        shapes = {name: tuple(made.shape) for name, made in plain.make(empty).items()}
        found.append(Assembly(plain.parts, {first: shapes.pop(first), **shapes}, plain.rules, inside, naming))
    return tuple(found)
