"""What verify finds wrong: every kind of damage, by name; and nothing where nothing is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from streamcollapse import Compute, Output, SearchOptions, prune, verify
from streamcollapse.cli.main import app
from streamcollapse.errors import CheckpointError, ModelError, NonFiniteError, PlanError
from streamcollapse.settings.run import RunSettings
from tests.checkpoints import edit_json, save_llama
from tests.formats import as_torch

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source`` and what was pruned from it into several shards, ``pruned``."""
    root = tmp_path_factory.mktemp("made")
    save_llama(root / "source")
    options = SearchOptions(layers_per_merge=3, interval=1, threshold=-1.0, rule="mean")
    prune(
        root / "source",
        root / "pruned",
        options,
        settings=RunSettings(compute=Compute("cpu", "float32"), output=Output("60kB")),
    )
    return root


@pytest.fixture
def both(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "both")
    return tmp_path / "both"


def shard_of(directory: Path, name: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][name]


def rewrite(shard: Path, name: str, tensor: torch.Tensor) -> None:
    save_file({**load_file(shard), name: tensor}, shard, {"format": "pt"})


def test_nothing_wrong(both: Path) -> None:
    alone = verify(both / "pruned")
    assert alone.digests == len(list((both / "pruned").glob("*.safetensors"))) > 2
    assert (alone.source, alone.recomputed) == (None, 0)
    found = verify(both / "pruned", both / "source")
    assert found.recomputed == found.tensors == alone.tensors
    assert verify(both / "source").digests == 0
    stored = as_torch(both / "source", both / "torch")
    assert verify(stored).tensors == verify(both / "source").tensors
    shutil.rmtree(both / "source")
    stored.rename(both / "source")
    with pytest.raises(PlanError, match="another source"):
        verify(both / "pruned", both / "source")


def test_a_byte_that_changed(both: Path) -> None:
    shard = sorted((both / "pruned").glob("*.safetensors"))[1]
    raw = bytearray(shard.read_bytes())
    raw[-7] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: sha256 is \w+…, its report says \w+…"):
        verify(both / "pruned")
    (both / "pruned" / "streamcollapse_report.json").unlink()
    assert verify(both / "pruned").digests == 0
    with pytest.raises(CheckpointError, match=r"tensor model\.\S+ is not what the plan makes of the source"):
        verify(both / "pruned", both / "source")


def test_weights_that_are_no_numbers(both: Path) -> None:
    shard = shard_of(both / "pruned", NAME)
    tensor = load_file(shard)[NAME]
    tensor[0, 0] = torch.nan
    rewrite(shard, NAME, tensor)
    with pytest.raises(NonFiniteError, match=rf"tensor {NAME} has 1 NaN or infinite"):
        verify(both / "pruned")


def test_a_tensor_of_another_shape_or_name(both: Path) -> None:
    shard = shard_of(both / "pruned", NAME)
    whole = shard.read_bytes()
    rewrite(shard, NAME, torch.ones(48, 31))
    with pytest.raises(ModelError, match=r"up_proj\.weight"):
        verify(both / "pruned", both / "source")
    shard.write_bytes(whole)
    rewrite(shard, "model.layers.0.mlp.other", torch.ones(2))
    (both / "pruned" / "streamcollapse_report.json").unlink()
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.0\.mlp\.other is not in the plan's result"):
        verify(both / "pruned", both / "source")


def test_a_config_that_was_edited(both: Path) -> None:
    edit_json(both / "pruned" / "config.json", lambda config: config.update(rms_norm_eps=0.5))
    verify(both / "pruned")
    with pytest.raises(CheckpointError, match=r"config\.json: is not what the plan makes of the source's config"):
        verify(both / "pruned", both / "source")


def test_a_report_that_does_not_fit(both: Path) -> None:
    edit_json(both / "pruned" / "streamcollapse_report.json", lambda r: r["shards"].update(ghost="0"))
    with pytest.raises(CheckpointError, match="ghost: the report has it, the index has not"):
        verify(both / "pruned")
    edit_json(both / "pruned" / "streamcollapse_report.json", lambda r: r.update(shards=3))
    with pytest.raises(CheckpointError, match="its shards are not names and digests"):
        verify(both / "pruned")
    (both / "pruned" / "streamcollapse_plan.json").unlink()
    (both / "pruned" / "streamcollapse_report.json").unlink()
    with pytest.raises(PlanError, match="cannot be read"):
        verify(both / "pruned", both / "source")


def test_the_command_line(both: Path) -> None:
    pruned, source = str(both / "pruned"), str(both / "source")
    done = CliRunner().invoke(app, ["verify", pruned, "--source", source])
    assert done.exit_code == 0, done.output
    assert f"recomputed  {verify(pruned).tensors} tensors from {source}, equal bit by bit" in done.stdout
    done = CliRunner().invoke(app, ["verify", pruned, "--json"])
    assert json.loads(done.stdout)["digests"] > 2
    done = CliRunner().invoke(app, ["verify", str(both / "nowhere")])
    assert (done.exit_code, done.stdout) == (1, "")
