"""Looking ahead: which states are chosen, and that what is known costs nothing."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from streamcollapse.merge.plan import stack_key
from streamcollapse.merge.record import Decision
from streamcollapse.searches.algorithm1 import SearchState
from streamcollapse.searches.lookahead import AcceptModel, Depth, Outcome, likely_states
from tests.methods import method

OPTIONS = method(layers_per_merge=3, interval=1)


def _odds(outcomes: str) -> AcceptModel:
    return AcceptModel(0.65, [Decision(10, 2, None, outcome == "A") for outcome in outcomes])


def _unknown(state: SearchState) -> Outcome | None:
    return None


def test_a_walk_of_rejections_when_rejections_are_likely() -> None:
    state = SearchState.start(30, OPTIONS)
    states = likely_states(state, _odds("R" * 20), Depth(6), _unknown)
    assert states[0] is state
    assert [s.pointer for s in states] == [27, 26, 25, 24, 23, 22]
    assert all(s.layers == state.layers for s in states)


def test_a_walk_of_accepts_when_accepts_are_likely() -> None:
    states = likely_states(SearchState.start(30, OPTIONS), _odds("A" * 20), Depth(4), _unknown)
    assert [len(s.layers) for s in states] == [30, 28, 26, 25], "K = 2, 2, 1"


def test_known_states_are_passed_through_and_cost_nothing() -> None:
    root = SearchState.start(30, OPTIONS)

    def known(state: SearchState) -> Outcome | None:
        return (None,) if state.layers == root.layers and state.pointer > 20 else None

    states = likely_states(root, AcceptModel(0.65), Depth(3), known)
    assert states[0].pointer == 20
    assert states[0].layers == root.layers
    assert all(s.pointer <= 20 for s in states)


def test_nothing_to_choose_where_everything_is_known() -> None:
    root = SearchState.start(10, OPTIONS)
    assert likely_states(root, AcceptModel(0.65), Depth(5), lambda state: (None,)) == []


@settings(deadline=None)
@given(num_layers=st.integers(4, 24), nodes=st.integers(1, 20), history=st.text("AR", max_size=6), c=st.integers(2, 5))
def test_each_state_follows_from_one_before_it(num_layers: int, nodes: int, history: str, c: int) -> None:
    root = SearchState.start(num_layers, method(layers_per_merge=c, interval=1))
    odds = _odds(history)
    states = likely_states(root, odds, Depth(nodes), _unknown)
    assert states == likely_states(root, odds, Depth(nodes), _unknown), "reproducible"
    if root.candidate() is None:
        assert states == []
        return
    assert states[0] == root
    assert len(states) <= nodes
    candidates = [candidate for state in states if (candidate := state.candidate()) is not None]
    assert len(candidates) == len(states) == len({stack_key(candidate.layers) for candidate in candidates})
    assert all(state.pointer < root.pointer for state in states[1:])


def test_looking_ahead_stops_where_it_does_not_pay() -> None:
    root, odds = SearchState.start(60, OPTIONS), _odds("R" * 20)
    counts = [len(likely_states(root, odds, Depth(64, ratio), _unknown)) for ratio in (0.0, 0.05, 1.0, 20.0)]
    assert counts[0] == 1, "reading costs nothing: no speculation"
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    assert len(likely_states(root, odds, Depth(3, 1e9), _unknown)) == 3
    even = Depth(64, 2.0)
    assert even.pays(0.5, 1.0, 2)
    assert not even.pays(0.5, 2.0, 2)
    assert even.pays(0.01, 5.0, 1), "computed while the next layer is being read"


def test_no_more_is_read_than_pays() -> None:
    def reach(pointer: int) -> int:
        root = replace(SearchState.start(60, OPTIONS), pointer=pointer)
        states = likely_states(root, _odds("R" * 12), Depth(30), _unknown)
        return pointer - min(state.pointer for state in states)

    assert reach(57) < reach(45) < reach(32), "a sweep that reads much anyway reads on for less"


def test_a_candidate_that_needs_nothing_more_comes_before_one_that_does() -> None:
    root = SearchState.start(40, method(layers_per_merge=8, interval=1))
    states = likely_states(root, _odds("AR" * 10 + "AARR" * 3), Depth(12), _unknown)
    needed = [set[int]().union(*(x.mix for x in c.layers[c.position :])) for s in states if (c := s.candidate())]
    assert states[0] is root
    assert len(set().union(*needed)) < 12, "layers of a sweep are fewer than its candidates"
