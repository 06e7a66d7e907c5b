"""What a pass reads: each tensor once, in order, in pieces that fit, for as long as it is needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamcollapse.stream.weights import Chunk, most_held, plan_chunks

SIZES = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 50}


def test_chunks_by_hand() -> None:
    chunks = plan_chunks([["a", "b", "c"], ["d", "a"], ["e", "d"]], SIZES.__getitem__, 4)
    # b and c end with step 0, but do not fit together; a is needed until step 1; e is larger than any unit
    assert chunks == [
        Chunk(("b",), 0, 0),
        Chunk(("c",), 0, 0),
        Chunk(("a",), 0, 1),
        Chunk(("d",), 1, 2),
        Chunk(("e",), 2, 2),
    ]
    assert most_held(chunks) == 3


def test_what_stays_is_read_at_its_first_use_and_takes_no_slot() -> None:
    chunks = plan_chunks([["a", "b"], ["a", "c"]], SIZES.__getitem__, 100, keep={"a"})
    assert chunks == [Chunk(("b",), 0, 0), Chunk(("a",), 0, 0, stay=True), Chunk(("c",), 1, 1)]
    assert most_held(chunks) == 1


@given(
    steps=st.lists(st.lists(st.sampled_from(sorted(SIZES)), max_size=6), max_size=8),
    capacity=st.integers(1, 60),
    keep=st.sets(st.sampled_from(sorted(SIZES))),
)
def test_every_tensor_is_in_one_unit_that_is_there_when_it_is_needed(
    steps: list[list[str]], capacity: int, keep: set[str]
) -> None:
    chunks = plan_chunks(steps, SIZES.__getitem__, capacity, keep)
    where = {name: unit for unit in chunks for name in unit.names}
    assert sorted(where) == sorted({name for names in steps for name in names})
    assert sum(len(unit.names) for unit in chunks) == len(where)
    assert [unit.first for unit in chunks] == sorted(unit.first for unit in chunks)
    for unit in chunks:
        assert len(unit.names) == 1 or sum(SIZES[name] for name in unit.names) <= capacity
        assert unit.stay == all(name in keep for name in unit.names) == any(name in keep for name in unit.names)
    for number, names in enumerate(steps):
        for name in names:
            assert where[name].first <= number
            assert where[name].stay or number <= where[name].last
    held = [sum(u.first <= n <= u.last for u in chunks if not u.stay) for n in range(len(steps))]
    assert most_held(chunks) == max(held, default=0)
