"""From the settings of a search to what they mean for one model, before a weight is read."""

from streamcollapse.arch import architecture as likeness
from streamcollapse.errors import ModelError
from streamcollapse.merge.view import mismatch
from streamcollapse.progress import StackChanged, WarningRaised
from streamcollapse.run.needs import Demand
from streamcollapse.run.opened import Job
from streamcollapse.searches.candidate import Candidate
from streamcollapse.searches.registry import complete, make_target, strategy_of
from streamcollapse.searches.sizes import ratio_told, sized
from streamcollapse.searches.strategy import SearchContext, SearchResult, SearchSpace
from streamcollapse.settings.catalogue import EFFORTS
from streamcollapse.settings.search import SearchOptions


def search_space(job: Job, options: SearchOptions) -> SearchSpace:
    """What ``options`` mean for this model. Raises OptionError where they do not fit it."""
    layout, source = job.architecture.layout, job.source

    def parameters(names: list[str]) -> int:
        infos = [source.info(name) for name in names]
        return sum(info.num_elements for info in infos if info.dtype.is_floating_point)

    layers = tuple(parameters(list(layout.layer_names(i))) for i in range(job.num_layers))
    fitted, told = sized(job, complete(options))
    target = make_target(fitted, layers, parameters(list(source.names)))
    return SearchSpace(fitted, target, told or ratio_told(target))


def check_space(job: Job, space: SearchSpace) -> None:
    """Raise OptionError, before a weight is read, where a search would have nothing to try, ModelError where layers
    would not stay what they are when others go.

    Tried on the first candidate; one that merges unlike layers is skipped by the search, and tells nothing.
    """
    strategy = strategy_of(space.options)
    strategy.check(space)
    for step in strategy.must_fit(space):
        if reason := mismatch(job.checkpoint, job.architecture.layout, step.merged_layer):
            layers = f"layers {step.position}-{step.position + step.merged}"
            raise ModelError(f"{layers} cannot be merged: {reason}; raise `lowest`, or lower `highest`")
    for candidate in strategy.first_candidates(space)[:1]:
        check_prunable(job, candidate)


def check_prunable(job: Job, candidate: Candidate) -> None:
    """Raise ModelError where the layers of ``candidate`` would not stay what they are when others go."""
    if mismatch(job.checkpoint, job.architecture.layout, candidate.merged_layer):
        return
    likeness.check_prunable(job.architecture, [layer.base for layer in candidate.layers], job.trust_remote_code)


def demand_of(space: SearchSpace) -> Demand:
    """What a search of ``space`` asks of memory."""
    strategy = strategy_of(space.options)
    candidate = next(iter(strategy.first_candidates(space)), None)
    window = 1 if candidate is None or not candidate.merged else len(candidate.merged_layer.mix)
    options = space.options
    return Demand(len(strategy.boundaries(space)), window, options.metric, strategy.samples, EFFORTS[options.effort])


def find_layers(context: SearchContext) -> SearchResult:
    """Find the layers of the pruned model."""
    space, listener = context.space, context.run.listener
    listener(StackChanged(tuple(1 for _ in range(space.num_layers))))
    found = strategy_of(space.options).run(context)
    if len(found.layers) == space.num_layers:
        listener(WarningRaised("no merge was accepted: the result is the source as it is"))
    return found
