"""Does pruning stay within two decoder layers and the embedding?

Question   How much anonymous memory does a whole prune (reference pass, search, write) take beyond the interpreter
           with torch, transformers and this package imported?
Ceiling    Two decoder layers plus the embedding, in the checkpoint's bytes. File pages of the mapped checkpoint do
           not count: the kernel drops them when it needs the memory.
Method     A synthetic Llama of 24 layers, 2.73 GB in bfloat16. Each run is a process of its own; RssAnon of
           /proc/self/status is sampled every 10 ms. Thresholds force both outcomes: every merge accepted (T = -1)
           and some of each.

    python benchmarks/bench_memory.py [--keep DIR] [--repeat 3] [--save FILE]

Exits 1 when a run exceeds the ceiling. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streamcollapse.settings.run import RunSettings

CASES = [
    {"rule": "sequential", "dtype": "auto", "threshold": 0.65},
    {"rule": "sequential", "dtype": "float32", "threshold": 0.65},
    {"rule": "mean", "dtype": "auto", "threshold": -1.0},
    {"rule": "mean", "dtype": "float32", "threshold": -1.0},
]


def one_run(source: Path, out: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Prune in this process and report its memory. Called in a process of its own."""
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    import streamcollapse
    from streamcollapse.resources.meter import sample_memory

    options = streamcollapse.SearchOptions(strategy="laco", rule=case["rule"], threshold=case["threshold"])
    compute = streamcollapse.Compute("cpu", case["dtype"])
    prune = streamcollapse.prune
    before = sample_memory().anonymous
    if before is None:
        raise SystemExit("this system does not tell anonymous memory apart; run it on Linux")
    pruned = prune(source, out, options, settings=RunSettings(compute=compute))
    usage: Any = pruned.report["usage"]
    return {
        "interpreter_bytes": before,
        "peak_anonymous_bytes": usage["peak_anonymous_rss"] - before,
        "per_phase": {p["name"]: p["peak_anonymous_rss"] - before for p in usage["phases"]},
        "seconds": usage["seconds"],
        "bytes_read": usage["bytes_read"],
        "layers": pruned.report["layers"],
        "compute_dtype": pruned.report["compute"]["dtype"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="where to keep the synthetic checkpoint between calls")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--save", type=Path, help="also write the document to this file")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        source, out, case = arguments.run
        print(json.dumps(one_run(Path(source), Path(out), json.loads(case))))
        return

    import torch
    from make_checkpoint import SHAPES, make_checkpoint

    from streamcollapse.jobs.inspect import inspect
    from streamcollapse.units import format_bytes

    with tempfile.TemporaryDirectory() as temporary:
        source = arguments.keep or Path(temporary) / "source"
        if not source.exists():
            make_checkpoint(source, SHAPES["llama-1.4b"])
        found = inspect(source)
        layer, embedding = max(found.layer_bytes), found.outside_bytes // 2
        ceiling = 2 * layer + embedding
        print(f"checkpoint {format_bytes(found.num_bytes)}, {found.num_layers} layers of {format_bytes(layer)}")
        print(f"ceiling    {format_bytes(ceiling)} (two layers and the embedding, {format_bytes(embedding)})")
        results: list[dict[str, Any]] = []
        for case in CASES:
            runs = []
            for _ in range(arguments.repeat):
                out = Path(temporary) / "out"
                command = [sys.executable, __file__, "--run", str(source), str(out), json.dumps(case)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                shutil.rmtree(out)
            peaks = [run["peak_anonymous_bytes"] for run in runs]
            result = {**case, "runs": runs, "median": statistics.median(peaks), "worst": max(peaks)}
            results.append(result)
            print(
                f"{case['rule']:<11}{runs[0]['compute_dtype']:<9} T = {case['threshold']:<5} "
                f"{runs[0]['layers']['before']} -> {runs[0]['layers']['after']} layers  "
                f"peak {', '.join(format_bytes(p) for p in peaks)}  "
                f"({100 * max(peaks) / ceiling:.0f} % of the ceiling)  {runs[0]['seconds']:.1f} s"
            )
    document = {
        "benchmark": "memory",
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "processor": torch.cpu.get_capabilities().get("cpu_name"),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
        },
        "date": datetime.now(UTC).date().isoformat(),
        "checkpoint_bytes": found.num_bytes,
        "layer_bytes": layer,
        "embedding_bytes": embedding,
        "ceiling_bytes": ceiling,
        "results": results,
        "within": all(r["worst"] <= ceiling for r in results),
    }
    if arguments.save:
        arguments.save.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    sys.exit(0 if document["within"] else 1)


if __name__ == "__main__":
    main()
