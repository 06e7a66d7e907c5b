"""GGUF files: converted tensor by tensor they are, bit for bit, what transformers makes of them as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from streamcollapse import Output, convert, inspect, perplexity, resume, verify
from streamcollapse.cli.main import app
from streamcollapse.errors import CheckpointError, ModelError, StreamCollapseError
from streamcollapse.progress import StepDone
from streamcollapse.storage.checkpoint import Checkpoint
from tests.gguf_files import FAMILIES, save_gguf

pytest.importorskip("gguf")
IDS = torch.tensor([[5, 17, 300, 4000, 2, 99]])


def _loaded(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The file as transformers loads it, whole."""
    try:
        from transformers import GgufConfig
    except ImportError:  # transformers 4 knows no other way than to dequantise
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    whole = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, quantization_config=whole
    )


@pytest.mark.parametrize(("family", "kind"), [*((name, "Q8_0") for name in FAMILIES), ("llama", "F16")])
def test_it_is_what_transformers_makes_of_it(family: str, kind: str, tmp_path: Path) -> None:
    path, out = save_gguf(family, tmp_path, kind), tmp_path / "out"
    convert(path, out, dtype="bfloat16")
    theirs = _loaded(path, torch.bfloat16)
    ours, told = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(ours) is type(theirs)
    one, two = ours.state_dict(), theirs.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    with torch.inference_mode():
        assert torch.equal(ours.eval()(IDS).logits, theirs.eval()(IDS).logits)
    tokenizers = [AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)]
    assert len({json.dumps(t("The river rises in the hills.")["input_ids"]) for t in tokenizers}) == 1
    assert verify(out).layers == 3


@pytest.mark.parametrize("kind", ["Q4_0", "BF16", "F32"])
def test_precision_is_that_of_the_file_unless_it_is_said(kind: str, tmp_path: Path) -> None:
    path = save_gguf("llama", tmp_path, kind)
    found = convert(path, tmp_path / "out")
    assert found.after.keys() == {"float32" if kind == "F32" else "bfloat16"}
    assert kind in found.before
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == next(iter(found.after))
    assert config["architectures"] == ["LlamaForCausalLM"]
    again = convert(path, tmp_path / "wide", dtype="float32")
    assert again.after.keys() == {"float32"}
    theirs = _loaded(path, torch.float32).state_dict()
    wide = Checkpoint(tmp_path / "wide")
    assert all(torch.equal(wide.read(name, torch.device("cpu")), theirs[name]) for name in wide.names)


def test_a_conversion_resumes(tmp_path: Path) -> None:
    path, out = save_gguf("qwen 2", tmp_path), tmp_path / "out"
    convert(path, tmp_path / "whole", output=Output("100kB"))
    with pytest.raises(KeyboardInterrupt):

        def stop(event: object) -> None:
            if isinstance(event, StepDone) and "layers.2" in event.name:
                raise KeyboardInterrupt

        convert(path, out, output=Output("100kB"), listener=stop)
    resume(tmp_path / ".out.work")
    assert {p.name: p.read_bytes() for p in out.glob("*.safetensors")} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").glob("*.safetensors")
    }


def test_what_cannot_be_converted_is_one_line(tmp_path: Path) -> None:
    path, out = save_gguf("llama", tmp_path), tmp_path / "out"
    data = path.read_bytes()
    cases: list[tuple[bytes, type[StreamCollapseError], str]] = [
        (b"GGML" + data[4:], CheckpointError, "no GGUF file that can be used"),
        (data[:100], CheckpointError, "no GGUF file that can be used"),
        (data[: len(data) // 2], CheckpointError, "no GGUF file that can be used"),
        (data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_Q.weight"), ModelError, "holds no model.layers.1.self_attn"),
        (data.replace(b"llama", b"falco", 1), StreamCollapseError, "falco"),
    ]
    for number, (damaged, error, message) in enumerate(cases):
        path.write_bytes(damaged)
        with pytest.raises(error, match=message) as caught:
            convert(path, out)
        assert "\n" not in str(caught.value), number
        assert not out.exists()


def test_other_verbs_say_how_to_make_a_checkpoint_of_it(tmp_path: Path) -> None:
    path = save_gguf("llama", tmp_path)
    for command in (
        ["inspect", str(path)],
        ["prune", str(path), "--out", str(tmp_path / "out"), "--target-layers", "2"],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1
        assert f"make a checkpoint of it: streamcollapse convert {path} --out DIR" in result.stderr
    dry = CliRunner().invoke(app, ["convert", str(path), "--out", str(tmp_path / "out"), "--dry-run"])
    assert "Q8_0" in dry.stdout
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, ["convert", str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert inspect(tmp_path / "out").num_layers == 3
    text = tmp_path / "text.txt"
    text.write_text("The river rises in the hills and runs east. " * 20)
    assert perplexity(tmp_path / "out", text).tokens > 50
