"""Stored names against the model's own, where transformers converts on load; against what it loads itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from streamcollapse.arch.architecture import load_architecture
from streamcollapse.arch.naming import natural_key
from streamcollapse.errors import ModelError
from streamcollapse.run.opened import open_job
from streamcollapse.settings.run import Compute, RunSettings
from streamcollapse.storage.checkpoint import Checkpoint
from tests.checkpoints import edit_tensors, save_model
from tests.families import FAMILIES
from tests.streams import plain_stream


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return save_model(FAMILIES["mixtral, experts"](), tmp_path / "mixtral")


@pytest.mark.parametrize(
    "name", ["mixtral, experts", "qwen 3 moe, dense and sparse", "deepseek 3, latent attention, dense first"]
)
def test_assembled_parameters_are_those_that_transformers_loads(name: str, tmp_path: Path) -> None:
    """Twelve experts: the tenth is stored as ``experts.10``, which sorts before ``experts.2`` as text."""
    directory = save_model(FAMILIES[name](), tmp_path / "m")
    job = open_job(directory, RunSettings(Compute("cpu", "float32")))
    model, view = job.model(plain_stream(job)), job.original()
    own = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    for position in range(job.num_layers):
        with model.onload(view, position) as weights:
            expected = {n: t for n, t in own.items() if n.startswith(f"model.layers.{position}.")}
            assert len(weights.parameters) == len(expected)
            for suffix, parameter in weights.parameters.items():
                assert torch.equal(parameter, expected[f"model.layers.{position}.{suffix}"])


def test_the_names_on_disk_are_what_is_merged_and_written(mixtral: Path) -> None:
    layout = load_architecture(Checkpoint(mixtral)).layout
    stored = {n.removeprefix("model.layers.0.") for n in load_file(mixtral / "model.safetensors") if ".0." in n[:16]}
    assert set(layout.layers[0]) == stored
    assert "block_sparse_moe.experts.3.w2.weight" in stored
    assert layout.norms == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert layout.unmerged == frozenset()


def test_an_expert_that_is_missing(mixtral: Path) -> None:
    edit_tensors(mixtral, lambda tensors: tensors.pop("model.layers.2.block_sparse_moe.experts.3.w1.weight"))
    with pytest.raises(ModelError):
        load_architecture(Checkpoint(mixtral))


def test_all_experts_missing(mixtral: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".layers.2." in n and ".w2." in n]:
            del tensors[name]

    edit_tensors(mixtral, drop)
    with pytest.raises(ModelError, match=r"layers\.2\..*experts.* is missing"):
        load_architecture(Checkpoint(mixtral))


def test_layers_above_the_stack_that_the_model_leaves_out(tmp_path: Path) -> None:
    """DeepSeek-V3 stores a head that predicts two tokens at once as one layer more."""
    directory = save_model(FAMILIES["deepseek 3, latent attention, dense first"](), tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    edit_tensors(directory, lambda tensors: tensors.update({"model.layers.61.eh_proj.weight": torch.ones(2, 2)}))
    if not DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected:
        pytest.skip("this transformers does not know of them")
    layout = load_architecture(Checkpoint(directory)).layout
    assert not any("61" in name for name in layout.outside)
    edit_tensors(directory, lambda tensors: tensors.update({"model.layers.7.eh_proj.weight": torch.ones(2, 2)}))
    with pytest.raises(ModelError, match=r"layers.7.eh_proj.weight belongs to a layer beyond the 6"):
        load_architecture(Checkpoint(directory))


def test_natural_order() -> None:
    assert sorted(["e.10.w", "e.9.w", "e.1.w", "a"], key=natural_key) == ["a", "e.1.w", "e.9.w", "e.10.w"]
