"""The last step of a search: scales for the layers that stay (strategy/rescale.py)."""

from __future__ import annotations

from streamcollapse.jobs.finding import Found, Search
from streamcollapse.merge.plan import Decision
from streamcollapse.strategy.collapse import Candidate
from streamcollapse.strategy.rescale import RescaleState, scale


def rescaled(search: Search, found: Found) -> Found:
    """``found`` with the scales that make it most similar, and a decision for each layer that a round changes.

    A round takes two sweeps: every change alone, then those that help together.
    """
    evaluator, decisions = search.evaluator, list(found.decisions)
    whole = Candidate(len(found.layers), 0, found.layers, ())
    similarity = evaluator.scores([whole], found.layers)[0].similarity
    if similarity is None:
        return found
    state = RescaleState.start(found.layers, similarity, search.options)
    while True:
        alone = [one.similarity for one in evaluator.scores(state.candidates, state.layers)]
        together = state.together(alone)
        if not together:
            return Found(found.options, state.layers, decisions)
        joint = [one.similarity or -1.0 for one in evaluator.scores(together, state.layers)]
        best = max(range(len(joint)), key=lambda i: joint[i])
        after = state.after(together[best], joint[best])
        for position, steps in state.changes(after):
            decision = Decision(position + 1, 0, joint[best], True, None, f"scale {scale(steps):g}")
            search.keep(decision, len(decisions), after.layers)
            decisions.append(decision)
        state = after
