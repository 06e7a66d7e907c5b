"""Where tensors lie in files, and in which pieces they are best read: by (file, offset), neighbours together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from streamcollapse.storage.source import TensorInfo, span_elements

PAGE_BYTES = 4096  # what reads past the page cache are aligned to
_GAP_BYTES = 1 << 16  # a hole that is cheaper to read than to seek over


@dataclass(frozen=True)
class Location:
    """The bytes ``[start, end)`` of file ``path`` are a tensor of ``info``; with ``strides`` (in elements) if it is not
    contiguous."""

    path: Path
    start: int
    info: TensorInfo
    strides: tuple[int, ...] | None = None

    @property
    def end(self) -> int:
        return self.start + self.num_elements * self.info.dtype.itemsize

    @property
    def num_elements(self) -> int:
        """From the first to the last; of a tensor that is not contiguous, others may lie between them."""
        return self.info.num_elements if self.strides is None else span_elements(self.info.shape, self.strides)

    def shaped(self, flat: torch.Tensor) -> torch.Tensor:
        """``flat``, the ``num_elements`` elements one after the other, as the tensor that they are."""
        return flat.view(self.info.shape) if self.strides is None else flat.as_strided(self.info.shape, self.strides)


@dataclass(frozen=True)
class Extent:
    """One stretch of a file that is read as a whole, with the tensors in it by name."""

    path: Path
    start: int
    end: int
    tensors: tuple[tuple[str, Location], ...]

    @property
    def aligned_start(self) -> int:
        return self.start // PAGE_BYTES * PAGE_BYTES

    @property
    def aligned_bytes(self) -> int:
        """What it takes in memory when whole pages are read."""
        return -(-self.end // PAGE_BYTES) * PAGE_BYTES - self.aligned_start


def coalesce(places: Mapping[str, Location], gap: int = _GAP_BYTES) -> list[Extent]:
    """``places`` in the order in which a disk reads fastest; neighbours up to ``gap`` bytes apart become one extent."""
    extents: list[Extent] = []
    for name, place in sorted(places.items(), key=lambda item: (item[1].path, item[1].start)):
        last = extents[-1] if extents else None
        if last is not None and last.path == place.path and place.start - last.end <= gap:
            extents[-1] = Extent(last.path, last.start, max(last.end, place.end), (*last.tensors, (name, place)))
        else:
            extents.append(Extent(place.path, place.start, place.end, ((name, place),)))
    return extents


def needed_bytes(extents: Sequence[Extent]) -> int:
    """What ``extents`` take in a block of memory, one after the other, as whole pages."""
    return sum(extent.aligned_bytes for extent in extents)


def tensors_in(block: torch.Tensor, extents: Sequence[Extent]) -> dict[str, torch.Tensor]:
    """The tensors of ``extents`` by name, as views of ``block`` (uint8, page-aligned) into which they were read.

    A tensor lies at the same offset within a page as in its file, so that computing with it gives the same bits as
    computing with the mapped file. One that its file does not align is copied.
    """
    tensors: dict[str, torch.Tensor] = {}
    position = 0
    for extent in extents:
        for name, place in extent.tensors:
            start = position + place.start - extent.aligned_start
            raw = block[start : start + place.end - place.start]
            if start % place.info.dtype.itemsize:
                raw = raw.clone()
            tensors[name] = place.shaped(raw.view(place.info.dtype))
        position += extent.aligned_bytes
    return tensors
