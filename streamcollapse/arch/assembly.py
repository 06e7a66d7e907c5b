"""How the stored tensors of a decoder layer become the parameters of its module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from streamcollapse.arch.naming import Naming, Target, natural_key
from streamcollapse.storage.source import TensorInfo


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
    naming: Naming, inside: str, placed: Mapping[str, Target], infos: Mapping[str, TensorInfo]
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
