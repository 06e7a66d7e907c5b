"""Plans made by hand and of other plans, against layers put together in another way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcollapse.errors import PlanError
from streamcollapse.merge.composing import Group, compose, hand_made, parse_group, parse_layers
from streamcollapse.merge.plan import Plan, PlanLayer, collapse, original_layers
from streamcollapse.merge.rules import RULES


def test_published_lists_and_merges() -> None:
    assert parse_layers("21-29") == list(range(21, 30))
    assert parse_layers("3, 5,9-10") == [3, 5, 9, 10]
    assert parse_group("12-15:rdsc:0.25") == Group(12, 15, "rdsc", 0.25)
    layers = hand_made(32, parse_layers("21-29"), [parse_group("4-6:mean"), parse_group("8-9:sequential")])
    assert [layer.base for layer in layers] == [0, 1, 2, 3, 4, 7, 8, *range(10, 21), 30, 31]
    assert layers[4] == PlanLayer(4, {4: 1 / 3, 5: 1 / 3, 6: 1 / 3})
    assert layers[6] == PlanLayer(8, {9: 1.0})
    assert hand_made(3, [0], []) == original_layers(3)[1:]


@pytest.mark.parametrize(
    ("drop", "groups", "message"),
    [
        ("x", [], "layers 'x' are not numbers or ranges"),
        ("5-3", [], "give the lower one first"),
        ("-1", [], "are not numbers or ranges"),
        ("8", [], "layer 8 is dropped, but the source has layers 0 to 7"),
        ("1,1", [], "layer 1 is dropped and dropped"),
        ("2", ["1-3:mean"], "layer 2 is dropped and merged"),
        (None, ["1-3:mean", "3-4:mean"], "layer 3 is merged and merged"),
        (None, ["1-3:media"], "names no rule; give one of rdsc"),
        (None, ["1-3"], "names no rule"),
        (None, ["1:mean"], "takes a range of two layers or more"),
        (None, ["1-2,4-5:mean"], "takes a range of two layers or more"),
        (None, ["1-2:mean:2"], "only rdsc takes a scale"),
        (None, ["1-2:rdsc:nan"], "only rdsc takes a scale, a number"),
        ("0-7", [], "no layer is left"),
        ("0-999999999", [], "are no range"),
    ],
)
def test_what_cannot_be(drop: str | None, groups: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        hand_made(8, parse_layers(drop) if drop else [], [parse_group(text) for text in groups])


def _plan(layers: tuple[PlanLayer, ...], num_source_layers: int, norms: bool = False) -> Plan:
    return Plan("m", num_source_layers, "f", layers, norms)


@given(data=st.data())
def test_composing_is_doing_one_after_the_other(data: st.DataObject) -> None:
    """Layers as numbers: a mix is a sum, so both plans can be worked out by hand."""
    count = data.draw(st.integers(4, 9))

    def drawn(number: int) -> tuple[PlanLayer, ...]:
        layers = original_layers(number)
        for _ in range(data.draw(st.integers(0, 2))):
            if len(layers) > 2:
                position = data.draw(st.integers(0, len(layers) - 2))
                layers = collapse(layers, position, 1, data.draw(st.sampled_from(sorted(RULES))), 0.5)
        return layers

    values = [2.0**i for i in range(count)]
    first = _plan(drawn(count), count)
    second = _plan(drawn(first.num_layers), first.num_layers)
    middle = [sum(c * values[s] for s, c in layer.mix.items()) for layer in first.layers]
    expected = [sum(c * middle[s] for s, c in layer.mix.items()) for layer in second.layers]
    both = compose(first, second)
    found = [sum(c * values[s] for s, c in layer.mix.items()) for layer in both.layers]
    assert found == pytest.approx(expected)
    assert [layer.base for layer in both.layers] == [first.layers[layer.base].base for layer in second.layers]
    assert (both.num_source_layers, both.fingerprint) == (count, "f")
    assert Plan.from_json(both.to_json()) == both


def test_plans_that_do_not_belong_together() -> None:
    with pytest.raises(PlanError, match="the second plan is for a source of 8 layers, the first one leaves 5"):
        compose(_plan(original_layers(5), 5), _plan(original_layers(8), 8))
    mean, sequential = collapse(original_layers(5), 1, 1, "mean", 1.0), collapse(original_layers(4), 1, 1, "mean", 1.0)
    with pytest.raises(PlanError, match="norms follow the mix in one plan and the base in the other"):
        compose(_plan(mean, 5, norms=True), _plan(sequential, 4))
    dropped = _plan(original_layers(4)[:3], 4)
    assert compose(_plan(mean, 5, norms=True), dropped).merge_norms, "nothing is mixed in the second"
