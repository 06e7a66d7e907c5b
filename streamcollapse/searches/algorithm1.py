"""Algorithm 1 of the paper as a state machine without tensors: what to try next, and what follows from the outcome.

States are immutable, so both outcomes of a candidate can be looked at before either is known.
``l``, ``lowest`` (L) and ``highest`` (H) are 1-based, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from streamcollapse.merge.plan import LayerKey, PlanLayer, collapse, original_layers
from streamcollapse.searches.candidate import Candidate
from streamcollapse.settings.search import SearchOptions


@dataclass(frozen=True)
class SearchState:
    """The state of Algorithm 1 before line 3: the stack so far and the pointer l."""

    options: SearchOptions
    layers: tuple[PlanLayer, ...]
    pointer: int

    @classmethod
    def start(cls, num_layers: int, options: SearchOptions) -> SearchState:
        """Lines 1 and 2: the whole model, l = H - C."""
        fitted = options.for_model(num_layers)
        assert fitted.highest is not None
        return cls(fitted, original_layers(num_layers), fitted.highest - fitted.layers_per_merge)

    def candidate(self) -> Candidate | None:
        """Lines 3 to 5: the next merge to test, by the first of the rules, or None when l has passed L."""
        return next(iter(self.candidates), None)

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """The next merge by each of the rules; those that come to the same layer are one. Empty when l has passed L.

        Made once: looking ahead asks a state for them several times.
        """
        if self.pointer < self.options.lowest:
            return ()
        merged = min(self.options.layers_per_merge - 1, len(self.layers) - self.pointer)
        found: dict[LayerKey, Candidate] = {}
        for variant in self.options.variants:
            layers = collapse(self.layers, self.pointer - 1, merged, variant.rule, variant.scale)
            key = layers[self.pointer - 1].key
            rules = (*found[key].rules, variant.label) if key in found else (variant.label,)
            found[key] = Candidate(self.pointer, merged, layers, rules)
        return tuple(found.values())

    def after(self, accepted: Candidate | None) -> SearchState:
        """Lines 7 to 15: the state that follows when ``accepted`` of the candidates is, or none."""
        assert self.candidates, "the search has ended"
        if accepted is None:
            return replace(self, pointer=self.pointer - 1)
        pointer = after_merge(self.pointer, len(accepted.layers), self.options)
        return replace(self, layers=accepted.layers, pointer=pointer)


def after_merge(pointer: int, num_layers: int, options: SearchOptions) -> int:
    """Lines 9 to 12: the pointer after a merge at ``pointer`` that left ``num_layers`` layers.

    Starting at H - C with I >= 1, a merge always has a follower (K >= 1) and l - I never exceeds the layers left, so
    the reset of lines 10 and 11 does not occur; the paper has it, so it stays.
    """
    lowered = pointer - options.interval
    return num_layers - options.layers_per_merge if lowered > num_layers else lowered


def most_candidates(num_layers: int, options: SearchOptions) -> int:
    """An upper bound on the candidates of a search: one per value of the pointer, which only moves down."""
    return max(SearchState.start(num_layers, options).pointer - options.lowest + 1, 0)
