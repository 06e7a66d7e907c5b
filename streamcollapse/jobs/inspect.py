"""What a checkpoint is and what pruning it would need, from its headers alone."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from streamcollapse.run.memory_plan import Demand, least_memory
from streamcollapse.run.needs import MemoryPlan, Need, peak_bytes
from streamcollapse.run.opened import Job, open_job
from streamcollapse.searches.registry import complete, strategy_of
from streamcollapse.settings.run import RunSettings
from streamcollapse.settings.search import SearchOptions
from streamcollapse.storage.source import bytes_by_dtype


@dataclass(frozen=True)
class Inspection:
    """A checkpoint in figures. ``dtypes`` maps dtype to bytes; layers are listed bottom first; sizes are bytes.
    ``needs`` are those of a search by ``strategy``, or of the run that is asked about."""

    path: str
    family: str
    model_type: str
    num_layers: int
    num_tensors: int
    num_shards: int
    parameters: int
    num_bytes: int
    dtypes: dict[str, int]
    layer_bytes: list[int]
    outside_bytes: int
    tied_embeddings: bool
    compute_device: str
    compute_dtype: str
    needs: list[Need]
    peak_bytes: int
    resident_layers: int
    budgets: dict[str, int]
    io: str
    strategy: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON types."""
        return asdict(self)


def inspect(source: str | Path, *, settings: RunSettings = RunSettings()) -> Inspection:  # noqa: B008 - frozen
    """Describe the checkpoint directory ``source`` and what pruning it by default needs at the least; reads headers and
    config only. Raises StreamCollapseError."""
    job = open_job(source, settings)
    usual = complete(SearchOptions())
    strategy = strategy_of(usual)
    demand = Demand(job.num_layers, metric=usual.metric, samples=strategy.samples)
    return replace(describe(job, least_memory(job, demand)), strategy=strategy.name)


def describe(job: Job, choice: MemoryPlan) -> Inspection:
    """The figures of an open job that spends memory as ``choice`` says."""
    checkpoint, layout = job.checkpoint, job.architecture.layout
    layers = [sum(checkpoint.info(n).num_bytes for n in layout.layer_names(i)) for i in range(layout.num_layers)]
    return Inspection(
        path=str(checkpoint.directory),
        family=job.architecture.config.family,
        model_type=str(job.architecture.config.raw.get("model_type")),
        num_layers=layout.num_layers,
        num_tensors=len(checkpoint.names),
        num_shards=len(checkpoint.shards),
        parameters=checkpoint.num_parameters,
        num_bytes=checkpoint.num_bytes,
        dtypes=bytes_by_dtype(checkpoint),
        layer_bytes=layers,
        outside_bytes=sum(checkpoint.info(n).num_bytes for n in layout.outside),
        tied_embeddings=layout.tied_head,
        compute_device=str(job.placement.device),
        compute_dtype=job.placement.dtype_name,
        needs=list(choice.needs),
        peak_bytes=peak_bytes(choice.needs, "ram"),
        resident_layers=choice.resident_layers,
        budgets=choice.budgets,
        io=choice.io,
    )
