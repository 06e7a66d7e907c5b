"""Every claim about CUDA, measured by one command, in parts of nine minutes at most.

Question   Part 1   Do the tests that need a GPU pass? How fast are the bus, and the ring of slots over it? How long do
                    the paper's procedure and the default take on 1.1B and 7B shapes? Do CPU and GPU decide the same,
                    and mix to the same bits?
           Part 2   Does streaming reach its ceiling on the 13B with nothing resident? Are budgets of GPU memory kept,
                    and those that are too small refused, also beside another process?
           Part 3   Do searches on the 70B stay within 20 GiB of the GPU and 32 GiB of memory?
           Part 4   How long does a repair of a 7B take? How fast do a 7B and a 70B heal, and within which memory?
Ceiling    Of a streamed pass: the slower of reading alone from the page cache and copying alone, measured in its row.
Method     Every row is a process of its own with a time limit, forked from one that has made the imports. One that
           fails, dies or does not end is a row as well, and the others go on. Checkpoints are made on the GPU, into the
           page cache, and removed again; those of 13B and 70B are sparse: their holes read as zeros, so that nothing
           here says anything of a disk, but for the writes. Peaks are the allocator's (reserved, all of it), the
           device's and the process's (beyond what was held before the job, with the context there).
Rehearsal  ``--rehearse`` runs the same rows on a CPU with tiny shapes, and does not judge speed: figures mean nothing.

    python benchmarks/gpu_day.py --part 1|2|3|4 ... --out DIR [--work DIR] [--limit 540] [--only ROW ...] [--rehearse]

Needs one GPU of 80 GB, 128 GiB of memory and 40 GB of disk in --work; no network. The package runs from its source
tree. Of several parts what they share is made once. After every row DIR/gpu-day-partN.json and .md are written anew.
Exit code 1 if a row was not measured, or a wanted figure was missed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from gpu_results import Results
from gpu_rows import ABOUT, PARTS, ROWS, Row
from gpu_runner import Outcome, Runner

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "transformers", "safetensors", "numpy", "typer", "rich", "psutil", "pydantic", "yaml", "pytest",
          "xdist", "hypothesis")  # fmt: skip
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # as the command line sets it
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # to ask whether there is a GPU, the server of processes must not touch it
}


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the rows it means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=PARTS, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory for the two files of results")
    parser.add_argument("--work", type=Path, help="directory in which checkpoints are made and removed")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for all of it")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows in this order, each after what it needs")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes")
    given = parser.parse_args(arguments)
    here = {row.name: row for row in ROWS if not row.parts or not {*row.parts}.isdisjoint(given.part)}
    given.part = "-".join(map(str, given.part))
    for name in given.only or ():
        if name not in here:
            rows = ", ".join(row.name for row in here.values() if row.parts)
            parser.error(f"--only: {name!r} is no row of part {given.part}, which has {rows}")
    given.rows = chosen(here, given.only)
    return given


def chosen(here: dict[str, Row], only: Sequence[str] | None) -> list[Row]:
    """The rows of a part, or ``only`` some in their order, each after those that it needs."""
    found: list[Row] = []
    for name in [row.name for row in here.values() if row.parts] if only is None else only:
        for row in (*chosen(here, here[name].needs), here[name]):
            found += [] if row in found else [row]
    return found


def missing() -> list[str]:
    """The packages that are needed and not there; none is imported."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def prepare() -> None:
    """What the processes of rows inherit."""
    for name, value in ENVIRONMENT.items():
        os.environ[name] = value
    paths = [str(ROOT), str(ROOT / "benchmarks")]
    sys.path[:0] = [path for path in paths if path not in sys.path]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([before] if before else [])])
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """End in order: what runs is killed, what was made is removed, whoever sends a signal meanwhile."""
    for other in ENDING:
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


@contextlib.contextmanager
def workplace(parent: Path | None) -> Iterator[Path]:
    """A directory that is gone afterwards, whatever happens."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu-day-", dir=parent)).resolve()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def begin(given: argparse.Namespace, work: Path, results: Results) -> Runner | None:
    """Ask what machine this is, and say it; None where there is no device."""
    deadline = time.monotonic() + given.limit
    runner = Runner(work, given.rehearse, deadline)
    outcome = runner.run(ABOUT, ABOUT.limit)
    if outcome.finding is not None and outcome.finding.figures["forked"]:
        print("the server of processes has used CUDA: every row makes its own imports", flush=True)
        runner = Runner(work, given.rehearse, deadline, "spawn")
        outcome = runner.run(ABOUT, ABOUT.limit)
    found = outcome.finding
    if found is None:
        print(f"device: unknown\n{outcome.error}", flush=True)
        return None
    results.header += found.measured.splitlines()
    results.environment |= found.figures
    print(found.measured, flush=True)
    return runner if found.figures["usable"] else None


def measure(runner: Runner, rows: Sequence[Row], results: Results) -> None:
    """All ``rows``, each told as it ends."""
    done: set[str] = set()
    for row in rows:
        lacking = [need for need in row.needs if need not in done]
        outcome = Outcome(row, "not run", error=f"needs {lacking[0]}") if lacking else runner.run(row)
        results.add(outcome)
        if outcome.finding is not None:
            done.add(row.name)
        print(results.line(outcome), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a part; returns the exit code."""
    given = options(arguments)
    prepare()
    lacking = missing()
    told = f"missing packages: {', '.join(lacking) or 'none'}"
    print(told, flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    results = Results(given.out, given.part, given.rehearse, [told], {"missing": lacking})
    with workplace(given.work) as work:
        runner = begin(given, work, results)
        results.save()
        if runner is None:
            print("nothing can be measured here; --rehearse runs the same rows on a CPU")
            return 1
        measure(runner, given.rows, results)
    print(f"{results.summary()}; {results.table}")
    return 0 if results.good() else 1


if __name__ == "__main__":
    sys.exit(main())
