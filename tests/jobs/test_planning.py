"""Plans by hand, and pruning twice in one step, by what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from streamcollapse import Calibration, Compute, Plan, SearchOptions, apply, prune
from streamcollapse.cli.main import app
from streamcollapse.settings.run import Repair, RunSettings
from tests.checkpoints import edit_json

FLOAT32 = Compute("cpu", "float32")


def _run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_list_of_layers_is_dropped_as_by_hand(llama: Path, tmp_path: Path) -> None:
    said = _run("plan", "make", llama, "--drop", "2,4-5", "--merge", "6-7:mean", "--plan", tmp_path / "p.json")
    assert "8 -> 4" in said
    plan = Plan.load(tmp_path / "p.json")
    assert plan.search is None
    _run("apply", llama, tmp_path / "p.json", "--out", tmp_path / "out", "--device", "cpu")
    source = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    layers = list(source.model.layers)
    assert len(ours.model.layers) == 4
    for layer, expected in zip(ours.model.layers, (layers[0], layers[1], layers[3], layers[6]), strict=True):
        for name, tensor in layer.state_dict().items():
            wanted = expected.state_dict()[name]
            if expected is layers[6] and "norm" not in name:
                wanted = (wanted + layers[7].state_dict()[name]) / 2
            torch.testing.assert_close(tensor, wanted, atol=1e-6, rtol=1e-6)
    _run("verify", tmp_path / "out", "--source", llama)


@pytest.mark.parametrize("rule", ["sequential", "mean"])
def test_two_prunings_in_one_step(llama_bf16: Path, tmp_path: Path, rule: str) -> None:
    """Bit by bit where no tensor was rounded twice, within one rounding of the dtype elsewhere."""
    once = prune(
        llama_bf16,
        tmp_path / "once",
        SearchOptions(3, 1, threshold=0.4, rule=rule),
        settings=RunSettings(compute=FLOAT32),
    )
    assert once.plan.num_layers < 8
    twice = prune(
        tmp_path / "once",
        tmp_path / "twice",
        SearchOptions(2, 1, rule=rule, strategy="greedy", target_layers=once.plan.num_layers - 2, rescale=False),
        settings=RunSettings(calibration=Calibration("sentences"), compute=FLOAT32, repair=Repair("none")),
    )
    for name in ("once", "twice"):
        (tmp_path / f"{name}.json").write_bytes((tmp_path / name / "streamcollapse_plan.json").read_bytes())
    _run("plan", "compose", tmp_path / "once.json", tmp_path / "twice.json", "--plan", tmp_path / "both.json")
    both = Plan.load(tmp_path / "both.json")
    assert both.num_layers == twice.plan.num_layers
    apply(llama_bf16, both, tmp_path / "both")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("twice", "both"))
    assert found.keys() == expected.keys()
    mixed = {
        f"model.layers.{i}."
        for i, layer in enumerate(twice.plan.layers)
        if len(layer.mix) > 1 or any(len(once.plan.layers[s].mix) > 1 for s in layer.mix)
    }
    for name, tensor in expected.items():
        if rule == "sequential" or not any(name.startswith(prefix) for prefix in mixed):
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name].float(), tensor.float(), rtol=2**-7, atol=2**-9)
    assert rule == "sequential" or mixed
    first = json.loads((tmp_path / "both" / "config.json").read_text())
    assert first == json.loads((tmp_path / "twice" / "config.json").read_text())


def test_what_cannot_be_planned_writes_nothing(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "p.json"
    for arguments, message in (
        (["make", llama, "--drop", "8", "--plan", target], "layer 8 is dropped, but the source has layers 0 to 7"),
        (["make", llama, "--merge", "1-2", "--plan", target], "names no rule"),
        (["make", llama, "--drop", "1", "--plan", llama / "config.json" / "p.json"], "is not a directory"),
        (["compose", tmp_path / "a.json", tmp_path / "b.json", "--plan", target], "a.json: cannot be read"),
    ):
        done = CliRunner().invoke(app, ["plan", *map(str, arguments)])
        assert done.exit_code == 1
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == []
    _run("plan", "make", llama, "--drop", "1", "--plan", target)
    kept = target.read_bytes()
    done = CliRunner().invoke(app, ["plan", "make", str(llama), "--drop", "2", "--plan", str(target)])
    assert (done.exit_code, target.read_bytes()) == (1, kept)
    edit_json(target, lambda plan: plan["source"].update(fingerprint="0" * 64))
    done = CliRunner().invoke(app, ["apply", str(llama), str(target), "--out", str(tmp_path / "out")])
    assert "the plan was made for another source" in done.stderr
