"""Accepted mixed layers, stored once they have been built, so that later sweeps and the writer read one layer for them.

What is stored are the rounded tensors that the writer would write. A merge of merged layers still goes back to the
source, for one rounding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch

from streamcollapse.errors import OutputError
from streamcollapse.merge.plan import LayerKey, PlanLayer
from streamcollapse.merge.view import MergedView
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.extents import Location
from streamcollapse.storage.rooms import OnDisk


class KeptLayers:
    """Stores the layers that are ``wanted`` in a temporary directory in ``scratch``, which ``close`` removes.

    Layers whose sources are all in ``resident`` are not stored: nothing is read for them. Without space on the disk
    nothing is stored, and the sources are read as before.
    """

    def __init__(self, checkpoint: Checkpoint, scratch: Path, resident: Collection[int]) -> None:
        self._checkpoint, self._scratch, self._resident = checkpoint, scratch, resident
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._wanted: set[LayerKey] = set()
        self._full = False
        self._count = 0
        self.names: dict[LayerKey, dict[str, str]] = {}

    def __enter__(self) -> KeptLayers:
        return self

    def __exit__(self, *error: object) -> None:
        self.want(())
        if self._directory is not None:
            self._directory.cleanup()

    def want(self, layers: Iterable[PlanLayer]) -> None:
        """From now on ``layers`` are the stack: what is stored of others goes, what is not stored of these may come."""
        mixed = {layer.key: layer for layer in layers if len(layer.mix) > 1}
        for key in self.names.keys() - mixed.keys():
            for name in self.names.pop(key).values():
                self._checkpoint.detach(name).unlink()
        self._wanted = {
            key
            for key, layer in mixed.items()
            if key not in self.names and not all(source in self._resident for source in layer.mix)
        }

    def offer(self, view: MergedView, position: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Store layer ``position`` of ``view`` if it is wanted; ``weights`` are its tensors by suffix, as computed
        with.

        Converting them back to their own dtype is exact: they were rounded to it before.
        """
        layer = view.layers[position]
        if layer.key not in self._wanted or self._full:
            return
        try:
            if self._directory is None:
                self._directory = tempfile.TemporaryDirectory(prefix=".streamcollapse-", dir=self._scratch)
            room, stored = OnDisk(Path(self._directory.name)), {}
            for suffix, name in view.layer_names(position).items():
                if suffix in weights and len(view.mix_of(layer, suffix)) > 1:
                    info = view.info(name)
                    self._count += 1
                    file = f"{self._count:06d}"
                    kept = room.make(file, info.shape, info.dtype)
                    kept.copy_(weights[suffix])
                    room.settle(kept)
                    stored[suffix] = f"kept/{file}"
                    self._checkpoint.attach(stored[suffix], Location(Path(self._directory.name) / file, 0, info))
        except (OutputError, OSError):  # no space for it, or no place: the sources are still there
            self._full = True
            return
        self.names[layer.key] = stored
        self._wanted.discard(layer.key)
