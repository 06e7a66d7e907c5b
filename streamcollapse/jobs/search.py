"""Find the plan of a pruned model, and write no weights."""

from dataclasses import replace
from pathlib import Path

from streamcollapse.jobs.prepare import Prepared, prepare_search
from streamcollapse.jobs.repair import repaired
from streamcollapse.merge.plan import Plan
from streamcollapse.merge.record import SearchRecord
from streamcollapse.progress import Listener, PhaseStarted, silent
from streamcollapse.resources.device import heap_for
from streamcollapse.run.opened import Run, open_run
from streamcollapse.run.refits import save_refits
from streamcollapse.run.saved_reference import reference_of
from streamcollapse.run.work_directory import TemporaryWork, search_work
from streamcollapse.searches.evaluator import Evaluator
from streamcollapse.searches.exchange import exchanged, is_exchanging
from streamcollapse.searches.limit import LossLimit
from streamcollapse.searches.registry import strategy_of
from streamcollapse.searches.rescale import rescaled
from streamcollapse.searches.space import find_layers
from streamcollapse.searches.strategy import SearchContext, SearchResult
from streamcollapse.settings.run import RunSettings
from streamcollapse.settings.search import SearchOptions


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
    return run_search(prepare_search(source, options, settings, save_as, listener))


def run_search(prepared: Prepared) -> Plan:
    """``search`` as ``prepared``."""
    prepared.announce()
    with (
        search_work(
            prepared.key, prepared.options, prepared.settings.streaming, prepared.memory.spill, prepared.out
        ) as work,
        open_run(prepared.job, prepared.memory, work.path) as run,
    ):
        plan = repaired(prepared, find_plan(prepared, run, work), run, work)
        if prepared.out is not None:
            save_refits(run.job, plan, prepared.out)
            plan.save(prepared.out)
            plan = replace(plan, origin=prepared.out)  # where its repaired tensors are
        return plan


def find_plan(prepared: Prepared, run: Run, work: TemporaryWork) -> Plan:
    """The reference pass, the search, exchanges and scales if they are wanted."""
    job, space, samples = run.job, prepared.space, prepared.samples
    assert space is not None
    assert samples is not None
    with heap_for(run.memory.activations):
        with job.meter.phase("reference"):
            job.listener(PhaseStarted("reference", job.num_layers))
            reference = reference_of(run, work, samples, strategy_of(space.options).boundaries(space))
        lookahead = prepared.settings.streaming.lookahead
        evaluator = Evaluator(run, reference, work.memory, space.options, lookahead)
        with job.meter.phase("search"):
            job.listener(PhaseStarted("search"))
            context = SearchContext(run, space, reference, evaluator, work, _limit(prepared, run))
            found = find_layers(context)
        if strategy_of(space.options).by_rounds and is_exchanging(space.options):
            with job.meter.phase("exchanges"):
                job.listener(PhaseStarted("exchanges"))
                found = exchanged(context, found)
        if space.options.rescale and len(found.layers) < space.num_layers:
            with job.meter.phase("scales"):
                job.listener(PhaseStarted("scales"))
                found = rescaled(context, found)
    fingerprint, record = job.checkpoint.fingerprint(), _record(prepared, found, samples.digest)
    return Plan(job.name, job.num_layers, fingerprint, found.layers, space.options.merge_norms, record)


def _limit(prepared: Prepared, run: Run) -> LossLimit | None:
    """How far the search may go, where no size says it."""
    options, text = prepared.options, prepared.held_out
    if options is None or options.max_loss is None or options.has_size:
        return None
    assert text is not None
    return LossLimit(run, text, options.max_loss, options.merge_norms)


def _record(prepared: Prepared, found: SearchResult, digest: str) -> SearchRecord:
    return SearchRecord(found.options, digest, prepared.job.placement.dtype_name, tuple(found.decisions))
