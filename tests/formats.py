"""The same checkpoint in other formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file


def as_torch(source: Path, out: Path, shards: int = 1, legacy: bool = False) -> Path:
    """The single-file checkpoint ``source`` in PyTorch files."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    parts = [names[i::shards] for i in range(shards)]
    files = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    files = ["pytorch_model.bin"] if shards == 1 else files
    for file, part in zip(files, parts, strict=True):
        torch.save({n: tensors[n] for n in part}, out / file, _use_new_zipfile_serialization=not legacy)
    if shards > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (out / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return out
