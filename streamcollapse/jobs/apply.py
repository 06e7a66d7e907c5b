"""Write the checkpoint that a plan describes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from streamcollapse.errors import NonFiniteError
from streamcollapse.forward.walk import Stack, schedule
from streamcollapse.jobs.healing import HealedStack, healed
from streamcollapse.jobs.prepare import Prepared, prepare_apply
from streamcollapse.jobs.repair import repaired
from streamcollapse.merge.composing import in_words
from streamcollapse.merge.plan import PLAN_FILE, Plan, original_layers
from streamcollapse.output.checkpoint import REPORT_FILE, check_loadable, write_companions, write_config, write_weights
from streamcollapse.output.report import Report, build_report, load_report, sizes
from streamcollapse.output.verdict import Judgement, is_broken, judge, told
from streamcollapse.progress import Listener, PhaseStarted, WarningRaised, silent
from streamcollapse.resources.device import heap_for
from streamcollapse.run.held_out import plans_on
from streamcollapse.run.opened import Run, open_run
from streamcollapse.run.request import output_work
from streamcollapse.run.work_directory import WorkDirectory
from streamcollapse.settings.run import RunSettings
from streamcollapse.storage.disk import check_space
from streamcollapse.storage.staging import staged_directory, tidy_up
from streamcollapse.storage.writer import plan_shards


@dataclass(frozen=True)
class Pruned:
    """What ``prune`` and ``apply`` give back: where the checkpoint is, its plan, and the report."""

    out: Path
    plan: Plan
    report: Report


def apply(
    source: str | Path,
    plan: Plan,
    out: str | Path,
    *,
    settings: RunSettings = RunSettings(),  # noqa: B008 - frozen
    listener: Listener = silent,
) -> Pruned:
    """The second half of ``prune``: write the checkpoint that ``plan`` describes. Raises StreamCollapseError."""
    return run_apply(prepare_apply(source, plan, out, settings, listener))


def run_apply(prepared: Prepared) -> Pruned:
    """``apply`` as ``prepared``."""
    assert prepared.plan is not None
    assert prepared.out is not None
    with output_work(prepared.request, prepared.key) as work:
        if work.has_finished(prepared.out):
            return finished(prepared.out)
        prepared.announce()
        with open_run(prepared.job, prepared.memory, work.path) as run:
            plan = repaired(prepared, prepared.plan, run, work)
            if prepared.lessons is None:
                return write_pruned(prepared, plan, run, work)
        return write_healed(prepared, healed(prepared.job, prepared.lessons, plan, work), work)


def write_healed(prepared: Prepared, outcome: HealedStack, work: WorkDirectory) -> Pruned:
    """``write_pruned`` of what was healed, with the course of that in its report."""

    def finish(report: Report, stage: Path) -> None:
        report["healing"] = outcome.course

    with open_run(prepared.job, prepared.memory, work.path) as run:
        return write_pruned(prepared, outcome.plan, run, work, finish)


Finish = Callable[[Report, Path], None]  # given the report and the new directory, before it gets its name


def write_pruned(prepared: Prepared, plan: Plan, run: Run, work: WorkDirectory, finish: Finish | None = None) -> Pruned:
    """Stream the plan's tensors into a new checkpoint, which gets its name last of all. ``finish`` may put more into
    the report and the directory."""
    job, out, output = prepared.job, prepared.out, prepared.settings.output
    assert out is not None
    run.stored.set_stack(plan.layers)
    view = job.view(plan.layers, plan.merge_norms, run.stored.names)
    shards = plan_shards(view, output.max_shard_bytes)
    with staged_directory(out, output.overwrite) as stage:
        finished = work.reuse_shards(stage)
        check_space(out, sum(shard.file_bytes for shard in shards if shard.file_name not in finished))
        write_config(stage, job.checkpoint.directory, job.architecture.config, plan, job.trust_remote_code)
        check_loadable(stage, view, job.architecture, job.trust_remote_code)
        with job.meter.phase("write"):
            job.listener(PhaseStarted("write", sum(len(shard.names) for shard in shards)))
            write_weights(view, run.stream, shards, stage, job.listener, finished, work.shard_done)
        judgement = judged(prepared, plan, run)
        report = build_report(
            job.checkpoint,
            plan,
            sizes(view, plan.num_layers),
            job.compute(),
            {
                "max_shard_bytes": output.max_shard_bytes,
                "search": plan.to_json().get("search"),
                "changes": in_words(plan),
            },
            {**job.meter.summary(), "memory": run.memory.to_json()},
            work.shards(),
        )
        report["held_out"] = judgement
        if finish is not None:
            finish(report, stage)
        write_companions(stage, job.checkpoint.directory, plan, report)
        job.checkpoint.check_unchanged()
        work.publishing()
    return Pruned(out, replace(plan, origin=out / PLAN_FILE), report)  # where its repaired tensors are


def judged(prepared: Prepared, plan: Plan, run: Run) -> Judgement | None:
    """What ``plan`` comes to beside its source on the held-out text; None where that is not asked, or cannot be told:
    a result is never lost for it."""
    job, text = prepared.job, prepared.held_out
    if text is None:
        return None
    with job.meter.phase("verdict"), heap_for(run.memory.activations):
        stacks = [Stack(layers, 0) for layers in (original_layers(job.num_layers), plan.layers)]
        job.listener(PhaseStarted("verdict", len(schedule(stacks))))
        try:
            before, after = plans_on(run.model, text, [plan], job)
        except NonFiniteError as error:
            job.listener(WarningRaised(f"no verdict: {error}"))
            return None
    judgement = judge(text.name, before, after)
    if is_broken(judgement):
        job.listener(WarningRaised(f"the result is {told(judgement)}"))
    return judgement


def finished(out: Path) -> Pruned:
    """What a run that was killed right after the renaming had made."""
    tidy_up(out)
    return Pruned(out, Plan.load(out / PLAN_FILE), load_report(out / REPORT_FILE))
