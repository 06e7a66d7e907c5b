"""Several plans of one source beside each other: sizes, and loss on a held-out text, in one walk over the layers."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from streamcollapse.errors import OptionError, PlanError
from streamcollapse.jobs.apply import apply
from streamcollapse.jobs.speed import speed
from streamcollapse.output.report import sizes
from streamcollapse.output.results import ComparedModel, Comparison, Result, load_results, source_of
from streamcollapse.progress import Listener, PhaseStarted, StepDone, silent
from streamcollapse.run.held_out import held_out_perplexities, held_out_text
from streamcollapse.run.opened import Job, open_job
from streamcollapse.run.refits import use_plan
from streamcollapse.searches.words import said_of
from streamcollapse.settings.run import Comparing, Output, RunSettings


def compare(
    plans: Sequence[str | Path],
    *,
    conditions: Comparing = Comparing(),  # noqa: B008 - frozen
    settings: RunSettings = RunSettings(),  # noqa: B008
    listener: Listener = silent,
) -> Comparison:
    """What each of ``plans`` (a plan, or the directory of a pruned model) makes of the one source of them all.

    Every layer is read once for all of them. Nothing is written that stays. Raises StreamCollapseError.
    """
    results = load_results(plans)
    job = open_source(results, conditions, settings, listener)
    found = compared(job, results, conditions, settings)
    if not conditions.speed:
        return found
    rates = _rates(job, results, conditions, settings)
    models = [replace(model, tokens_per_second=rate) for model, rate in zip(found.models, rates, strict=True)]
    return replace(found, models=models)


def open_source(results: Sequence[Result], conditions: Comparing, settings: RunSettings, listener: Listener) -> Job:
    """The source of ``results``, open. Raises OptionError where it is not known, PlanError where it is another."""
    source = source_of(results, conditions.source)
    if source is None:
        raise OptionError(f"where {results[0].plan.source_name} is, no plan says; give the model as `source`")
    job = open_job(source, settings, listener)
    for result in results:
        try:
            use_plan(job, result.plan)
        except PlanError as error:
            raise PlanError(f"{result.name}: {error}") from error
    return job


def compared(job: Job, results: Sequence[Result], conditions: Comparing, settings: RunSettings) -> Comparison:
    """``results`` of the source that ``job`` has open, without their speed."""
    text = held_out_text(job, conditions.file, conditions.max_tokens)
    plans = [result.plan for result in results]
    scores = held_out_perplexities(job, text, plans, settings.streaming)
    views = [job.original(), *(job.view(plan.layers, plan.merge_norms) for plan in plans)]
    named = [(job.name, "the source"), *((result.name, said_of(result.plan)) for result in results)]
    models = []
    for (name, method), view, score in zip(named, views, scores, strict=True):
        size = sizes(view, len(view.layers))
        fine = math.isfinite(score.perplexity)
        losses = (score.nll, score.nll - scores[0].nll, score.perplexity) if fine else (None, None, None)
        models.append(ComparedModel(name, method, size.layers, size.bytes, *losses))
    return Comparison(job.name, text.name, scores[0].tokens, models, job.compute(), job.meter.summary())


def _rates(job: Job, results: Sequence[Result], conditions: Comparing, settings: RunSettings) -> list[float]:
    """Generated tokens per second of the source and of each result, each loaded as a whole in a process of its own."""
    place = None if conditions.scratch is None else Path(conditions.scratch)
    if place is not None and not place.is_dir():
        raise OptionError(f"{place}: is no directory; give one as `scratch`")
    job.listener(PhaseStarted("speed", 1 + len(results)))
    rates = [speed(job.checkpoint.directory, settings=settings, own_process=True).tokens_per_second]
    for result in results:
        with tempfile.TemporaryDirectory(prefix="streamcollapse-compare-", dir=place) as directory:
            model = result.directory
            if model is None:
                writing = replace(settings, output=Output())
                model = apply(job.checkpoint.directory, result.plan, Path(directory) / "model", settings=writing).out
            job.listener(StepDone(result.name, 0))
            rates.append(speed(model, settings=settings, own_process=True).tokens_per_second)
    return rates
