"""Is a checkpoint what it should be? Its files among themselves, and a pruned one against its source, bit by bit."""

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from streamcollapse.arch.config import pruned_config
from streamcollapse.errors import CheckpointError
from streamcollapse.jobs.convert import CONVERSION_FILE, CPU
from streamcollapse.merge.plan import PLAN_FILE, Plan
from streamcollapse.output.checkpoint import REPORT_FILE
from streamcollapse.output.report import recorded_shards
from streamcollapse.progress import Listener, PhaseStarted, StepDone, silent
from streamcollapse.run.memory_plan import plan_one_layer
from streamcollapse.run.opened import Job, open_job, open_stream
from streamcollapse.run.refits import use_plan
from streamcollapse.settings.run import Compute, RunSettings, Streaming
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.disk import Digest
from streamcollapse.storage.header import ShardHeader
from streamcollapse.storage.index import CONFIG_FILE, is_file, read_json
from streamcollapse.storage.locks import FileLease
from streamcollapse.storage.mapping import about_to_change
from streamcollapse.storage.source import check_finite

_COMPUTE = Compute("cpu", "float32")


@dataclass(frozen=True)
class Verification:
    """What was found right: ``digests`` shards have the sha256 of their report (0 where there is none), ``recomputed``
    tensors are what the plan makes of the ``source``."""

    path: str
    layers: int
    tensors: int
    num_bytes: int
    digests: int
    source: str | None
    recomputed: int

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON types."""
        return asdict(self)


def verify(
    directory: str | Path,
    source: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
    listener: Listener = silent,
) -> Verification:
    """Check the checkpoint ``directory``: index against headers, names and shapes against the config, every weight a
    number, every shard the sha256 that its report gives. With ``source``, recompute every tensor from the plan and
    compare its bits, and the config. Streamed: a few tensors in memory.

    Raises StreamCollapseError for the first thing that is not right.
    """
    settings = RunSettings(_COMPUTE, trust_remote_code=trust_remote_code)
    job = open_job(directory, settings, listener)
    digests = _check_contents(job, listener)
    recomputed = 0
    if source is not None:
        origin = open_job(source, settings, listener)
        recomputed = _check_against(job, origin, listener)
    checkpoint = job.checkpoint
    return Verification(
        path=str(checkpoint.directory),
        layers=job.num_layers,
        tensors=len(checkpoint.names),
        num_bytes=checkpoint.num_bytes,
        digests=digests,
        source=None if source is None else str(source),
        recomputed=recomputed,
    )


def _check_contents(job: Job, listener: Listener) -> int:
    """Look at every weight; returns how many shards have the digest that they should have."""
    checkpoint, directory = job.checkpoint, job.checkpoint.directory
    reports = [directory / name for name in (CONVERSION_FILE, REPORT_FILE) if is_file(directory / name)]
    recorded = recorded_shards(reports[0]) if reports else {}
    for name in recorded:
        if name not in {shard.path.name for shard in checkpoint.shards}:
            raise CheckpointError(f"{directory / name}: the report has it, the index has not")
    with job.meter.phase("verify"):
        listener(PhaseStarted("verify", len(checkpoint.names)))
        for shard in checkpoint.shards:
            found = _digest_of(checkpoint, shard, listener)
            expected = recorded.get(shard.path.name, found)
            if found != expected:
                raise CheckpointError(
                    f"{shard.path}: sha256 is {found[:12]}…, its report says {expected[:12]}…; "
                    "the file was changed or damaged after it was written"
                )
    return len(recorded)


def _digest_of(checkpoint: Checkpoint, shard: ShardHeader, listener: Listener) -> str:
    """sha256 of ``shard``, whose weights are looked at on the way."""
    mapped, digest, position = checkpoint.mapping(shard.path.name), Digest(), 0
    with closing(digest), closing(FileLease(shard.path)) as lease:
        for name, tensor in sorted(shard.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if lease.is_wanted_back():
                raise about_to_change(shard.path)
            mapped.populate(position, tensor.end)
            hashed = digest.update(mapped.raw(position, max(tensor.end, position)))
            check_finite(name, checkpoint.read(name, CPU))
            hashed.result()
            mapped.give_back(position, tensor.end, drop_after_use=False)
            position = max(tensor.end, position)
            listener(StepDone(name, tensor.info.num_bytes))
        digest.update(mapped.raw(position, shard.file_bytes)).result()
    return digest.close()


def _check_against(job: Job, origin: Job, listener: Listener) -> int:
    """Recompute ``job``'s tensors from ``origin``; returns how many there are."""
    checkpoint = job.checkpoint
    plan = Plan.load(checkpoint.directory / PLAN_FILE)
    use_plan(origin, plan)
    config = pruned_config(origin.architecture.config, [layer.base for layer in plan.layers])
    if read_json(checkpoint.directory / CONFIG_FILE) != config:
        raise CheckpointError(
            f"{checkpoint.directory / CONFIG_FILE}: is not what the plan makes of the source's config"
        )
    view = origin.view(plan.layers, plan.merge_norms)
    if different := {*view.names} ^ {*checkpoint.names}:
        name = min(different)
        where = "not in the plan's result" if name in checkpoint.names else "missing"
        raise CheckpointError(f"{checkpoint.directory}: tensor {name} is {where}")
    names = list(view.names)
    with (
        open_stream(origin, plan_one_layer(origin, Streaming())) as stream,
        origin.meter.phase("recompute"),
        stream.run([view.sources_of(name) for name in names]) as weights,
    ):
        listener(PhaseStarted("recompute", len(names)))
        over = view.over(weights)
        for name in names:
            with weights.step():
                same = _same_bits(over.read(name, CPU), checkpoint.read(name, CPU))
            if not same:
                raise CheckpointError(
                    f"{checkpoint.directory}: tensor {name} is not what the plan makes of the "
                    "source; write it again with apply"
                )
            listener(StepDone(name, view.info(name).num_bytes))
    return len(names)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))
