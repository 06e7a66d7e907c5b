"""mergekit writes the pruned model of a streamcollapse plan from its own YAML: passthrough slices, one per layer.

A plan made with the rule ``sequential`` says for each layer one source layer whose matrices it takes; the slice is that
layer. passthrough takes a slice whole, so the norms of a merged layer are those of the layer that gives the matrices,
where streamcollapse keeps those of the group's first layer: the same names, shapes and bytes are written, and all
matrices are the same.

    python mergekit_write.py SOURCE PLAN OUT [--threads N] [--shard-size BYTES]

Needs torch and mergekit. The last line of stdout is one JSON document; its part ``write`` is the merge, and ``flush``
brings the files to the disk.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import pairwise
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from usage import Usage


def slices(plan: dict[str, object], source: Path) -> list[dict[str, object]]:
    """Ranges of source layers, neighbours joined, in mergekit's words."""
    taken = []
    for layer in plan["layers"]:
        if list(layer["mix"].values()) != [1.0]:
            raise SystemExit(f"layer {layer} is a mix of several layers; passthrough cannot write it")
        taken.append(int(next(iter(layer["mix"]))))
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(taken)) if b != a + 1), len(taken)]
    ranges = [[taken[start], taken[end - 1] + 1] for start, end in pairwise(starts)]
    return [{"sources": [{"model": str(source), "layer_range": found}]} for found in ranges]


def flush(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shard-size", type=int, default=5 * 10**9, help="bytes")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    usage = Usage()
    plan = json.loads(given.plan.read_text(encoding="utf-8"))
    dtype = json.loads((given.source / "config.json").read_text(encoding="utf-8"))["dtype"]
    text = yaml.safe_dump({"merge_method": "passthrough", "dtype": dtype, "slices": slices(plan, given.source)})
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions(copy_tokenizer=True, lazy_unpickle=True, quiet=True, out_shard_size=given.shard_size)
    with usage.part("write"):
        run_merge(config, str(given.out), options, config_source=text)
    with usage.part("flush"):
        flush(given.out)
    usage.report(
        ("torch", "transformers", "mergekit"),
        did="passthrough slices; norms of merged layers from the layer that gives the matrices",
        threads=torch.get_num_threads(),
        slices=[found["sources"][0]["layer_range"] for found in slices(plan, given.source)],
        bytes_written=sum(path.stat().st_size for path in given.out.glob("*.safetensors")),
    )


if __name__ == "__main__":
    main()
