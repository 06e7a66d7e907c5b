"""Every size that a nested search passed: equal to a search that stops there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from streamcollapse import Plan, SearchOptions, search
from streamcollapse.errors import PlanError
from streamcollapse.searches.course import course, sized_plan
from streamcollapse.settings.run import Compute, RunSettings

SETTINGS = RunSettings(Compute("cpu", "float32"))
NESTED = {
    "greedy": SearchOptions(strategy="greedy", target_layers=3, effort="thorough"),
    "rules compete": SearchOptions(
        strategy="greedy", target_layers=3, rule="first,mean,rdsc", rdsc_scale=(0.5, 0.3), rescale=False
    ),
    "block-influence": SearchOptions(strategy="block-influence", target_layers=3, rescale=True, metric="kl"),
}


@pytest.mark.parametrize("options", NESTED.values(), ids=NESTED)
def test_a_plan_has_every_size_on_its_way(llama: Path, options: SearchOptions, tmp_path: Path) -> None:
    plan = search(llama, options, settings=SETTINGS)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert [len(layers) for layers in course(loaded)] == [8, 7, 6, 5, 4, 3]
    assert sized_plan(loaded, 3) is loaded
    for size in (6, 4):
        found = sized_plan(loaded, size)
        alone = search(llama, options.but(target_layers=size, rescale=False), settings=SETTINGS)
        assert found.layers == alone.layers
        assert found.search is not None
        assert found.search.options == alone.search.options  # type: ignore[union-attr]
        assert sum(decision.accepted for decision in found.search.decisions) == 8 - size
        found.save(tmp_path / "smaller.json")
        assert Plan.load(tmp_path / "smaller.json") == found


def test_sizes_that_are_not_on_the_way(llama: Path) -> None:
    plan = search(llama, NESTED["block-influence"], settings=SETTINGS)
    for size, why in ((2, "passed 3 to 7 layers, not 2; give one of these, or search again"), (8, "8 layers are all")):
        with pytest.raises(PlanError, match=why):
            sized_plan(plan, size)
    several = SearchOptions(strategy="greedy", target_layers=3, merges_per_round=2, rescale=False)
    for other in (search(llama, several, settings=SETTINGS), replace(plan, search=None)):
        assert course(other) == ()
        with pytest.raises(PlanError, match="is for 3 layers alone: its search passed no other sizes"):
            sized_plan(other, 4)
