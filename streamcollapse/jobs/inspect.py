"""What a checkpoint is and what pruning it would need, from its headers alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from streamcollapse.arch.survey import Survey, survey
from streamcollapse.progress import silent
from streamcollapse.resources.device import Placement, resolve
from streamcollapse.run.needs import Demand, MemoryPlan, Need, least, peak_bytes, workload_of
from streamcollapse.searches.registry import complete, strategy_of
from streamcollapse.settings.run import RunSettings, Streaming
from streamcollapse.settings.search import SearchOptions
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.hub import local_directory
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
    """Describe the checkpoint ``source`` and what pruning it by default needs at the least; reads headers and config
    only. Whether the model can be pruned is for a dry run to say. Raises StreamCollapseError."""
    checkpoint = Checkpoint(local_directory(source, silent))
    model = survey(checkpoint)
    if model is None:
        from streamcollapse.arch.architecture import load_architecture  # imports transformers, which takes seconds

        model = load_architecture(checkpoint, settings.trust_remote_code).survey
    placement, usual = resolve(settings.compute, checkpoint.weights_dtype), complete(SearchOptions())
    strategy = strategy_of(usual)
    demand = Demand(len(model.layers), metric=usual.metric, samples=strategy.samples)
    work = workload_of(checkpoint, model, placement, demand)
    plan = least(work, Streaming(), placement.device.type != "cpu")
    return replace(describe(checkpoint, model, placement, plan), strategy=strategy.name)


def describe(checkpoint: Checkpoint, model: Survey, placement: Placement, plan: MemoryPlan) -> Inspection:
    """The figures of a ``checkpoint`` that is computed with on ``placement`` and memory as ``plan`` says."""

    def size(names: Sequence[str]) -> int:
        return sum(checkpoint.info(name).num_bytes for name in names)

    return Inspection(
        path=str(checkpoint.directory),
        family=model.family,
        model_type=model.model_type,
        num_layers=len(model.layers),
        num_tensors=len(checkpoint.names),
        num_shards=len(checkpoint.shards),
        parameters=checkpoint.num_parameters,
        num_bytes=checkpoint.num_bytes,
        dtypes=bytes_by_dtype(checkpoint),
        layer_bytes=[size(names) for names in model.layers],
        outside_bytes=size(model.outside),
        tied_embeddings=model.tied_head,
        compute_device=str(placement.device),
        compute_dtype=placement.dtype_name,
        needs=list(plan.needs),
        peak_bytes=peak_bytes(plan.needs, "ram"),
        resident_layers=plan.resident_layers,
        budgets=plan.budgets,
        io=plan.io,
    )
