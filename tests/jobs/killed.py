"""Runs jobs in forked children that are killed at counted points. A program of its own, so that nothing in the parent
has started threads, which a fork does not take along.

    python -m tests.jobs.killed prune|convert SOURCE DIRECTORY POINTS SEED

A point is anything that touches the disk (an open, a write, a flush, a rename, a removal) or that the job says. Prints
one JSON document: how many points there are, which were tried, in which phase each was, and what went wrong.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamcollapse import Calibration, Compute, Output, SearchOptions, convert, prune
from streamcollapse.progress import Event, Listener, PhaseStarted
from streamcollapse.settings.run import RunSettings

OPTIONS = SearchOptions(layers_per_merge=3, interval=1, threshold=0.6, rule="mean")
OUTPUT = Output(max_shard_size="30kB")
WATCHED = ("fsync", "pwrite", "preadv", "posix_fallocate", "rename", "replace", "mkdir", "unlink", "rmdir", "truncate")


class Points:
    """Counts points, and ends the process without a word at number ``deadly``."""

    def __init__(self, deadly: int | None) -> None:
        self.deadly, self.count, self.phase = deadly, 0, "start"
        self.phases: list[str] = []

    def point(self) -> None:
        if self.count == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1
        self.phases.append(self.phase)

    def listen(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            self.phase = event.name
        self.point()

    def watch(self) -> None:
        for name in WATCHED:
            setattr(os, name, self._counted(getattr(os, name)))
        builtins.open = self._counted(builtins.open)  # type: ignore[assignment]
        io_open = Path.open
        Path.open = self._counted(io_open)  # type: ignore[method-assign]

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.point()
            return function(*arguments, **options)

        return counted


@dataclass(frozen=True)
class Work:
    """What is to be killed: ``verb`` on ``source``, with ``samples`` for those that want them."""

    verb: str
    source: Path
    samples: Path

    def do(self, out: Path, output: Output, listener: Listener) -> None:
        if self.verb == "convert":
            convert(self.source, out, dtype="bfloat16", output=output, listener=listener)
            return
        compute, calibration = Compute("cpu", "float32"), Calibration(self.samples)
        prune(
            self.source,
            out,
            OPTIONS,
            settings=RunSettings(calibration=calibration, compute=compute, output=output),
            listener=listener,
        )


def run(work: Work, out: Path, overwrite: bool, deadly: int | None, told: Path | None = None) -> int:
    """Do ``work`` in a child; returns its exit status as ``waitpid`` gives it."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 1
    try:
        torch.set_num_threads(1)
        points = Points(deadly)
        points.watch()
        work.do(out, Output(OUTPUT.max_shard_size, overwrite), points.listen)
        if told is not None:
            told.write_text(json.dumps(points.phases))
        code = 0
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent shall hear of it
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def contents(directory: Path) -> dict[str, Any]:
    """Every file's bytes; of the report, what is not time, bytes or memory of the run, or its place."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        if path.name in ("streamcollapse_report.json", "streamcollapse_conversion.json"):
            report = json.loads(path.read_text())
            for name in ("usage", "out"):
                report.pop(name, None)
            found[path.name] = report
        elif path.is_file():
            found[str(path.relative_to(directory))] = path.read_bytes()
    return found


def chosen_points(phases: list[str], points: int, draw: random.Random) -> list[int]:
    """About ``points`` of all points, at random, with five of each phase at least: the first phase has few."""
    numbers = list(range(len(phases)))
    draw.shuffle(numbers)
    of_each = [[n for n in numbers if phases[n] == phase][:5] for phase in dict.fromkeys(phases)]
    first = [n for some in of_each for n in some]
    return sorted(list(dict.fromkeys([*first, *numbers]))[: max(points, len(first))])


def main(verb: str, source: Path, directory: Path, points: int, seed: int) -> None:
    work = Work(verb, source, directory / "samples.txt")
    work.samples.write_text("A river runs.\nThe old town burned in the war.\n")
    expected, told = directory / "expected", directory / "told.json"
    assert run(work, expected, False, None, told) == 0
    phases: list[str] = json.loads(told.read_text())
    chosen = chosen_points(phases, points, random.Random(seed))
    right = contents(expected)
    halves = []
    for half in range(2):  # one for each core of a small machine
        place = directory / f"half-{half}"
        place.mkdir()
        if not (child := os.fork()):
            wrong = [said for number in chosen[half::2] for said in tried(work, place, number, right)]
            (directory / f"wrong-{half}.json").write_text(json.dumps(wrong))
            os._exit(0)
        halves.append(child)
    for child in halves:
        os.waitpid(child, 0)
    wrong = [said for half in range(2) for said in json.loads((directory / f"wrong-{half}.json").read_text())]
    killed = len(chosen) - wrong.count("not reached")
    wrong = [said for said in wrong if said != "not reached"]
    by_phase = Counter(phases[number] for number in chosen)
    print(json.dumps({"points": len(phases), "killed": killed, "phases": by_phase, "wrong": wrong}))


def tried(work: Work, parent: Path, number: int, right: dict[str, Any]) -> list[str]:
    """What went wrong when a run was killed at point ``number`` and then started again."""
    wrong: list[str] = []
    place = parent / str(number)
    place.mkdir()
    out, overwrite = place / "out", random.Random(number).random() < 0.3
    if overwrite:
        out.mkdir()
        (out / "old").write_text("old")
    if run(work, out, overwrite, number) != signal.SIGKILL:
        return ["not reached"]
    there = sorted(p.name for p in out.iterdir()) if out.exists() else None
    if there not in (None, ["old"], sorted(right)):
        wrong.append(f"{number}: half an output: {there}")
    if overwrite and there is None and not (place / ".out.replaced" / "old").exists():
        wrong.append(f"{number}: the old output is lost")
    complete = there == sorted(right) and not (place / ".out.work").exists()
    if run(work, out, overwrite, None) != 0 and not complete:  # else it says that the output exists
        wrong.append(f"{number}: the second run failed")
    elif contents(out) != right:
        wrong.append(f"{number}: another result")
    if sorted(p.name for p in place.iterdir()) != ["out"]:
        wrong.append(f"{number}: left behind: {sorted(p.name for p in place.iterdir())}")
    shutil.rmtree(place)
    return wrong


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
