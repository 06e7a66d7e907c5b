"""The job, top to bottom: prune a checkpoint that does not fit in memory, by layer collapse.

prepare     every check, before a weight is read (prepare.py)
reference   stream the original once, keep the hidden states at layer boundaries
search      propose merges, run each from the boundary below, keep what stays similar
write       stream the merged tensors into a new checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamcollapse.jobs.prepare import Prepared, prepare_apply, prepare_prune, prepare_search
from streamcollapse.merge.plan import Plan, SearchRecord
from streamcollapse.output.checkpoint import (
    PLAN_FILE,
    REPORT_FILE,
    check_loadable,
    write_companions,
    write_config,
    write_weights,
)
from streamcollapse.output.report import build_report, load_report, sizes
from streamcollapse.progress import Listener, PhaseStarted, silent
from streamcollapse.run.memory_plan import Means, means
from streamcollapse.run.workplace import WorkPlace, kept_place, search_place
from streamcollapse.searches.evaluator import Evaluator
from streamcollapse.searches.registry import strategy_of
from streamcollapse.searches.space import run_search
from streamcollapse.searches.strategy import SearchContext, SearchResult
from streamcollapse.settings.run import RunSettings
from streamcollapse.settings.search import SearchOptions
from streamcollapse.storage.disk import check_space
from streamcollapse.storage.staging import staged_directory, tidy_up
from streamcollapse.storage.writer import plan_shards
from streamcollapse.stream.allocator import heap_for


@dataclass(frozen=True)
class Pruned:
    """What ``prune`` and ``apply`` give back: where the checkpoint is, its plan, and the report as JSON types."""

    out: Path
    plan: Plan
    report: dict[str, Any]


def prune(
    source: str | Path,
    out: str | Path,
    options: SearchOptions = SearchOptions(),  # noqa: B008 - frozen
    *,
    settings: RunSettings = RunSettings(),  # noqa: B008
    listener: Listener = silent,
) -> Pruned:
    """Prune the checkpoint ``source``, a directory or a Hub id (``org/name[@revision]``), into the new directory
    ``out``.

    Raises StreamCollapseError (errors.py) for anything the input or the machine is at fault for; ``out`` then does not
    exist, or is the older directory that ``settings.output.overwrite`` would have replaced.
    """
    return run_prune(prepare_prune(source, out, options, settings, listener))


def run_prune(prepared: Prepared, passing: bool = False) -> Pruned:
    """``prune`` as ``prepared``; ``passing``: the output goes with the caller's run, and nothing is kept of it."""
    prepared.announce()
    assert prepared.out is not None
    with kept_place(prepared.request, prepared.key, passing) as place:
        if place.has_finished(prepared.out):
            return _finished(prepared.out)
        with means(prepared.job, prepared.memory, place.scratch) as given:
            plan = _search(prepared, given, place)
            return _write(prepared, plan, given, place)


def search(
    source: str | Path,
    options: SearchOptions = SearchOptions(),  # noqa: B008 - frozen
    *,
    settings: RunSettings = RunSettings(),  # noqa: B008
    listener: Listener = silent,
    save_as: str | Path | None = None,
) -> Plan:
    """The first half of ``prune``: find the plan, write no weights.

    With ``save_as`` the plan is written there, and progress is saved beside it until it is: the same search resumes
    after a crash. Raises StreamCollapseError.
    """
    return run_search_alone(prepare_search(source, options, settings, save_as, listener))


def run_search_alone(prepared: Prepared) -> Plan:
    """``search`` as ``prepared``."""
    prepared.announce()
    with (
        search_place(
            prepared.key, prepared.options, prepared.settings.streaming, prepared.memory.spill, prepared.out
        ) as place,
        means(prepared.job, prepared.memory, place.scratch) as given,
    ):
        plan = _search(prepared, given, place)
        if prepared.out is not None:
            plan.save(prepared.out)
        return plan


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
    with kept_place(prepared.request, prepared.key) as place:
        if place.has_finished(prepared.out):
            return _finished(prepared.out)
        with means(prepared.job, prepared.memory, place.scratch) as given:
            return _write(prepared, prepared.plan, given, place)


def _search(prepared: Prepared, given: Means, place: WorkPlace) -> Plan:
    job, space, samples = prepared.job, prepared.space, prepared.samples
    assert space is not None
    assert samples is not None
    model, boundaries = job.model(given.stream), strategy_of(space.options).boundaries(space)
    with heap_for(given.choice.activations):
        with job.meter.phase("reference"):
            job.listener(PhaseStarted("reference", job.num_layers))
            reference = place.reference(job, samples, model, boundaries)
        lookahead = prepared.settings.streaming.lookahead
        evaluator = Evaluator(job, model, given, reference, place.memory, space.options, lookahead)
        with job.meter.phase("search"):
            job.listener(PhaseStarted("search"))
            found = run_search(SearchContext(job, space, reference, evaluator, place))
    fingerprint, record = job.checkpoint.fingerprint(), _record(prepared, found, samples.digest)
    return Plan(job.name, job.num_layers, fingerprint, found.layers, space.options.merge_norms, record)


def _write(prepared: Prepared, plan: Plan, given: Means, place: WorkPlace) -> Pruned:
    job, out, output = prepared.job, prepared.out, prepared.settings.output
    assert out is not None
    given.stored.set_stack(plan.layers)
    view = job.view(plan.layers, plan.merge_norms, given.stored.names)
    shards = plan_shards(view, output.max_shard_bytes)
    with staged_directory(out, output.overwrite) as stage:
        finished = place.take_up(stage)
        check_space(out, sum(shard.file_bytes for shard in shards if shard.file_name not in finished))
        write_config(stage, job.checkpoint.directory, job.architecture.config, plan, job.trust_remote_code)
        check_loadable(stage, view, job.architecture, job.trust_remote_code)
        with job.meter.phase("write"):
            job.listener(PhaseStarted("write", sum(len(shard.names) for shard in shards)))
            write_weights(view, given.stream, shards, stage, job.listener, finished, place.shard_done)
        report = build_report(
            job.checkpoint,
            plan,
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


def _record(prepared: Prepared, found: SearchResult, digest: str) -> SearchRecord:
    return SearchRecord(found.options, digest, prepared.job.placement.dtype_name, tuple(found.decisions))
