"""How long does one wait for an answer that needs no computing?

Question   Seconds, and seconds of processor time, of help, of mistakes in options, paths and files of jobs, and of
           ``inspect``: nearly all of it imports.
Ceiling    Starting Python; for ``inspect`` importing torch. Both are rows.
Method     Processes of their own, in turn, a first round to warm the page cache; medians of --repeat, every run in the
           file.
           Processor time is user and system time of the process, as the kernel counts it.

    python benchmarks/bench_startup.py [--repeat 7] [--save FILE]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

from about import report

PROGRAM = [sys.executable, "-m", "streamcollapse"]


def rows(model: Path, place: Path) -> dict[str, tuple[list[str], float | None]]:
    """The commands by name, each with the most seconds that it should take; of ``inspect`` processor time counts."""
    (place / "there").mkdir()
    (place / "jobs.yaml").write_text(f"jobs: [{{source: {model}, treshold: 1}}]")
    prune = [*PROGRAM, "prune", str(model), "--out", str(place / "out")]
    return {
        "Python alone": ([sys.executable, "-c", "pass"], None),
        "import torch": ([sys.executable, "-c", "import torch"], None),
        "--help": ([*PROGRAM, "--help"], 0.3),
        "--version": ([*PROGRAM, "--version"], 0.3),
        "prune --help": ([*PROGRAM, "prune", "--help"], 0.3),
        "an option that does not exist": ([*prune, "--stratgy", "laco"], 0.3),
        "an option outside its range": ([*prune, "-C", "1"], 0.3),
        "a source that does not exist": ([*PROGRAM, "prune", str(place / "no"), "--out", str(place / "out")], 1.0),
        "an output that exists": ([*PROGRAM, "prune", str(model), "--out", str(place / "there")], 1.0),
        "a typo in a file of jobs": ([*PROGRAM, "batch", str(place / "jobs.yaml"), "--out", str(place / "out")], 1.0),
        "inspect": ([*PROGRAM, "inspect", str(model)], 2.0),
    }


def measured(command: list[str]) -> dict[str, float]:
    """One run: seconds of the clock and of the processor."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    seconds, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "processor": used}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--save", type=Path, help="also write the document to this file")
    arguments = parser.parse_args()
    with resources.as_file(resources.files("streamcollapse.data")) as data, tempfile.TemporaryDirectory() as place:
        commands = rows(data / "wiki-llama-24l", Path(place))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for round_number in range(arguments.repeat + 1):
            for name, (command, _) in commands.items():
                one = measured(command)
                if round_number:
                    runs[name].append(one)
    results: list[dict[str, Any]] = []
    for name, (_, most) in commands.items():
        medians = {key: statistics.median(run[key] for run in runs[name]) for key in ("seconds", "processor")}
        counted = medians["processor" if name == "inspect" else "seconds"]
        results.append(
            {"what": name, **medians, "most": most, "met": most is None or counted <= most, "runs": runs[name]}
        )
        verdict = "" if most is None else f"   at most {most:g}: {'yes' if counted <= most else 'NO'}"
        print(f"{name:<32}{medians['seconds']:6.2f} s   {medians['processor']:6.2f} s of the processor{verdict}")
    report("startup", {"results": results}, arguments.save)


if __name__ == "__main__":
    main()
