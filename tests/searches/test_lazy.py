"""Lazy greedy: what is scored in a round, and that nothing is missed where costs fall no more than is allowed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from streamcollapse.merge.plan import PlanLayer
from streamcollapse.run.evaluations import Evaluation
from streamcollapse.searches.candidate import Candidate, Target
from streamcollapse.searches.strategies import greedy
from streamcollapse.searches.strategies.greedy import GreedyState, LazyQueue
from streamcollapse.searches.strategy import SearchSpace
from tests.methods import method


class Costs:
    """Stands in for an evaluator: layers cost what they cost alone, each pair of them something more."""

    def __init__(self, num_layers: int, seed: int, pairs: float) -> None:
        dice = random.Random(seed)
        self.alone = [0.05 + dice.expovariate(2.0) for _ in range(num_layers)]
        self.pairs = {(a, b): dice.uniform(0.0, pairs) for a in range(num_layers) for b in range(a)}
        self.num_layers, self.asked = num_layers, 0
        self._known: dict[Candidate, Evaluation] = {}

    def known(self, candidate: Candidate) -> Evaluation | None:
        return self._known.get(candidate)

    def scores(self, candidates: Sequence[Candidate], layers: Sequence[PlanLayer]) -> list[Evaluation]:
        for candidate in candidates:
            gone = sorted({*range(self.num_layers)} - {layer.base for layer in candidate.layers})
            cost = sum(self.alone[a] for a in gone) + sum(self.pairs[b, a] for a in gone for b in gone if b > a)
            self.asked += candidate not in self._known
            self._known[candidate] = Evaluation(math.exp(-cost))
        return [self._known[candidate] for candidate in candidates]


def _found(costs: Costs, wanted: int, lazy: bool, scout: Costs | None = None) -> list[int]:
    options = method(strategy="greedy", target_layers=wanted, rescale=False, highest=costs.num_layers)
    target = Target(wanted, None, (1,) * costs.num_layers, costs.num_layers)
    state, queue = GreedyState.start(SearchSpace(options, target)), LazyQueue()
    if scout is not None:
        queue.scout(scout, state)  # type: ignore[arg-type]
    while state.candidates:
        found = queue.scores(costs, state) if lazy else costs.scores(state.candidates, state.layers)  # type: ignore[arg-type]
        best = max(range(len(found)), key=lambda i: found[i].similarity or 0.0)
        state = state.after(state.candidates[best])
    return [layer.base for layer in state.layers]


@pytest.mark.parametrize("seed", range(8))
def test_where_costs_never_fall_it_is_greedy_search_with_fewer_scores(seed: int) -> None:
    full, lazy = Costs(24, seed, 0.05), Costs(24, seed, 0.05)
    assert _found(lazy, 16, lazy=True) == _found(full, 16, lazy=False)
    assert lazy.asked < 0.8 * full.asked


@pytest.mark.parametrize("seed", range(8))
def test_a_scout_that_is_not_exact_saves_scores_in_the_first_round(seed: int) -> None:
    full, lazy, scout = (Costs(24, seed, 0.05) for _ in range(3))
    scout.alone = [cost * random.Random(seed).uniform(0.9, 1.1) for cost in full.alone]
    assert _found(lazy, 23, lazy=True, scout=scout) == _found(full, 23, lazy=False)
    assert lazy.asked < 0.5 * full.asked


@pytest.mark.parametrize("seed", range(4))
def test_where_all_may_fall_to_nothing_everything_is_scored(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "FALL", 0.0)
    full, lazy = Costs(16, seed, -0.05), Costs(16, seed, -0.05)
    assert _found(lazy, 10, lazy=True) == _found(full, 10, lazy=False)


def test_merges_beside_a_gap_are_scored_in_every_round() -> None:
    costs = Costs(12, 0, 0.0)
    costs.alone = [1.0] * 5 + [0.1] + [1.0] * 6
    state, queue = GreedyState.start(_space(12)), LazyQueue()
    queue.scores(costs, state)  # type: ignore[arg-type]
    gone = next(c for c in state.candidates if 5 not in {layer.base for layer in c.layers})
    state = state.after(gone)
    found = queue.scores(costs, state)  # type: ignore[arg-type]
    scored = {state.neighbours(c.position)[1] for c, one in zip(state.candidates, found, strict=True) if one.similarity}
    assert {4, 6, 7} <= scored


def _space(count: int) -> SearchSpace:
    options = method(strategy="greedy", target_layers=count - 4, rescale=False, highest=count)
    return SearchSpace(options, Target(count - 4, None, (1,) * count, count))
