"""The same weights in another format are the same model: what comes out is equal byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from streamcollapse import Compute, Output, SearchOptions, prune
from streamcollapse.errors import CheckpointError
from streamcollapse.settings.run import Repair, RunSettings
from tests.checkpoints import save_llama
from tests.formats import as_torch

OPTIONS = SearchOptions(layers_per_merge=3, interval=1, threshold=0.5, rule="mean")
FLOAT32 = Compute("cpu", "float32")


@pytest.mark.parametrize(("shards", "legacy"), [(1, False), (3, False), (1, True)], ids=["single", "sharded", "legacy"])
def test_pytorch_files_prune_to_the_same_bytes(tmp_path: Path, shards: int, legacy: bool) -> None:
    source = save_llama(tmp_path / "safe")
    stored = as_torch(source, tmp_path / "torch", shards, legacy)
    runs = {"a": source, "b": stored}
    for name, directory in runs.items():
        prune(
            directory,
            tmp_path / name,
            OPTIONS,
            settings=RunSettings(compute=FLOAT32, output=Output(max_shard_size="40kB")),
        )
    written = sorted(p.name for p in (tmp_path / "a").glob("model*"))
    assert len(written) > 2
    one, two = (
        {n: t for file in (tmp_path / name).glob("*.safetensors") for n, t in load_file(file).items()} for name in runs
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)
    plans = [json.loads((tmp_path / name / "streamcollapse_plan.json").read_text()) for name in runs]
    assert plans[0]["search"] == plans[1]["search"], "similarities too"


def test_both_formats_in_one_directory(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "safe", num_layers=2)
    (source / "pytorch_model.bin").write_bytes(b"never looked at")
    pruned = prune(source, tmp_path / "out", settings=RunSettings(compute=FLOAT32, repair=Repair("none")))
    assert pruned.plan.num_source_layers == 2
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_pickle_with_code_writes_nothing(tmp_path: Path) -> None:
    source = as_torch(save_llama(tmp_path / "safe", num_layers=2), tmp_path / "torch")
    torch.save(torch.nn.Linear(2, 2), source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="the pickle wants torch"):
        prune(source, tmp_path / "out", settings=RunSettings(compute=FLOAT32))
    assert not (tmp_path / "out").exists()
