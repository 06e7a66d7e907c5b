"""The synthetic checkpoints: the same every time, smooth in depth, and with --sparse the same layout with holes."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.writer import plan_shards

CPU = torch.device("cpu")


@pytest.fixture
def maker():
    import make_checkpoint

    return make_checkpoint


def test_the_same_every_time_and_smooth(maker, monkeypatch):
    shape = maker.SHAPES["tiny"]
    name = "model.layers.{}.mlp.up_proj.weight"
    kept = [maker.SmoothLlama(shape, 0).read(name.format(i), CPU).float() for i in range(shape.layers)]
    monkeypatch.setattr(maker, "NOISE_BYTES", 0)  # drawn again for every tensor
    drawn = maker.SmoothLlama(shape, 0).read(name.format(3), CPU).float()
    assert torch.equal(drawn, kept[3])
    near, far = torch.dist(kept[0], kept[1]), torch.dist(kept[0], kept[7])
    assert near < 0.25 * far
    assert kept[0].std().item() == pytest.approx(shape.hidden**-0.5, rel=0.05)


def test_sparse_files_read_as_the_dense_ones_with_zero_matrices(maker, tmp_path):
    shape = maker.SHAPES["tiny"]
    weights = {maker.make_checkpoint(tmp_path / kind, shape, sparse=kind == "sparse") for kind in ("dense", "sparse")}
    assert len(weights) == 1
    dense, sparse = Checkpoint(tmp_path / "dense"), Checkpoint(tmp_path / "sparse")
    assert sparse.names == dense.names
    loaded = {k: v for file in (tmp_path / "sparse").glob("*.safetensors") for k, v in load_file(file).items()}
    assert len(loaded) == len(dense.names)
    for name, tensor in loaded.items():
        matrix = ".layers." in name and tensor.dim() == 2
        assert torch.equal(tensor, torch.zeros_like(tensor) if matrix else dense.read(name, CPU)), name


def test_on_a_device_the_same_tensors_are_written_plainly(maker, tmp_path):
    shape = maker.SHAPES["tiny"]
    for kind, device in (("waited-for", None), ("plain", CPU)):
        maker.make_checkpoint(tmp_path / kind, shape, device=device)
    shards = [path.name for path in (tmp_path / "plain").glob("*.safetensors")]
    assert len(shards) > 1
    for name in shards:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "waited-for" / name).read_bytes()
    assert Checkpoint(tmp_path / "plain").names == Checkpoint(tmp_path / "waited-for").names


@pytest.mark.skipif(not hasattr(os.stat_result, "st_blocks"), reason="this system does not tell blocks")
def test_sparse_takes_the_disk_of_what_is_written(maker, tmp_path):
    shape = maker.Shape(2, 1024, 4096, 8, 8, vocabulary=64)
    maker.make_checkpoint(tmp_path / "sparse", shape, sparse=True)
    apparent, on_disk = maker.disk_bytes(tmp_path / "sparse")
    assert apparent > 60 * 10**6
    assert on_disk < 2 * 10**6


def test_llama2_70b_has_the_shards_it_is_published_in(maker):
    shape = maker.SHAPES["llama2-70b"]
    shards = plan_shards(maker.SmoothLlama(shape, 0), shape.shard_bytes)
    assert len(shards) == 15
    assert 137 * 10**9 < sum(shard.file_bytes for shard in shards) < 139 * 10**9
