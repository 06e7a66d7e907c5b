"""What every job on a checkpoint opens: the checkpoint, of which only headers are read, and the run with its stream."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from streamcollapse.arch.architecture import Architecture, load_architecture
from streamcollapse.errors import printable
from streamcollapse.forward.batches import call_tokens
from streamcollapse.forward.model import StreamedModel
from streamcollapse.forward.stored import StoredLayers
from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.merge.view import NOTHING_KEPT, Kept, MergedView
from streamcollapse.progress import Listener, silent
from streamcollapse.resources.device import Placement, device_errors, resolve, steady_heap, within_vram
from streamcollapse.resources.meter import Meter
from streamcollapse.run.needs import MemoryPlan
from streamcollapse.settings.run import RunSettings
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.hub import local_directory
from streamcollapse.storage.placed import Overlay
from streamcollapse.storage.source import ObservedSource
from streamcollapse.stream.copies import CudaCopies
from streamcollapse.stream.loaders import DeviceLoader, Loader, MappedLoader, PlainLoader, ReadLoader
from streamcollapse.stream.weights import Limits, WeightStream


@dataclass(frozen=True)
class Job:
    """An open checkpoint: understood, placed and metered. ``overlay``: its tensors, and mixed layers that a run stores;
    ``source`` counts into ``meter`` what is read of it."""

    checkpoint: Checkpoint
    overlay: Overlay
    architecture: Architecture
    placement: Placement
    meter: Meter
    source: ObservedSource
    listener: Listener
    trust_remote_code: bool

    @property
    def name(self) -> str:
        """What the source calls itself: its Hub id where the config records one, else its directory's name."""
        recorded = self.architecture.config.raw.get("_name_or_path")
        if isinstance(recorded, str) and recorded.count("/") == 1 and not recorded.startswith((".", "/")):
            return printable(recorded)
        directory = self.checkpoint.directory.resolve()
        cached = re.fullmatch(r"models--(.+?)--(.+)", directory.parent.parent.name)
        if cached is not None and directory.parent.name == "snapshots":  # the layout of the Hub's cache
            return printable(f"{cached[1]}/{cached[2]}")
        return printable(directory.name)

    @property
    def num_layers(self) -> int:
        return self.architecture.layout.num_layers

    @property
    def hidden_size(self) -> int:
        return int(self.architecture.config.text.hidden_size)

    @property
    def width(self) -> int:
        """Columns or rows of the widest matrix in a layer, experts apart."""
        shapes = [self.source.info(name).shape for name in self.architecture.layout.layer_names(0)]
        return max((max(shape[-2:]) for shape in shapes if len(shape) > 1), default=self.hidden_size)

    @property
    def call_tokens(self) -> int:
        """How many tokens a call of a layer takes."""
        return call_tokens(self.width, self.placement.grain)

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        return int(self.architecture.skeleton.model.get_input_embeddings().weight.shape[0])

    def view(self, layers: tuple[PlanLayer, ...], merge_norms: bool = False, kept: Kept = NOTHING_KEPT) -> MergedView:
        """``layers`` over this source, as a tensor source; ``kept`` are names of mixed tensors that are stored."""
        return MergedView(self.source, self.architecture.layout, layers, merge_norms, kept)

    def original(self) -> MergedView:
        """The source itself, as the plan that changes nothing."""
        return self.view(original_layers(self.num_layers))

    def model(self, stream: WeightStream) -> StreamedModel:
        """The streamed forward pass of this source, with weights from ``stream``."""
        return StreamedModel(self.architecture, stream, self.placement, self.listener)

    def compute(self) -> dict[str, str]:
        """Device and dtype, as text."""
        return {"device": str(self.placement.device), "dtype": self.placement.dtype_name}


def open_job(source: str | Path, settings: RunSettings, listener: Listener = silent) -> Job:
    """Open the checkpoint ``source``: a directory or a Hub id. Raises CheckpointError, ModelError, DeviceError."""
    steady_heap()
    checkpoint = Checkpoint(local_directory(source, listener))
    architecture = load_architecture(checkpoint, settings.trust_remote_code)
    placement = resolve(settings.compute, architecture.weights_dtype)
    meter = Meter(placement.device)
    overlay = Overlay(checkpoint)
    return Job(
        checkpoint,
        overlay,
        architecture,
        placement,
        meter,
        ObservedSource(overlay, meter.read),
        listener,
        settings.trust_remote_code,
    )


@contextmanager
def open_stream(job: Job, plan: MemoryPlan) -> Iterator[WeightStream]:
    """The weight stream of ``job`` while the body runs: one for all its phases. What its device reports in the body
    is one line: raises BudgetError where the device's memory ran out, DeviceFailedError where it failed."""
    device, budget = job.placement.device, plan.budget
    with device_errors(device), within_vram(device, None if budget is None else budget.vram_limit):
        stream = _stream(job, plan)
        try:
            yield stream
        finally:
            stream.close()


def _stream(job: Job, plan: MemoryPlan) -> WeightStream:
    layout, device = job.architecture.layout, job.placement.device
    keep = frozenset(name for i in plan.resident(layout.num_layers) for name in layout.layer_names(i))
    loader = _loader(job, plan)
    layers = [layout.layer_names(i) for i in range(layout.num_layers)]
    chunk_bytes = max(sum(loader.size([name]) for name in names) for names in layers)
    fallback = MappedLoader(job.overlay, plan.drop_after_use) if device.type == "cpu" else None
    limits = Limits(plan.prefetch, chunk_bytes, plan.slot_bytes or None)
    return WeightStream(job.source, device, loader, job.meter, limits, keep, fallback)


@dataclass(frozen=True)
class Run:
    """A job while it runs: the open checkpoint, how memory is spent, the weight stream, the mixed layers that are
    ``stored``, and the streamed ``model``."""

    job: Job
    memory: MemoryPlan
    stream: WeightStream
    stored: StoredLayers

    @cached_property
    def model(self) -> StreamedModel:
        """The streamed forward pass, whose layer slot is made when it is first needed."""
        return self.job.model(self.stream)

    @property
    def meter(self) -> Meter:
        return self.job.meter

    @property
    def listener(self) -> Listener:
        return self.job.listener


@contextmanager
def open_run(job: Job, memory: MemoryPlan, scratch: Path) -> Iterator[Run]:
    """The run of ``job`` while the body lasts; what is stored in ``scratch`` is removed at its end."""
    reserve = job.checkpoint.num_bytes
    with (
        StoredLayers(job.overlay, scratch, memory.resident(job.num_layers), reserve) as stored,
        open_stream(job, memory) as stream,
    ):
        yield Run(job, memory, stream, stored)


def _loader(job: Job, plan: MemoryPlan) -> Loader:
    if job.placement.device.type == "cpu":
        if plan.io == "mmap":
            return MappedLoader(job.overlay, plan.drop_after_use)
        return ReadLoader(job.overlay, direct=plan.io == "direct")
    if plan.io == "mmap":
        return PlainLoader(job.overlay, job.placement.device)
    return DeviceLoader(job.overlay, plan.io == "direct", CudaCopies(job.placement.device))
