"""A sweep: the order of its visits, what it reads, and that company changes no bit of a similarity."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcollapse.forward.batches import make_batches
from streamcollapse.forward.measure import make_measure, sweep
from streamcollapse.forward.reference import reference_pass
from streamcollapse.forward.walk import PathStep, Stack, Visit, last_source, schedule
from streamcollapse.merge.plan import PlanLayer, collapse, original_layers
from streamcollapse.merge.rules import RULES
from streamcollapse.run.opened import open_job
from streamcollapse.settings.run import Compute, RunSettings
from streamcollapse.storage.source import ObservedSource
from tests.forward.test_reference import random_samples
from tests.streams import plain_stream


def test_visits_by_hand() -> None:
    # Five layers. A merges 3 and 4 into 2 (0-based), B merges 2 into 1. Above, A has nothing of its own left but the
    # merged layer; B goes through 3 and 4.
    a = Stack(collapse(original_layers(5), 2, 2, "mean", 1.0), 2)
    b = Stack(collapse(original_layers(5), 1, 1, "sequential", 1.0), 1)
    visits = schedule([a, b])
    assert [(v.layer.base, v.last_source, v.steps) for v in visits] == [
        (1, 2, (PathStep(1, None, 1, 1, ()),)),
        (3, 3, (PathStep(2, 1, 1, 1, ()),)),
        (2, 4, (PathStep(0, None, 2, 0, (0,)),)),
        (4, 4, (PathStep(3, 2, 1, 0, (1,)),)),
    ]


def test_candidates_that_came_the_same_way_share_it() -> None:
    """As in a round that tries every merge above one that has been accepted."""
    accepted = collapse(original_layers(8), 1, 1, "mean", 1.0)
    stacks = [Stack(collapse(accepted, p, 1, "sequential", 1.0), 1) for p in (3, 4, 5)]
    visits = schedule(stacks)
    runs = {v.layer.base: len(v.steps) for v in visits if v.layer.untouched}
    assert runs == {3: 1, 4: 1, 5: 1, 6: 1, 7: 2}, "3 and 4 run for those that differ above only, 6 and 7 for one each"
    assert len(next(v for v in visits if v.layer.base == 1).steps) == 1
    assert sorted(n for v in visits for p in v.steps for n in p.finished) == [0, 1, 2]


def test_shared_layers_are_visited_once() -> None:
    stacks = [Stack(collapse(original_layers(8), p, 1, "mean", 1.0), p) for p in (2, 3, 4)]
    visits = schedule(stacks)
    assert Counter(v.layer.base for v in visits)[7] == 1
    assert _candidates(visits, original_layers(8)[7]) == [0, 1, 2]
    assert _candidates(visits, PlanLayer(5, {5: 1.0})) == [0, 1]


def _candidates(visits: list[Visit], layer: PlanLayer) -> list[int]:
    """Whose hidden states pass through ``layer``."""
    entering = {p.number: p.entering for v in visits for p in v.steps}
    through = {p.number for v in visits if v.layer == layer for p in v.steps}
    found = []
    for passage in (p for v in visits for p in v.steps if p.finished):
        way: int | None = passage.number
        while way is not None and way not in through:
            way = entering[way]
        found += [] if way is None else list(passage.finished)
    return sorted(found)


@given(data=st.data(), num_layers=st.integers(3, 12), rule=st.sampled_from(sorted(RULES)))
def test_every_candidate_walks_its_own_stack_in_order(data: st.DataObject, num_layers: int, rule: str) -> None:
    stacks = []
    for _ in range(data.draw(st.integers(1, 5))):
        layers, position = original_layers(num_layers), num_layers
        while position > 0 and data.draw(st.booleans()):
            position = data.draw(st.integers(0, position - 1))
            if position + 1 < len(layers):
                followers = data.draw(st.integers(1, len(layers) - position - 1))
                layers = collapse(layers, position, followers, rule, 1.0)
        stacks.append(Stack(layers, min(position, len(layers))))
    visits = schedule(stacks)
    assert [v.last_source for v in visits] == sorted(v.last_source for v in visits)
    assert len({repr(v.layer) for v in visits}) == len(visits)
    for number, stack in enumerate(stacks):
        walked = [v.layer for v in visits if number in _candidates(visits, v.layer)]
        assert walked == list(stack.layers[stack.position :])
        assert all(last_source(layer) < num_layers for layer in walked)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rule", "metric"), [*zip(sorted(RULES), ("kl", "nll", "cka-kernel", "cosine"), strict=True)])
def test_company_changes_no_bit_and_each_tensor_is_read_once(
    llama_bf16: Path, rule: str, metric: str, dtype: str
) -> None:
    job = open_job(llama_bf16, RunSettings(Compute("cpu", dtype)))
    batches = make_batches(random_samples(), max_tokens=40)
    assert len(batches) > 1
    reference = reference_pass(job.model(plain_stream(job)), batches, range(8))
    whole = original_layers(8)
    once = collapse(whole, 5, 2, rule, 1.0)
    stacks = [
        Stack(once, 5),
        Stack(collapse(once, 4, 1, rule, 1.0), 4),
        Stack(collapse(once, 3, 2, rule, 1.0), 3),
        Stack(collapse(whole, 4, 2, rule, 1.0), 4),
        Stack(collapse(whole, 0, 7, rule, 1.0), 0),
        Stack(collapse(collapse(whole, 1, 1, rule, 1.0), 3, 1, rule, 1.0), 1),
        Stack(collapse(collapse(whole, 1, 1, rule, 1.0), 4, 2, rule, 1.0), 1),
        Stack(collapse(collapse(whole, 1, 1, rule, 1.0), 4, 2, rule, 1.0), 1),
    ]
    reads: Counter[str] = Counter()
    source = ObservedSource(job.checkpoint, lambda name, size: reads.update([name]))
    model = job.model(plain_stream(job, source))
    measure = make_measure(metric, model, reference, job.vocabulary)
    together = sweep(model, stacks, False, reference, measure)
    assert all(count == 1 for count in reads.values()), "a tensor was read twice"
    apart = [sweep(model, [s], False, reference, measure)[0] for s in stacks]
    assert together == apart
    assert len(set(together)) > 3
    backwards = sweep(model, stacks[::-1], False, reference, measure)
    assert backwards[::-1] == together
