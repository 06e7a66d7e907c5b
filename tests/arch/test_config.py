from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, Gemma2Config, Gemma3TextConfig, GPT2Config, PretrainedConfig, Qwen2Config

from streamcollapse.arch.config import load_config, pruned_config
from streamcollapse.arch.stored import config_text
from streamcollapse.errors import CheckpointError, ModelError
from tests.checkpoints import edit_json, llama_config

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "head_dim": 8,
}


def _prune(config: PretrainedConfig, tmp_path: Path, bases: list[int]) -> tuple[dict[str, Any], PretrainedConfig]:
    config.save_pretrained(tmp_path)
    edited = pruned_config(load_config(tmp_path, trust_remote_code=False), bases)
    (tmp_path / "config.json").write_text(config_text(edited))
    return edited, AutoConfig.from_pretrained(tmp_path)


def test_only_the_layer_count_changes(tmp_path: Path) -> None:
    config = llama_config(8)
    config.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    edited, loaded = _prune(config, tmp_path, [0, 1, 5])
    assert edited == {**before, "num_hidden_layers": 3}
    assert loaded.num_hidden_layers == 3


def test_aliases_of_the_layer_count(tmp_path: Path) -> None:
    edited, loaded = _prune(GPT2Config(n_layer=6, n_embd=32, n_head=4), tmp_path, [0, 3])
    assert edited["n_layer"] == 2
    assert "num_hidden_layers" not in edited
    assert loaded.num_hidden_layers == 2


@pytest.mark.parametrize("kind", [Gemma2Config, Gemma3TextConfig])
def test_layer_types_follow_the_kept_bases(tmp_path: Path, kind: type[PretrainedConfig]) -> None:
    config = kind(num_hidden_layers=6, **SMALL)
    types = list(config.layer_types)
    bases = [0, 1, 3, 5]
    _, loaded = _prune(config, tmp_path, bases)
    assert list(loaded.layer_types) == [types[b] for b in bases]


def test_layer_types_that_are_derived_are_written_out_where_the_derivation_would_differ(tmp_path: Path) -> None:
    config = Qwen2Config(num_hidden_layers=6, use_sliding_window=True, max_window_layers=3, sliding_window=8, **SMALL)
    config.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda d: d.pop("layer_types", None))
    types = list(AutoConfig.from_pretrained(tmp_path).layer_types)
    assert len(set(types)) == 2
    edited = pruned_config(load_config(tmp_path, trust_remote_code=False), [0, 3, 4, 5])
    (tmp_path / "config.json").write_text(config_text(edited))
    assert list(AutoConfig.from_pretrained(tmp_path).layer_types) == [types[b] for b in (0, 3, 4, 5)]


def test_lists_that_only_happen_to_be_as_long_stay(tmp_path: Path) -> None:
    config = llama_config(3, eos_token_id=[1, 2, 3])
    edited, _ = _prune(config, tmp_path, [0])
    assert edited["eos_token_id"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda d: d.update(quantization_config={"quant_method": "gptq", "bits": 4}),
            r"quantised \(quantization_config: gptq\); use the original 16-bit weights",
        ),
        (lambda d: d.update(compression_config={"x": 1}), r"quantised \(compression_config: unknown\)"),
        (lambda d: d.update(model_type="nonsense"), "transformers cannot read it"),
        (
            lambda d: d.update(model_type="own", auto_map={"AutoConfig": "own.Config"}),
            "runs code of its own .* pass `trust_remote_code`",
        ),
        (lambda d: d.update(model_type="t5"), "encoder-decoder model"),
        (lambda d: d.update(model_type="bert"), "bert is an encoder, whose attention sees both ways"),
        (lambda d: d.update(num_hidden_layers=0), "no usable number of decoder layers"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, edit: Any, message: str) -> None:
    llama_config(2).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", edit)
    with pytest.raises(ModelError, match=message) as caught:
        load_config(tmp_path, trust_remote_code=False)
    assert "\n" not in str(caught.value)


def test_no_code_of_the_checkpoint_runs_without_the_flag(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "own.py").write_text(f"open({str(canary)!r}, 'w')\n")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.M"}})
    )
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_config(tmp_path, trust_remote_code=False)
    assert not canary.exists()


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read"):
        load_config(tmp_path, trust_remote_code=False)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_config(tmp_path, trust_remote_code=False)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not a JSON object"):
        load_config(tmp_path, trust_remote_code=False)
