"""Converting PyTorch files the plain way: load a shard whole, save it whole.

python plain_convert.py SOURCE OUT [--dtype float32]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from usage import Usage


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype")
    arguments = parser.parse_args()
    usage = Usage()
    arguments.out.mkdir()
    shutil.copy(arguments.source / "config.json", arguments.out)
    shards = sorted(arguments.source.glob("*.bin"))
    with usage.part("convert"):
        for number, shard in enumerate(shards, 1):
            tensors = torch.load(shard, mmap=True, weights_only=True)
            dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
            tensors = {name: tensor.to(dtype) if dtype else tensor for name, tensor in tensors.items()}
            save_file(tensors, arguments.out / f"model-{number:05d}-of-{len(shards):05d}.safetensors", {"format": "pt"})
            del tensors
    usage.report(("torch", "safetensors"))


main()
