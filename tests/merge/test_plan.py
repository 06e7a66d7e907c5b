from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcollapse.errors import OutputError, PlanError
from streamcollapse.merge.plan import Plan, PlanLayer
from streamcollapse.merge.record import Decision, SearchRecord
from streamcollapse.searches.registry import complete
from streamcollapse.settings.search import SearchOptions
from tests.methods import unchanged

RECORD = SearchRecord(
    complete(SearchOptions(4, 2, 1, 32, 0.65, "sequential", strategy="laco", metric="cosine", rescale=False)),
    calibration_sha256="c",
    compute_dtype="float32",
    decisions=(Decision(28, 3, 0.93, True), Decision(26, 2, None, False, "unlike shapes")),
)
PLAN = Plan("llama", 32, "f" * 64, (PlanLayer(0, {0: 1.0}), PlanLayer(21, {21: -2.0, 22: 1.0, 24: 1.0})), False, RECORD)


def test_the_document_is_the_documented_format() -> None:
    assert PLAN.to_json() == {
        "format": "streamcollapse.plan/1",
        "source": {"name": "llama", "num_hidden_layers": 32, "fingerprint": "f" * 64},
        "layers": [{"base": 0, "mix": {"0": 1.0}}, {"base": 21, "mix": {"21": -2.0, "22": 1.0, "24": 1.0}}],
        "merge_norms": False,
        "search": {
            "rule": "sequential",
            "rdsc_scale": 1.0,
            "layers_per_merge": 4,
            "lowest": 1,
            "highest": 32,
            "interval": 2,
            "threshold": 0.65,
            "calibration_sha256": "c",
            "compute_dtype": "float32",
            "decisions": [
                {"l": 28, "merged": 3, "similarity": 0.93, "accepted": True},
                {"l": 26, "merged": 2, "similarity": None, "accepted": False, "reason": "unlike shapes"},
            ],
        },
    }


def test_a_file_round_trip_changes_nothing(tmp_path: Path) -> None:
    for plan in (PLAN, unchanged("x/y", 3, "0")):
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
        assert json.loads((tmp_path / "plan.json").read_text()) == plan.to_json()


_layers = st.lists(
    st.builds(
        lambda base, mix: PlanLayer(base, dict(sorted(mix.items()))),
        st.integers(0, 31),
        st.dictionaries(st.integers(0, 31), st.floats(-1e6, 1e6).filter(bool), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda layer: layer.base,
).map(lambda layers: sorted(layers, key=lambda layer: layer.base))


@given(layers=_layers, name=st.text(), norms=st.booleans())
def test_any_plan_survives_json(layers: list[PlanLayer], name: str, norms: bool) -> None:
    plan = Plan(name, 32, "f", tuple(layers), norms)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert len({plan, again}) == 1, "plans can be members of sets"


def _edit(path: str, value: Any) -> Any:
    document = copy.deepcopy(PLAN.to_json())
    *parents, last = [int(p) if p.isdigit() and p != "0x" else p for p in path.split("/")]
    target: Any = document
    for parent in parents:
        target = target[parent]
    if value is KeyError:
        del target[last]
    else:
        target[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "streamcollapse.plan/2", "format is streamcollapse.plan/2, this version reads"),
        ("format", KeyError, "the plan: format is missing"),
        ("extra", 1, "the plan: extra is not known"),
        ("source", [], "source is not a JSON object"),
        ("source/num_hidden_layers", "32", "num_hidden_layers is 32, expected int"),
        ("source/num_hidden_layers", True, "expected int"),
        ("layers", [], "at least one"),
        ("layers/0/base", 32, r"layers\[0\]: source layer 32 is not among the 32"),
        ("layers/0/base", -1, r"layers\[0\]: source layer -1"),
        ("layers/1/mix", {}, r"layers\[1\]: mix is empty"),
        ("layers/1/mix", {"99": 1.0}, "source layer 99"),
        ("layers/1/mix", {"-1": 1.0}, "mix names -1"),
        ("layers/1/mix", {"01": 1.0}, "mix names 01"),
        ("layers/1/mix", {"²": 1.0}, "mix names ²"),
        ("layers/1/mix", {"1": float("nan")}, "not a number other than 0"),
        ("layers/1/mix", {"1": 0}, "other than 0"),
        ("layers/1/mix", {"1": 1e39}, "up to 1e6"),
        ("layers/1/mix", {"1": 10**400}, "up to 1e6"),
        ("layers/1/mix", {"9" * 5000: 1.0}, "not a source layer"),
        ("layers/1/base", 0, r"layers\[1\]: base 0 does not lie above base 0"),
        ("search/rule", "\ud800", "search: rule .* is unknown"),
        ("search/threshold", 10**400, r"threshold \(T\) is 1000+.*…; it must be"),
        ("layers/1/mix", {"1": "1"}, "coefficient of layer 1 is 1"),
        ("layers/1/mix", {"1": True}, "coefficient of layer 1 is True"),
        ("merge_norms", "no", "merge_norms is neither"),
        ("search/threshold", "high", r"threshold \(T\) is 'high'; it must be a valid number"),
        ("search/decisions/0/accepted", 1, r"decisions\[0\]: accepted is 1"),
        ("search/decisions/0/reason", 1, "reason is 1"),
        ("search/rule", KeyError, "search: rule is missing"),
    ],
)
def test_a_malformed_plan_is_refused_by_entry(path: str, value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_json(_edit(path, value))
    assert "\n" not in str(caught.value)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(
    path=st.sampled_from(["format", "source", "layers", "layers/0", "layers/0/mix", "search", "search/decisions/0"]),
    value=_json,
)
def test_arbitrary_json_ends_in_the_error_tree(path: str, value: Any) -> None:
    message = ""
    try:
        Plan.from_json(_edit(path, value))
    except PlanError as error:
        message = str(error)
    assert "\n" not in message


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(PlanError, match="not JSON"):
        Plan.load(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(PlanError, match=r"x.json: the plan is not a JSON object"):
        Plan.load(tmp_path / "x.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        PLAN.save(tmp_path / "file" / "plan.json")
