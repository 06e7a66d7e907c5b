"""The job, top to bottom: prune a checkpoint that does not fit in memory, by layer collapse.

reference   stream the original once, keep the hidden states at every layer boundary
search      Algorithm 1: propose a merge, run it from the boundary below, keep it if the result stays similar
write       stream the merged tensors into a new checkpoint
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamcollapse.jobs.asked import Asked
from streamcollapse.jobs.candidates import Evaluator
from streamcollapse.jobs.opening import Job, Samples, calibration_samples, open_job
from streamcollapse.jobs.preview import smallest_output
from streamcollapse.jobs.searching import run_search
from streamcollapse.jobs.streams import Means, allotment, means, plain_allotment
from streamcollapse.jobs.targets import boundaries, check_candidates, check_prunable
from streamcollapse.jobs.workdir import was_renamed
from streamcollapse.jobs.workplace import WorkPlace, kept_place, search_place, work_key
from streamcollapse.merge.plan import Decision, Plan, SearchRecord
from streamcollapse.merge.view import check_plan
from streamcollapse.output.checkpoint import (
    PLAN_FILE,
    REPORT_FILE,
    check_loadable,
    write_companions,
    write_config,
    write_weights,
)
from streamcollapse.output.report import build_report, load_report, sizes
from streamcollapse.progress import Listener, MemoryPlanned, PhaseStarted, WarningRaised, silent
from streamcollapse.settings import Calibration, Compute, Output, Streaming
from streamcollapse.storage.disk import check_space
from streamcollapse.storage.hub import local_path
from streamcollapse.storage.staging import check_output, staged_bytes, staged_directory, tidy_up
from streamcollapse.storage.writer import plan_shards
from streamcollapse.strategy.collapse import CollapseOptions
from streamcollapse.stream.allocator import heap_for
from streamcollapse.stream.needs import Allotment


@dataclass(frozen=True)
class Pruned:
    """What ``prune`` and ``apply`` give back: where the checkpoint is, its plan, and the report as JSON types."""

    out: Path
    plan: Plan
    report: dict[str, Any]


def prune(
    source: str | Path,
    out: str | Path,
    options: CollapseOptions = CollapseOptions(),  # noqa: B008 - frozen
    *,
    calibration: Calibration = Calibration(),  # noqa: B008
    compute: Compute = Compute(),  # noqa: B008
    streaming: Streaming = Streaming(),  # noqa: B008
    output: Output = Output(),  # noqa: B008
    trust_remote_code: bool = False,
    listener: Listener = silent,
) -> Pruned:
    """Prune the checkpoint ``source``, a directory or a Hub id (``org/name[@revision]``), into the new directory
    ``out``.

    Raises StreamCollapseError (errors.py) for anything the input or the machine is at fault for; ``out`` then does not
    exist, or is the older directory that ``output.overwrite`` would have replaced.
    """
    check_output(Path(out), local_path(source), was_renamed(Path(out), streaming) or output.overwrite)
    job = open_job(source, compute, trust_remote_code, listener)
    return prune_job(job, Path(out), options, calibration, streaming, output)


def prune_job(
    job: Job,
    out: Path,
    options: CollapseOptions,
    calibration: Calibration,
    streaming: Streaming,
    output: Output,
    passing: bool = False,
) -> Pruned:
    """``prune`` of a checkpoint that is open, into an ``out`` that was checked; ``passing``: and goes with the run."""
    samples = calibration_samples(job, calibration, options.strategy)
    check_space(out, smallest_output(job, options) - staged_bytes(out))
    choice = _planned_memory(job, options, samples, streaming)
    asked = Asked(job, out, streaming, output, options=options, calibration=calibration)
    with kept_place(asked, work_key(job, samples, options.merge_norms), passing) as place:
        if place.has_finished(out):
            return _finished(out)
        with means(job, choice, place.scratch) as given:
            plan = _search(job, options, samples, streaming, given, place)
            return _write(job, plan, given, out, output, place)


def search(
    source: str | Path,
    options: CollapseOptions = CollapseOptions(),  # noqa: B008
    *,
    calibration: Calibration = Calibration(),  # noqa: B008
    compute: Compute = Compute(),  # noqa: B008
    streaming: Streaming = Streaming(),  # noqa: B008
    trust_remote_code: bool = False,
    listener: Listener = silent,
    save_as: str | Path | None = None,
) -> Plan:
    """The first half of ``prune``: find the plan, write no weights.

    With ``save_as`` the plan is written there, and what is found out is kept beside it until it is: the same search
    goes on after a crash. Raises StreamCollapseError.
    """
    target = None if save_as is None else Path(save_as)
    job = open_job(source, compute, trust_remote_code, listener)
    samples = calibration_samples(job, calibration, options.strategy)
    choice = _planned_memory(job, options, samples, streaming)
    with (
        search_place(job, samples, options, streaming, choice.spill, target) as place,
        means(job, choice, place.scratch) as given,
    ):
        plan = _search(job, options, samples, streaming, given, place)
        if target is not None:
            plan.save(target)
        return plan


def apply(
    source: str | Path,
    plan: Plan,
    out: str | Path,
    *,
    compute: Compute = Compute(),  # noqa: B008
    streaming: Streaming = Streaming(),  # noqa: B008
    output: Output = Output(),  # noqa: B008
    trust_remote_code: bool = False,
    listener: Listener = silent,
) -> Pruned:
    """The second half of ``prune``: write the checkpoint that ``plan`` describes. Raises StreamCollapseError."""
    check_output(Path(out), local_path(source), was_renamed(Path(out), streaming) or output.overwrite)
    job = open_job(source, compute, trust_remote_code, listener)
    check_plan(plan, job.checkpoint.fingerprint(), job.checkpoint, job.architecture.layout)
    asked = Asked(job, Path(out), streaming, output, plan=plan)
    with kept_place(asked, work_key(job, None, plan.merge_norms, plan.digest)) as place:
        if place.has_finished(Path(out)):
            return _finished(Path(out))
        with means(job, plain_allotment(job, streaming), place.scratch) as given:
            return _write(job, plan, given, Path(out), output, place)


def _planned_memory(job: Job, options: CollapseOptions, samples: Samples, streaming: Streaming) -> Allotment:
    check_candidates(job, options)
    check_prunable(job, options)
    for text in options.not_taken():
        job.listener(WarningRaised(text))
    choice = allotment(job, samples, streaming, options)
    rows = tuple((need.phase, need.what, need.num_bytes, need.memory) for need in choice.needs)
    job.listener(MemoryPlanned(rows, choice.budgets, choice.io))
    return choice


def _search(
    job: Job, options: CollapseOptions, samples: Samples, streaming: Streaming, given: Means, place: WorkPlace
) -> Plan:
    model = job.model()
    with heap_for(given.choice.activations):
        with job.meter.phase("reference"):
            job.listener(PhaseStarted("reference", job.num_layers))
            reference = place.reference(job, samples, model, given.stream, boundaries(options, job.num_layers))
        evaluator = Evaluator(job, model, given, reference, place.memory, streaming, options)
        with job.meter.phase("search"):
            job.listener(PhaseStarted("search"))
            found = run_search(job, options, reference, evaluator, place)
    record = _record(found.options, samples, job, found.decisions)
    fingerprint = job.checkpoint.fingerprint()
    return Plan(job.name, job.num_layers, fingerprint, found.layers, options.merge_norms, record)


def _write(job: Job, plan: Plan, given: Means, out: Path, output: Output, place: WorkPlace) -> Pruned:
    given.kept.want(plan.layers)
    view = job.view(plan.layers, plan.merge_norms, given.kept.names)
    shards = plan_shards(view, output.max_shard_bytes)
    with staged_directory(out, output.overwrite) as stage:
        finished = place.take_up(stage)
        check_space(out, sum(shard.file_bytes for shard in shards if shard.file_name not in finished))
        write_config(stage, job.checkpoint.directory, job.architecture.config, plan, job.trust_remote_code)
        check_loadable(stage, view, job.architecture, job.trust_remote_code)
        with job.meter.phase("write"):
            job.listener(PhaseStarted("write", sum(len(shard.names) for shard in shards)))
            write_weights(view, given.stream, shards, stage, job.meter, job.listener, finished, place.shard_done)
        report = build_report(
            job.checkpoint,
            plan,
            sizes(job.checkpoint, job.num_layers),
            sizes(view, plan.num_layers),
            job.compute(),
            {"max_shard_bytes": output.max_shard_bytes, "search": plan.to_json().get("search")},
            {**job.meter.summary(), "memory": given.choice.to_json()},
            place.shards(),
        )
        write_companions(stage, job.checkpoint.directory, plan, report)
        job.checkpoint.check_unchanged()
        place.mark("renaming")
    return Pruned(out, plan, report)


def _finished(out: Path) -> Pruned:
    """What a run that was killed right after the renaming had made."""
    tidy_up(out)
    return Pruned(out, Plan.load(out / PLAN_FILE), load_report(out / REPORT_FILE))


def _record(options: CollapseOptions, samples: Samples, job: Job, decisions: list[Decision]) -> SearchRecord:
    settings = asdict(options)
    del settings["merge_norms"]  # the plan itself says it
    return SearchRecord(
        **settings,
        calibration_sha256=samples.digest,
        compute_dtype=job.placement.dtype_name,
        decisions=tuple(decisions),
    )
