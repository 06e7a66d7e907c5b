"""What does it cost when two programs share the cores?

Question   Threads that wait for work spin (OMP_WAIT_POLICY=ACTIVE, close to the default) or sleep (PASSIVE, which the
           command line sets). How long does a streamed perplexity take alone, and how long when two run at once?
Ceiling    Two at once take at best twice as long as one alone.
Method     The bundled model, 8,000 tokens, processes of their own; seconds of the perplexity phase, every run.

    python benchmarks/bench_contention.py [--repeat 3] [--save FILE]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path


def run(policy: str, together: int) -> list[float]:
    """Seconds of each of ``together`` processes that run at once."""
    with resources.as_file(resources.files("streamcollapse.data")) as data:
        text = str(data / "text" / "wiki_eval.txt")
        command = [sys.executable, "-m", "streamcollapse", "perplexity", str(data / "wiki-llama-24l"), "--text", text]
        command += ["--max-tokens", "8000", "--device", "cpu", "--json"]
        environment = {**os.environ, "OMP_WAIT_POLICY": policy}
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(together)]
        return [json.loads(process.communicate()[0])["usage"]["seconds"] for process in running]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--save", type=Path, help="also write the document to this file")
    arguments = parser.parse_args()
    results = []
    for policy in ("ACTIVE", "PASSIVE"):
        for together in (1, 2):
            runs = [seconds for _ in range(arguments.repeat) for seconds in run(policy, together)]
            results.append({"policy": policy, "together": together, "runs": runs, "median": statistics.median(runs)})
            spread = f"({min(runs):.2f} to {max(runs):.2f})"
            print(f"{policy:<8} {together} at once: median {statistics.median(runs):.2f} s  {spread}")
    document = {
        "benchmark": "contention",
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "results": results,
    }
    if arguments.save:
        arguments.save.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
