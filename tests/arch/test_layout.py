from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from streamcollapse.arch.architecture import load_architecture
from streamcollapse.arch.config import load_config
from streamcollapse.arch.skeleton import build_skeleton
from streamcollapse.errors import ModelError
from streamcollapse.resources.meter import sample_memory
from streamcollapse.storage.checkpoint import Checkpoint
from tests.checkpoints import edit_json, edit_tensors, llama_config, save_llama, save_model

NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}


def test_layers_norms_and_the_rest(llama: Path) -> None:
    layout = load_architecture(Checkpoint(llama)).layout
    assert layout.stack == "model.layers"
    assert layout.num_layers == 8
    assert layout.norms == NORMS
    assert layout.unmerged == frozenset()
    assert not layout.tied_head
    assert sorted(layout.outside) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert set(layout.layers[3]) == {
        *NORMS,
        *(f"self_attn.{x}_proj.weight" for x in "qkvo"),
        *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    }
    assert layout.name(3, "mlp.up_proj.weight") == "model.layers.3.mlp.up_proj.weight"


def test_names_without_the_decoder_s_prefix(tmp_path: Path) -> None:
    """GPT-2 on the Hub stores h.0.… and a causal mask that is no weight; the head is tied."""
    config = GPT2Config(vocab_size=4096, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    directory = save_model(config, tmp_path / "gpt2")
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(directory / "model.safetensors").items()}
    for i in range(3):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    layout = load_architecture(Checkpoint(directory)).layout
    assert layout.stack == "h"
    assert layout.unmerged == {"attn.bias"}
    assert layout.norms == {"ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"}
    assert layout.tied_head
    assert layout.stored["transformer.wte.weight"] == "wte.weight"
    assert layout.stored["lm_head.weight"] == "wte.weight"


def test_tensors_that_do_not_match_the_model(tmp_path: Path) -> None:
    directory = save_llama(tmp_path / "m", num_layers=2)
    original = (directory / "model.safetensors").read_bytes()

    def refused(edit: object, message: str) -> None:
        (directory / "model.safetensors").write_bytes(original)
        edit_tensors(directory, edit)
        with pytest.raises(ModelError, match=message):
            load_architecture(Checkpoint(directory))

    refused(lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"model.layers.1.mlp.up_proj.weight is missing")
    refused(lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing")
    refused(lambda t: t.pop("lm_head.weight"), "tensor lm_head.weight is missing")
    refused(
        lambda t: t.update({"model.layers.2.x": torch.ones(1)}), r"model.layers.2.x belongs to a layer beyond the 2"
    )
    refused(
        lambda t: [t.pop(n) for n in list(t) if "layers" in n], r"no tensor is named model.layers.0.…; the checkpoint's"
    )
    refused(
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32, dtype=torch.int8)}),
        r"tensor model.layers.0.mlp.up_proj.weight is packed or quantised \(int8\)",
    )
    refused(
        lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(6, 32, dtype=torch.int32)}),
        r"up_proj.qweight is packed or quantised \(int32\)",
    )
    refused(
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32).to(torch.float8_e4m3fn)}),
        r"up_proj.weight is packed or quantised \(float8_e4m3fn\)",
    )


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path: Path) -> None:
    directory = save_model(llama_config(2, tie_word_embeddings=True), tmp_path / "m")
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    edit_tensors(directory, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    layout = load_architecture(Checkpoint(directory)).layout
    assert layout.tied_head
    assert layout.stored["lm_head.weight"] == "lm_head.weight"
    edit_tensors(directory, lambda tensors: tensors.update({"lm_head.weight": embedding + 1.0}))
    with pytest.raises(
        ModelError, match=r"are tied, but (model.embed_tokens|lm_head).weight and .* differ; set tie_word"
    ):
        load_architecture(Checkpoint(directory))
    edit_json(directory / "config.json", lambda d: d.update(tie_word_embeddings=False))
    assert not load_architecture(Checkpoint(directory)).layout.tied_head


@pytest.mark.parametrize("number", ["007", "٣", "9" * 5000, "-1"])
def test_numbers_that_are_no_layer_s_stay_outside(tmp_path: Path, number: str) -> None:
    directory = save_llama(tmp_path / "m", num_layers=2)
    edit_tensors(directory, lambda tensors: tensors.update({f"model.layers.{number}.extra": torch.ones(1)}))
    assert f"model.layers.{number}.extra" in load_architecture(Checkpoint(directory)).layout.outside


def test_a_wrapper_without_a_single_stack(tmp_path: Path) -> None:
    directory = save_llama(tmp_path / "m", num_layers=2)
    edit_json(directory / "config.json", lambda d: d.update(model_type="bert", architectures=["BertModel"]))
    with pytest.raises(ModelError):
        load_architecture(Checkpoint(directory))


def test_the_skeleton_of_a_large_model_takes_no_memory(tmp_path: Path) -> None:
    """A 70B-shaped model: 138 GB of parameters, none of them allocated; rotary frequencies are real."""
    config = llama_config(
        80, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, vocab_size=32000
    )
    config.save_pretrained(tmp_path)
    loaded = load_config(tmp_path, trust_remote_code=False)
    gc.collect()
    before = sample_memory().rss
    skeleton = build_skeleton(loaded, torch.bfloat16, trust_remote_code=False)
    after = sample_memory().rss
    assert sum(p.numel() for p in skeleton.model.parameters()) > 68e9
    assert all(p.is_meta for p in skeleton.model.parameters())
    assert not any(b.is_meta for b in skeleton.model.buffers())
    assert after - before < 200e6
    assert len(skeleton.layers) == 80
    assert (skeleton.decoder_path, skeleton.layers_path) == ("model", "model.layers")
