"""Which candidates to evaluate together: the most probable nodes of the tree of outcomes.

Each evaluation branches into accept and reject. A sweep reads the weights once for a whole set of candidates, so it
pays to evaluate those that may be needed next as well. How probable an accept is, experts say that predict the next
outcome, mixed by how well each has predicted so far. Speculation never changes a result, only what is read.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, pairwise

from streamcollapse.merge.plan import LayerKey, StackKey, stack_key
from streamcollapse.merge.record import Decision
from streamcollapse.searches.algorithm1 import SearchState
from streamcollapse.searches.candidate import Candidate

_ORDERS = (0, 1, 2, 3, 4, 6, 8)  # how many outcomes before a candidate an expert looks at
_FADING = [0.8**place for place in range(len(_ORDERS))]  # the more outcomes, the later there is enough to go by
_PRIOR = (*(0.5 * weight / sum(_FADING) for weight in _FADING), 0.5)  # the last one is the nearness's
_SHARE = 0.02  # of the weights, handed back to the prior after every outcome, so that no expert is ever lost
_DECAY = 0.85  # weight of a similarity's move relative to the one after it
_LIMITS = (0.03, 0.97)  # no outcome is ever certain


@dataclass(frozen=True)
class SimilarityForecast:
    """What is expected of the next candidate's similarity: a normal distribution."""

    mean: float
    spread: float

    def above(self, threshold: float) -> float:
        """The probability of a similarity above ``threshold``."""
        return 0.5 * math.erfc((threshold - self.mean) / self.spread / math.sqrt(2))


@dataclass(frozen=True)
class Forecast:
    """What is known before a candidate, along a path of decisions that may be hypothetical.

    ``outcomes`` so far, oldest first, ``weights`` of the experts (one for each of the orders, then the nearness), and
    ``near``: None as long as no similarities are known, when its expert says what the others say.
    """

    threshold: float
    outcomes: tuple[bool, ...] = ()
    weights: tuple[float, ...] = _PRIOR
    near: SimilarityForecast | None = None

    @cached_property
    def predictions(self) -> tuple[float, ...]:
        """The probability of an accept by each expert.

        An order's expert counts what followed where the last outcomes were the same, and adds half an accept and half
        a reject (R. E. Krichevsky and V. K. Trofimov, IEEE Trans. Inf. Theory 27, 1981).
        """
        accepts, rejects = [0.5] * len(_ORDERS), [0.5] * len(_ORDERS)
        for position, accepted in enumerate(self.outcomes):
            agreeing = self._agreeing(position)
            counts = accepts if accepted else rejects
            for expert, order in enumerate(_ORDERS):
                if order > agreeing:
                    break
                counts[expert] += 1.0
        told = tuple(a / (a + r) for a, r in zip(accepts, rejects, strict=True))
        if self.near is None:
            weights = self.weights[:-1]
            return *told, sum(w * p for w, p in zip(weights, told, strict=True)) / sum(weights)
        return *told, self.near.above(self.threshold)

    @cached_property
    def accept(self) -> float:
        """The probability of an accept: the experts' average by weight."""
        mixed = sum(w * p for w, p in zip(self.weights, self.predictions, strict=True))
        return min(max(mixed, _LIMITS[0]), _LIMITS[1])

    def after(self, accepted: bool) -> Forecast:
        """The forecast one candidate later: experts gain weight by the probability they gave to what happened.

        That is the Bayesian mixture, whose log loss exceeds the best expert's by no more than -log of its prior, with
        M. Herbster and M. K. Warmuth's fixed share (Machine Learning 32, 1998), so that the best may change.
        """
        gained = [w * (p if accepted else 1.0 - p) for w, p in zip(self.weights, self.predictions, strict=True)]
        total = sum(gained)
        weights = tuple((1.0 - _SHARE) * g / total + _SHARE * p for g, p in zip(gained, _PRIOR, strict=True))
        near = self.near
        if near is not None:  # further away, so less certain
            side = max(near.mean, self.threshold) if accepted else min(near.mean, self.threshold)
            near = SimilarityForecast(side, near.spread * math.sqrt(1.5))
        return replace(self, outcomes=(*self.outcomes, accepted), weights=weights, near=near)

    def _agreeing(self, position: int) -> int:
        """How many outcomes before ``position`` agree with the last ones, up to the highest order."""
        agreeing, outcomes, end = 0, self.outcomes, len(self.outcomes)
        while (
            agreeing < min(position, _ORDERS[-1]) and outcomes[position - 1 - agreeing] == outcomes[end - 1 - agreeing]
        ):
            agreeing += 1
        return agreeing


@dataclass
class AcceptModel:
    """How probable an accept is, learnt from the decisions so far.

    Experts are mixed by how well each has predicted: those of ``Forecast.predictions``, which see the outcomes, and one
    that sees how far the last similarity lies from the threshold, in units of what similarities usually move.
    """

    threshold: float
    decisions: list[Decision] = field(default_factory=list)

    def __post_init__(self) -> None:
        decisions, self.decisions = self.decisions, []
        self._forecast = Forecast(self.threshold)
        for decision in decisions:
            self.learn(decision)

    def learn(self, decision: Decision) -> None:
        """Take a decision into account."""
        self.decisions.append(decision)
        self._forecast = replace(self._forecast.after(decision.accepted), near=self._near())

    def forecast(self) -> Forecast:
        """What the decisions so far say of the next one."""
        return self._forecast

    def shares(self, candidates: Sequence[Candidate]) -> list[float]:
        """How probable it is that each of ``candidates``, of rules that compete, is the one if one is accepted.

        Laplace's rule of succession on the rules that have won so far.
        """
        won = Counter(decision.rule for decision in self.decisions if decision.accepted)
        weights = [1 + won[candidate.rule] for candidate in candidates]
        return [weight / sum(weights) for weight in weights]

    def _near(self) -> SimilarityForecast | None:
        seen = [d.similarity for d in self.decisions if d.similarity is not None]
        if len(seen) < 2:
            return None
        moves = [b - a for a, b in pairwise(seen)]
        weights = [_DECAY**age for age in range(len(moves))][::-1]
        spread = math.sqrt(sum(w * m * m for w, m in zip(weights, moves, strict=True)) / sum(weights))
        return SimilarityForecast(seen[-1], max(spread, 1e-6))


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
LayerRead = int | LayerKey  # a source layer, or a mixed layer of the stack so far, which is kept once it has been built


class _Reading:
    """The layers that a sweep reads, and the nodes that wait because they alone do not pay for reading more."""

    def __init__(self, root: SearchState) -> None:
        self._kept = {layer.key for layer in root.layers if len(layer.mix) > 1}
        self._reads: set[LayerRead] = set()
        self._waiting: list[tuple[int, Node, set[LayerRead]]] = []

    def more(self, candidates: Sequence[Candidate]) -> set[LayerRead]:
        """What ``candidates`` need beyond what is read."""
        reads: set[LayerRead] = set()
        for candidate in candidates:
            for layer in candidate.layers[candidate.start :]:
                reads.update([layer.key] if layer.key in self._kept else layer.mix)
        return reads - self._reads

    def read(self, reads: set[LayerRead]) -> None:
        self._reads |= reads

    def wait(self, node: Node, more: set[LayerRead], settled: float) -> list[Node]:
        """Let ``node`` wait for ``more``. Gives back all that wait if more is read now.

        That is so if the nodes it serves settle more decisions for each layer than the sweep does, ``settled`` in all.
        """
        self._waiting.append((len(more), node, more))
        self._waiting.sort(key=lambda waiting: (waiting[0], waiting[1][1]))
        best, extra, gain, rate = None, set[LayerRead](), 0.0, settled / len(self._reads)
        for _, (negative, *_), reads in self._waiting:
            extra = extra | reads
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
