"""How far to prune, in every way that it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from streamcollapse.cli.main import app
from streamcollapse.units import format_bytes
from tests.checkpoints import save_model
from tests.families import FAMILIES

RUN = ("--device", "cpu", "--compute-dtype", "float32")


def _invoke(*command: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(command))
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def _dry(source: Path, *options: str) -> dict[str, object]:
    command = ("search", str(source), "--plan", "p.json", "--strategy", "block-influence", "--dry-run", "--json")
    found: dict[str, object] = json.loads(_invoke(*command, *RUN, *options))
    return found


@pytest.mark.parametrize("said", ["6", "-2", "75%", "-25%"])
def test_a_number_of_layers(llama: Path, tmp_path: Path, said: str) -> None:
    plan = tmp_path / "plan.json"
    _invoke("search", str(llama), "--plan", str(plan), "--strategy", "block-influence", "--target-layers", said, *RUN)
    document = json.loads(plan.read_text())
    assert len(document["layers"]) == document["search"]["target_layers"] == 6


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("9", "target layers is 9, but the model has 8 layers"),
        ("-8", "target layers is -8, but the model has 8 layers"),
        ("200%", "target layers is 200%, but the model has 8 layers"),
        ("few", "target layers is 'few'; give how many stay (24), how many fewer (-8), or a share of the layers (75%)"),
    ],
)
def test_no_number_of_layers(llama: Path, tmp_path: Path, said: str, message: str) -> None:
    command = ("search", str(llama), "--plan", str(tmp_path / "plan.json"), "--target-layers", said, *RUN)
    assert message in _invoke(*command, code=1)


def test_a_ratio_says_what_it_means(llama: Path, bundled: Path) -> None:
    assert _dry(bundled, "--target-ratio", "0.25")["target"] == "0.25 of all parameters: 24 -> 18 layers"
    told = str(_dry(llama, "--target-ratio", "0.07")["target"])
    assert told.startswith("0.07 of all parameters: 8 -> 6 layers, since")
    command = ("search", str(llama), "--plan", "p.json", "--strategy", "block-influence", "--target-ratio", "0.6")
    message = _invoke(*command, *RUN, code=1)
    assert "takes more than half of the layers: give --target-layers 1 if that is what is wanted" in message


def test_into_memory(tmp_path: Path) -> None:
    source = save_model(FAMILIES["mistral, sliding"](), tmp_path / "model")
    stored = {name: 4 * tensor.numel() for name, tensor in load_file(source / "model.safetensors").items()}
    layer = sum(size for name, size in stored.items() if ".layers.0." in name)
    whole, cache = sum(stored.values()), 2 * 2 * 8 * 8  # elements: keys and values, two heads of 8, a window of 8
    for bits, dtype in ((32, "float32"), (8, "int8")):
        room = ("--target-memory", str(whole - 2 * layer + 4 * cache * bits // 8), "--context", "100")
        told = _dry(source, *room, "--kv-dtype", dtype)
        assert "6 -> 4 layers" in str(told["target"])
        assert f"the cache of 100 tokens in {dtype}, {format_bytes(4 * cache * bits // 8)}" in str(told["target"])
        assert told["options"]["target_memory"] == room[1]  # type: ignore[index]
    command = ("search", str(source), "--plan", str(tmp_path / "p.json"), *RUN, "--target-memory")
    assert "fit as they are: nothing has to go" in _invoke(*command, "1GB", code=1)
    assert "what is outside the layers takes" in _invoke(*command, "10kB", code=1)
    assert "target layers and target memory are both given" in _invoke(*command, "1GB", "--target-layers", "4", code=1)
    _invoke(*command, str(whole - 2 * layer + 4 * cache * 2), "--strategy", "block-influence", "--context", "100")
    record = json.loads((tmp_path / "p.json").read_text())["search"]
    assert record["target_layers"] == 4
    assert "target_memory" not in record


def test_one_search_gives_every_size(llama: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    command = ("search", str(llama), "--plan", str(plan), "--strategy", "block-influence", "--target-layers", "3", *RUN)
    assert "4 to 7 layers: streamcollapse apply with --layers" in _invoke(*command)
    for said, layers in (("5", 5), ("-1", 7), ("50%", 4)):
        out = tmp_path / f"of-{layers}"
        _invoke("apply", str(llama), str(plan), "--out", str(out), "--layers", said, "--device", "cpu")
        assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == layers
        assert json.loads((out / "streamcollapse_report.json").read_text())["layers"] == {"before": 8, "after": layers}
    message = _invoke("apply", str(llama), str(plan), "--out", str(tmp_path / "x"), "--layers", "2", code=1)
    assert "passed 3 to 7 layers, not 2; give one of these, or search again with --target-layers" in message
    assert not (tmp_path / "x").exists()
