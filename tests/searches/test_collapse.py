"""Algorithm 1: tables worked by hand, and a second transcription of the paper's pseudocode under random outcomes."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from streamcollapse.errors import OptionError
from streamcollapse.merge.plan import PlanLayer
from streamcollapse.searches.algorithm1 import SearchState, after_merge, most_candidates
from streamcollapse.settings.search import SearchOptions
from tests.methods import method


def _run(num_layers: int, options: SearchOptions, outcomes: str) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """(l, K) of each candidate under ``outcomes`` (A accept, R reject), and the source layers each cell covers."""
    state = SearchState.start(num_layers, options)
    tried = []
    for outcome in outcomes:
        candidate = state.candidate()
        assert candidate is not None
        tried.append((candidate.pointer, candidate.merged))
        state = state.after(state.candidate() if outcome == "A" else None)
    assert state.candidate() is None
    ends = [layer.base for layer in state.layers[1:]] + [num_layers]
    return tried, [list(range(layer.base + 1, end + 1)) for layer, end in zip(state.layers, ends, strict=True)]


def test_a_search_is_greedy_unless_the_paper_s_letters_are_given() -> None:
    plain = method()
    assert (plain.strategy, plain.rule, plain.metric, plain.rescale) == ("greedy", "first", "kl", False)
    for paper in (method(4), method(interval=2), method(strategy="laco")):
        assert paper == method(4, 2, rule="sequential", strategy="laco", metric="cosine", rescale=False)
    assert method(4, strategy="greedy") == plain, "a strategy that is named stays"
    assert method(rescale=False).rescale is False
    assert method(4, rescale=True).rescale is True


def test_worked_by_hand_eight_layers() -> None:
    # C=3, I=2. l = 8-3 = 5: merges 6,7 into 5, accepted; 6 layers left, l = 3.
    # l = 3: merges 4 and the cell 5-7, rejected; l = 2: merges 3,4 into 2, accepted; l = 0 < L: done.
    options = method(layers_per_merge=3, interval=2)
    tried, cells = _run(8, options, "ARA")
    assert tried == [(5, 2), (3, 2), (2, 2)]
    assert cells == [[1], [2, 3, 4], [5, 6, 7], [8]]


def test_worked_by_hand_where_fewer_layers_lie_above() -> None:
    # C=4, I=1, ten layers. l=6: K=3, accepted, 7 left; l=5: 2 lie above, K=2, accepted, 5 left; l=4: K=1, rejected;
    # l=3: K=2, accepted, 3 left; l=2: K=1, rejected; l=1: K=2, rejected.
    options = method(layers_per_merge=4, interval=1)
    tried, cells = _run(10, options, "AARARR")
    assert tried == [(6, 3), (5, 2), (4, 1), (3, 2), (2, 1), (1, 2)]
    assert cells == [[1], [2], [3, 4, 5, 6, 7, 8, 9, 10]]


def test_the_range_limits_the_pointer() -> None:
    # L=3, H=7, C=2: l starts at 5 and stops below 3; the layers above H are merged only as followers.
    options = method(layers_per_merge=2, interval=1, lowest=3, highest=7)
    assert _run(10, options, "RRR")[0] == [(5, 1), (4, 1), (3, 1)]


def test_the_first_pointer_may_already_be_below_the_range() -> None:
    assert _run(4, method(layers_per_merge=4), "")[1] == [[1], [2], [3], [4]]
    assert most_candidates(4, method(layers_per_merge=4)) == 0


def test_the_paper_s_table_8_starts() -> None:
    assert SearchState.start(32, method()).pointer == 28
    assert SearchState.start(40, method(layers_per_merge=6)).pointer == 34


def test_a_pointer_above_the_top_is_reset() -> None:
    # No sequence of outcomes leads there, so the lines are tested by themselves.
    options = method(layers_per_merge=2, interval=3)
    assert after_merge(9, 5, options) == 3  # 9 - 3 = 6 > 5 layers: 5 - C
    assert after_merge(8, 5, options) == 5  # 8 - 3 = 5, not above
    assert after_merge(4, 5, options) == 1


options_strategy = st.builds(
    SearchOptions,
    layers_per_merge=st.integers(2, 9),
    interval=st.integers(1, 5),
    lowest=st.integers(1, 6),
    rule=st.sampled_from(["rdsc", "sequential", "mean", "first"]),
)


@given(
    num_layers=st.integers(1, 40), options=options_strategy, outcomes=st.lists(st.booleans(), min_size=40, max_size=40)
)
def test_against_the_pseudocode(num_layers: int, options: SearchOptions, outcomes: list[bool]) -> None:
    assume(options.lowest <= num_layers)
    state = SearchState.start(num_layers, options)
    # The paper's lines, on a list of lists of 1-based layers.
    model = [[i] for i in range(1, num_layers + 1)]
    l = num_layers - options.layers_per_merge  # noqa: E741
    step = 0
    while l >= options.lowest:
        k = min(options.layers_per_merge - 1, len(model) - l)
        candidate = state.candidate()
        assert candidate is not None
        assert (candidate.pointer, candidate.merged) == (l, k)
        assert k >= 1, "a merge always has a follower, so the pointer never passes the top"
        accepted = outcomes[step]
        if accepted:
            model = [*model[: l - 1], list(chain(*model[l - 1 : l + k])), *model[l + k :]]
            l -= options.interval  # noqa: E741
        else:
            l -= 1  # noqa: E741
        state = state.after(state.candidate() if accepted else None)
        step += 1
    assert state.candidate() is None
    assert step <= most_candidates(num_layers, options)
    assert [layer.base + 1 for layer in state.layers] == [group[0] for group in model]
    for layer, group in zip(state.layers, model, strict=True):
        assert set(layer.mix) <= {i - 1 for i in group}


def test_states_are_not_changed_by_looking_ahead() -> None:
    state = SearchState.start(12, method())
    state.after(state.candidate()).after(None)
    assert state == SearchState.start(12, method())
    assert state.after(None).layers == state.layers
    assert state.layers[0] == PlanLayer(0, {0: 1.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_merge": 1}, r"\(C\) is 1; it must be greater than or equal to 2"),
        ({"interval": 0}, r"\(I\) is 0; it must be greater than or equal to 1"),
        ({"lowest": 0}, r"\(L\) is 0; it must be greater than or equal to 1"),
        ({"lowest": 9, "highest": 8}, r"\(L\) is 9, above highest \(H\), 8"),
        ({"threshold": 1.01}, r"\(T\) is 1.01; similarity by kl lies between -1 and 1"),
        ({"threshold": float("nan")}, r"\(T\) is nan"),
        ({"interval": 1.5}, r"interval \(I\) is 1.5; it must be a valid integer"),
        ({"highest": "8"}, r"highest \(H\) is '8'; it must be a valid integer"),
        ({"merge_norms": "no"}, "merge norms is 'no'"),
        ({"rule": "bset"}, "rule 'bset' is unknown; did you mean best. choose one of rdsc, sequential, mean, first"),
        ({"rule": "rdsc", "rdsc_scale": 0.0}, "rdsc scale is 0.0"),
        ({"rule": "rdsc", "rdsc_scale": (0.5, 0.5)}, "names a number twice"),
        ({"rule": "mean,mean"}, "names a rule twice"),
        ({"rule": "mean,"}, "rule '' is unknown"),
        ({"rule": 3}, "rule is 3; it must be a valid string"),
        ({"rule": "rdsc", "rdsc_scale": "one"}, "rdsc scale is 'one', not a number"),
        ({"rdsc_scale": 0.5}, "the rule is first; it applies to rdsc only"),
    ],
)
def test_settings_out_of_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        method(**changes)  # type: ignore[arg-type]


def test_a_range_beyond_the_model() -> None:
    with pytest.raises(OptionError, match=r"highest \(H\) is 33, but the model has 32 layers"):
        SearchState.start(32, method(highest=33))
    with pytest.raises(OptionError, match=r"lowest \(L\) is 33, above highest \(H\), 32"):
        SearchState.start(32, method(lowest=33))
