"""Accepted mixed layers, stored once they have been built, so that later sweeps and the writer read one layer for them.

What is stored are the rounded tensors that the writer would write. A merge of merged layers still goes back to the
source, for one rounding.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch

from streamcollapse.errors import OutputError
from streamcollapse.merge.plan import LayerKey, PlanLayer
from streamcollapse.merge.view import MergedView
from streamcollapse.storage.extents import Location
from streamcollapse.storage.placed import Overlay
from streamcollapse.storage.scratch import DiskScratch
from streamcollapse.storage.source import TensorInfo


class StoredLayers:
    """Stores the layers that are ``wanted`` in a temporary directory in ``scratch``, which ``close`` removes.

    Layers whose sources are all in ``resident`` are not stored: nothing is read for them. Where storing a layer would
    leave less than ``reserve`` bytes on the disk nothing is stored, and the sources are read as before.
    """

    def __init__(self, overlay: Overlay, scratch: Path, resident: Collection[int], reserve: int) -> None:
        self._overlay, self._scratch, self._resident, self._reserve = overlay, scratch, resident, reserve
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._wanted: set[LayerKey] = set()
        self._full = False
        self._count = 0
        self.names: dict[LayerKey, dict[str, str]] = {}

    def __enter__(self) -> StoredLayers:
        return self

    def __exit__(self, *error: object) -> None:
        self.set_stack(())
        if self._directory is not None:
            self._directory.cleanup()

    def set_stack(self, layers: Iterable[PlanLayer]) -> None:
        """From now on ``layers`` are the stack: what is stored of others goes, what is not stored of these may come."""
        mixed = {layer.key: layer for layer in layers if len(layer.mix) > 1}
        for key in self.names.keys() - mixed.keys():
            self._remove(self.names.pop(key))
        self._wanted = {
            key
            for key, layer in mixed.items()
            if key not in self.names and not all(source in self._resident for source in layer.mix)
        }

    def store_if_wanted(self, view: MergedView, position: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Store layer ``position`` of ``view`` if it is wanted; ``weights`` are its stored tensors by suffix, as
        computed with."""
        layer = view.layers[position]
        if layer.key not in self._wanted or self._full:
            return
        names = view.layer_names(position)
        mixed = {s: n for s, n in names.items() if s in weights and len(view.mix_of(layer, s)) > 1}
        stored: dict[str, str] = {}
        try:
            needed = sum(view.info(name).num_bytes for name in mixed.values())
            if shutil.disk_usage(self._scratch).free - needed < self._reserve:
                raise OutputError("the rest of the disk is for the output")
            for suffix, name in mixed.items():
                stored[suffix] = self._store(_rounded(view, name, weights[suffix]))
        except (OutputError, OSError):  # no space for it, or no place: the sources are still there
            self._full = True
            self._remove(stored)
            return
        self.names[layer.key] = stored
        self._wanted.discard(layer.key)

    def _store(self, tensor: torch.Tensor) -> str:
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix=".streamcollapse-", dir=self._scratch)
        self._count += 1
        place, file = Path(self._directory.name), f"{self._count:06d}"
        files = DiskScratch(place)
        tensor_on_disk = files.allocate(file, tuple(tensor.shape), tensor.dtype)
        tensor_on_disk.copy_(tensor)
        files.page_out(tensor_on_disk)
        info = TensorInfo(tensor.dtype, tuple(tensor.shape))
        self._overlay.add(f"stored/{file}", Location(place / file, 0, info))
        return f"stored/{file}"

    def _remove(self, stored: Mapping[str, str]) -> None:
        for name in stored.values():
            self._overlay.remove(name).unlink()


def _rounded(view: MergedView, name: str, weight: torch.Tensor) -> torch.Tensor:
    """``name`` as the writer would write it: ``weight`` converted back where that is exact, else mixed once more."""
    dtype = view.info(name).dtype
    exact = weight.dtype == dtype or (weight.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16))
    return weight.to(dtype) if exact else view.read(name, weight.device)
