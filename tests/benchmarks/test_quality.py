"""The verdict of quality.py, on rows made up for it."""

from __future__ import annotations

from typing import Any

import pytest

RECOMMENDED = {"strategy": "greedy", "rule": "first", "metric": "kl", "rescale": False, "merges_per_round": 1}


def row(rise: float, layers: int = 6, **changes: Any) -> dict[str, Any]:
    plain = {"strategy": "laco", "rule": "sequential", "metric": "cosine", "rescale": False, "merges_per_round": 1}
    place = {
        "samples": "sentences",
        "repair": "none",
        "C": 2,
        "I": 1,
        "threshold": 0.5,
        "wanted_layers": layers,
        "layers": layers,
    }
    return {**plain, **place, "rise": rise, **changes}


@pytest.mark.parametrize(
    ("ours", "laco", "block_influence", "met"),
    [(0.069, 0.10, 0.2, True), (0.071, 0.10, 0.2, False), (0.05, 0.10, 0.04, False), (0.05, 0.10, 0.05, True)],
)
def test_the_bar(ours: float, laco: float, block_influence: float, met: bool) -> None:
    from quality import judged

    rows = [
        row(ours, samples="passages", repair="auto", **RECOMMENDED),
        row(0.01, samples="sentences", repair="auto", **RECOMMENDED),  # not what is recommended
        row(0.01, samples="passages", **RECOMMENDED),  # nor that
        row(laco, samples="passages"),
        row(laco + 0.1),  # another C, I or T
        row(0.01, layers=7),
        row(0.01, rescale=True),  # not the paper's
        row(0.01, rule="mean"),
        row(block_influence, strategy="block-influence", metric=None, rule="first"),
        row(1.0, strategy="angular", metric=None, rule="first"),
    ]
    quarter, half = judged(rows, 8)
    assert quarter["met"] is met
    assert quarter["of_laco"] == pytest.approx(ours / laco)
    assert half["met"] is None, "nothing was measured there"


def test_a_number_of_layers_that_was_not_reached_is_told() -> None:
    from quality import _cell

    assert _cell([row(0.5), row(0.4)], 6) == "0.4000"
    assert _cell([row(0.5, layers=7, wanted_layers=6)], 6) == "0.5000 (7)"
    assert _cell([row(0.5)], 4) == "-"
