"""Every check of a job before a weight is read. What --dry-run prints is what the run then executes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamcollapse.errors import BudgetError, CalibrationError, PlanError
from streamcollapse.jobs.expected import expected_time, is_long, work_of
from streamcollapse.jobs.inspect import Inspection, describe
from streamcollapse.jobs.lessons import Lessons, healing_disk, told_with, told_with_cuts, wanted_lessons
from streamcollapse.merge.composing import refuse_identity
from streamcollapse.merge.plan import Plan, PlanLayer, original_layers
from streamcollapse.output.report import sizes
from streamcollapse.progress import Listener, NoteMade, TimeExpected, WarningRaised, silent
from streamcollapse.run.first_checks import check_out, check_plan_path, check_source
from streamcollapse.run.fit_text import FitText, fit_text
from streamcollapse.run.held_out import HeldOut, held_out_text
from streamcollapse.run.memory_plan import plan_memory, plan_one_layer, plan_repair
from streamcollapse.run.needs import MemoryPlan
from streamcollapse.run.opened import Job, open_job
from streamcollapse.run.refits import use_plan
from streamcollapse.run.request import Request
from streamcollapse.run.samples import Samples, calibration_samples
from streamcollapse.run.saved_reference import work_key
from streamcollapse.run.work_directory import check_directory, search_path
from streamcollapse.searches.registry import complete, ignored_settings, strategy_of, usual_repair
from streamcollapse.searches.space import check_space, demand_of, search_space
from streamcollapse.searches.strategy import SearchSpace, fewest_layers
from streamcollapse.searches.work import Round
from streamcollapse.settings.catalogue import EFFORTS
from streamcollapse.settings.run import Calibration, Compute, RunSettings
from streamcollapse.settings.search import SearchOptions
from streamcollapse.storage.disk import check_space as check_disk
from streamcollapse.storage.staging import staged_bytes


@dataclass(frozen=True)
class Prepared:
    """A job that may begin: everything about it is checked, nothing is written.

    ``options`` (complete), ``space`` and ``samples``: of a search, else None; ``plan``: the one to apply, else None;
    ``held_out``: the text that judges the result, or tells the search how far to go; None: nothing does. ``fit_text``:
    what the result is repaired on, ``lessons``: how it is healed; None where it is not.
    ``out``: the directory to make, or the plan's file, if any. Sizes in bytes of weights: the output's at the least and
    at the most; ``disk_free``: where the output would go, None where none would. ``expected``: how long it will take,
    once that is ``timed``.
    """

    job: Job
    settings: RunSettings
    memory: MemoryPlan
    key: dict[str, Any]
    out: Path | None
    options: SearchOptions | None = None
    space: SearchSpace | None = None
    samples: Samples | None = None
    plan: Plan | None = None
    held_out: HeldOut | None = None
    fit_text: FitText | None = None
    lessons: Lessons | None = None
    smallest_output: int = 0
    largest_output: int = 0
    disk_free: int | None = None
    expected: TimeExpected | None = None

    @property
    def request(self) -> Request:
        """The job as it was asked for, with the device and dtype that it computes with."""
        assert self.out is not None
        placement = self.job.placement
        settings = replace(self.settings, compute=Compute(str(placement.device), placement.dtype_name))
        verb, source = "prune" if self.plan is None else "apply", self.job.checkpoint.directory
        return Request(verb, source, self.out, settings, self.options, self.plan)

    @property
    def most_candidates(self) -> int:
        """The most candidates that a search evaluates."""
        return 0 if self.space is None else strategy_of(self.space.options).most_candidates(self.space)

    @property
    def ignored(self) -> list[str]:
        """A line for each setting that makes no difference."""
        return [] if self.options is None else ignored_settings(self.options)

    @property
    def inspection(self) -> Inspection:
        """The source in figures, and how this job spends memory."""
        return describe(self.job.checkpoint, self.job.architecture.survey, self.job.placement, self.memory)

    def announce(self) -> None:
        """Tell the listener what is ignored and how memory will be spent, as the run begins."""
        if self.space is not None and self.space.told:
            self.job.listener(NoteMade(self.space.told))
        for text in self.ignored:
            self.job.listener(WarningRaised(text))
        self.job.listener(self.memory.event)
        if self.expected is not None:
            self.job.listener(self.expected)

    @property
    def work(self) -> dict[str, list[Round]]:
        """What a search is expected to compute, by phase."""
        return work_of(self)

    def timed(self, even_if_short: bool = True) -> Prepared:
        """The same, with how long it will take, by a probe of a few seconds. One that is no longer than a probe and
        need not be timed ``even_if_short`` is left as it is."""
        if not (even_if_short or is_long(self)):
            return self
        return replace(self, expected=expected_time(self))

    def to_json(self) -> dict[str, Any]:
        """What the job would do, as JSON types."""
        return {
            "inspection": self.inspection.to_json(),
            "samples": None if self.samples is None else self.samples.num_samples,
            "tokens": None if self.samples is None else self.samples.num_tokens,
            "most_candidates": self.most_candidates,
            "target": None if self.space is None else self.space.told or None,
            "smallest_output": self.smallest_output,
            "largest_output": self.largest_output,
            "options": None if self.options is None else self.options.given,
            "disk_free": self.disk_free,
            "expected_seconds": None if self.expected is None else self.expected.seconds,
        }


def prepare_prune(
    source: str | Path, out: str | Path, options: SearchOptions, settings: RunSettings, listener: Listener = silent
) -> Prepared:
    """``prune`` of ``source`` into ``out``, checked. Raises what it would raise before it begins."""
    check_source(source)
    check_out(source, out, settings.streaming, settings.output)
    return prepare_open(open_job(source, settings, listener), Path(out), options, settings)


def prepare_open(job: Job, out: Path, options: SearchOptions, settings: RunSettings) -> Prepared:
    """``prepare_prune`` of a checkpoint that is open, into an ``out`` that was checked."""
    found = _prepare_search(job, options, settings, out, writes=True)
    found.request.check_work(found.key)
    needed = found.smallest_output + healing_disk(found.lessons, found.smallest_output)
    return replace(found, disk_free=check_disk(out, needed - staged_bytes(out)))


def prepare_search(
    source: str | Path,
    options: SearchOptions,
    settings: RunSettings,
    save_as: str | Path | None = None,
    listener: Listener = silent,
) -> Prepared:
    """``search`` of ``source``, checked. Raises what it would raise before it begins."""
    check_source(source)
    target = None if save_as is None else Path(save_as)
    if target is not None:
        check_plan_path(target, settings.output.overwrite)
    found = _prepare_search(open_job(source, settings, listener), options, settings, target, writes=False)
    path = search_path(settings.streaming, target)
    if path is not None and (settings.streaming.work_dir is not None or path.resolve().parent.is_dir()):
        check_directory(path, found.key)
    return found


def _prepare_search(
    job: Job, options: SearchOptions, settings: RunSettings, out: Path | None, writes: bool
) -> Prepared:
    space = search_space(job, options)
    check_space(job, space)
    strategy = strategy_of(space.options)
    samples = calibration_samples(job, _shortened(settings.calibration, space), strategy.samples)
    needed = options.max_loss is not None
    held_out = _held_out(job, settings, needed) if writes or needed else None
    may_drop = _Droppable(repair=not settings.repair.is_given, verdict=not needed)
    settings, text = _repair_text(job, settings, usual_repair(space.options) if writes else "none")
    memory, held_out, text = _memory(job, samples, settings, (space, held_out, text), may_drop)
    if text is None:
        settings = replace(settings, repair=replace(settings.repair, method="none"))
    key, layers = work_key(job, samples, options.merge_norms), fewest_layers(strategy, space)
    smallest, largest = sizes(job.view(layers), len(layers)).bytes, job.checkpoint.num_bytes
    lessons = wanted_lessons(job, settings) if writes else None
    memory = told_with(told_with_cuts(job, memory, text, _supposed(job, len(layers)), settings), lessons)
    found = Prepared(job, settings, memory, key, out, complete(options), space, samples, None, held_out, text, lessons)
    return replace(found, smallest_output=smallest, largest_output=largest)


def _supposed(job: Job, kept: int) -> tuple[PlanLayer, ...]:
    """A stack of ``kept`` layers, for as long as nothing is known of it: it is cut in the middle."""
    layers = original_layers(job.num_layers)
    return (*layers[: kept - kept // 2], *layers[job.num_layers - kept // 2 :])


@dataclass(frozen=True)
class _Droppable:
    """What goes where there is no memory for it, since nobody asked for it."""

    repair: bool
    verdict: bool


def _memory(
    job: Job,
    samples: Samples,
    settings: RunSettings,
    wanted: tuple[SearchSpace, HeldOut | None, FitText | None],
    may_drop: _Droppable,
) -> tuple[MemoryPlan, HeldOut | None, FitText | None]:
    """The memory of a search, and of what is ``wanted`` after it what there is memory for. Raises BudgetError."""
    space, held_out, text = wanted
    demand = replace(demand_of(space), held_out=0 if held_out is None else held_out.tokens)
    if text is not None:
        demand = replace(demand, repair=(settings.repair.chosen, sum(text.tokens), text.call_tokens))
    try:
        return plan_memory(job, samples, settings.streaming, demand), held_out, text
    except BudgetError as error:
        if text is not None and may_drop.repair:
            what, wanted = "repair", (space, held_out, None)
        elif held_out is not None and may_drop.verdict:
            what, wanted = "verdict", (space, None, text)
        else:
            raise
        job.listener(WarningRaised(f"no {what}, which is no reason to refuse the job: {error}"))
    return _memory(job, samples, settings, wanted, may_drop)


def _repair_text(job: Job, settings: RunSettings, usual: str) -> tuple[RunSettings, FitText | None]:
    """``settings`` with a repair by ``usual`` where they name none, and what that is fitted on. Raises CalibrationError
    for text that cannot be had, where the repair was asked for; else that is a warning."""
    is_asked = settings.repair.is_given
    settings = settings if is_asked else replace(settings, repair=replace(settings.repair, method=usual))
    if not settings.repair.is_wanted:
        return settings, None
    try:
        return settings, fit_text(job, settings.repair)
    except CalibrationError as error:
        if is_asked:
            raise
        job.listener(WarningRaised(f"no repair: {error}"))
        return settings, None


def _held_out(job: Job, settings: RunSettings, needed: bool = False) -> HeldOut | None:
    """The text that judges, where it is wanted. Raises CalibrationError for one that cannot be had, where it was named
    or is ``needed``; else that is a warning."""
    if not settings.judging.verdict and not needed:
        return None
    try:
        return held_out_text(job, settings.judging.held_out)
    except CalibrationError as error:
        if needed or settings.judging.held_out is not None:
            raise
        job.listener(WarningRaised(f"no verdict: {error}"))
        return None


def _shortened(calibration: Calibration, space: SearchSpace) -> Calibration:
    """``calibration`` as the effort of the search wants it."""
    most = EFFORTS[space.options.effort].tokens
    return calibration if most is None else replace(calibration, max_tokens=min(calibration.max_tokens, most))


def prepare_apply(
    source: str | Path, plan: Plan, out: str | Path, settings: RunSettings, listener: Listener = silent
) -> Prepared:
    """``apply`` of ``plan`` to ``source``, checked. Raises what it would raise before it begins."""
    check_source(source)
    check_out(source, out, settings.streaming, settings.output)
    job = open_job(source, settings, listener)
    use_plan(job, plan)
    refuse_identity(plan)
    if settings.repair.is_wanted and any(layer.refits for layer in plan.layers):
        raise PlanError("the plan is repaired already; apply it without `repair`")
    text = fit_text(job, settings.repair) if settings.repair.is_wanted else None
    size = sizes(job.view(plan.layers, plan.merge_norms), plan.num_layers).bytes
    lessons = wanted_lessons(job, settings)
    free = check_disk(Path(out), size + healing_disk(lessons, size) - staged_bytes(Path(out)))
    if text is None:
        memory = plan_one_layer(job, settings.streaming)
    else:
        repair = settings.repair.chosen, sum(text.tokens), text.call_tokens
        memory = plan_repair(job, settings.streaming, repair)
        memory = told_with_cuts(job, memory, text, plan.layers, settings)
    held_out = _held_out(job, settings)
    key = work_key(job, None, plan.merge_norms, plan.digest)
    found = Prepared(
        job, settings, told_with(memory, lessons), key, Path(out), None, None, None, plan, held_out, text, lessons
    )
    found = replace(found, smallest_output=size, largest_output=size, disk_free=free)
    found.request.check_work(key)
    return found
