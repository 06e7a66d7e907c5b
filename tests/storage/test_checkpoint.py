from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamcollapse.errors import CheckpointError
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.index import INDEX_FILE, read_json
from tests.checkpoints import edit_json, edit_tensors, save_llama, write_raw

CPU = torch.device("cpu")


def test_reads_every_tensor_of_every_shard(llama_bf16: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for shard in llama_bf16.glob("*.safetensors"):
        expected |= load_file(shard)
    checkpoint = Checkpoint(llama_bf16)
    assert len(checkpoint.shards) > 1
    assert sorted(checkpoint.names) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name, CPU), tensor), name
        assert checkpoint.info(name).num_bytes == tensor.nbytes
    assert checkpoint.num_bytes == sum(t.nbytes for t in expected.values())
    assert checkpoint.num_parameters == sum(t.numel() for t in expected.values())


def test_a_read_is_a_view_that_cannot_reach_the_file(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "copy")
    before = (copy / "model.safetensors").read_bytes()
    checkpoint = Checkpoint(copy)
    name = checkpoint.names[0]
    assert checkpoint.read(name, CPU).data_ptr() == checkpoint.read(name, CPU).data_ptr()
    checkpoint.read(name, CPU).zero_()
    assert (copy / "model.safetensors").read_bytes() == before


def test_empty_scalar_and_unaligned_tensors(tmp_path: Path) -> None:
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "value": {"dtype": "F32", "shape": [], "data_offsets": [1, 5]},
        "empty": {"dtype": "F16", "shape": [0, 3], "data_offsets": [5, 5]},
    }
    write_raw(tmp_path / "model.safetensors", header, b"\x07" + torch.tensor([1.5]).numpy().tobytes())
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.read("value", CPU).item() == 1.5
    assert checkpoint.read("byte", CPU).tolist() == [7]
    assert checkpoint.read("empty", CPU).shape == (0, 3)


def test_the_fingerprint_tells_a_fine_tune_from_its_base(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", num_layers=2, seed=0)
    again = save_llama(tmp_path / "again", num_layers=2, seed=0)
    other = save_llama(tmp_path / "other", num_layers=2, seed=1)
    assert Checkpoint(base).fingerprint() == Checkpoint(again).fingerprint()
    headers = [Checkpoint(d).shards[0].raw for d in (base, other)]
    assert headers[0] == headers[1], "a digest of headers alone could not tell them apart"
    assert Checkpoint(base).fingerprint() != Checkpoint(other).fingerprint()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"])
def test_the_fingerprint_tells_of_one_changed_tensor(tmp_path: Path, name: str) -> None:
    source = save_llama(tmp_path / "m", num_layers=4)
    before = Checkpoint(source).fingerprint()
    edit_tensors(source, lambda t: t[name].mul_(1.01))
    assert Checkpoint(source).fingerprint() != before


def _sharded(tmp_path: Path, source: Path) -> Path:
    return shutil.copytree(source, tmp_path / "copy")


def test_shard_missing(tmp_path: Path, llama_bf16: Path) -> None:
    copy = _sharded(tmp_path, llama_bf16)
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: the shard is missing; download it again"):
        Checkpoint(copy)


def test_index_names_a_tensor_that_no_shard_has(tmp_path: Path, llama_bf16: Path) -> None:
    copy = _sharded(tmp_path, llama_bf16)
    edit_json(copy / INDEX_FILE, lambda d: d["weight_map"].update(ghost=sorted(copy.glob("*.safetensors"))[0].name))
    with pytest.raises(CheckpointError, match=r"tensor ghost is in model-00001\S+, which has none"):
        Checkpoint(copy)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/../../x", "C:\\x", "..\\x", "", 3])
def test_index_that_leaves_the_directory(tmp_path: Path, llama_bf16: Path, shard: object) -> None:
    copy = _sharded(tmp_path, llama_bf16)
    edit_json(copy / INDEX_FILE, lambda d: d["weight_map"].update({"lm_head.weight": shard}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is mapped to"):
        Checkpoint(copy)


def test_tensor_in_two_shards(tmp_path: Path, llama_bf16: Path) -> None:
    copy = _sharded(tmp_path, llama_bf16)
    first, second = sorted(copy.glob("*.safetensors"))[:2]
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**tensors, name: tensor}, second)
    with pytest.raises(CheckpointError, match=f"tensor {name} is also in {first.name}"):
        Checkpoint(copy)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"no model\.safetensors, no pytorch_model\.bin and no index"),
        (["weights.bin"], r"PyTorch files, but neither pytorch_model\.bin nor"),
        (["model.gguf"], "a GGUF file"),
        (["adapter_config.json", "adapter_model.safetensors"], r"an adapter \(LoRA\) and no model; merge it"),
        (["consolidated.00.pth", "params.json"], "Meta's own format"),
        (["model-00001-of-00002.safetensors"], "restore the index"),
    ],
)
def test_directory_without_a_checkpoint(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_source_that_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"model\.gguf: a GGUF file; make a checkpoint of it"):
        Checkpoint(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        Checkpoint(tmp_path / "file")


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    copy = save_llama(tmp_path / "m", num_layers=2)
    checkpoint = Checkpoint(copy)
    edit_tensors(copy, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match="changed size while it was in use"):
        checkpoint.read("model.norm.weight", CPU)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "deep/file.jinja"])
def test_links_that_leave_the_directory_are_refused(tmp_path: Path, llama: Path, name: str) -> None:
    source = shutil.copytree(llama, tmp_path / "source")
    secret = tmp_path / "secret"
    (source / name).parent.mkdir(exist_ok=True)
    if (source / name).exists():
        (source / name).rename(secret)
    else:
        secret.write_text("secret")
    (source / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=rf"{Path(name).name}: is a link to {secret}, outside the checkpoint's"):
        Checkpoint(source)


def test_links_inside_and_those_of_the_hub_s_cache_are_followed(tmp_path: Path, llama: Path) -> None:
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(llama.iterdir()):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert Checkpoint(snapshot).names
    (tmp_path / "linked").symlink_to(snapshot)
    assert Checkpoint(tmp_path / "linked").names, "the directory itself may be reached by a link"
    source = shutil.copytree(llama, tmp_path / "source")
    (source / "copy.json").symlink_to("config.json")
    assert Checkpoint(source).names


def test_documents_that_are_no_files_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe: is not a file"):
        read_json(tmp_path / "pipe")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="not JSON"):
        read_json(tmp_path / "deep.json")
    monkeypatch.setattr("streamcollapse.storage.index.MAX_JSON_BYTES", 1000)
    with pytest.raises(CheckpointError, match="has 200000 bytes, over the limit of 1000"):
        read_json(tmp_path / "deep.json")
