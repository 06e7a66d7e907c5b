"""Rules against closed forms, and what holds for every group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamcollapse.merge.mixing import mix_tensors
from streamcollapse.merge.plan import PlanLayer, collapse, original_layers
from streamcollapse.merge.rules import RULES, Mix


def _singles(*layers: int) -> list[Mix]:
    return [{layer: 1.0} for layer in layers]


@pytest.mark.parametrize(
    ("rule", "scale", "expected"),
    [
        ("rdsc", 1.0, {21: -2.0, 22: 1.0, 23: 1.0, 24: 1.0}),  # Eq. (1) with m = 3: b + 3 k's - 3 b
        ("rdsc", 0.5, {21: -0.5, 22: 0.5, 23: 0.5, 24: 0.5}),
        ("rdsc", 0.25, {21: 0.25, 22: 0.25, 23: 0.25, 24: 0.25}),
        ("sequential", 1.0, {24: 1.0}),
        ("mean", 1.0, {21: 0.25, 22: 0.25, 23: 0.25, 24: 0.25}),
        ("first", 1.0, {21: 1.0}),
    ],
)
def test_closed_forms(rule: str, scale: float, expected: dict[int, float]) -> None:
    assert RULES[rule](_singles(21, 22, 23, 24), scale) == expected


def test_eq_1_with_one_follower_is_the_follower() -> None:
    assert RULES["rdsc"](_singles(3, 4), 1.0) == {4: 1.0}


def test_a_merge_of_merged_layers_is_a_mix_of_source_layers() -> None:
    once = collapse(original_layers(6), 2, 2, "rdsc", 1.0)
    assert once[2] == PlanLayer(2, {2: -1.0, 3: 1.0, 4: 1.0})
    twice = collapse(once, 1, 2, "rdsc", 1.0)  # 1 + (2' - 1) + (5 - 1), with 2' = -2 + 3 + 4
    assert twice == (PlanLayer(0, {0: 1.0}), PlanLayer(1, {1: -1.0, 2: -1.0, 3: 1.0, 4: 1.0, 5: 1.0}))
    assert not twice[1].untouched
    assert twice[0].untouched


def test_the_released_codes_loop_telescopes_to_sequential() -> None:
    g = torch.Generator().manual_seed(0)
    layers = [torch.randn(3, generator=g, dtype=torch.float64) for _ in range(4)]
    base = layers[0].clone()
    for k in layers[1:]:
        base += k - base
    assert torch.allclose(base, layers[3], rtol=0, atol=1e-15)


@pytest.mark.parametrize("rule", RULES)
@given(size=st.integers(2, 8), scale=st.floats(0.01, 2.0), value=st.floats(-100, 100, width=16))
def test_equal_layers_merge_to_themselves(rule: str, size: int, scale: float, value: float) -> None:
    mix = RULES[rule](_singles(*range(size)), scale if rule == "rdsc" else 1.0)
    assert sum(mix.values()) == pytest.approx(1.0, abs=1e-12)
    layer = torch.tensor([value, 1.0, -3.5]).bfloat16()
    merged = mix_tensors([(mix[s], layer) for s in sorted(mix)], torch.bfloat16)
    assert torch.equal(merged, layer)


@pytest.mark.parametrize("rule", RULES)
@given(data=st.data())
def test_rules_are_linear_and_have_no_zero_coefficients(rule: str, data: st.DataObject) -> None:
    coefficient = st.sampled_from([-2.0, -1.0, 0.5, 1.0, 3.0])
    mixes = data.draw(st.lists(st.dictionaries(st.integers(0, 5), coefficient, min_size=1), min_size=2, max_size=5))
    merged = RULES[rule](mixes, 1.0)
    values = {layer: 1.7**layer for layer in range(6)}  # a "layer" is a number here
    numbers = [sum(c * values[s] for s, c in mix.items()) for mix in mixes]
    expected = {
        "rdsc": numbers[0] + sum(k - numbers[0] for k in numbers[1:]),
        "sequential": numbers[-1],
        "mean": sum(numbers) / len(numbers),
        "first": numbers[0],
    }[rule]
    assert sum(c * values[s] for s, c in merged.items()) == pytest.approx(expected)
    assert all(merged.values())
    assert list(merged) == sorted(merged) or rule in ("sequential", "first")
