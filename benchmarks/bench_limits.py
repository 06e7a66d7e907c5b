"""Models that do not fit: 7B inside a 3 GiB memory cgroup, 70B with a budget of 12 GiB, on whatever machine this is.

Question   7b   Does the whole prune of a Llama2-7B-shaped checkpoint of 13.5 GB run inside a memory cgroup of 3 GiB,
and
                how long does it take? Wanted: under three minutes.
           70b  Does the search on a Llama2-70B-shaped directory of 138 GB stay within a budget of 12 GiB, whatever the
                outcomes? Forced both ways: T = -1 accepts every merge, T = 1 rejects every one.
Ceiling    7b   The bytes read and written at the rate of the disk, beside the time the report says was computed.
Method     7b   The checkpoint is dense and made by make_checkpoint.py; the cgroup (version 1) is made and removed by
                this script, which says so when it may not.
           70b  The checkpoint is sparse: large matrices are holes and read as zeros, so the numbers say nothing of a
                disk; what is measured is memory, and that the machinery holds. ``--samples`` sentences of calibration
                keep the computing short. The budget goes beyond the interpreter's own memory, which is told apart.

    python benchmarks/bench_limits.py {7b,70b} [--work DIR] [--samples 1] [--lookahead 16] [--save FILE]

The last line of stdout is one JSON document. Exit code 1 if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from about import report
from groups import NoGroupError, memory_group
from make_checkpoint import SHAPES, make_checkpoint
from measure import FailedError, Measured, run, write_sentences

from streamcollapse.units import format_bytes, format_seconds

GROUP_BYTES, SECONDS = 3 << 30, 180.0
BUDGET, BUDGET_BYTES = "12GiB", 12 << 30


def described(measured: Measured, usage: dict[str, Any]) -> dict[str, Any]:
    keys = ("name", "seconds", "seconds_reading", "seconds_waiting", "bytes_read", "bytes_written", "peak_rss",
            "peak_anonymous_rss", "peak_file_rss", "peak_group")  # fmt: skip
    phases = [{key: phase[key] for key in keys} for phase in usage["phases"]]
    memory = {key: value for key, value in usage["memory"].items() if key != "needs"}
    return {
        "process_seconds": measured.seconds,
        "job_seconds": usage["seconds"],
        "peak_rss": measured.peak_rss,
        "peak_anonymous_rss": measured.peak_anonymous_rss,
        "bytes_read": usage["bytes_read"],
        "bytes_written": usage["bytes_written"],
        "memory": memory,
        "phases": phases,
    }


def seven(given: argparse.Namespace, work: Path) -> tuple[dict[str, Any], bool]:
    """The prune of the 7B inside the cgroup."""
    source, out = work / "llama2-7b", work / "out"
    if not source.exists():
        make_checkpoint(source, SHAPES["llama2-7b"])
    verb = ["prune", str(source), "--out", str(out), "--strategy", "laco", "--json"]
    prune = [sys.executable, "-m", "streamcollapse", *verb]
    try:
        with memory_group(GROUP_BYTES) as group:
            measured, peak = run(group.launching(prune), dict(os.environ)), group.peak_bytes
    except (FailedError, NoGroupError) as error:
        raise SystemExit(f"7b: {error}") from None
    shutil.rmtree(out)
    document = measured.document
    found = {
        "case": "7b",
        "layers": document["layers"],
        "ratio": document["ratio"],
        **described(measured, document["usage"]),
    }
    found |= {"group_bytes": GROUP_BYTES, "group_peak": peak, "wanted_seconds": SECONDS}
    layers = document["layers"]
    print(f"{layers['before']} -> {layers['after']} layers in {measured.seconds:.0f} s (whole process)")
    print(f"group: {format_bytes(peak)} at most of {format_bytes(GROUP_BYTES)}, page cache included")
    return found, measured.seconds < SECONDS and peak <= GROUP_BYTES


def seventy(given: argparse.Namespace, work: Path) -> tuple[dict[str, Any], bool]:
    """The search on the sparse 70B, forced both ways."""
    source, plan, samples = work / "llama2-70b", work / "plan.json", work / "samples.txt"
    if not source.exists():
        make_checkpoint(source, SHAPES["llama2-70b"], sparse=True)
    write_sentences(samples, given.samples)
    runs, good = [], True
    for threshold in (-1, 1):
        search = [
            sys.executable,
            "-c",
            WITH_USAGE,
            str(source),
            str(threshold),
            str(samples),
            BUDGET,
            str(given.lookahead),
        ]
        measured = run(search, dict(os.environ))
        document = measured.document
        beyond = document["usage"]["peak_rss"] - document["interpreter_rss"]
        row = {"threshold": threshold, **{k: document[k] for k in ("layers_after", "candidates", "interpreter_rss")}}
        row |= {"peak_beyond_interpreter": beyond, **described(measured, document["usage"])}
        runs.append(row)
        good = good and beyond <= BUDGET_BYTES
        print(
            f"T = {threshold:>2}  80 -> {row['layers_after']} layers, {row['candidates']} candidates, "
            f"{format_seconds(measured.seconds)}, {format_bytes(row['bytes_read'])} read, "
            f"peak {format_bytes(beyond)} beyond the interpreter's {format_bytes(row['interpreter_rss'])}",
            flush=True,
        )
    plan.unlink(missing_ok=True)
    return {
        "case": "70b",
        "budget_bytes": BUDGET_BYTES,
        "samples": given.samples,
        "lookahead": given.lookahead,
        "runs": runs,
    }, good


WITH_USAGE = """
import json, sys
import transformers
from transformers import AutoModelForCausalLM
from streamcollapse import Calibration, RunSettings, SearchOptions, Streaming
from streamcollapse.jobs.prepare import prepare_search
from streamcollapse.jobs.search import run_search
from streamcollapse.resources.meter import sample_memory
source, threshold, samples, budget, lookahead = sys.argv[1:]
before = sample_memory().rss
settings = RunSettings(calibration=Calibration(samples), streaming=Streaming(int(lookahead), ram_budget=budget))
prepared = prepare_search(source, SearchOptions(strategy="laco", threshold=float(threshold)), settings)
plan = run_search(prepared)
usage = {**prepared.job.meter.summary(), "memory": prepared.memory.to_json()}
print(json.dumps({"usage": usage, "interpreter_rss": before, "layers_after": plan.num_layers,
                  "candidates": len(plan.search.decisions)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("7b", "70b"))
    parser.add_argument("--work", type=Path, help="directory for the checkpoint, kept")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--lookahead", type=int, default=16)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    print(__doc__.split("\n\n")[1])
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(exist_ok=True)
        found, good = (seven if given.case == "7b" else seventy)(given, work)
    report("limits", {**found, "within": good}, given.save)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
