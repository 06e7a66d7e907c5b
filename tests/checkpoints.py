"""Small checkpoints made in code. Weights are scaled so that layers matter: some merges hurt, some do not."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

import streamcollapse

BUNDLED = Path(streamcollapse.__file__).parent / "data" / "wiki-llama-24l"
VOCABULARY = 4096  # that of the bundled tokenizer


def save_model(
    config: PretrainedConfig,
    out: Path,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    gain: float = 4.0,
    **save: Any,
) -> Path:
    """A random causal language model of ``config`` with the bundled tokenizer, saved by transformers."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)
            else:  # norms and biases: not all alike, so that mixing them up shows
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            assert torch.isfinite(parameter).all(), name
    model.to(dtype).save_pretrained(out, **save)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, out / name)
    return out


def llama_config(num_layers: int = 8, **changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "num_hidden_layers": num_layers,
    }
    return LlamaConfig(**(settings | changes))


def save_llama(out: Path, num_layers: int = 8, **options: Any) -> Path:
    return save_model(llama_config(num_layers), out, **options)


def edit_tensors(directory: Path, edit: Any) -> None:
    """Rewrite the single file of a checkpoint after ``edit(tensors)`` changed the dict in place."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, edit: Any) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def write_raw(path: Path, header: Any, data: bytes = b"", header_bytes: int | None = None) -> Path:
    """A safetensors file with exactly this header (JSON value or bytes) and data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if header_bytes is None else header_bytes) + raw + data)
    return path
