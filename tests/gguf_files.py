"""GGUF files of small models, made as llama.cpp's converter makes them: its names, and what it does to weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file

from tests.checkpoints import VOCABULARY, save_model

LAYERS = 3
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "num_hidden_layers": LAYERS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# The config, GGUF's architecture, and the name that the file gives the model.
FAMILIES: dict[str, tuple[Any, str, str]] = {
    "llama": (lambda: hf.LlamaConfig(**SMALL), "llama", "small"),
    "llama, tied": (lambda: hf.LlamaConfig(**SMALL, tie_word_embeddings=True), "llama", "small"),
    "mistral": (lambda: hf.MistralConfig(**SMALL, sliding_window=None, head_dim=16), "llama", "Mistral 7B"),
    "qwen 2": (lambda: hf.Qwen2Config(**SMALL), "qwen2", "small"),
    "qwen 3": (lambda: hf.Qwen3Config(**SMALL, head_dim=128), "qwen3", "small"),
    "gemma 3": (lambda: hf.Gemma3TextConfig(**SMALL, head_dim=32, sliding_window=16), "gemma3", "small"),
    "phi 3": (lambda: hf.Phi3Config(**SMALL | {"vocab_size": 32_064}), "phi3", "small"),
    "qwen 3, experts": (
        lambda: hf.Qwen3MoeConfig(
            **SMALL, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=768
        ),
        "qwen3moe",
        "small",
    ),
    "qwen 2, experts": (
        lambda: hf.Qwen2MoeConfig(
            **SMALL,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
        ),
        "qwen2moe",
        "small",
    ),
}


def save_gguf(family: str, directory: Path, kind: str = "Q8_0", **save: Any) -> Path:
    """A random model of ``family`` as ``directory/model.gguf``, matrices in ``kind``; the checkpoint that it is made of
    is in ``directory/original``."""
    make, architecture, name = FAMILIES[family]
    config = make()
    original = save_model(config, directory / "original", gain=2.0, **save)
    tensors: dict[str, torch.Tensor] = {}
    for shard in original.glob("*.safetensors"):
        tensors |= load_file(shard)
    import gguf

    path = directory / "model.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    _write_config(writer, config, architecture)
    _write_tokenizer(writer, original, "llama" if architecture == "gemma3" else "gpt2")
    quantised = gguf.GGMLQuantizationType[kind]
    for stored, weight in _as_converted(tensors, config, architecture).items():
        array = weight.float().numpy()
        if array.ndim > 1 and array.shape[-1] % 32 == 0 and "ffn_gate_inp" not in stored:
            data = gguf.quants.quantize(array, quantised)
            writer.add_tensor(stored, data, raw_dtype=quantised)
        else:
            writer.add_tensor(stored, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_config(writer: Any, config: Any, architecture: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if experts := getattr(config, "num_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)


def _write_tokenizer(writer: Any, original: Path, kind: str) -> None:
    model = json.loads((original / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if kind == "llama":  # characters, and what stands for a space
        tokens = ["<bos>", "<eos>", "<unk>", "<pad>", "\u2581", *map(chr, range(33, 127))]
        tokens += [f"<unused{number}>" for number in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model(kind)
    if kind == "llama":  # pieces with scores instead of merges
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_unk_token_id(2)
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    if kind == "gpt2":
        writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _as_converted(tensors: dict[str, torch.Tensor], config: Any, architecture: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint under GGUF's names, as the converter leaves them."""
    import gguf

    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, weight in tensors.items():
        plain, _, suffix = name.rpartition(".")
        if ".experts." in plain:
            before, _, after = plain.partition(".experts.")
            number, _, what = after.partition(".")
            plain = f"{before}.experts.{what}"
            experts.setdefault(f"{names.get_name(plain)}.{suffix}", {})[int(number)] = weight
            continue
        if architecture == "llama" and plain.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if plain.endswith("q_proj") else config.num_key_value_heads
            weight = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        if architecture == "gemma3" and plain.endswith("norm"):
            weight = weight + 1
        if plain.endswith("shared_expert_gate"):
            weight = weight[0]
        found[f"{names.get_name(plain)}.{suffix}"] = weight
    return found | {name: torch.stack([parts[i] for i in sorted(parts)]) for name, parts in experts.items()}
