"""What a strategy is, what it has to work with, and what it comes to.

A strategy is one object in one file of searches/strategies/: it says what it is, which settings it goes by with which
defaults, what it would try, and runs the search. Nothing outside searches/ knows one strategy from another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from streamcollapse.errors import OptionError
from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.merge.record import Decision, SearchRecord
from streamcollapse.progress import DecisionMade, StackChanged
from streamcollapse.searches.candidate import Candidate, Target
from streamcollapse.searches.work import Round, swept
from streamcollapse.settings.search import SearchOptions, layers_in_words

if TYPE_CHECKING:  # what follows needs torch; listing strategies does not
    from streamcollapse.forward.reference import Reference
    from streamcollapse.run.evaluations import Evaluation
    from streamcollapse.run.opened import Run
    from streamcollapse.run.work_directory import TemporaryWork
    from streamcollapse.searches.evaluator import Evaluator
    from streamcollapse.searches.limit import LossLimit

Found = tuple[tuple[PlanLayer, ...], list[Decision]]


@dataclass(frozen=True)
class SearchSpace:
    """What may be searched of one model: ``options`` complete and fitted to it, the ``target``, and what that means
    for the model, in words, where it is not plain."""

    options: SearchOptions
    target: Target
    told: str = ""

    @property
    def num_layers(self) -> int:
        return len(self.target.parameters)

    @property
    def lowest(self) -> int:
        """L, counted from 1."""
        return self.options.lowest

    @property
    def highest(self) -> int:
        """H, counted from 1."""
        assert self.options.highest is not None
        return self.options.highest


@dataclass(frozen=True)
class SearchResult:
    """What a search came to: ``options`` with what it filled in, the layers, and the decisions in order."""

    options: SearchOptions
    layers: tuple[PlanLayer, ...]
    decisions: list[Decision]


@dataclass(frozen=True)
class SearchContext:
    """What a strategy has to work with: its space, what the reference pass kept, the evaluator; and the ``limit``,
    where a search goes as far as that lets it."""

    run: Run
    space: SearchSpace
    reference: Reference
    evaluator: Evaluator
    work: TemporaryWork
    limit: LossLimit | None = None

    def aiming_at(self, num_layers: int) -> SearchContext:
        """The same with that many layers as the target."""
        target = replace(self.space.target, layers=num_layers)
        return replace(self, space=replace(self.space, target=target))

    def record(self, decision: Decision, number: int, layers: tuple[PlanLayer, ...]) -> None:
        """Decision ``number`` is taken: into the journal with it, and say so."""
        self.work.decided(number, decision)
        self.tell(decision, layers)

    def tell(self, decision: Decision, layers: tuple[PlanLayer, ...]) -> None:
        """Say what was decided, and what the stack is after it."""
        listener = self.run.listener
        listener(DecisionMade(decision.l, decision.merged, decision.similarity, decision.accepted, decision.reason))
        listener(StackChanged(cells(layers, self.space.num_layers)))


class Strategy(ABC):
    """A way to find the layers of the pruned model.

    ``defaults``: of the settings that only some strategies go by (registry.OWNED), those that this one does, with its
    defaults. ``implied_by``: settings that mean this strategy where none is named. ``samples``: those it calibrates on
    by default. ``needs_target``: it stops at a target only. ``one_rule``: it compares none. ``goes_by_loss``: it can
    stop where the limit says. ``verdict``: what it does
    with layers. ``by_rounds``: a decision is the best of its round, not one of the candidates.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    cost: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    implied_by: ClassVar[tuple[str, ...]] = ()
    is_default: ClassVar[bool] = False
    samples: ClassVar[str] = "sentences"
    needs_target: ClassVar[bool] = False
    one_rule: ClassVar[bool] = False
    goes_by_loss: ClassVar[bool] = False
    verdict: ClassVar[str] = "merged"
    by_rounds: ClassVar[bool] = False

    @property
    def has_effort(self) -> bool:
        """Whether it goes by an effort."""
        return "effort" in self.defaults

    def boundaries(self, space: SearchSpace) -> range:
        """The 0-based layer boundaries that the search needs of the reference pass."""
        return range(space.lowest - 1, space.highest)

    @abstractmethod
    def first_candidates(self, space: SearchSpace) -> Sequence[Candidate]:
        """The candidates of the first round, or some like those that the search may come to; empty where there is
        nothing to try."""

    @abstractmethod
    def fewest_layers(self, space: SearchSpace) -> tuple[PlanLayer, ...]:
        """A stack of as many layers as stay at the least where no target says so."""

    @abstractmethod
    def most_candidates(self, space: SearchSpace) -> int:
        """The most candidates that are evaluated; of a search for a threshold, in each of its tries."""

    def rounds(self, space: SearchSpace, room: int, has_scout: bool) -> list[Round]:
        """What each round of the search is expected to compute, where a sweep has at most ``room`` candidates, and
        where there is or is not a scout."""
        return [swept(self.first_candidates(space), room)]

    @abstractmethod
    def run(self, context: SearchContext) -> SearchResult:
        """Find the layers."""

    def check(self, space: SearchSpace) -> None:
        """Raise OptionError, before a weight is read, where there is nothing to try."""
        if not self.first_candidates(space):
            raise OptionError(self.nothing_to_try(space))

    def nothing_to_try(self, space: SearchSpace) -> str:
        """The line that says why there is nothing to try."""
        if space.num_layers == 1:
            return "the model has one layer: none can go"
        return (
            f"layers {space.lowest} (L) to {space.highest} (H), counted from 1, have no two neighbours to merge; lower "
            "`lowest`, or raise `highest`"
        )

    def must_fit(self, space: SearchSpace) -> Sequence[Candidate]:
        """The candidates whose layers must go together, because the search takes them as they come."""
        return ()

    def layers_of(self, decision: Decision) -> str:
        """The layers that ``decision`` is about, in words, counted from 0."""
        return f"layers {decision.l - 1}-{decision.l - 1 + decision.merged}"

    def verdict_of(self, decision: Decision, options: SearchOptions) -> str:
        """What came of a candidate that has a similarity, in words."""
        sign, verdict = (">", "merged") if decision.accepted else ("<=", "rejected")
        return f" {sign} {options.threshold:g}, {verdict}"

    def course(self, record: SearchRecord, layers: tuple[PlanLayer, ...]) -> Sequence[tuple[PlanLayer, ...]]:
        """The stacks that the search passed on its way, from the whole ``layers`` on, one for each accepted decision;
        empty where the result for a size is not on the way to a smaller one."""
        return ()

    def uses(self, setting: str, options: SearchOptions) -> bool:
        """Whether ``setting`` makes a difference with ``options``."""
        if setting in ("metric", "effort") and options.rescale:
            return True
        return setting in self.defaults and not (setting == "threshold" and options.has_target)


def fewest_layers(strategy: Strategy, space: SearchSpace) -> tuple[PlanLayer, ...]:
    """A stack of as many layers as stay at the least."""
    if space.target.is_set:
        return original_layers(space.num_layers)[: space.target.fewest()]
    return strategy.fewest_layers(space)


def method_line(strategy: Strategy, options: SearchOptions) -> str:
    """The settings that make a difference to the result, in one line."""
    said = [strategy.name]
    if "layers_per_merge" in strategy.defaults:
        said.append(f"C={options.layers_per_merge} I={options.interval}")
    if options.target_layers is not None:
        said.append(layers_in_words(options.target_layers))
    elif options.target_memory is not None:
        said.append(f"into {options.target_memory}")
    elif options.target_ratio is not None:
        said.append(f"ratio {options.target_ratio:g}")
    elif options.max_loss is not None:
        said.append(f"loss +{options.max_loss:g} at most")
    elif strategy.uses("threshold", options):
        said.append(f"T={options.threshold:g}")
    said += [f"rule {options.rule}"] if strategy.uses("rule", options) else []
    said += [f"metric {options.metric}"] if strategy.uses("metric", options) else []
    if strategy.uses("effort", options) and options.effort != strategy.defaults.get("effort", options.effort):
        said.append(f"effort {options.effort}")
    return ", ".join(said + ["then scales"] * options.rescale)


def competition(
    taken: Candidate, candidates: Sequence[Candidate], evaluations: Sequence[Evaluation], options: SearchOptions
) -> tuple[str | None, dict[str, float | None] | None]:
    """Where rules compete, the one of ``taken``, and how similar each of them is at its place alone."""
    if len(options.variants) == 1:
        return None, None
    pairs = zip(candidates, evaluations, strict=True)
    there = {label: e.similarity for c, e in pairs if c.pointer == taken.pointer for label in c.rules}
    return taken.rule, {v.label: there[v.label] for v in options.variants if v.label in there}


def cells(layers: Sequence[PlanLayer], num_layers: int) -> tuple[int, ...]:
    """How many source layers each layer stands for, dropped ones above it included."""
    bases = [layer.base for layer in layers]
    return tuple(end - base for base, end in zip(bases, [*bases[1:], num_layers], strict=True))


def loss(similarity: float | None) -> float:
    """In nats, of a metric that is exp(-nats); of the others what orders alike."""
    return -math.log(max(similarity or 0.0, 1e-300))


class OnePass(Strategy):
    """Drops layers, and evaluates no candidate: it goes by the hidden states at every boundary, to a target."""

    cost = "1"
    defaults = {"rescale": False}  # noqa: RUF012 - a Mapping
    needs_target = True
    goes_by_loss = True
    verdict = "dropped"

    def boundaries(self, space: SearchSpace) -> range:
        return range(space.num_layers + 1)

    def first_candidates(self, space: SearchSpace) -> Sequence[Candidate]:
        count = space.num_layers  # without its last layer: like those that it may come to
        return [Candidate(count - 1, 0, original_layers(count)[:-1], ())] if count > 1 else []

    def fewest_layers(self, space: SearchSpace) -> tuple[PlanLayer, ...]:
        return original_layers(1)

    def most_candidates(self, space: SearchSpace) -> int:
        return 0

    def rounds(self, space: SearchSpace, room: int, has_scout: bool) -> list[Round]:
        return []

    def verdict_of(self, decision: Decision, options: SearchOptions) -> str:
        return ", dropped" if decision.accepted else ", kept"

    @abstractmethod
    def choose(self, context: SearchContext) -> Found:
        """The layers that stay, and the decisions in order."""

    def run(self, context: SearchContext) -> SearchResult:
        limit, space = context.limit, context.space
        if limit is not None:
            sized = cache(lambda size: self.choose(context.aiming_at(size)))
            size = limit.smallest(space.num_layers, lambda size: sized(size)[0])
            if size == space.num_layers:
                return SearchResult(space.options, original_layers(size), [])
            layers, decisions = sized(size)
        else:
            layers, decisions = self.choose(context)
        for number, decision in enumerate(decisions):
            context.record(decision, number, layers)
        return SearchResult(context.space.options, layers, decisions)
