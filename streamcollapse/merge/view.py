"""MergedView: a plan over a source, seen as a tensor source. What is evaluated is what is written.

A mixed tensor is accumulated straight from the source tensors, in ascending order of source layer (mixing.py). A layer
that is its base passes the source's bytes through untouched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from streamcollapse.arch.layout import Layout
from streamcollapse.errors import PlanError
from streamcollapse.merge.mixing import Terms, mix_into, mix_tensors
from streamcollapse.merge.plan import LayerKey, Plan, PlanLayer
from streamcollapse.merge.rules import Mix
from streamcollapse.storage.source import TensorInfo, TensorSource

Kept = Mapping[LayerKey, Mapping[str, str]]
NOTHING_KEPT: Kept = MappingProxyType({})


def refit_name(digest: str) -> str:
    """The name under which a source has the refitted tensor of sha256 ``digest``."""
    return f"refits/{digest}"


class MergedView:
    """The tensors of the pruned model that ``layers`` describe, under their names in its checkpoint.

    ``kept``: where mixed tensors have been stored before, the names under which ``source`` has them.
    """

    def __init__(
        self,
        source: TensorSource,
        layout: Layout,
        layers: Sequence[PlanLayer],
        merge_norms: bool,
        kept: Kept = NOTHING_KEPT,
    ) -> None:
        self._source = source
        self._layout = layout
        self._merge_norms = merge_norms
        self._kept = kept
        self.layers = tuple(layers)
        self._where = {
            layout.name(position, suffix): (layer, suffix)
            for position, layer in enumerate(self.layers)
            for suffix in layout.layers[layer.base]
        } | {layout.name(0, suffix): (layer, suffix) for layer in self.layers for suffix in layer.after}

    @property
    def names(self) -> Sequence[str]:
        """Outside tensors first, then layer after layer, as a reader of the whole model would want them."""
        return [*dict.fromkeys([*self._layout.outside, *self._where])]

    def layer_names(self, position: int) -> dict[str, str]:
        """suffix -> name of every tensor of the 0-based layer ``position`` of the pruned model."""
        return {s: self._layout.name(position, s) for s in self._layout.layers[self.layers[position].base]}

    def info(self, name: str) -> TensorInfo:
        """dtype and shape of ``name``: those of the base's tensor."""
        if name not in self._where:
            return self._source.info(name)
        layer, suffix = self._where[name]
        return self._source.info(self._layout.name(layer.base, suffix))

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """``name`` of the pruned model on ``device``, where it is mixed as well."""
        if name not in self._where:
            return self._source.read(name, device)
        return mix_tensors(self._terms(name, device), self.info(name).dtype)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a matrix outside the stack."""
        return self._source.read_rows(name, rows)

    def read_into(self, out: torch.Tensor, name: str) -> None:
        """The values of ``name``, converted into ``out``, mixed on its device and rounded to their own dtype first."""
        mix_into(out, self._terms(name, out.device), self.info(name).dtype)

    def untouched(self, name: str) -> bool:
        """Whether ``name`` is a tensor of the source as it is, so that reading it need not copy."""
        return name not in self._where or list(self.mix_of(*self._where[name]).values()) == [1.0]

    def _terms(self, name: str, device: torch.device) -> Terms:
        return [(c, self._source.read(n, device)) for c, n in self._parts(*self._where[name])]

    def _parts(self, layer: PlanLayer, suffix: str) -> list[tuple[float, str]]:
        """Coefficient and source's name of everything that one tensor of ``layer`` is made of."""
        if suffix in layer.refits:
            return [(1.0, refit_name(layer.refits[suffix]))]
        mix = self.mix_of(layer, suffix)
        if len(mix) > 1 and (stored := self._kept.get(layer.key, {}).get(suffix)) is not None:
            return [(1.0, stored)]
        return [(mix[s], self._layout.name(s, suffix)) for s in sorted(mix)]

    def source_names(self, position: int) -> list[str]:
        """The source's name of every tensor that reading layer ``position`` reads, as often as it reads it."""
        layer = self.layers[position]
        suffixes = self._layout.layers[layer.base]
        return [name for suffix in suffixes for _, name in self._parts(layer, suffix)]

    def sources_of(self, name: str) -> list[str]:
        """The source's names of what reading ``name`` reads."""
        if name not in self._where:
            return [name]
        return [part for _, part in self._parts(*self._where[name])]

    def over(self, source: TensorSource) -> MergedView:
        """The same plan over another source of the same tensors."""
        return MergedView(source, self._layout, self.layers, self._merge_norms, self._kept)

    def mix_of(self, layer: PlanLayer, suffix: str) -> Mix:
        """The mix of one tensor of ``layer``: its base alone for norms, for stored tensors that are not learned, and
        for what was fitted anew and is not mixed at all."""
        from_base = suffix in self._layout.unmerged or (suffix in self._layout.norms and not self._merge_norms)
        return {layer.base: 1.0} if from_base or suffix in layer.refits else layer.mix


def mismatch(source: TensorSource, layout: Layout, layer: PlanLayer) -> str | None:
    """Why the source layers in ``layer``'s mix cannot be combined with its base, or None if they can."""
    for other in sorted(layer.mix):
        for suffix in sorted({*layout.layers[layer.base], *layout.layers[other]}):
            if suffix in layout.unmerged:
                continue
            if suffix not in layout.layers[layer.base] or suffix not in layout.layers[other]:
                has, lacks = (other, layer.base) if suffix in layout.layers[other] else (layer.base, other)
                return f"source layer {has} has {suffix}, source layer {lacks} has not"
            ours = source.info(layout.name(layer.base, suffix))
            theirs = source.info(layout.name(other, suffix))
            if ours != theirs:
                return (
                    f"{suffix} is {list(ours.shape)} {_dtype(ours)} in source layer {layer.base}, "
                    f"{list(theirs.shape)} {_dtype(theirs)} in source layer {other}"
                )
    return None


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def check_plan(plan: Plan, fingerprint: str, source: TensorSource, layout: Layout) -> None:
    """Raise PlanError unless ``plan`` was made for this source and every mix in it can be computed."""
    if plan.num_source_layers != layout.num_layers:
        raise PlanError(
            f"the plan is for a source of {plan.num_source_layers} layers, this one has {layout.num_layers}"
        )
    if plan.fingerprint != fingerprint:
        raise PlanError(
            f"the plan was made for another source ({plan.source_name}, fingerprint {plan.fingerprint[:12]}…; "
            f"this one's is {fingerprint[:12]}…); search this source again"
        )
    for position, layer in enumerate(plan.layers):
        if reason := mismatch(source, layout, layer):
            raise PlanError(f"layers[{position}] cannot be merged: {reason}")
        after = {f"/{name}" for name in layout.outside} if position == len(plan.layers) - 1 else set[str]()
        if unknown := sorted({*layer.refits} - {*layout.layers[layer.base]} - after):
            raise PlanError(
                f"layers[{position}]: {unknown[0]} was fitted anew, but the source has no such tensor there"
            )
