"""What a pass reads: each tensor once, in order, in pieces that fit, for as long as it is needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamcollapse.stream.chunks import Unit, most_held, plan_chunks

SIZES = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 50}


def test_units_by_hand() -> None:
    units = plan_chunks([["a", "b", "c"], ["d", "a"], ["e", "d"]], SIZES.__getitem__, 4)
    # b and c end with step 0, but do not fit together; a is needed until step 1; e is larger than any unit
    assert units == [Unit(("b",), 0, 0), Unit(("c",), 0, 0), Unit(("a",), 0, 1), Unit(("d",), 1, 2), Unit(("e",), 2, 2)]
    assert most_held(units) == 3


def test_what_stays_is_read_at_its_first_use_and_takes_no_slot() -> None:
    units = plan_chunks([["a", "b"], ["a", "c"]], SIZES.__getitem__, 100, keep={"a"})
    assert units == [Unit(("b",), 0, 0), Unit(("a",), 0, 0, stay=True), Unit(("c",), 1, 1)]
    assert most_held(units) == 1


@given(
    steps=st.lists(st.lists(st.sampled_from(sorted(SIZES)), max_size=6), max_size=8),
    capacity=st.integers(1, 60),
    keep=st.sets(st.sampled_from(sorted(SIZES))),
)
def test_every_tensor_is_in_one_unit_that_is_there_when_it_is_needed(
    steps: list[list[str]], capacity: int, keep: set[str]
) -> None:
    units = plan_chunks(steps, SIZES.__getitem__, capacity, keep)
    where = {name: unit for unit in units for name in unit.names}
    assert sorted(where) == sorted({name for names in steps for name in names})
    assert sum(len(unit.names) for unit in units) == len(where)
    assert [unit.first for unit in units] == sorted(unit.first for unit in units)
    for unit in units:
        assert len(unit.names) == 1 or sum(SIZES[name] for name in unit.names) <= capacity
        assert unit.stay == all(name in keep for name in unit.names) == any(name in keep for name in unit.names)
    for number, names in enumerate(steps):
        for name in names:
            assert where[name].first <= number
            assert where[name].stay or number <= where[name].last
    held = [sum(u.first <= n <= u.last for u in units if not u.stay) for n in range(len(steps))]
    assert most_held(units) == max(held, default=0)
