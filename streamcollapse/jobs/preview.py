"""Dry runs: every check that a job makes before it reads a weight, and what it would then do."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamcollapse.errors import OutputError, printable
from streamcollapse.jobs.inspect import Inspection, describe
from streamcollapse.jobs.opening import Job, calibration_samples, open_job
from streamcollapse.jobs.streams import allotment, least_allotment
from streamcollapse.jobs.targets import check_candidates, check_prunable, count_candidates, fewest_layers
from streamcollapse.jobs.workplace import check_work_directory
from streamcollapse.merge.plan import Plan
from streamcollapse.merge.view import check_plan
from streamcollapse.output.report import sizes
from streamcollapse.progress import silent
from streamcollapse.settings import Calibration, Compute, Output, Streaming
from streamcollapse.storage.disk import check_space
from streamcollapse.storage.hub import local_path
from streamcollapse.storage.staging import check_output
from streamcollapse.strategy.collapse import CollapseOptions


@dataclass(frozen=True)
class Preview:
    """What a run would do. Sizes in bytes of weights; ``samples``, ``tokens`` and ``options`` are None where
    nothing is searched. ``disk_free``: bytes where the output would go, None where none would."""

    inspection: Inspection
    samples: int | None
    tokens: int | None
    most_candidates: int
    smallest_output: int
    largest_output: int
    options: CollapseOptions | None = None
    disk_free: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON types."""
        return asdict(self)


def preview_search(
    source: str | Path,
    options: CollapseOptions,
    calibration: Calibration,
    compute: Compute,
    streaming: Streaming,
    trust_remote_code: bool,
    out: str | Path | None = None,
    output: Output = Output(),  # noqa: B008 - frozen
) -> Preview:
    """What ``prune`` (or ``search``, without ``out``) would do. Raises what they would raise before they begin."""
    if out is not None:
        check_output(Path(out), local_path(source), output.overwrite)
    job = open_job(source, compute, trust_remote_code, silent)
    check_candidates(job, options)
    check_prunable(job, options)
    samples = calibration_samples(job, calibration, options.strategy)
    check_work_directory(streaming, job, samples, options.merge_norms)
    smallest = smallest_output(job, options)
    free = None if out is None else check_space(Path(out), smallest)
    candidates = count_candidates(job, options)
    inspection = describe(job, allotment(job, samples, streaming, options))
    largest = job.checkpoint.num_bytes
    return Preview(inspection, samples.num_samples, samples.num_tokens, candidates, smallest, largest, options, free)


def preview_apply(
    source: str | Path, plan: Plan, out: str | Path, compute: Compute, output: Output, trust_remote_code: bool
) -> Preview:
    """What ``apply`` would do. Raises what it would raise before it begins."""
    check_output(Path(out), local_path(source), output.overwrite)
    job = open_job(source, compute, trust_remote_code, silent)
    check_plan(plan, job.checkpoint.fingerprint(), job.checkpoint, job.architecture.layout)
    size = sizes(job.view(plan.layers, plan.merge_norms), plan.num_layers).bytes
    free = check_space(Path(out), size)
    return Preview(describe(job, least_allotment(job, None)), None, None, 0, size, size, disk_free=free)


def check_plan_path(path: Path, overwrite: bool, option: str = "--plan") -> None:
    """Raise OutputError unless a plan may be written to ``path``, which ``option`` gave."""
    if path.is_dir() or (path.exists() and not overwrite):
        what = "is a directory" if path.is_dir() else f"exists; choose another {option} or pass --overwrite"
        raise OutputError(f"{printable(path)}: {what}")
    if not path.resolve().parent.is_dir():
        raise OutputError(f"{printable(path.parent)}: does not exist; create it first")
    if not os.access(path.resolve().parent, os.W_OK | os.X_OK):
        raise OutputError(f"{printable(path.parent)}: is not writable; choose another {option}")


def smallest_output(job: Job, options: CollapseOptions) -> int:
    """Bytes of weights that remain at the least."""
    layers = fewest_layers(job, options)
    return sizes(job.view(layers), len(layers)).bytes
