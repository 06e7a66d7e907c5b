"""Rows of gpu_day.py on how bytes get to the device: the bus, the ring of slots, reading and computing at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from gpu_bench import Bench
from gpu_devices import Device, best_of, gigabytes, median_of, timed
from gpu_rows import RING_WANTED, Finding

from streamcollapse.resources.meter import SAMPLE_SECONDS, sample_memory
from streamcollapse.run.opened import Job, open_job
from streamcollapse.settings.run import RunSettings, Streaming
from streamcollapse.storage.extents import Extent, coalesce, needed_bytes
from streamcollapse.storage.reader import FileReader
from streamcollapse.stream import loaders
from streamcollapse.stream.weights import Limits, WeightStream
from streamcollapse.units import format_bytes, format_seconds

ROUNDS = 3
IN_FLIGHT = loaders.DeviceLoader.IN_FLIGHT  # as shipped


@dataclass(frozen=True)
class Layers:
    """The decoder layers of ``job`` as a device's loader brings them in: names and extents of each, the bytes of all,
    and what a slot for any one of them takes."""

    job: Job
    names: list[list[str]]
    extents: list[list[Extent]]
    num_bytes: int
    slot_bytes: int

    @classmethod
    def of(cls, job: Job) -> Layers:
        """Those of ``job``."""
        layout, locate = job.architecture.layout, job.checkpoint.locate
        names = [list(layout.layer_names(i)) for i in range(layout.num_layers)]
        extents = [coalesce({name: locate(name) for name in layer}) for layer in names]
        one_by_one = [sum(needed_bytes(coalesce({name: locate(name)})) for name in layer) for layer in names]
        slot_bytes = max(*one_by_one, *map(needed_bytes, extents))
        return cls(job, names, extents, sum(e.end - e.start for layer in extents for e in layer), slot_bytes)


def bus(bench: Bench) -> Finding:
    """Copies to the device from memory of every kind, and on it; what pinning costs, and a look at what is held, which
    jobs take all the time."""
    device, size = bench.device, bench.pick(1 << 30, 1 << 22)
    copies = device.copies()
    rates = {"registered": copies.rate(size)}
    registering = timed(lambda: copies.host_block(size))
    copies.free()
    pinning = timed(lambda: device.pinned(size))
    target, other = copies.device_block(size), copies.device_block(size).fill_(1)

    def copy(source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)
        device.synchronize()

    sources = {"torch's pinned": device.pinned(size).fill_(1), "pageable": torch.ones(size, dtype=torch.uint8)}
    for name, source in {**sources, "on the device": other}.items():
        rates[name] = size / best_of(ROUNDS, partial(copy, source))
    each = {"registering": registering * 1e9 / size, "torch's pinning": pinning * 1e9 / size}
    look = best_of(100, partial(sample_memory, device.place))
    words = ", ".join(f"{name} {gigabytes(rate, 1.0)}" for name, rate in rates.items())
    words += "; for a GB of new memory " + ", ".join(f"{k} {format_seconds(v)}" for k, v in each.items())
    words += f"; a look at memory {1e3 * look:.3f} ms, every {1e3 * SAMPLE_SECONDS:.0f} ms"
    figures = {"bytes_per_second": rates, "seconds_per_gigabyte": each, "seconds_of_a_look": look}
    return Finding(words, {"bytes": size, **figures})


def ring(bench: Bench, shape: str, in_flight: Sequence[int]) -> Finding:
    """Passes of the weight stream that compute nothing, against reading alone and copying alone."""
    layers, device = open_layers(bench, shape), bench.device
    copying = copy_alone(layers, device)
    found, parts = {}, []
    for count in sorted({*in_flight, IN_FLIGHT}):
        reading = read_alone(layers, device, count)
        with requests(count), stream_of(layers, device) as stream:
            once = partial(run, stream, layers, device)
            first, seconds = timed(once), median_of(ROUNDS, once)
        ratio = seconds / max(reading, copying)
        found[count] = {"first": first, "pass": seconds, "reading": reading, "copying": copying, "ratio": ratio}
        rate = gigabytes(layers.num_bytes, seconds)
        parts.append(f"{count} in flight {ratio:.2f} (pass {seconds:.3f} s, {rate}; reading {reading:.3f} s)")
        bench.note(**{f"{count} in flight": f"{ratio:.2f}"})
    shipped = found[IN_FLIGHT]
    words = f"{'; '.join(parts)}; copying {format_bytes(layers.num_bytes)} {copying:.3f} s; as shipped {IN_FLIGHT}"
    words += f", the first pass {shipped['first']:.3f} s"
    return Finding(words, {"bytes": layers.num_bytes, "in_flight": found}, fast=shipped["ratio"] <= RING_WANTED)


def overlap(bench: Bench, shape: str) -> Finding:
    """A pass during which the device multiplies matrices for as long as the pass takes without."""
    layers, device = open_layers(bench, shape), bench.device
    size, dtype = bench.pick(4096, 128), torch.float32 if bench.rehearsal else torch.bfloat16
    one, other = (torch.randn(size, size, device=device.place).to(dtype) for _ in range(2))
    product = torch.empty_like(one)

    def compute(times: int) -> None:
        for _ in range(times):
            torch.mm(one, other, out=product)

    def computing(times: int) -> None:
        compute(times)
        device.synchronize()

    with stream_of(layers, device) as stream:
        run(stream, layers, device)
        alone = median_of(ROUNDS, lambda: run(stream, layers, device))
        each = best_of(ROUNDS, lambda: computing(50)) / 50
        times = max(round(alone / len(layers.names) / each), 1)
        load = median_of(ROUNDS, lambda: computing(times * len(layers.names)))
        both = median_of(ROUNDS, lambda: run(stream, layers, device, lambda: compute(times)))
    ratio = both / max(alone, load)
    return Finding(
        f"{ratio:.2f}: both {both:.3f} s, the pass alone {alone:.3f} s, {times} products a layer alone {load:.3f} s",
        {"ratio": ratio, "both": both, "pass": alone, "computing": load, "products": times, "size": size},
        fast=ratio <= RING_WANTED,
    )


def open_layers(bench: Bench, shape: str) -> Layers:
    """The layers of the checkpoint ``shape``."""
    return Layers.of(open_job(bench.source(shape), RunSettings(bench.compute())))


@contextmanager
def stream_of(layers: Layers, device: Device) -> Iterator[WeightStream]:
    """A stream through pinned slots, whose memory is let go of at the end."""
    job, copies = layers.job, device.copies()
    loader = loaders.DeviceLoader(job.checkpoint, False, copies)
    try:
        yield WeightStream(job.source, device.place, loader, job.meter, Limits(Streaming().prefetch, layers.slot_bytes))
    finally:
        device.synchronize()
        copies.free()


def run(stream: WeightStream, layers: Layers, device: Device, work: Callable[[], None] = lambda: None) -> None:
    """One pass over all layers, with ``work`` at each."""
    with stream.run(layers.names) as weights:
        for _ in layers.names:
            with weights.step():
                work()
    device.synchronize()


def read_alone(layers: Layers, device: Device, in_flight: int = IN_FLIGHT) -> float:
    """Seconds to read all layers into pinned blocks such as the ring's, after a first time that brings them in."""
    copies, reader = device.copies(), FileReader(False, in_flight)
    blocks = [copies.host_block(layers.slot_bytes) for _ in range(loaders.DeviceLoader.HOST_SLOTS)]

    def read() -> None:
        for number, extents in enumerate(layers.extents):
            reader.read(extents, blocks[number % len(blocks)])

    try:
        read()
        return median_of(ROUNDS, read)
    finally:
        reader.close()
        copies.free()


def copy_alone(layers: Layers, device: Device) -> float:
    """Seconds to copy as many bytes as the layers have from pinned blocks to blocks on the device."""
    copies = device.copies()
    pairs = [
        (copies.device_block(layers.slot_bytes), copies.host_block(layers.slot_bytes).fill_(0))
        for _ in range(loaders.DeviceLoader.HOST_SLOTS)
    ]

    def copy() -> None:
        for number, extents in enumerate(layers.extents):
            (target, source), size = pairs[number % len(pairs)], needed_bytes(extents)
            copies.upload(target[:size], source[:size], None)
        device.synchronize()

    try:
        copy()
        return median_of(ROUNDS, copy)
    finally:
        copies.free()


@contextmanager
def requests(in_flight: int) -> Iterator[None]:
    """While the body runs, loaders read with ``in_flight`` requests at once."""
    with patch.object(loaders.DeviceLoader, "IN_FLIGHT", in_flight):
        yield
