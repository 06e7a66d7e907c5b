"""Which candidates to evaluate together: the most probable nodes of the tree of outcomes.

Each evaluation branches into accept and reject. A sweep reads the weights once for a whole set of candidates, so it
pays to evaluate those that may be needed next as well. Speculation never changes a result, only what is read.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from streamcollapse.merge.plan import LayerKey, StackKey, stack_key
from streamcollapse.searches.accept_model import AcceptModel, Forecast
from streamcollapse.searches.algorithm1 import SearchState
from streamcollapse.searches.candidate import Candidate

Outcome = tuple[Candidate | None]  # the candidate that is accepted, or that none is
Known = Callable[[SearchState], Outcome | None]


@dataclass(frozen=True)
class Depth:
    """How far to look ahead: at most ``nodes`` candidates, and only as long as it pays (``cost_ratio`` None: always).

    ``cost_ratio`` is the time to read a layer in multiples of the time to run a candidate through it. A candidate that
    is needed with probability p saves p of a later sweep's reading, shared by the candidates which that sweep would
    settle, and wastes 1 - p of its own computing, unless that is done while the next layer is still being read.
    """

    nodes: int
    cost_ratio: float | None = None

    def pays(self, probability: float, settled: float, count: int) -> bool:
        """Whether to add a candidate needed with ``probability`` to ``count`` that settle ``settled`` decisions."""
        if self.cost_ratio is None or count < self.cost_ratio:
            return True
        return probability / settled * self.cost_ratio > 1.0 - probability


Node = tuple[float, int, SearchState, Forecast]  # minus its probability, order of arrival, what to evaluate
Unit = int | LayerKey  # a source layer, or a mixed layer of the stack so far, which is kept once it has been built


class _Reading:
    """The layers that a sweep reads, and the nodes that wait because they alone do not pay for reading more."""

    def __init__(self, root: SearchState) -> None:
        self._kept = {layer.key for layer in root.layers if len(layer.mix) > 1}
        self._units: set[Unit] = set()
        self._waiting: list[tuple[int, Node, set[Unit]]] = []

    def more(self, candidates: Sequence[Candidate]) -> set[Unit]:
        """What ``candidates`` need beyond what is read."""
        units: set[Unit] = set()
        for candidate in candidates:
            for layer in candidate.layers[candidate.start :]:
                units.update([layer.key] if layer.key in self._kept else layer.mix)
        return units - self._units

    def read(self, units: set[Unit]) -> None:
        self._units |= units

    def wait(self, node: Node, more: set[Unit], settled: float) -> list[Node]:
        """Let ``node`` wait for ``more``. Gives back all that wait if more is read now.

        That is so if the nodes it serves settle more decisions for each layer than the sweep does, ``settled`` in all.
        """
        self._waiting.append((len(more), node, more))
        self._waiting.sort(key=lambda waiting: (waiting[0], waiting[1][1]))
        best, extra, gain, rate = None, set[Unit](), 0.0, settled / len(self._units)
        for _, (negative, *_), units in self._waiting:
            extra = extra | units
            gain -= negative
            if gain / len(extra) > rate:
                best, rate = extra, gain / len(extra)
        if best is None:
            return []
        self.read(best)
        released = [waiting for _, waiting, _ in self._waiting]
        self._waiting = []
        return released


def likely_states(root: SearchState, model: AcceptModel, depth: Depth, known: Known) -> list[SearchState]:
    """The states, ``root`` first, whose candidates are most probably needed, as many as ``depth`` says.

    They come in the order of their probability, but for those that would have the sweep read more layers than they
    are worth: these wait or are left out. ``known(state)`` is the outcome of a state where all its candidates are
    known already; such states cost nothing and are passed through. States without a candidate end their path. Where
    rules compete, a state's candidates are taken together.
    """
    chosen: list[SearchState] = []
    taken: set[StackKey] = set()  # different ways can lead to the same candidate, or to the same state
    reached: set[tuple[StackKey, int]] = set()
    order = count()  # equal probabilities: first come, first served, so that a sweep is reproducible
    frontier: list[Node] = [(-1.0, next(order), root, model.forecast())]
    reading = _Reading(root)
    settled = 0.0  # decisions that the chosen candidates are expected to settle
    while frontier and len(taken) < depth.nodes:
        node = negative, _, state, forecast = heapq.heappop(frontier)
        if chosen and not depth.pays(-negative, settled, len(taken)):
            break  # nothing that is left is more probable
        candidates = state.candidates
        if not candidates or (stack_key(state.layers), state.pointer) in reached:
            continue
        outcome = known(state)
        if outcome is None and not (keys := {stack_key(c.layers) for c in candidates}) <= taken:
            more = reading.more(candidates)
            if more and chosen:
                for released in reading.wait(node, more, settled):
                    heapq.heappush(frontier, released)
                continue
            reading.read(more)
            taken |= keys
            chosen.append(state)
            settled -= negative
        reached.add((stack_key(state.layers), state.pointer))
        ways: list[tuple[Candidate | None, float]] = [(None, 1.0 - forecast.accept)]
        ways += [(c, forecast.accept * share) for c, share in zip(candidates, model.shares(candidates), strict=True)]
        for accepted, share in ways:
            if outcome is None or outcome == (accepted,):
                probability = negative * (share if outcome is None else 1.0)
                after = forecast.after(accepted is not None)
                heapq.heappush(frontier, (probability, next(order), state.after(accepted), after))
    return chosen
