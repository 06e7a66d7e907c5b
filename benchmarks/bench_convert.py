"""What does converting a checkpoint of PyTorch files cost, in time and memory?

Question   Whole processes: `streamcollapse convert` against loading and saving shard by shard, the plain way, for the
           same bytes and for another precision. How far is it from copying as many bytes?
Ceiling    Copying the bytes that are written from a file in the page cache to the disk, fsync included.
Method     TinyLlama-1.1B's shape in bfloat16 in two PyTorch files, in the page cache. Runs alternate between the
           contenders. Memory is sampled from outside every 10 ms; anonymous memory is what the kernel cannot drop.

    python benchmarks/bench_convert.py [--shape tinyllama-1.1b] [--repeat 3] [--scratch DIR] [--save FILE]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from about import report
from make_checkpoint import SHAPES, make_checkpoint
from measure import CHUNK_BYTES, Measured, run
from safetensors.torch import load_file

from streamcollapse.storage.index import INDEX_FILE
from streamcollapse.units import format_bytes

HERE = Path(__file__).parent
CASES = {"the same bytes": None, "to float32": "float32"}


def make_torch_files(out: Path, shape: str, scratch: Path) -> int:
    """A checkpoint of ``shape`` in PyTorch files; returns its bytes."""
    made = scratch / "safetensors"
    make_checkpoint(made, SHAPES[shape])
    out.mkdir()
    weight_map: dict[str, str] = {}
    for shard in sorted(made.glob("*.safetensors")):
        tensors = load_file(shard)
        name = shard.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(tensors, out / name)
        weight_map |= dict.fromkeys(tensors, name)
    if (made / INDEX_FILE).exists():
        (out / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(made / "config.json", out)
    shutil.rmtree(made)
    return sum(path.stat().st_size for path in out.glob("*.bin"))


def copy_seconds(source: Path, out: Path, num_bytes: int) -> float:
    """Writing ``num_bytes`` from the files of ``source``, over and over, to ``out``, fsync included."""
    files = sorted(source.glob("*.bin"))
    start, left = time.perf_counter(), num_bytes
    with out.open("wb") as target:
        while left > 0:
            for file in files:
                with file.open("rb") as origin:
                    while left > 0 and (piece := origin.read(min(CHUNK_BYTES, left))):
                        target.write(piece)
                        left -= len(piece)
        target.flush()
        os.fsync(target.fileno())
    seconds = time.perf_counter() - start
    out.unlink()
    return seconds


def compare(source: Path, scratch: Path, dtype: str | None, num_bytes: int, repeat: int) -> dict[str, Any]:
    """Medians and every run of both contenders and of the copy, for one case."""
    out = scratch / "out"
    extra = ["--dtype", dtype] if dtype else []
    commands = {
        "streamcollapse": [sys.executable, "-m", "streamcollapse", "convert", str(source), "--out", str(out), "--json"],
        "plain": [sys.executable, str(HERE / "baselines" / "plain_convert.py"), str(source), str(out)],
    }
    runs: dict[str, list[Measured]] = {name: [] for name in commands}
    copies = []
    written = num_bytes * (2 if dtype == "float32" else 1)
    for _ in range(repeat):
        for name, command in commands.items():
            runs[name].append(run([*command, *extra], dict(os.environ)))
            os.sync()
            shutil.rmtree(out)
        copies.append(copy_seconds(source, scratch / "copy", written))
    inside = {
        "streamcollapse": [one.document["usage"]["seconds"] for one in runs["streamcollapse"]],
        "plain": [one.document["parts"]["convert"] for one in runs["plain"]],
    }
    return {
        "bytes_written": written,
        "copy_seconds": copies,
        "process_seconds": {name: [one.seconds for one in of] for name, of in runs.items()},
        "seconds": inside,
        "peak_anonymous_rss": {name: [one.peak_anonymous_rss for one in of] for name, of in runs.items()},
        "faster_than_plain": statistics.median(inside["plain"]) / statistics.median(inside["streamcollapse"]),
        "multiple_of_copy": statistics.median(inside["streamcollapse"]) / statistics.median(copies),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where the checkpoints are written (default: temporary directory)")
    parser.add_argument("--save", type=Path, help="also write the document to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as temporary:
        scratch = Path(temporary)
        num_bytes = make_torch_files(scratch / "source", arguments.shape, scratch)
        print(f"{arguments.shape}: {format_bytes(num_bytes)} of PyTorch files")
        results = {}
        for case, dtype in CASES.items():
            results[case] = found = compare(scratch / "source", scratch, dtype, num_bytes, arguments.repeat)
            peaks = {name: format_bytes(max(of)) for name, of in found["peak_anonymous_rss"].items()}
            print(
                f"{case:<16} {statistics.median(found['seconds']['streamcollapse']):.1f} s, "
                f"{found['faster_than_plain']:.2f} times as fast as plain, {found['multiple_of_copy']:.2f} x a copy; "
                f"anonymous memory {peaks['streamcollapse']}, plain {peaks['plain']}"
            )
    report("convert", {"shape": arguments.shape, "bytes": num_bytes, "results": results}, arguments.save)


if __name__ == "__main__":
    main()
