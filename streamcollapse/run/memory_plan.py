"""How a job's weights are streamed: what the memory there is allows, and which way of reading is fastest here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from streamcollapse.arch.architecture import Architecture
from streamcollapse.forward.batches import MAX_CALL_TOKENS
from streamcollapse.forward.measure import KEPT_BYTES, LOGITS_BYTES, distributions_bytes
from streamcollapse.forward.model import StreamedModel
from streamcollapse.forward.stored import StoredLayers
from streamcollapse.progress import Listener
from streamcollapse.run.opened import Job, Samples
from streamcollapse.settings.catalogue import METRICS
from streamcollapse.settings.run import Streaming
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.probe import cached_share, read_rate
from streamcollapse.storage.reader import check_direct_reads
from streamcollapse.stream.allotment import allot, least
from streamcollapse.stream.budget import budget_for, free_ram
from streamcollapse.stream.copies import CudaCopies
from streamcollapse.stream.device import device_errors, within_vram
from streamcollapse.stream.loaders import DeviceLoader, Loader, MappedLoader, PlainLoader, ReadLoader
from streamcollapse.stream.meters import Meter
from streamcollapse.stream.needs import Allotment, Work, Workload, activation_bytes, measure_work
from streamcollapse.stream.weights import Limits, WeightStream

# where no samples are at hand: ten sentences, 24 passages
ASSUMED_TOKENS = {"sentences": 10 * 64, "passages": 24 * 256}
_PROBE_BYTES = 1 << 28
_WORTH_PROBING = 4 * _PROBE_BYTES  # bytes of checkpoint; less is read before a probe would pay
_MOSTLY = 0.9  # in the page cache: nothing is faster than what is there already


def work_of(job: Job, samples: Samples | None, boundaries: int, window: int = 1, kind: str = "sentences") -> Work:
    """What a search with ``samples``, or as many tokens as those of ``kind``, has to hold whose candidates start from
    ``boundaries`` layer boundaries, and whose merges read ``window`` layers."""
    tokens = ASSUMED_TOKENS[kind] if samples is None else samples.num_tokens
    call = (1, MAX_CALL_TOKENS) if samples is None else samples.largest_call
    layout, dtype = job.architecture.layout, job.placement.dtype
    embedding = job.architecture.skeleton.model.get_input_embeddings().weight.numel() * dtype.itemsize
    workload = Workload(tokens, call, boundaries, window)
    return measure_work(job.source, layout, dtype, job.hidden_size, workload, embedding)


@dataclass(frozen=True)
class Demand:
    """What a search asks of memory: how many layer ``boundaries`` it starts from, how many layers a merge combines
    (``window``), the ``metric`` it judges by, and the ``samples`` it takes where none are at hand."""

    boundaries: int
    window: int = 1
    metric: str = "cosine"
    samples: str = "sentences"


def allotment(job: Job, samples: Samples | None, streaming: Streaming, demand: Demand) -> Allotment:
    """How a search spends the memory it may use. Raises BudgetError before any weight is read."""
    head = _head_bytes(job, samples, demand)
    work = replace(work_of(job, samples, demand.boundaries, demand.window, demand.samples), head=head)
    choice = allot(work, budget_for(streaming, job.placement.device), streaming)
    activations = max(work.activations, 4 * LOGITS_BYTES if head else 0)
    return replace(choice, io=choose_io(job, streaming.io, choice), activations=activations)


def _head_bytes(job: Job, samples: Samples | None, demand: Demand) -> int:
    """What a metric of next-token distributions holds: the head, four blocks of logits at its busiest, and for ``kl``
    the original's distributions where they are few."""
    output = job.architecture.skeleton.model.get_output_embeddings()
    if not METRICS[demand.metric].by_logits or output is None:
        return 0
    lengths = [(ASSUMED_TOKENS[demand.samples],)] if samples is None else [batch.lengths for batch in samples.batches]
    kept = distributions_bytes(lengths, job.vocabulary) if demand.metric == "kl" else 0
    held = 4 * LOGITS_BYTES + (kept if kept <= KEPT_BYTES else 0)
    return int(output.weight.numel()) * job.placement.dtype.itemsize + held


def least_allotment(job: Job, demand: Demand | None) -> Allotment:
    """What a run needs at the least, whatever there is: a search of ``demand``, or one that only writes."""
    work = work_of(job, None, 0)
    if demand is not None:
        work = work_of(job, None, demand.boundaries, kind=demand.samples)
        work = replace(work, head=_head_bytes(job, None, demand))
    return least(work, Streaming(), job.placement.device.type != "cpu")


def plain_allotment(job: Job, streaming: Streaming, call_tokens: int = MAX_CALL_TOKENS) -> Allotment:
    """For passes that hold one layer and the activations of a call of ``call_tokens``: nothing stays."""
    shapes = [job.source.info(name).shape for name in job.architecture.layout.layer_names(0)]
    activations = activation_bytes(shapes, job.hidden_size, (1, call_tokens), job.placement.dtype.itemsize)
    from_cache = job.checkpoint.num_bytes > free_ram()
    choice = Allotment(streaming.prefetch, from_cache=from_cache, activations=activations)
    return replace(choice, io=choose_io(job, streaming.io, choice))


@contextmanager
def open_stream(job: Job, choice: Allotment) -> Iterator[WeightStream]:
    """The weight stream of ``job`` while the body runs: one for all its phases. What its device reports in the body
    is one line: raises BudgetError where the device's memory ran out, DeviceFailedError where it failed."""
    device, budget = job.placement.device, choice.budget
    with device_errors(device), within_vram(device, None if budget is None else budget.vram_limit):
        stream = _stream(job, choice)
        try:
            yield stream
        finally:
            stream.close()


def _stream(job: Job, choice: Allotment) -> WeightStream:
    layout, device = job.architecture.layout, job.placement.device
    keep = frozenset(name for i in choice.resident(layout.num_layers) for name in layout.layer_names(i))
    loader = _loader(job, choice)
    layers = [layout.layer_names(i) for i in range(layout.num_layers)]
    unit_bytes = max(sum(loader.size([name]) for name in names) for names in layers)
    fallback = MappedLoader(job.overlay, choice.from_cache) if device.type == "cpu" else None
    limits = Limits(choice.prefetch, unit_bytes, choice.slot_bytes or None)
    return WeightStream(job.source, device, loader, job.meter, limits, keep, fallback)


@dataclass(frozen=True)
class Run:
    """A job while it runs: the open checkpoint, how memory is spent, the weight stream, the mixed layers that are
    ``stored``, and the streamed ``model``."""

    job: Job
    memory: Allotment
    stream: WeightStream
    stored: StoredLayers

    @cached_property
    def model(self) -> StreamedModel:
        """The streamed forward pass, whose layer slot is made when it is first needed."""
        return self.job.model(self.stream)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.job.checkpoint

    @property
    def architecture(self) -> Architecture:
        return self.job.architecture

    @property
    def meter(self) -> Meter:
        return self.job.meter

    @property
    def listener(self) -> Listener:
        return self.job.listener


@contextmanager
def open_run(job: Job, memory: Allotment, scratch: Path) -> Iterator[Run]:
    """The run of ``job`` while the body lasts; what is stored in ``scratch`` is removed at its end."""
    reserve = job.checkpoint.num_bytes
    with (
        StoredLayers(job.overlay, scratch, memory.resident(job.num_layers), reserve) as stored,
        open_stream(job, memory) as stream,
    ):
        yield Run(job, memory, stream, stored)


def _loader(job: Job, choice: Allotment) -> Loader:
    if job.placement.device.type == "cpu":
        if choice.io == "mmap":
            return MappedLoader(job.overlay, choice.from_cache)
        return ReadLoader(job.overlay, direct=choice.io == "direct")
    if choice.io == "mmap":
        return PlainLoader(job.overlay, job.placement.device)
    return DeviceLoader(job.overlay, choice.io == "direct", CudaCopies(job.placement.device))


def choose_io(job: Job, io: str, choice: Allotment) -> str:
    """``io``, or what a short measurement says for auto.

    On a CPU mapped weights are used in place; reading past the page cache pays only where the checkpoint does not fit
    into memory and the disk is faster that way. Raises CheckpointError where the file system refuses the I/O mode asked
    for. A CUDA device gets its weights from pinned memory in any case.
    """
    if io == "direct":
        check_direct_reads(job.checkpoint.shards[0].path)
    if io != "auto":
        return io
    mapped = "mmap" if job.placement.device.type == "cpu" else "pread"
    fits = not choice.from_cache
    small = job.checkpoint.num_bytes < _WORTH_PROBING
    if fits or small or cached_share(job.checkpoint) > _MOSTLY:
        return mapped
    rates = {mode: read_rate(job.checkpoint, mode, _PROBE_BYTES) for mode in (mapped, "direct")}
    through, past = rates[mapped], rates["direct"]
    return "direct" if through is not None and past is not None and past > through else mapped
