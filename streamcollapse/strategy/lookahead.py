"""Which candidates to evaluate together: the most probable nodes of the tree of outcomes.

Each evaluation branches into accept and reject. A sweep reads the weights once for a whole set of candidates, so it
pays to evaluate those that may be needed next as well. Speculation never changes a result, only what is read.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, pairwise

from streamcollapse.merge.plan import Decision, StackKey, stack_key
from streamcollapse.strategy.collapse import CollapseState

_DECAY = 0.85  # weight of a decision relative to the one after it
_LIMITS = (0.03, 0.97)  # no outcome is ever certain

Known = Callable[[CollapseState], bool | None]


@dataclass(frozen=True)
class Belief:
    """What is expected of the next candidate's similarity: a normal distribution, or nothing yet (``spread`` 0)."""

    mean: float = 0.0
    spread: float = 0.0


@dataclass
class Odds:
    """How probable an accept is, learnt from the decisions so far.

    Two estimates are averaged: how often recent candidates were accepted, and how far the last similarity lies from
    the threshold, in units of what similarities usually move from one candidate to the next.
    """

    threshold: float
    decisions: list[Decision] = field(default_factory=list)

    def learn(self, decision: Decision) -> None:
        """Take a decision into account."""
        self.decisions.append(decision)

    def belief(self) -> Belief:
        """What the similarities so far say of the next one."""
        seen = [d for d in self.decisions if d.similarity is not None]
        if len(seen) < 2:
            return Belief()
        moves = [_value(b) - _value(a) for a, b in pairwise(seen)]
        weights = [_DECAY**age for age in range(len(moves))][::-1]
        spread = math.sqrt(sum(w * m * m for w, m in zip(weights, moves, strict=True)) / sum(weights))
        return Belief(_value(seen[-1]), max(spread, 1e-6))

    def accept(self, belief: Belief) -> float:
        """The probability that a candidate with this ``belief`` is accepted."""
        weights = [_DECAY**age for age in range(len(self.decisions))][::-1]
        accepted = sum(w for w, d in zip(weights, self.decisions, strict=True) if d.accepted)
        frequency = (accepted + 0.5) / (sum(weights) + 1.0)
        if belief.spread == 0.0:
            return _limited(frequency)
        distance = (belief.mean - self.threshold) / belief.spread
        return _limited((frequency + 0.5 * math.erfc(-distance / math.sqrt(2))) / 2)

    def after(self, belief: Belief, accepted: bool) -> Belief:
        """What is expected one candidate later if the outcome is ``accepted``: further away, so less certain."""
        if belief.spread == 0.0:
            return belief
        side = max(belief.mean, self.threshold) if accepted else min(belief.mean, self.threshold)
        return Belief(side, belief.spread * math.sqrt(1.5))


@dataclass(frozen=True)
class Depth:
    """How far to look ahead: at most ``nodes`` candidates, and only as long as it pays (``cost_ratio`` None: always).

    ``cost_ratio`` is the time to read a layer in multiples of the time to run a candidate through it. A candidate that
    is needed with probability p saves p of a later sweep's reading, shared by the candidates which that sweep would
    settle, and wastes 1 - p of its own computing.
    """

    nodes: int
    cost_ratio: float | None = None

    def pays(self, probability: float, settled: float) -> bool:
        """Whether to add a candidate needed with ``probability`` to those expected to settle ``settled`` decisions."""
        return self.cost_ratio is None or probability / settled * self.cost_ratio > 1.0 - probability


def likely_states(root: CollapseState, odds: Odds, depth: Depth, known: Known) -> list[CollapseState]:
    """The states, ``root`` first, whose candidates are most probably needed, in that order, as many as ``depth`` says.

    ``known(state)`` is the outcome of a state's candidate where it is known already; such states cost nothing and are
    passed through. States without a candidate end their path.
    """
    chosen: list[CollapseState] = []
    taken: set[StackKey] = set()  # different ways can lead to the same candidate, or to the same state
    reached: set[tuple[StackKey, int]] = set()
    order = count()  # equal probabilities: first come, first served, so that a sweep is reproducible
    frontier: list[tuple[float, int, CollapseState, Belief]] = [(-1.0, next(order), root, odds.belief())]
    settled = 0.0  # decisions that the chosen candidates are expected to settle
    while frontier and len(chosen) < depth.nodes:
        negative, _, state, belief = heapq.heappop(frontier)
        if chosen and not depth.pays(-negative, settled):
            break  # nothing that is left is more probable
        candidate = state.candidate()
        if candidate is None or (stack_key(state.layers), state.pointer) in reached:
            continue
        reached.add((stack_key(state.layers), state.pointer))
        outcome = known(state)
        if outcome is None and (key := stack_key(candidate.layers)) not in taken:
            taken.add(key)
            chosen.append(state)
            settled -= negative
        accept = odds.accept(belief)
        for accepted, share in ((False, 1.0 - accept), (True, accept)):
            if outcome is None or outcome == accepted:
                probability = negative * (share if outcome is None else 1.0)
                entry = (probability, next(order), state.after(accepted), odds.after(belief, accepted))
                heapq.heappush(frontier, entry)
    return chosen


def _value(decision: Decision) -> float:
    assert decision.similarity is not None
    return decision.similarity


def _limited(probability: float) -> float:
    return min(max(probability, _LIMITS[0]), _LIMITS[1])
