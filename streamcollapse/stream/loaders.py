"""Ways to bring a chunk of tensors to where they are computed with. Each is slow and simple; passes overlap them.

PlainLoader    asks a tensor source, one tensor after the other: what every other way must equal
MappedLoader   views of the mapped file, populated ahead and given back: no copy on a CPU
ReadLoader     reads into blocks of memory, through or past the page cache
DeviceLoader   reads into pinned blocks and copies them to device blocks on the side
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamcollapse.storage.extents import Extent, coalesce, needed_bytes, tensors_in
from streamcollapse.storage.locks import FileLease
from streamcollapse.storage.mapping import MappedFile, about_to_change
from streamcollapse.storage.placed import PlacedTensors
from streamcollapse.storage.reader import FileReader, ReadingStopped, page_aligned
from streamcollapse.storage.source import TensorSource
from streamcollapse.stream.copies import Copies
from streamcollapse.stream.slots import Ring

_POPULATE_BYTES = 1 << 25  # between two looks at whether to stop


@dataclass(frozen=True)
class Loaded:
    """Tensors of a chunk by name, complete after ``arrive``; ``release`` once nothing will be issued that uses them."""

    tensors: dict[str, torch.Tensor]
    num_bytes: int
    arrive: Callable[[], None] = lambda: None
    release: Callable[[], None] = lambda: None


class Loader:
    """Loads chunks for one pass after the other; ``load`` runs in a thread of its own, one call at a time. ``stays``:
    what was loaded is there until the pass ends, for whoever has not let go of it."""

    stays = False

    def size(self, names: Sequence[str]) -> int:
        """Bytes that a chunk of ``names`` takes in a slot; 0 where no slots are needed."""
        return 0

    def start(self, slots: int, slot_bytes: int) -> None:
        """Begin a pass with ``slots`` slots of ``slot_bytes``; those of the pass before are used again if they do."""

    def load(self, names: Sequence[str], own_memory: bool) -> Loaded:
        """Bring in ``names``; ``own_memory``: in memory of their own, not in a slot. Raises CheckpointError."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise CheckpointError if what is loaded is about to change: where it is used for long."""

    def stop(self) -> None:
        """Break off a running ``load`` from another thread: it raises ReadingStopped, or comes to its end soon."""

    def finish(self) -> None:
        """End the pass, once no ``load`` runs and everything loaded is released."""

    def close(self) -> None:
        """Let go of all memory, after the last pass."""


class PlainLoader(Loader):
    """Reads from any ``source``, onto ``device``."""

    stays = True

    def __init__(self, source: TensorSource, device: torch.device) -> None:
        self._source, self._device = source, device

    def load(self, names: Sequence[str], own_memory: bool) -> Loaded:
        tensors = {name: self._source.read(name, self._device) for name in names}
        return Loaded(tensors, sum(self._source.info(name).num_bytes for name in names))


class MappedLoader(Loader):
    """Populates the mapped pages of ``tensors``. With ``drop_after_use``, pages that were used leave the page cache.

    A checkpoint that does not fit into memory would otherwise push out the very pages that are needed next.
    """

    stays = True

    def __init__(self, tensors: PlacedTensors, drop_after_use: bool) -> None:
        self._placed, self._from_cache = tensors, drop_after_use
        self._stopped = threading.Event()
        self._leases: dict[Path, FileLease] = {}
        self._own_memory: dict[Path, MappedFile] = {}  # files with tensors that are used in later passes too

    def start(self, slots: int, slot_bytes: int) -> None:
        self._stopped.clear()
        for path, mapped in self._own_memory.items():
            self._hold(path)
            mapped.check_size()

    def load(self, names: Sequence[str], own_memory: bool) -> Loaded:
        extents = _extents(self._placed, names, gap=0)  # there is nothing to seek over
        tensors: dict[str, torch.Tensor] = {}
        for extent in extents:
            mapped = self._placed.mapped(extent.tensors[0][1])
            self._hold(extent.path)
            if own_memory:
                self._own_memory[extent.path] = mapped
            for start in range(extent.start, extent.end, _POPULATE_BYTES):
                if self._stopped.is_set():
                    raise ReadingStopped
                mapped.populate(start, min(start + _POPULATE_BYTES, extent.end))
            tensors |= {name: mapped.tensor(place) for name, place in extent.tensors}
        release = (lambda: None) if own_memory else (lambda: self._give_back(extents))
        return Loaded(tensors, _file_bytes(extents), release=release)

    def _hold(self, path: Path) -> None:
        """Keep others from cutting the file short while it is used in place."""
        if path not in self._leases:
            self._leases[path] = FileLease(path)
        if self._leases[path].is_wanted_back():
            raise about_to_change(path)

    def check(self) -> None:
        for path in self._leases:
            self._hold(path)

    def _give_back(self, extents: Sequence[Extent]) -> None:
        for extent in extents:
            self._placed.mapped(extent.tensors[0][1]).give_back(extent.start, extent.end, self._from_cache)

    def stop(self) -> None:
        self._stopped.set()

    def finish(self) -> None:
        for lease in self._leases.values():
            lease.close()
        self._leases.clear()


class ReadLoader(Loader):
    """Reads into slots in host memory, past the page cache if ``direct``."""

    def __init__(self, tensors: PlacedTensors, direct: bool) -> None:
        self._placed, self._direct = tensors, direct
        self._ring: Ring[None] = Ring(0, 0, page_aligned)

    def size(self, names: Sequence[str]) -> int:
        return needed_bytes(_extents(self._placed, names))

    def start(self, slots: int, slot_bytes: int) -> None:
        self._reader = FileReader(self._direct)
        if not self._ring.serves(slots, slot_bytes):
            self._ring = Ring(slots, slot_bytes, page_aligned)
        self._ring.open()

    def load(self, names: Sequence[str], own_memory: bool) -> Loaded:
        extents = _extents(self._placed, names)
        if own_memory:
            block = page_aligned(needed_bytes(extents))
            self._reader.read(extents, block)
            return Loaded(tensors_in(block, extents), _file_bytes(extents))
        lease = self._ring.acquire()
        try:
            self._reader.read(extents, lease.block)
        except BaseException:
            lease.release()
            raise
        return Loaded(tensors_in(lease.block, extents), _file_bytes(extents), release=lease.release)

    def stop(self) -> None:
        self._ring.close()
        self._reader.stop()

    def finish(self) -> None:
        self._reader.close()

    def close(self) -> None:
        self._ring = Ring(0, 0, page_aligned)


class DeviceLoader(Loader):
    """Disk -> pinned slot -> copy on the side -> device slot.

    Two rings: a host slot is free again once its copy is done, a device slot once the computation that was issued while
    it was held is done.
    """

    IN_FLIGHT = 8  # requests at once: 22.6 GB/s to an H100 on 16 cores, where 4 came to 16.6 and 16 to 22.2
    HOST_SLOTS = 3  # one being filled, one being copied, one between the two

    def __init__(self, tensors: PlacedTensors, direct: bool, copies: Copies) -> None:
        self._placed, self._direct, self._copies = tensors, direct, copies
        self._host: Ring[Any] = Ring(0, 0, copies.host_block)
        self._device: Ring[Any] = Ring(0, 0, copies.device_block)

    def size(self, names: Sequence[str]) -> int:
        return needed_bytes(_extents(self._placed, names))

    def start(self, slots: int, slot_bytes: int) -> None:
        self._reader = FileReader(self._direct, self.IN_FLIGHT)
        if not self._host.serves(self.HOST_SLOTS, slot_bytes):  # kept where it can be: pinning is slow
            self._copies.free()
            self._host = Ring(self.HOST_SLOTS, slot_bytes, self._copies.host_block)
        if not self._device.serves(slots, slot_bytes):
            self._device = Ring(slots, slot_bytes, self._copies.device_block)
        self._host.open()
        self._device.open()

    def load(self, names: Sequence[str], own_memory: bool) -> Loaded:
        extents = _extents(self._placed, names)
        taken, ticket = needed_bytes(extents), None
        host = self._host.acquire()
        try:
            if host.after is not None:
                self._copies.wait(host.after)
            self._reader.read(extents, host.block)
            if own_memory:
                block = self._copies.device_block(taken)
                ticket = self._copies.upload(block, host.block[:taken], None)
                return self._on_device(extents, block, ticket, lambda: None)
            device = self._device.acquire()
            try:
                ticket = self._copies.upload(device.block[:taken], host.block[:taken], device.after)
            except BaseException:
                device.release(device.after)
                raise
            return self._on_device(extents, device.block, ticket, lambda: device.release(self._copies.mark()))
        finally:
            host.release(ticket)

    def _on_device(
        self, extents: Sequence[Extent], block: torch.Tensor, ticket: Any, release: Callable[[], None]
    ) -> Loaded:
        # Not before the bytes are there: a tensor that its file does not align is copied.
        def arrive() -> None:
            self._copies.arrive(ticket)
            loaded.tensors.update(tensors_in(block, extents))

        loaded = Loaded({}, _file_bytes(extents), arrive, release)
        return loaded

    def stop(self) -> None:
        self._host.close()
        self._device.close()
        self._reader.stop()

    def finish(self) -> None:
        self._reader.close()

    def close(self) -> None:
        self._copies.free()
        self._host = Ring(0, 0, self._copies.host_block)
        self._device = Ring(0, 0, self._copies.device_block)


def _extents(tensors: PlacedTensors, names: Sequence[str], **options: int) -> list[Extent]:
    return coalesce({name: tensors.locate(name) for name in names}, **options)


def _file_bytes(extents: Sequence[Extent]) -> int:
    return sum(extent.end - extent.start for extent in extents)
