"""Greedy search without tensors: in each round every merge of two neighbouring layers is scored, and the best is taken.

As SLEB (Song et al., 2024) removes blocks one by one by perplexity; here with any of the merge rules, and judged by the
similarity that the search measures. A round is one upward pass over the weights: candidates above what has been merged
share the way up to there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from streamcollapse.merge.plan import LayerKey, PlanLayer, collapse, original_layers
from streamcollapse.strategy.collapse import Candidate, CollapseOptions
from streamcollapse.strategy.target import Target


@dataclass(frozen=True)
class GreedyState:
    """The stack so far; ``done`` once no candidate is worth taking."""

    options: CollapseOptions
    target: Target
    layers: tuple[PlanLayer, ...]
    done: bool = False

    @classmethod
    def start(cls, num_layers: int, options: CollapseOptions, target: Target) -> GreedyState:
        """The whole model."""
        return cls(options.for_model(num_layers), target, original_layers(num_layers))

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

    def together(self, similarities: Sequence[float | None], most: int) -> list[tuple[Candidate, Candidate]]:
        """The most similar candidate, then with the next one that has no layer in common with those taken, and so on:
        at most ``most`` merges, as the target allows. Each merge comes with the stack that it and those before it make.

        ``similarities`` of the candidates, in order; those without one are passed over.
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

    def _merged(self, taken: Sequence[Candidate]) -> tuple[PlanLayer, ...]:
        layers = self.layers
        for candidate in sorted(taken, key=lambda candidate: -candidate.position):  # those above keep no place
            position = candidate.position
            layers = (*layers[:position], candidate.merged_layer, *layers[position + 2 :])
        return layers

    def after(self, accepted: Candidate | None) -> GreedyState:
        """The state after a round in which ``accepted`` was taken, or none was good enough."""
        return replace(self, done=True) if accepted is None else replace(self, layers=accepted.layers)
