"""What every job on a checkpoint opens first, and the settings of a run. Reads headers only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamcollapse.arch.architecture import Architecture, understand
from streamcollapse.errors import printable
from streamcollapse.forward.batches import Batch, call_tokens, make_batches
from streamcollapse.forward.model import StreamedModel
from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.merge.view import NOTHING_KEPT, Kept, MergedView
from streamcollapse.progress import Listener, silent
from streamcollapse.run.samples import load_samples, load_tokenizer, samples_digest, tokenize
from streamcollapse.settings.run import Calibration, RunSettings
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.hub import local_directory
from streamcollapse.storage.placed import Overlay
from streamcollapse.storage.source import ObservedSource
from streamcollapse.stream.allocator import steady_heap
from streamcollapse.stream.device import Placement, resolve
from streamcollapse.stream.meters import Meter
from streamcollapse.stream.weights import WeightStream


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
    architecture = understand(checkpoint, settings.trust_remote_code)
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


@dataclass(frozen=True)
class Samples:
    """Calibration samples as the model takes them, and the digest that names them."""

    batches: list[Batch]
    digest: str

    @property
    def num_tokens(self) -> int:
        return sum(batch.input_ids_NT.numel() for batch in self.batches)

    @property
    def num_samples(self) -> int:
        return sum(len(batch.lengths) for batch in self.batches)

    @property
    def largest_call(self) -> tuple[int, int]:
        """Rows and tokens a row of the largest call."""
        return max((tuple(b.input_ids_NT.shape) for b in self.batches), key=lambda shape: shape[0] * shape[1])  # type: ignore[return-value]


def calibration_samples(job: Job, calibration: Calibration, usual: str) -> Samples:
    """Load and tokenise the samples; without a file, the ``usual`` ones. Raises CalibrationError."""
    texts = load_samples(calibration, usual)
    tokenizer: Any = load_tokenizer(job.checkpoint.directory, job.trust_remote_code)
    limit = min(calibration.max_tokens, longest_context(job) or calibration.max_tokens)
    token_ids = tokenize(tokenizer, texts, limit, job.vocabulary)
    return Samples(make_batches(token_ids, call_tokens(job.width)), samples_digest(token_ids))


def longest_context(job: Job) -> int | None:
    """The most tokens the model takes at once, where its config says so."""
    limit = getattr(job.architecture.config.text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
