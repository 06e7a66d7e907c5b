"""Make a deterministic Llama-shaped checkpoint whose depth is smooth: neighbouring layers are alike, so merges pass.

    python benchmarks/make_checkpoint.py OUT --shape llama-1.4b [--layers N] [--seed S]

Layer i is one random layer plus a slow rotation through a second one, so that layers far apart differ while
neighbours hardly do. Written tensor by tensor: memory is one tensor, disk is the size of the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from streamcollapse.storage.source import TensorInfo
from streamcollapse.storage.writer import plan_shards, write_shards
from streamcollapse.units import format_bytes


@dataclass(frozen=True)
class Shape:
    """A Llama: sizes as in its config."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32000


SHAPES = {
    "llama-1.4b": Shape(24, 2048, 5632, 16, 16),
    "tinyllama-1.1b": Shape(22, 2048, 5632, 32, 4),
    "llama2-7b": Shape(32, 4096, 11008, 32, 32),
}


class SmoothLlama:
    """The tensors of the checkpoint, computed when they are read (a TensorSource)."""

    def __init__(self, shape: Shape, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.seed, self.dtype = shape, seed, dtype
        head = shape.hidden // shape.heads
        kv = head * shape.key_value_heads
        h, f = shape.hidden, shape.feed_forward
        self._layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (h,),
            "self_attn.q_proj.weight": (h, h),
            "self_attn.k_proj.weight": (kv, h),
            "self_attn.v_proj.weight": (kv, h),
            "self_attn.o_proj.weight": (h, h),
            "post_attention_layernorm.weight": (h,),
            "mlp.gate_proj.weight": (f, h),
            "mlp.up_proj.weight": (f, h),
            "mlp.down_proj.weight": (h, f),
        }
        self._shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, h)}
        for i in range(shape.layers):
            self._shapes |= {f"model.layers.{i}.{suffix}": size for suffix, size in self._layer.items()}
        self._shapes |= {"model.norm.weight": (h,), "lm_head.weight": (shape.vocabulary, h)}

    @property
    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self.dtype, self._shapes[name])

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        size = self._shapes[name]
        if len(size) == 1:
            return torch.ones(size, dtype=self.dtype)
        parts = name.split(".")
        if "layers" not in parts:
            return (0.02 * self._noise(name, size)).to(self.dtype)
        angle = 0.5 * int(parts[2]) / self.shape.layers
        suffix = ".".join(parts[3:])
        mixed = math.cos(angle) * self._noise(f"a.{suffix}", size) + math.sin(angle) * self._noise(f"b.{suffix}", size)
        return (mixed / math.sqrt(size[1])).to(self.dtype)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self.read(name, torch.device("cpu"))[rows]

    def _noise(self, name: str, size: tuple[int, ...]) -> torch.Tensor:
        """Uniform noise of unit variance that depends on ``name`` and the seed alone."""
        number = self.seed + sum(ord(c) * 31**i for i, c in enumerate(name)) % (2**31)
        return (torch.rand(size, generator=torch.Generator().manual_seed(number)) - 0.5) * math.sqrt(12)

    def config(self) -> dict[str, object]:
        s = self.shape
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": str(self.dtype).removeprefix("torch."),
            "hidden_size": s.hidden,
            "intermediate_size": s.feed_forward,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "num_key_value_heads": s.key_value_heads,
            "vocab_size": s.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": False,
        }


def make_checkpoint(out: Path, shape: Shape, seed: int = 0) -> int:
    """Write the checkpoint into the new directory ``out``; returns its bytes of weights."""
    out.mkdir(parents=True)
    source = SmoothLlama(shape, seed)
    shards = plan_shards(source, 2 * 10**9)
    write_shards(source, shards, out, torch.device("cpu"), lambda name, num_bytes: None)
    (out / "config.json").write_text(json.dumps(source.config(), indent=2))
    with resources.as_file(resources.files("streamcollapse.data") / "wiki-llama-24l") as model:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model / name, out / name)
    return sum(shard.data_bytes for shard in shards)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1.4b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = SHAPES[arguments.shape]
    if arguments.layers:
        chosen = Shape(arguments.layers, *list(vars(chosen).values())[1:])
    print(f"{arguments.out}: {format_bytes(make_checkpoint(arguments.out, chosen, arguments.seed))}")
