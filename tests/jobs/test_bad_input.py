"""Every bad input through the command line: one line, exit code 1, nothing written, nothing lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from streamcollapse.cli.main import app
from tests.checkpoints import edit_json, write_raw
from tests.methods import without_last

VALIDATES = int(transformers.__version__.split(".")[0]) >= 5  # a config's fields when it is read

INDEX = "model.safetensors.index.json"


def _shard(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[1]


def _truncate(directory: Path) -> None:
    data = _shard(directory).read_bytes()
    _shard(directory).write_bytes(data[:-10])


def _long_header(directory: Path) -> None:
    data = _shard(directory).read_bytes()
    _shard(directory).write_bytes((2**40).to_bytes(8, "little") + data[8:])


def _header_past_the_end(directory: Path) -> None:
    write_raw(_shard(directory), b"{}", header_bytes=50)


def _overlap(directory: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    write_raw(_shard(directory), {"a": entry, "b": entry}, bytes(8))


def _out_of_range(directory: Path) -> None:
    write_raw(_shard(directory), {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(4))


def _edit_shards(directory: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for shard in directory.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] = edit(tensors[name])
            save_file(tensors, shard, {"format": "pt"})


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[3, 4] = float("nan")
    return tensor


UP = "model.layers.2.mlp.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda d: _shard(d).unlink(), "the shard is missing; download it again"),
    "truncated shard": (_truncate, "the file is truncated: its data ends 10 bytes past the end"),
    "long header": (_long_header, "over the limit"),
    "header past the end": (_header_past_the_end, "the header is longer than the file"),
    "overlapping": (_overlap, "overlaps"),
    "out of range": (_out_of_range, "truncated"),
    "ghost tensor": (
        lambda d: edit_json(d / INDEX, lambda j: j["weight_map"].update(ghost=_shard(d).name)),
        "tensor ghost is in",
    ),
    "shard above": (
        lambda d: edit_json(d / INDEX, lambda j: j["weight_map"].update(ghost="../x")),
        "tensor ghost is mapped to ../x, outside the checkpoint's directory",
    ),
    "absolute shard": (
        lambda d: edit_json(d / INDEX, lambda j: j["weight_map"].update(ghost="/etc/x")),
        "mapped to /etc/x, outside",
    ),
    "index that is no JSON": (lambda d: (d / INDEX).write_text("{"), "not JSON"),
    "not finite": (lambda d: _edit_shards(d, UP, _nan), f"tensor {UP} has 1 NaN or infinite values"),
    "quantised by config": (
        lambda d: edit_json(d / "config.json", lambda j: j.update(quantization_config={"quant_method": "awq"})),
        "the checkpoint is quantised (quantization_config: awq)",
    ),
    "quantised by tensor": (
        lambda d: _edit_shards(d, UP, lambda t: t.to(torch.int8)),
        f"tensor {UP} is packed or quantised (int8)",
    ),
    "a field of the wrong kind": (
        lambda d: edit_json(d / "config.json", lambda j: j.update(num_hidden_layers="8")),
        "transformers cannot read it" if VALIDATES else "no usable number of decoder layers (num_hidden_layers is '8')",
    ),
    "more layers than tensors": (
        lambda d: edit_json(d / "config.json", lambda j: j.update(num_hidden_layers=10_000_000)),
        "num_hidden_layers is 10000000, but the checkpoint has",
    ),
    "a field that no model can have": (
        lambda d: edit_json(d / "config.json", lambda j: j.update(num_key_value_heads=0)),
        "no causal language model can be built for LlamaForCausalLM",
    ),
    "padding beyond the vocabulary": (
        lambda d: edit_json(d / "config.json", lambda j: j.update(pad_token_id=99999)),
        "no causal language model can be built",
    ),
    "other sizes in all layers": (
        lambda d: edit_json(d / "config.json", lambda j: j.update(intermediate_size=64)),
        "has shape [48, 32], the config gives [64, 32]; config.json and weights do not belong together",
    ),
    "another vocabulary": (
        lambda d: edit_json(d / "config.json", lambda j: j.update(vocab_size=5000)),
        "has shape [4096, 32], the config gives [5000, 32]",
    ),
    "integers for weights": (
        lambda d: _edit_shards(d, UP, lambda t: t.to(torch.int32)),
        f"tensor {UP} is packed or quantised (int32)",
    ),
    "a shard's name that no file can have": (
        lambda d: edit_json(d / INDEX, lambda j: j["weight_map"].update(ghost="a" * 5000)),
        "the shard is missing",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: cannot be read"),
    "no tokenizer": (
        lambda d: [p.unlink() for p in d.glob("tokenizer*")],
        "its tokenizer cannot be loaded: Couldn't instantiate the backend tokenizer from one of: (1) a ",
    ),
    "terminal codes in names": (
        lambda d: edit_json(d / INDEX, lambda j: j["weight_map"].update({"a\x1b[2Jb": "../\x07"})),
        "tensor a\\x1b[2Jb is mapped to ../\\x07",
    ),
}


def _refused(arguments: list[str], message: str, root: Path) -> None:
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, "more than one line"
    assert "Traceback" not in result.output
    assert "\x1b" not in result.stderr
    assert result.stdout == ""
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before, "files were left or lost"


@pytest.fixture
def source(llama_bf16: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama_bf16, tmp_path / "source")


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints(source: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(source)
    out = source.parent / "out"
    _refused(["prune", str(source), "--out", str(out), "--compute-dtype", "float32"], message, source.parent)
    assert not out.exists()
    if case not in ("not finite", "no tokenizer"):
        _refused(["inspect", str(source)], message, source.parent)


def test_weights_that_are_not_finite_outside_the_stack(source: Path) -> None:
    _edit_shards(source, "model.embed_tokens.weight", lambda t: t.fill_(float("inf")))
    command = ["prune", str(source), "--out", str(source.parent / "out")]
    _refused(command, "tensor model.embed_tokens.weight has", source.parent)


@pytest.mark.parametrize("name", [UP, "lm_head.weight", "model.embed_tokens.weight"])
def test_perplexity_of_weights_that_are_not_finite(source: Path, name: str) -> None:
    _edit_shards(source, name, lambda t: t.fill_(float("nan")))
    (source.parent / "text.txt").write_text("The river was long. " * 20)
    command = ["perplexity", str(source), "--text", str(source.parent / "text.txt"), "--compute-dtype", "float32"]
    _refused(command, f"tensor {name} has", source.parent)


def test_nothing_but_the_line_on_stderr(source: Path) -> None:
    """In a process of its own, where the libraries below are free to warn and to log."""
    edit_json(
        source / "config.json",
        lambda d: d.update(
            {key: {"rope_type": "nosuch", "factor": 2.0} for key in ("rope_parameters", "rope_scaling")}
        ),
    )
    arguments = ["prune", str(source), "--out", str(source.parent / "out")]
    command = [sys.executable, "-m", "streamcollapse", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no causal language model can be built")
    assert done.stderr.count("\n") == 1


def test_apply_names_the_tensor_that_is_not_finite(source: Path) -> None:
    """The plan is made for the damaged weights, so only the write can notice."""
    _edit_shards(source, UP, _nan)
    from streamcollapse import Checkpoint

    plan = without_last("source", 8, Checkpoint(source).fingerprint())
    plan.save(source.parent / "plan.json")
    out = source.parent / "out"
    _refused(["apply", str(source), str(source.parent / "plan.json"), "--out", str(out)], UP, source.parent)


OPTIONS: dict[str, tuple[list[str], str]] = {
    "C": (["--layers-per-merge", "1"], "(C) is 1"),
    "L above H": (["--lowest", "5", "--highest", "4"], "(L) is 5, above highest (H), 4"),
    "H beyond": (["--highest", "9"], "(H) is 9, but the model has 8 layers"),
    "T above": (["--threshold", "1.5"], "(T) is 1.5"),
    "T below": (["-T", "-1.5"], "(T) is -1.5"),
    "T nan": (["-T", "nan"], "(T) is nan"),
    "I": (["--interval", "0"], "(I) is 0"),
    "rule": (["--rule", "bset"], "rule 'bset' is unknown"),
    "device": (["--device", "tpu"], "device is 'tpu'; choose auto, cpu, cuda or cuda:N"),
    "dtype": (["--compute-dtype", "int8"], "compute dtype is 'int8'; choose one of auto, float32"),
    "shard size": (["--max-shard-size", "5 apples"], "'5 apples' is not a size"),
    "no lookahead": (["--lookahead", "0"], "lookahead is 0; it must be greater than or equal to 1"),
    "lookahead": (["--lookahead", "far"], "lookahead is 'far'; it must be auto or a whole number"),
    "max tokens": (["--max-tokens", "0"], "max tokens is 0"),
    "calibration": (["--calibration", "/nonexistent.txt"], "/nonexistent.txt: cannot be read"),
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("dry", [False, True])
def test_options_out_of_range(source: Path, case: str, dry: bool) -> None:
    arguments, message = OPTIONS[case]
    out = source.parent / "out"
    command = ["prune", str(source), "--out", str(out), *arguments, *(["--dry-run"] if dry else [])]
    _refused(command, message, source.parent)


def test_empty_calibration(source: Path) -> None:
    (source.parent / "empty.txt").write_text("\n \n")
    out = source.parent / "out"
    command = ["prune", str(source), "--out", str(out), "--calibration", str(source.parent / "empty.txt")]
    _refused(command, "no samples in it; write one sample a line", source.parent)


def test_places_for_the_output(source: Path) -> None:
    (source.parent / "there").mkdir()
    (source.parent / "there" / "precious").write_text("x")
    for out, message in (
        (source.parent / "there", "exists; choose another --out or pass --overwrite"),
        (source, "is, contains or lies inside the source"),
        (source / "out", "is, contains or lies inside the source"),
        (source.parent / ("a" * 250), "the name is too long"),
        (Path("/"), "/: is the root of the file system"),
        (source.parent / ("a" * 5000), "cannot be used: File name too long"),
    ):
        _refused(["prune", str(source), "--out", str(out)], message, source.parent)
    command = ["prune", str(source), "--out", str(source.parent), "--overwrite"]
    _refused(command, "is, contains or lies inside the source", source.parent)


def test_plans(source: Path, llama: Path) -> None:
    from streamcollapse import Checkpoint

    plan, out = source.parent / "plan.json", str(source.parent / "out")
    without_last("other", 8, Checkpoint(llama).fingerprint()).save(plan)
    _refused(["apply", str(source), str(plan), "--out", out], "the plan was made for another source", source.parent)
    plan.write_text(json.dumps({"format": "x"}))
    _refused(["apply", str(source), str(plan), "--out", out], "plan.json: the plan: layers is missing", source.parent)
    _refused(["apply", str(source), str(plan) + "x", "--out", out], "cannot be read", source.parent)
    _refused(["search", str(source), "--plan", str(plan)], "plan.json: exists; choose another --plan", source.parent)
    _refused(["search", str(source), "--plan", str(source)], "source: is a directory", source.parent)
    _refused(["search", str(source), "--plan", "/"], "/: is a directory", source.parent)


def test_no_space(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    out = source.parent / "out"
    _refused(["prune", str(source), "--out", str(out)], "no space on the disk: ", source.parent)


def test_no_cuda(source: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    command = ["prune", str(source), "--out", str(source.parent / "out"), "--device", "cuda"]
    _refused(command, "device cuda: no CUDA device is available; pass --device cpu", source.parent)


def test_usage_errors_have_their_own_exit_code() -> None:
    assert CliRunner().invoke(app, ["prune"]).exit_code == 2
    assert CliRunner().invoke(app, ["prune", "x", "--out", "y", "--nonsense"]).exit_code == 2
    assert CliRunner().invoke(app, ["nonsense"]).exit_code == 2
