"""Converted checkpoints against the tensors they were made of, and against transformers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamcollapse import Conversion, Output, convert, resume, verify
from streamcollapse.errors import CheckpointError, ModelError, NonFiniteError, OptionError, OutputError
from streamcollapse.jobs.convert import prepare_convert
from streamcollapse.progress import Event, StepDone
from tests.checkpoints import edit_json, edit_tensors, save_llama
from tests.formats import as_torch


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}


def assert_same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes(), name


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = save_llama(tmp_path / "source", num_layers=3)
    edit_tensors(directory, lambda t: t.update(mask=torch.full((2, 2), -torch.inf), steps=torch.tensor([3, 4])))
    return directory


@pytest.mark.parametrize(("shards", "legacy"), [(1, False), (2, False), (1, True)], ids=["single", "sharded", "legacy"])
def test_pytorch_files_become_safetensors(tmp_path: Path, source: Path, shards: int, legacy: bool) -> None:
    stored = as_torch(source, tmp_path / "torch", shards, legacy)
    found = convert(stored, tmp_path / "out")
    digest = hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert found.shards == {"model.safetensors": digest}
    assert_same_bytes(tensors_of(tmp_path / "out"), tensors_of(source))
    assert not list((tmp_path / "out").glob("*.bin*"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(source)
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("A river is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_shards_of_another_size(tmp_path: Path, source: Path) -> None:
    found = convert(source, tmp_path / "out", output=Output("30kB"))
    assert len(found.shards) > 3
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert_same_bytes(tensors_of(tmp_path / "out"), tensors_of(source))
    convert(tmp_path / "out", tmp_path / "back")
    assert [p.name for p in (tmp_path / "back").glob("model*")] == ["model.safetensors"]
    assert_same_bytes(tensors_of(tmp_path / "back"), tensors_of(source))


def test_another_precision(tmp_path: Path, source: Path) -> None:
    edit_json(source / "config.json", lambda c: c.update(text_config={"torch_dtype": "float32"}))
    found = convert(source, tmp_path / "out", dtype="bfloat16")
    expected = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors_of(source).items()}
    written = tensors_of(tmp_path / "out")
    assert written.keys() == expected.keys()
    assert all(written[n].dtype == t.dtype and torch.equal(written[n], t) for n, t in expected.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["torch_dtype"] == "bfloat16"
    assert {config.get("dtype"), config.get("torch_dtype")} - {None} == {"bfloat16"}
    assert found.before == {"float32": 2 * found.after["bfloat16"], "int64": 16}


def test_numbers_too_large_for_the_precision(tmp_path: Path, source: Path) -> None:
    edit_tensors(source, lambda t: t.update({"model.norm.weight": torch.full((32,), 1e6)}))
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight has numbers that are too large for float16"):
        convert(source, tmp_path / "out", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_packed_weights_are_copied_but_not_cast(tmp_path: Path, source: Path) -> None:
    packed = {
        "layer.qweight": torch.randint(0, 9, (4, 4), dtype=torch.int32),
        "b": torch.randn(3).to(torch.float8_e5m2),
    }
    save_file(packed, source / "model.safetensors")
    convert(source, tmp_path / "same")
    again = tensors_of(tmp_path / "same")
    assert torch.equal(again["layer.qweight"], packed["layer.qweight"])
    assert torch.equal(again["b"].view(torch.uint8), packed["b"].view(torch.uint8))
    with pytest.raises(ModelError, match="packed or quantised"):
        convert(source, tmp_path / "cast", dtype="float32")
    save_file({"a": torch.ones(2)}, source / "model.safetensors")
    edit_json(source / "config.json", lambda c: c.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(ModelError, match=r"quantised \(quantization_config: fp8\)"):
        convert(source, tmp_path / "cast", dtype="float32")


def test_small_files_come_along_and_other_weights_do_not(tmp_path: Path, source: Path) -> None:
    kept = ["README.md", "modeling_own.py", "chat_template.jinja", "preprocessor_config.json", "LICENSE"]
    left = [
        "pytorch_model.bin",
        "model.gguf",
        "tf_model.h5",
        "flax_model.msgpack",
        "training_args.bin",
        ".gitattributes",
    ]
    for name in [*kept, *left]:
        (source / name).write_text(f"this is {name}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    convert(source, tmp_path / "out")
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    added = {"additional_chat_templates/tools.jinja", "streamcollapse_conversion.json"}
    assert files == {*kept, *expected, *added}
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in kept)


def test_a_dry_run_writes_nothing(tmp_path: Path, source: Path) -> None:
    found = prepare_convert(source, tmp_path / "out", "float16", Output()).found
    assert not found.usage
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_transformers_is_not_needed() -> None:
    """It takes seconds to import, and a conversion looks at no model."""
    code = "import sys, streamcollapse.jobs.convert; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bad_input(tmp_path: Path, source: Path) -> None:
    with pytest.raises(OptionError, match="dtype 'int8' is unknown"):
        convert(source, tmp_path / "out", dtype="int8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    with pytest.raises(OutputError, match="`overwrite`"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", output=Output(overwrite=True))
    assert not (tmp_path / "out" / "precious").exists()


def test_every_tensor_is_told(tmp_path: Path, source: Path) -> None:
    events: list[Any] = []
    convert(source, tmp_path / "out", listener=events.append)
    written = [e for e in events if type(e).__name__ == "StepDone"]
    assert len(written) == events[0].total_steps == len(tensors_of(source))


def test_a_conversion_that_was_broken_off_goes_on_where_it_was(tmp_path: Path, source: Path) -> None:
    written: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            written.append(event.name)
            if len(written) == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="resume with: streamcollapse resume"):
        convert(source, tmp_path / "out", dtype="float16", output=Output("30kB"), listener=listen)
    assert not (tmp_path / "out").exists()
    first, written = written, []
    found = resume(tmp_path / ".out.work", listener=lambda e: written.append(e.name) if hasattr(e, "name") else None)
    assert isinstance(found, Conversion)
    assert written[0] == "convert", "the phase"
    assert len({*first, *written[1:]}) == found.num_tensors
    assert len(first) + len(written) - 1 < found.num_tensors + len(first), "finished shards are not written again"
    expected = convert(source, tmp_path / "expected", dtype="float16", output=Output("30kB"))
    assert found.shards == expected.shards
    assert_same_bytes(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected"))
    assert not list(tmp_path.glob(".*"))


def test_a_converted_checkpoint_can_be_verified(tmp_path: Path) -> None:
    convert(save_llama(tmp_path / "plain", num_layers=3), tmp_path / "out", output=Output("30kB"))
    assert verify(tmp_path / "out").digests > 3
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    damaged = bytearray(shard.read_bytes())
    damaged[-2] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="sha256 is"):
        verify(tmp_path / "out")
