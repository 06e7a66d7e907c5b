"""The weight stream: passes over weights in a known order, with reading, copying and computing at the same time.

A pass is told at its start which tensors each of its steps needs. While one step computes, the tensors of the next ones
are on their way; each is read once and held until the last step that needs it.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch

from streamcollapse.resources.device import give_back_memory
from streamcollapse.resources.meter import Meter
from streamcollapse.storage.source import TensorInfo, TensorSource
from streamcollapse.stream.loaders import Loaded, Loader


@dataclass(frozen=True)
class Chunk:
    """Tensors that are loaded together for step ``first`` of a pass and held until the end of step ``last``, or for
    good if they are to ``stay``."""

    names: tuple[str, ...]
    first: int
    last: int
    stay: bool = False


def plan_chunks(
    steps: Sequence[Sequence[str]], size: Callable[[str], int], capacity: int, keep: Container[str] = ()
) -> list[Chunk]:
    """Chunks for a pass whose step i needs the tensors ``steps[i]``, in the order in which they are needed.

    Those in ``keep`` are to stay. Each tensor is in one chunk: it is read once and held from its first use to its last.
    A chunk holds at most ``capacity`` bytes as ``size`` counts them, unless it is a single tensor. Tensors of different
    length of life are kept apart, so that what is needed longer does not hold up the rest.
    """
    last: dict[str, int] = {}
    for number, names in enumerate(steps):
        last.update(dict.fromkeys(names, number))
    chunks: list[Chunk] = []
    seen: set[str] = set()
    for number, names in enumerate(steps):
        groups: dict[tuple[int, bool], list[str]] = {}
        for name in dict.fromkeys(names):
            if name not in seen:
                seen.add(name)
                stay = name in keep
                groups.setdefault((number if stay else last[name], stay), []).append(name)
        for (end, stay), group in sorted(groups.items()):
            chunks += [Chunk(part, number, end, stay) for part in _within(group, size, capacity)]
    return chunks


def _within(names: Sequence[str], size: Callable[[str], int], capacity: int) -> list[tuple[str, ...]]:
    parts: list[list[str]] = []
    filled = 0
    for name in names:
        if not parts or filled + size(name) > capacity:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size(name)
    return [tuple(part) for part in parts]


def most_held(chunks: Sequence[Chunk]) -> int:
    """How many chunks that do not stay are held at once, at most."""
    change: Counter[int] = Counter()
    for chunk in chunks:
        if not chunk.stay:
            change[chunk.first] += 1
            change[chunk.last + 1] -= 1
    return max(accumulate(change[step] for step in sorted(change)), default=0)


Result = TypeVar("Result")

_SMALL = 32  # a chunk that fits this often into a slot does not take one


@dataclass(frozen=True)
class Limits:
    """``prefetch`` chunks are loaded ahead of use, fewer where memory is short. ``chunk_bytes``: what is loaded
    together takes no more in a slot, and a larger tensor is read only when it is asked for. ``slot_budget``: bytes for
    all slots of the loader together, None where it takes none."""

    prefetch: int
    chunk_bytes: int = 0
    slot_budget: int | None = None


class WeightStream:
    """Passes over ``source`` on ``device``, within ``limits``.

    A pass that needs more for its slots goes through ``fallback``, which takes none, or without one reads tensors when
    they are asked for. Tensors in ``keep`` stay once they have been read (``resident``).
    """

    def __init__(
        self,
        source: TensorSource,
        device: torch.device,
        loader: Loader,
        meter: Meter,
        limits: Limits,
        keep: Collection[str] = frozenset(),
        fallback: Loader | None = None,
    ) -> None:
        self.source, self.device, self.loader, self.meter = source, device, loader, meter
        self.resident: dict[str, torch.Tensor] = {}
        self._keep, self._fallback = keep, fallback
        self._limits = limits

    def run(self, steps: Sequence[Sequence[str]]) -> Pass:
        """A pass whose step i needs the tensors ``steps[i]``."""
        missing = [[name for name in names if name not in self.resident and self._streamed(name)] for names in steps]
        chunks = plan_chunks(missing, lambda name: self.loader.size([name]), self._limits.chunk_bytes, self._keep)
        sizes = {chunk: self.loader.size(chunk.names) for chunk in chunks}
        slot_bytes = max(sizes.values(), default=0)
        # A few norms that wait for their layer are not worth a slot: they get memory of their own.
        small = {chunk for chunk in chunks if 0 < sizes[chunk] * _SMALL <= slot_bytes}
        held, ahead = max(most_held([chunk for chunk in chunks if chunk not in small]), 1), self._limits.prefetch
        if self._limits.slot_budget is not None and slot_bytes:
            ahead = min(ahead, self._limits.slot_budget // slot_bytes - held)
            if ahead < 0:
                return self._without_slots(missing, len(steps))
        return Pass(self, self.loader, chunks, small, ahead, (held + ahead, slot_bytes), len(steps))

    def keep_none(self) -> bool:
        """Let go of the tensors that stayed, and let none stay from now on. Returns whether that frees anything."""
        found = bool(self._keep)
        self.keep(())
        return found

    def keep(self, names: Collection[str]) -> None:
        """Let go of the tensors that stayed; from now on let these ``names`` stay."""
        self.resident.clear()
        self._keep = frozenset(names)

    def sparing(self, attempt: Callable[[], Result]) -> Result:
        """What ``attempt`` comes to; where the device's memory runs out, what it comes to once nothing stays."""
        try:
            return attempt()
        except torch.OutOfMemoryError:
            if not self.keep_none():
                raise
        give_back_memory(self.device)  # not before the error is gone, whose traceback holds what was made
        return attempt()

    def close(self) -> None:
        """Let go of all memory, after the last pass."""
        self.resident.clear()
        self.loader.close()
        if self._fallback is not None:
            self._fallback.close()

    def _without_slots(self, missing: Sequence[Sequence[str]], num_steps: int) -> Pass:
        if self._fallback is None:
            return Pass(self, self.loader, [], set(), 0, (1, 0), num_steps)
        chunks = plan_chunks(missing, lambda name: 0, 0)
        return Pass(self, self._fallback, chunks, set(), self._limits.prefetch, (1, 0), num_steps)

    def _streamed(self, name: str) -> bool:
        return not self._limits.chunk_bytes or self.loader.size([name]) <= self._limits.chunk_bytes


class Pass:
    """One pass, as a tensor source: ``step()`` once for each step, inside of which its tensors can be read."""

    def __init__(
        self,
        stream: WeightStream,
        loader: Loader,
        chunks: Sequence[Chunk],
        small: Collection[Chunk],
        ahead: int,
        slots: tuple[int, int],
        num_steps: int,
    ) -> None:
        self._stream, self._loader, self._small = stream, loader, small
        self._ahead, self._slots = ahead, slots
        self._to_come = deque(chunks)
        self._pending: deque[tuple[Chunk, Future[Loaded]]] = deque()
        self._held: dict[Chunk, Loaded] = {}
        self._tensors: dict[str, torch.Tensor] = dict(stream.resident)
        self._step, self._num_steps = -1, num_steps
        self._thread: ThreadPoolExecutor | None = None

    def __enter__(self) -> Pass:
        self._loader.start(*self._slots)
        if self._ahead:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
            self._request()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        loader = self._loader
        if self._thread is not None:
            loader.stop()
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._tensors.clear()
        for _, future in self._pending:
            if not future.cancelled() and future.exception() is None:
                future.result().release()
        for loaded in self._held.values():
            loaded.release()
        loader.finish()
        assert kind is not None or self._step == self._num_steps - 1, "a pass goes through all of its steps"

    @contextmanager
    def step(self) -> Iterator[None]:
        """Have the tensors of the next step at hand while the body runs; they are not to be used after it, but
        where the loader says that they stay."""
        self._step += 1
        while (chunk := self._next()) is not None and chunk.first <= self._step:
            self._take()
        yield
        for chunk in [chunk for chunk in self._held if chunk.last <= self._step]:
            for name in chunk.names:
                del self._tensors[name]
            self._held.pop(chunk).release()

    def _next(self) -> Chunk | None:
        if self._pending:
            return self._pending[0][0]
        return self._to_come[0] if self._to_come else None

    def _request(self) -> None:
        """Ask for as many chunks as may be ahead."""
        assert self._thread is not None
        while self._to_come and len(self._pending) < self._ahead:
            chunk = self._to_come.popleft()
            self._pending.append((chunk, self._thread.submit(self._load, chunk)))

    def _take(self) -> None:
        if self._ahead:
            chunk, future = self._pending[0]
            with self._stream.meter.waiting():
                loaded = future.result()
            self._pending.popleft()
            self._request()
        else:
            chunk = self._to_come.popleft()
            with self._stream.meter.waiting():
                loaded = self._load(chunk)
        loaded.arrive()
        self._tensors |= loaded.tensors
        if chunk.stay:
            self._stream.resident |= loaded.tensors
        else:
            self._held[chunk] = loaded

    def _load(self, chunk: Chunk) -> Loaded:
        start = time.perf_counter()
        loaded = self._loader.load(chunk.names, chunk.stay or chunk in self._small)
        self._stream.meter.loaded(time.perf_counter() - start, loaded.num_bytes)
        return loaded

    @property
    def names(self) -> Sequence[str]:
        return self._stream.source.names

    def info(self, name: str) -> TensorInfo:
        return self._stream.source.info(name)

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """``name`` on ``device``: at hand if this step needs it, else read now."""
        tensor = self._tensors.get(name)
        return self._stream.source.read(name, device) if tensor is None else tensor.to(device)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self._stream.source.read_rows(name, rows)
