"""What a search has to work with, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass

from streamcollapse.forward.reference import Reference
from streamcollapse.jobs.candidates import Evaluator
from streamcollapse.jobs.opening import Job
from streamcollapse.jobs.workplace import WorkPlace
from streamcollapse.merge.plan import Decision, PlanLayer
from streamcollapse.progress import DecisionMade, StackChanged
from streamcollapse.strategy.collapse import CollapseOptions
from streamcollapse.strategy.target import Target


@dataclass(frozen=True)
class Found:
    """What a search came to: ``options`` with what it filled in, the layers, and the decisions in order."""

    options: CollapseOptions
    layers: tuple[PlanLayer, ...]
    decisions: list[Decision]


@dataclass(frozen=True)
class Search:
    """What a strategy has to work with."""

    job: Job
    options: CollapseOptions
    target: Target
    reference: Reference
    evaluator: Evaluator
    place: WorkPlace

    def keep(self, decision: Decision, number: int, layers: tuple[PlanLayer, ...]) -> None:
        """Decision ``number`` is taken: into the journal with it, and say so."""
        self.place.decided(number, decision)
        self.tell(decision, layers)

    def tell(self, decision: Decision, layers: tuple[PlanLayer, ...]) -> None:
        """Say what was decided, and what the stack is after it."""
        listener = self.job.listener
        listener(DecisionMade(decision.l, decision.merged, decision.similarity, decision.accepted, decision.reason))
        listener(StackChanged(cells(layers, self.job.num_layers)))


def cells(layers: tuple[PlanLayer, ...], num_layers: int) -> tuple[int, ...]:
    """How many source layers each layer stands for, dropped ones above it included."""
    bases = [layer.base for layer in layers]
    return tuple(end - base for base, end in zip(bases, [*bases[1:], num_layers], strict=True))
