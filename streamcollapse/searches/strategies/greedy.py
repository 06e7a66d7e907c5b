"""Greedy search: in each round every merge of two neighbouring layers is scored, and the best is taken.

As SLEB (Song et al., 2024) removes blocks one by one by perplexity; here with any of the merge rules, and judged by the
similarity that the search measures. A round is one upward pass over the weights: candidates above what has been merged
share the way up to there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from streamcollapse.merge.plan import LayerKey, PlanLayer, collapse, original_layers
from streamcollapse.merge.record import Decision, SearchRecord
from streamcollapse.progress import RoundStarted
from streamcollapse.run.evaluations import Evaluation
from streamcollapse.searches.candidate import Candidate, Target
from streamcollapse.searches.strategy import (
    SearchContext,
    SearchResult,
    SearchSpace,
    Strategy,
    competition,
    fewest_layers,
    loss,
)
from streamcollapse.searches.work import Round, layers_to_go, swept
from streamcollapse.settings.catalogue import EFFORTS
from streamcollapse.settings.search import SearchOptions

if TYPE_CHECKING:
    from streamcollapse.searches.evaluator import Evaluator


LOOK = 4  # merges at the head of the queue that are scored together
# Of the merges, expected in a round. Counted: 0.1 to 0.3 on SmolLM2, the larger numbers with fewer layers, and on the
# model that ships with the package 0.3 to 0.7.
SCORED = 0.25
FALL = 0.8  # of a cost: what it may fall to from one round to the next, but beside a gap


class Greedy(Strategy):
    """Song et al., 2024, with merges, by any metric."""

    name = "greedy"
    summary = "scores every merge of two neighbours and takes the best, round after round"
    source = "Song et al. 2024, SLEB (arXiv 2402.09025), there by perplexity and without merges"
    cost = (
        "1 for the reference, up to 1 for each layer that goes where memory holds a round's candidates, and 2 for each "
        "round of scales"
    )
    defaults = {  # noqa: RUF012 - a Mapping
        "threshold": 0.65,
        "merges_per_round": 1,
        "rule": "first",
        "metric": "kl",
        "rescale": False,
        "effort": "standard",
    }
    is_default = True
    goes_by_loss = True
    samples = "passages"
    by_rounds = True

    def first_candidates(self, space: SearchSpace) -> Sequence[Candidate]:
        return GreedyState.start(space).candidates

    def fewest_layers(self, space: SearchSpace) -> tuple[PlanLayer, ...]:
        return original_layers(1)

    def most_candidates(self, space: SearchSpace) -> int:
        fewest, rules = len(fewest_layers(self, space)), len(space.options.variants)
        return sum((count - 1) * rules for count in range(fewest + 1, space.num_layers + 1))

    def check(self, space: SearchSpace) -> None:
        if not space.target.is_set:  # it goes as far as the target lets it, if that is not at all
            super().check(space)

    def layers_of(self, decision: Decision) -> str:
        return f"positions {decision.l - 1}-{decision.l - 1 + decision.merged}"  # of the stack as it was then

    def verdict_of(self, decision: Decision, options: SearchOptions) -> str:
        return ", merged" if options.has_target else super().verdict_of(decision, options)

    def course(self, record: SearchRecord, layers: tuple[PlanLayer, ...]) -> Sequence[tuple[PlanLayer, ...]]:
        if (
            record.options.merges_per_round > 1
        ):  # places are those of a round's beginning, and rounds are not told apart
            return ()
        variants, stacks = (
            {variant.label: variant for variant in record.options.variants},
            list[tuple[PlanLayer, ...]](),
        )
        for decision in record.decisions:
            if decision.accepted and decision.merged:
                variant = variants[decision.rule] if decision.rule else record.options.variants[0]
                layers = collapse(layers, decision.l - 1, 1, variant.rule, variant.scale)
                stacks.append(layers)
        return stacks

    def rounds(self, space: SearchSpace, room: int, has_scout: bool) -> list[Round]:
        """Merges are taken here and there; what has been measured of real models says how many are scored for each."""
        options, state, rounds = space.options, GreedyState.start(space), list[Round]()
        lazy = EFFORTS[options.effort].lazy and options.merges_per_round == 1
        fewest = space.num_layers - layers_to_go(space)
        while state.candidates and len(state.layers) > fewest:
            count = len(state.candidates)
            if not lazy or (not rounds and not has_scout):
                new = swept(state.candidates, room)
            else:
                some = min(max(round(SCORED * count), LOOK), count)
                new = swept([state.candidates[i * count // some] for i in range(some)], LOOK)
                if not rounds:
                    new += swept(state.candidates, room, by_scout=True)
            here = _halfway(len(rounds) + 1) * count
            near = [1.0 / (1.0 + abs(place - here)) for place in range(count)]
            stacks = [stack for _, stack in state.best_disjoint(near, options.merges_per_round)]
            if len(stacks) > 1:
                new += swept(stacks[1:], room)
            rounds.append(new)
            state = state.after(stacks[-1])
        return rounds

    def run(self, context: SearchContext) -> SearchResult:
        options, decisions = context.space.options, list[Decision]()
        threshold = None if options.has_target else options.threshold
        state, queue = GreedyState.start(context.space), LazyQueue()
        lazy = EFFORTS[options.effort].lazy and options.merges_per_round == 1
        most, number = context.space.num_layers - len(fewest_layers(self, context.space)), 0
        while state.candidates:
            number += 1
            scout = context.evaluator.scout if lazy and number == 1 else None
            context.run.listener(RoundStarted(number, most, len(state.candidates) * (1 if scout is None else 2)))
            if scout is not None:
                queue.scout(scout, state)
            evaluations = (
                queue.scores(context.evaluator, state)
                if lazy
                else context.evaluator.scores(state.candidates, state.layers)
            )
            together = state.best_disjoint([one.similarity for one in evaluations], options.merges_per_round)
            if not together:
                first, why = state.candidates[0], evaluations[0].reason
                decision = Decision(first.pointer, first.merged, None, False, why)
                context.record(decision, len(decisions), state.layers)
                return SearchResult(options, state.layers, [*decisions, decision])
            stacks = [stack for _, stack in together]
            joint = [one.similarity for one in context.evaluator.scores(stacks, state.layers)]
            refused = None if context.limit is None else context.limit.refuses(stacks[-1].layers)
            if refused is not None:
                last = Decision(together[0][0].pointer, 1, None, False, refused)
                context.record(last, len(decisions), state.layers)
                return SearchResult(options, state.layers, [*decisions, last])
            good = [s is not None and (threshold is None or s > threshold) for s in joint]
            taken = good.index(False) if False in good else len(good)
            told = together[:taken] or together[:1]
            for (candidate, stack), similarity in zip(told, joint, strict=False):
                rule, tried = competition(candidate, state.candidates, evaluations, options)
                decision = Decision(candidate.pointer, candidate.merged, similarity, taken > 0, None, rule, tried)
                context.record(decision, len(decisions), stack.layers if taken else state.layers)
                decisions.append(decision)
            state = state.after(together[taken - 1][1] if taken else None)
        return SearchResult(options, state.layers, decisions)


STRATEGY = Greedy()


def _halfway(number: int) -> float:
    """1/2, 1/4, 3/4, 1/8, ...: places that spread evenly, however many there are (van der Corput's sequence)."""
    found, step = 0.0, 0.5
    while number:
        found, number, step = found + step * (number % 2), number // 2, step / 2
    return found


class LazyQueue:
    """What each merge cost when it was last scored, beyond what the stack then cost already.

    A merge seldom costs much less once others have been made, so in the next round only the head of the queue is scored
    again: until the best is better than what the next one would cost at ``FALL`` of its last cost (lazy greedy;
    M. Minoux, 1978, where costs never fall). Beside a gap costs fall more: there merges are always scored.
    """

    def __init__(self) -> None:
        self._costs: dict[tuple[int, int], float] = {}
        self._spent = 0.0

    def scout(self, scout: Evaluator, state: GreedyState) -> None:
        """Take what each merge of ``state`` costs by the ``scout`` for its last cost."""
        self._learn(state, self._costs_by(scout, state, state.candidates))

    def scores(self, evaluator: Evaluator, state: GreedyState) -> list[Evaluation]:
        """The evaluations of the candidates of ``state``; those that cannot be the best have no similarity."""
        expected = {c.position: self._expected(state, c.position) for c in state.candidates}
        queue = sorted(expected, key=lambda place: (expected[place], place))
        known: dict[int, float] = {}
        while queue and (not known or expected[queue[0]] < min(known.values())):
            new = [place for place in queue if expected[place] == -math.inf] or queue[:LOOK]
            queue = [place for place in queue if place not in new]
            known |= self._costs_by(evaluator, state, [c for c in state.candidates if c.position in new])
        self._learn(state, known)
        self._spent = min(known.values())
        nothing = Evaluation(None, "not scored in this round: it cost more before")
        return [(evaluator.known(c) or nothing) if c.position in known else nothing for c in state.candidates]

    def _costs_by(self, evaluator: Evaluator, state: GreedyState, some: Sequence[Candidate]) -> dict[int, float]:
        """What merging at each place costs by the best rule."""
        costs: dict[int, float] = {}
        for candidate, one in zip(some, evaluator.scores(some, state.layers), strict=True):
            costs[candidate.position] = min(loss(one.similarity), costs.get(candidate.position, math.inf))
        return costs

    def _learn(self, state: GreedyState, costs: dict[int, float]) -> None:
        self._costs |= {state.neighbours(place): cost - self._spent for place, cost in costs.items()}

    def _expected(self, state: GreedyState, place: int) -> float:
        """The least that a merge at ``place`` is expected to come to, in nats."""
        bases = [layer.base for layer in state.layers[max(place - 1, 0) : place + 3]]
        is_beside_a_gap = bases[-1] - bases[0] >= len(bases)
        last = self._costs.get(state.neighbours(place))
        return -math.inf if last is None or is_beside_a_gap else self._spent + FALL * last


@dataclass(frozen=True)
class GreedyState:
    """The stack so far; ``done`` once no candidate is worth taking."""

    options: SearchOptions
    target: Target
    layers: tuple[PlanLayer, ...]
    done: bool = False

    @classmethod
    def start(cls, space: SearchSpace) -> GreedyState:
        """The whole model."""
        return cls(space.options, space.target, original_layers(space.num_layers))

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """Every merge of two neighbours between ``lowest`` and ``highest`` by each of the rules that the target allows.

        Those that come to the same stack are one: dropping a layer is the same whichever neighbour stays.
        """
        if self.done:
            return ()
        assert self.options.highest is not None
        found: dict[tuple[LayerKey, ...], Candidate] = {}
        for position in range(len(self.layers) - 1):
            lower, upper = self.layers[position], self.layers[position + 1]
            if lower.base < self.options.lowest - 1 or max(upper.base, *upper.mix) >= self.options.highest:
                continue
            for variant in self.options.variants:
                layers = collapse(self.layers, position, 1, variant.rule, variant.scale)
                if self.target.is_set and not self.target.allows(layers):
                    continue
                key = tuple(layer.key for layer in layers)
                rules = (*found[key].rules, variant.label) if key in found else (variant.label,)
                found[key] = Candidate(position + 1, 1, layers, rules)
        return tuple(found.values())

    def best_disjoint(self, similarities: Sequence[float | None], most: int) -> list[tuple[Candidate, Candidate]]:
        """The most similar candidate, then with the next one that has no layer in common with those taken, and so on:
        at most ``most`` merges, as the target allows. Each merge comes with the stack that it and those before it make.

        ``similarities`` of the candidates, in order; those without one are skipped.
        """
        pairs = zip(self.candidates, similarities, strict=True)
        known = [(similarity, candidate) for candidate, similarity in pairs if similarity is not None]
        taken, stacks = list[Candidate](), list[tuple[Candidate, Candidate]]()
        for _, candidate in sorted(known, key=lambda pair: (-pair[0], self.candidates.index(pair[1]))):
            if any(abs(candidate.position - other.position) < 2 for other in taken):
                continue
            layers = self._merged([*taken, candidate])
            if len(taken) == most or (self.target.is_set and not self.target.allows(layers)):
                break
            taken.append(candidate)
            lowest = min(taken, key=lambda one: one.position)
            stacks.append((candidate, replace(lowest, layers=layers)))
        return stacks

    def neighbours(self, place: int) -> tuple[int, int]:
        """What tells a merge at ``place`` from others, whatever else goes: the source layers that are its bases, or the
        one that goes where it makes no difference which stays."""
        lower, upper = self.layers[place].base, self.layers[place + 1].base
        return (-1 if {variant.rule for variant in self.options.variants} == {"first"} else lower), upper

    def _merged(self, taken: Sequence[Candidate]) -> tuple[PlanLayer, ...]:
        layers = self.layers
        for candidate in sorted(taken, key=lambda candidate: -candidate.position):  # those above keep no place
            position = candidate.position
            layers = (*layers[:position], candidate.merged_layer, *layers[position + 2 :])
        return layers

    def after(self, accepted: Candidate | None) -> GreedyState:
        """The state after a round in which ``accepted`` was taken, or none was good enough."""
        return replace(self, done=True) if accepted is None else replace(self, layers=accepted.layers)
