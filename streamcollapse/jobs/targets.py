"""What a search may come to, before it begins: its target, the boundaries that it starts from, the least that stays."""

from __future__ import annotations

from streamcollapse.arch import likeness
from streamcollapse.errors import ModelError, OptionError
from streamcollapse.jobs.opening import Job
from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.merge.view import mismatch
from streamcollapse.strategy.collapse import Candidate, CollapseOptions, CollapseState, most_candidates
from streamcollapse.strategy.direct import groups_from_the_top
from streamcollapse.strategy.greedy import GreedyState
from streamcollapse.strategy.target import Target


def target_of(job: Job, options: CollapseOptions) -> Target:
    """The target of ``options`` in terms of this model. Raises OptionError where it is none for it."""
    layout, source = job.architecture.layout, job.source

    def parameters(names: list[str]) -> int:
        infos = [source.info(name) for name in names]
        return sum(info.num_elements for info in infos if info.dtype.is_floating_point)

    layers = tuple(parameters(list(layout.layer_names(i))) for i in range(job.num_layers))
    return Target(options.target_layers, options.target_ratio, layers, parameters(list(source.names)))


def boundaries(options: CollapseOptions, num_layers: int) -> range:
    """The 0-based layer boundaries that a search needs of the reference pass."""
    fitted = options.for_model(num_layers)
    assert fitted.highest is not None
    if options.strategy == "laco" and not options.rescale:
        return range(fitted.lowest - 1, max(CollapseState.start(num_layers, options).pointer, 0))
    if options.strategy in ("laco", "greedy", "rule-based"):
        return range(fitted.lowest - 1, fitted.highest)
    return range(num_layers + 1)


def first_candidate(job: Job, options: CollapseOptions) -> Candidate | None:
    """The first candidate of a search, or one like those that it may come to."""
    num_layers = job.num_layers
    if options.strategy == "laco":
        return CollapseState.start(num_layers, options).candidate()
    if options.strategy == "greedy":
        state = GreedyState.start(num_layers, options, target_of(job, options))
        return next(iter(state.candidates), None)
    if options.strategy == "rule-based":
        return next(iter(groups_from_the_top(num_layers, options, target_of(job, options))), None)
    layers = original_layers(num_layers)
    return Candidate(num_layers - 1, 0, layers[:-1], ()) if num_layers > 1 else None


def fewest_layers(job: Job, options: CollapseOptions) -> tuple[PlanLayer, ...]:
    """A stack of as many layers as stay at the least."""
    target, num_layers = target_of(job, options), job.num_layers
    if target.is_set:
        return original_layers(num_layers)[: target.fewest()]
    if options.strategy == "laco":
        state = CollapseState.start(num_layers, options)
        while candidate := state.candidate():
            state = state.after(candidate)
        return state.layers
    if options.strategy == "rule-based":
        steps = groups_from_the_top(num_layers, options, target)
        return steps[-1].layers if steps else original_layers(num_layers)
    return original_layers(1)


def count_candidates(job: Job, options: CollapseOptions) -> int:
    """The most candidates that a search evaluates; of a search for a threshold, in each of its tries."""
    num_layers, rules = job.num_layers, len(options.variants)
    if options.strategy == "laco":
        return most_candidates(num_layers, options) * rules
    if options.strategy == "greedy":
        return sum((count - 1) * rules for count in range(len(fewest_layers(job, options)) + 1, num_layers + 1))
    if options.strategy == "rule-based":
        return len(groups_from_the_top(num_layers, options, target_of(job, options)))
    return 0


def check_prunable(job: Job, options: CollapseOptions) -> None:
    """Raise ModelError, before a weight is read, where layers would not stay what they are when others go.

    Tried on the first candidate; one that merges unlike layers is passed over by the search, and tells nothing.
    """
    if options.strategy == "rule-based":  # it takes its groups as they come, and passes none over
        for step in groups_from_the_top(job.num_layers, options, target_of(job, options)):
            if reason := mismatch(job.checkpoint, job.architecture.layout, step.merged_layer):
                layers = f"layers {step.pointer}-{step.pointer + step.merged}"
                raise ModelError(f"{layers} cannot be merged: {reason}; raise --lowest, or lower --highest")
    candidate = first_candidate(job, options)
    if candidate is None or mismatch(job.checkpoint, job.architecture.layout, candidate.merged_layer):
        return
    likeness.check_prunable(job.architecture, [layer.base for layer in candidate.layers], job.trust_remote_code)


def check_candidates(job: Job, options: CollapseOptions) -> None:
    """Raise OptionError, before a weight is read, where a search would have no merge to try."""
    if options.strategy == "greedy" and target_of(job, options).is_set:  # as far as it goes, if that is not at all
        return
    if first_candidate(job, options) is None:
        raise OptionError(_nothing_to_try(job.num_layers, options))


def _nothing_to_try(num_layers: int, options: CollapseOptions) -> str:
    if num_layers == 1:
        return "the model has one layer: none can go"
    lowest, highest, together = options.lowest, options.for_model(num_layers).highest, options.layers_per_merge
    assert highest is not None
    if options.strategy == "laco" or (options.strategy == "rule-based" and highest - together + 1 < lowest):
        first = highest - together + (options.strategy == "rule-based")
        return (
            f"the first merge of {together} layers (C) below layer {highest} (H) would be into layer {first}, below "
            f"{lowest} (L); lower --layers-per-merge or --lowest, or raise --highest"
        )
    if options.strategy == "rule-based":
        return "no group of layers can be merged within the target; lower --layers-per-merge, or let more go"
    return f"layers {lowest} (L) to {highest} (H) have no two neighbours to merge; lower --lowest, or raise --highest"
