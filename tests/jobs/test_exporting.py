"""Plans for mergekit: what the document says, and what mergekit itself makes of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from streamcollapse import Calibration, Compute, Plan, SearchOptions, apply, make_plan, search
from streamcollapse.cli.main import app
from streamcollapse.errors import OptionError, PlanError
from streamcollapse.jobs.planning import export_plan
from streamcollapse.settings.run import RunSettings
from tests.checkpoints import save_llama

MERGEKIT = os.environ.get("STREAMCOLLAPSE_TEST_MERGEKIT")  # its command mergekit-yaml, in an environment of its own


def weight_of(sources: list[dict[str, Any]], tensor: str) -> list[float]:
    """The weight of each source for ``tensor``: the first filter that its name contains."""
    found = []
    for source in sources:
        given = source["parameters"]["weight"]
        rules = given if isinstance(given, list) else [{"value": given}]
        found.append(next(rule["value"] for rule in rules if rule.get("filter", "") in tensor))
    return found


@pytest.mark.parametrize("merge_norms", [False, True])
def test_the_document_says_what_the_plan_says(llama_bf16: Path, merge_norms: bool) -> None:
    plan = make_plan(llama_bf16, "6", ["1-3:mean", "4-5:sequential"], merge_norms=merge_norms)
    document = yaml.safe_load(export_plan(llama_bf16, plan, "mergekit"))
    assert (document["merge_method"], document["dtype"]) == ("linear", "bfloat16")
    assert document["parameters"] == {"normalize": False}
    ranges = [[source["layer_range"] for source in part["sources"]] for part in document["slices"]]
    assert ranges == [[[0, 1]], [[1, 2], [2, 3], [3, 4]], [[4, 5], [5, 6]], [[7, 8]]]
    for part in document["slices"]:
        names = [source["model"] for source in part["sources"]]
        assert len(set(names)) == len(names), "mergekit takes one name for one input"
        assert {Path(name).resolve() for name in names} == {llama_bf16.resolve()}
        assert sum(weight_of(part["sources"], "model.embed_tokens.weight")) == 1.0
    mean, last = (document["slices"][i]["sources"] for i in (1, 2))
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"
    assert weight_of(mean, up) == pytest.approx([1 / 3] * 3)
    assert weight_of(mean, norm) == (pytest.approx([1 / 3] * 3) if merge_norms else [1.0, 0.0, 0.0])
    assert weight_of(last, up) == [0.0, 1.0]
    assert weight_of(last, norm) == ([0.0, 1.0] if merge_norms else [1.0, 0.0])


@pytest.mark.skipif(MERGEKIT is None, reason="STREAMCOLLAPSE_TEST_MERGEKIT names no mergekit-yaml")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mergekit_builds_the_same_model(tmp_path: Path, dtype: torch.dtype) -> None:
    source = save_llama(tmp_path / "source", dtype=dtype)
    options = SearchOptions(strategy="greedy", rule="best", target_layers=5, rescale=True)
    searched = search(source, options, settings=RunSettings(calibration=Calibration("sentences")))
    by_hand = make_plan(source, "0,6", ["1-3:rdsc:0.25", "4-5:mean"])
    for number, plan in enumerate([searched, by_hand]):
        plan.save(tmp_path / "plan.json")
        text, theirs = tmp_path / f"{number}.yml", tmp_path / f"theirs-{number}"
        asked = ["plan", "export", str(source), str(tmp_path / "plan.json"), "--to", "mergekit", "--out", str(text)]
        assert CliRunner().invoke(app, asked).exit_code == 0
        done = subprocess.run([str(MERGEKIT), str(text), str(theirs)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        apply(source, plan, tmp_path / f"ours-{number}", settings=RunSettings(compute=Compute("cpu")))
        ours, found = (load_all(tmp_path / f"{name}-{number}") for name in ("ours", "theirs"))
        assert ours.keys() == found.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == found[name].dtype
            largest = float(tensor.abs().max())
            torch.testing.assert_close(found[name], tensor, rtol=torch.finfo(dtype).eps, atol=1e-6 * largest)


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_what_cannot_be_exported(llama: Path, llama_bf16: Path, tmp_path: Path) -> None:
    plan = make_plan(llama, "3")
    with pytest.raises(OptionError, match="tool 'gguf' is unknown; choose one of mergekit"):
        export_plan(llama, plan, "gguf")
    with pytest.raises(PlanError, match="another source"):
        export_plan(llama_bf16, plan, "mergekit")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    (tmp_path / "there.yml").write_text("mine")
    asked = ["plan", "export", str(llama), str(tmp_path / "plan.json"), "--out", str(tmp_path / "there.yml")]
    refused = CliRunner().invoke(app, asked)
    assert refused.exit_code == 1
    assert "there.yml: exists; choose another --out or pass --overwrite" in refused.stderr
    assert (tmp_path / "there.yml").read_text() == "mine"
