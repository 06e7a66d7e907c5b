"""What a batch would do: everything is checked, nothing is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from streamcollapse.batches.run import Batch, batch_report, planned
from streamcollapse.batches.tasks import Convert, Task, result_key
from streamcollapse.batches.worker import Machine, Outcome, Place, finished, is_ours, source_version
from streamcollapse.errors import StreamCollapseError, printable
from streamcollapse.jobs.convert import prepare_convert
from streamcollapse.jobs.prepare import prepare_prune
from streamcollapse.progress import silent
from streamcollapse.settings.run import Compute, Output, RunSettings
from streamcollapse.storage.hub import local_directory


def preview(
    jobs: str | Path,
    out: str | Path | None,
    *,
    settings: RunSettings = RunSettings(),  # noqa: B008 - frozen
) -> Batch:
    """An outcome for each task of the file ``jobs``: kept (done already), ready, or failed with what it would fail of.

    Sources on the Hub are fetched into its cache. Raises what ``batch`` would raise.
    """
    tasks, place = planned(jobs, out, settings.streaming)
    streaming = replace(settings.streaming, work_dir=None)
    machine = Machine(settings.compute.device, streaming, None, settings.trust_remote_code)
    outcomes = {task.name: _checked(task, place, machine) for task in tasks}
    return Batch(place.out, list(outcomes.values()), batch_report(place, tasks, outcomes, 0.0))


def _checked(task: Task, place: Place, machine: Machine) -> Outcome:
    out = place.out / task.name
    try:
        directory = local_directory(task.source, silent)
        known = finished(task, place, result_key(task, source_version(directory)))
        if known is not None:
            return known
        output = Output(task.max_shard_size, overwrite=is_ours(out))
        # Where results go does not exist yet; what is asked of a place is asked of the nearest one that does.
        stand_in = out if place.out.is_dir() else _nearest(place.out) / f".{task.name}"
        if isinstance(task.work, Convert):
            prepare_convert(directory, stand_in, task.work.dtype, output)
        else:
            compute = Compute(machine.device, task.work.compute_dtype)
            trusted, samples = machine.trust_remote_code, task.work.calibration
            settings = RunSettings(compute, samples, machine.streaming, output, trusted)
            prepare_prune(directory, stand_in, task.work.options, settings)
    except StreamCollapseError as error:
        return Outcome(task.name, "failed", str(out), printable(error))
    return Outcome(task.name, "ready", str(out))


def _nearest(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.is_dir())
