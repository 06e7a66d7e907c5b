"""How long does it take from a signal to the end of a run?

Question   Seconds from SIGTERM or SIGINT, at any moment of a prune or a conversion, to the end of the process, and
           whether what was left behind leads to the result.
Ceiling    Two seconds, however large the checkpoint: somebody has pressed Ctrl-C, or a scheduler will kill.
Method     A synthetic checkpoint (make_checkpoint.py). One undisturbed run says how long one takes; then runs are
           signalled at moments drawn evenly from that time, seeded, SIGINT and SIGTERM in turn, each into an output of
           its own kind, which the next run of the same verb goes on with, as a user would. At the end each verb runs
           undisturbed, and its weights must be those of the first run (sha256 of every shard).

    python benchmarks/bench_interrupt.py [--shape tinyllama-1.1b] [--layers N] [--signals 20] [--work DIR] [--save FILE]

The last line of stdout is one JSON document. Exit code 1 if a run took longer than wanted, or ended otherwise than it
should.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from about import report
from make_checkpoint import SHAPES, make_checkpoint

WANTED = 2.0
VERBS = {"prune": ("--strategy", "laco"), "convert": ("--dtype", "float16")}


def start(verb: str, source: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "streamcollapse", verb, str(source), "--out", str(out), *VERBS[verb], "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def undisturbed(verb: str, source: Path, out: Path) -> tuple[float, dict[str, str]]:
    """Seconds of the process, and sha256 of its shards; the output is removed."""
    began = time.perf_counter()
    process = start(verb, source, out)
    stdout, stderr = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{verb}: {stderr}")
    shutil.rmtree(out)
    return time.perf_counter() - began, json.loads(stdout.splitlines()[-1])["shards"]


def signalled(verb: str, source: Path, out: Path, after: float, number: signal.Signals) -> dict[str, Any]:
    """One run that gets a signal ``after`` seconds."""
    process = start(verb, source, out)
    time.sleep(after)
    sent = time.perf_counter()
    process.send_signal(number)
    stderr = process.communicate()[1]
    seconds = time.perf_counter() - sent
    # Python's own end, after the output got its name, ends by the signal itself.
    done = out.exists() and process.returncode in (0, -number)
    shutil.rmtree(out, ignore_errors=True)
    good = done or (process.returncode == 128 + number and stderr.startswith("interrupted: "))
    if not good or len(stderr.splitlines()) > 1:
        print(stderr, flush=True)
    return {
        "verb": verb,
        "signal": number.name,
        "after": round(after, 3),
        "seconds": round(seconds, 3),
        "exit_code": process.returncode,
        "done": done,
        "resumable": "resume" in stderr,
        "good": good and len(stderr.splitlines()) <= 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--signals", type=int, default=20, help="for each verb")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="directory for the checkpoint, kept")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    print(__doc__.split("\n\n")[1])
    shape = replace(SHAPES[given.shape], layers=given.layers or SHAPES[given.shape].layers)
    rows: list[dict[str, Any]] = []
    same = True
    with tempfile.TemporaryDirectory(dir=given.work) as temporary:
        source = (given.work or Path(temporary)) / f"{given.shape}-{shape.layers}-layers"
        if not source.exists():
            make_checkpoint(source, shape)
        for verb in VERBS:
            out, drawn = Path(temporary) / verb, random.Random(given.seed)
            whole, expected = undisturbed(verb, source, out)
            for i in range(given.signals):
                number = (signal.SIGINT, signal.SIGTERM)[i % 2]
                rows.append(signalled(verb, source, out, drawn.uniform(0.1, whole), number))
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            same = same and undisturbed(verb, source, out)[1] == expected
        stored = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    ended = sorted(row["seconds"] for row in rows if not row["done"])
    found = {
        "shape": given.shape,
        "layers": shape.layers,
        "bytes": stored,
        "wanted_seconds": WANTED,
        "signals": len(rows),
        "ended_by_signal": len(ended),
        "median_seconds": ended[len(ended) // 2] if ended else None,
        "longest_seconds": ended[-1] if ended else None,
        "same_result": same,
        "runs": rows,
    }
    print(f"{len(ended)} of {len(rows)} runs ended by a signal, at the longest after {found['longest_seconds']} s; "
          f"the same result: {same}")  # fmt: skip
    report("interrupt", found, given.save, os.cpu_count())
    sys.exit(0 if same and ended and ended[-1] <= WANTED and all(row["good"] for row in rows) else 1)


if __name__ == "__main__":
    main()
