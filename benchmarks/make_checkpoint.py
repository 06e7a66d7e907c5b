"""Make a deterministic Llama-shaped checkpoint whose depth is smooth: neighbouring layers are alike, so merges pass.

    python benchmarks/make_checkpoint.py OUT --shape llama-1.4b [--layers N] [--seed S] [--sparse] [--device cuda]

Layer i is one random layer plus a slow rotation through a second one, so that layers far apart differ while
neighbours hardly do. The two random layers stay in memory in bfloat16, up to 3 GB of them; beside them memory is one
tensor, disk is the size of the checkpoint.

With --sparse the matrices of the decoder layers are holes in the files: 138 GB take about 1 GB of disk.
Holes read as zeros, and a layer whose matrices are zero passes its input through, so every merge is accepted.

With --device the noise is drawn and mixed there (other noise on every kind of device), and the files are written
through the page cache and not waited for: a large checkpoint in seconds, for as long as the machine is up.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import torch

from streamcollapse.storage.index import INDEX_FILE
from streamcollapse.storage.source import TensorInfo
from streamcollapse.storage.writer import ShardPlan, plan_shards, write_shards
from streamcollapse.units import format_bytes

NOISE_BYTES = 3 * 10**9  # most that is kept of the two random layers; what does not fit is drawn again when needed


@dataclass(frozen=True)
class Shape:
    """A Llama: sizes as in its config, and of the shards it is published in."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32000
    shard_bytes: int = 2 * 10**9


SHAPES = {
    "tiny": Shape(8, 64, 128, 4, 4, vocabulary=4096, shard_bytes=10**6),
    "llama-1.4b": Shape(24, 2048, 5632, 16, 16),
    "tinyllama-1.1b": Shape(22, 2048, 5632, 32, 4),
    "llama2-7b": Shape(32, 4096, 11008, 32, 32, shard_bytes=10**10),
    "llama2-13b": Shape(40, 5120, 13824, 40, 40, shard_bytes=10**10),
    "llama2-70b": Shape(80, 8192, 28672, 64, 8, shard_bytes=10**10),
}


class SmoothLlama:
    """The tensors of the checkpoint, computed on ``device`` when they are read (a TensorSource)."""

    def __init__(
        self,
        shape: Shape,
        seed: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    ) -> None:
        self.shape, self.seed, self.dtype, self.device = shape, seed, dtype, device
        self._kept: dict[str, torch.Tensor] = {}
        self._kept_bytes = 0
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
            return torch.ones(size, dtype=self.dtype, device=self.device)
        parts = name.split(".")
        if "layers" not in parts:
            return (0.02 * self._noise(name, size)).to(self.dtype)
        angle = 0.5 * int(parts[2]) / self.shape.layers
        suffix = ".".join(parts[3:])
        scale = 1.0 / math.sqrt(size[1])
        mixed = self._random_layer(f"a.{suffix}", size) * (scale * math.cos(angle))
        mixed.add_(self._random_layer(f"b.{suffix}", size), alpha=scale * math.sin(angle))
        return mixed.to(self.dtype)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self.read(name, self.device)[rows]

    def _noise(self, name: str, size: tuple[int, ...]) -> torch.Tensor:
        """Uniform noise of unit variance that depends on ``name`` and the seed alone."""
        number = self.seed + sum(ord(c) * 31**i for i, c in enumerate(name)) % (2**31)
        generator = torch.Generator(self.device).manual_seed(number)
        return (torch.rand(size, generator=generator, device=self.device) - 0.5) * math.sqrt(12)

    def _random_layer(self, name: str, size: tuple[int, ...]) -> torch.Tensor:
        """A matrix of one of the two random layers, in bfloat16; kept while there is room."""
        if name in self._kept:
            return self._kept[name]
        noise = self._noise(name, size).to(torch.bfloat16)
        if self._kept_bytes + noise.nbytes <= NOISE_BYTES:
            self._kept[name] = noise
            self._kept_bytes += noise.nbytes
        return noise

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


def make_checkpoint(
    out: Path, shape: Shape, seed: int = 0, sparse: bool = False, device: torch.device | None = None
) -> int:
    """Write the checkpoint into the new directory ``out``; returns its bytes of weights.

    With a ``device`` tensors are computed there and not waited for on the disk.
    """
    out.mkdir(parents=True)
    source = SmoothLlama(shape, seed, device=device or torch.device("cpu"))
    shards = plan_shards(source, shape.shard_bytes)
    if sparse or device is not None:
        write_plainly(source, shards, out, sparse)
    else:
        write_shards(source, shards, out, torch.device("cpu"))
    (out / "config.json").write_text(json.dumps(source.config(), indent=2))
    with resources.as_file(resources.files("streamcollapse.data") / "wiki-llama-24l") as model:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model / name, out / name)
    return sum(shard.data_bytes for shard in shards)


def write_plainly(source: SmoothLlama, shards: Sequence[ShardPlan], directory: Path, holes: bool) -> None:
    """As ``write_shards``, without waiting for the disk; with ``holes`` for the matrices of the decoder layers."""
    for shard in shards:
        with (directory / shard.file_name).open("wb") as file:
            file.write(shard.header)
            position = len(shard.header)
            for name in shard.names:
                info = source.info(name)
                if not holes or len(info.shape) == 1 or ".layers." not in name:
                    file.seek(position)
                    file.write(source.read(name, source.device).cpu().view(torch.uint8).numpy().data)
                position += info.num_bytes
            file.truncate(shard.file_bytes)
    if len(shards) > 1:
        weight_map = {name: shard.file_name for shard in shards for name in shard.names}
        index = {"metadata": {"total_size": sum(s.data_bytes for s in shards)}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def disk_bytes(directory: Path) -> tuple[int, int]:
    """Bytes of the files in ``directory`` by their sizes, and as the disk holds them where the system tells."""
    found = [path.stat() for path in directory.iterdir()]
    apparent = sum(stat.st_size for stat in found)
    return apparent, sum(stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size for stat in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1.4b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparse", action="store_true", help="leave the matrices of the decoder layers as holes")
    parser.add_argument("--device", type=torch.device, help="cpu or cuda: compute there, do not wait for the disk")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.layers:
        shape = replace(shape, layers=arguments.layers)
    start = time.perf_counter()
    weights = make_checkpoint(arguments.out, shape, arguments.seed, arguments.sparse, arguments.device)
    seconds = time.perf_counter() - start
    apparent, on_disk = disk_bytes(arguments.out)
    print(
        f"{arguments.out}: {shape.layers} layers, {format_bytes(weights)} of weights in "
        f"{len(list(arguments.out.glob('*.safetensors')))} shards; {format_bytes(apparent)} apparent, "
        f"{format_bytes(on_disk)} on disk; {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
