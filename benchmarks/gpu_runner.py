"""Runs rows of gpu_day.py, each in a process of its own with its own time limit. Knows nothing of torch.

Processes are forked by a server that has imported what rows need and has not touched the device, so that a row costs no
imports. A row is the leader of a process group, which is killed at the limit with whatever the row has started; it dies
with its parent. What it prints goes to a file, the end of which tells why it died.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from gpu_rows import Finding, Row

PRELOADED = (
    "transformers.models.llama.modeling_llama",
    "gpu_bus",
    "gpu_checks",
    "gpu_jobs",
    "gpu_mending",
    "gpu_streamed",
)
TOLD_LINES = 14  # of a traceback, or of a program's output
TOLD_FRAMES = 8  # of each thread of a process that was killed or died
_GONE_SECONDS = 20.0  # a killed process may still have to let go of the device
LEAST_SECONDS = 5.0  # with less left a row is not begun
_FINDING, _ERROR, _NOTES, _LOG = "finding.json", "error.txt", "notes.json", "log.txt"

JobEnded = Literal["measured", "failed", "died", "killed", "no time", "not run"]


@dataclass(frozen=True)
class Outcome:
    """How ``row`` ended: with a finding, or with an ``error``. ``notes``: figures that it had told before."""

    row: Row
    ended: JobEnded
    seconds: float = 0.0
    finding: Finding | None = None
    error: str = ""
    notes: dict[str, Any] = field(default_factory=dict)


class Runner:
    """Runs rows with files in ``work``, none beyond ``deadline`` (monotonic seconds)."""

    def __init__(self, work: Path, rehearsal: bool, deadline: float, method: str = "forkserver") -> None:
        self._work, self._rehearsal, self._deadline = work, rehearsal, deadline
        self._context = multiprocessing.get_context(method)
        if method == "forkserver":
            multiprocessing.set_forkserver_preload(list(PRELOADED))

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - time.monotonic()

    def run(self, row: Row, seconds: float | None = None) -> Outcome:
        """Run ``row`` to its end or its limit: ``seconds``, else its own within those that are left."""
        seconds = min(row.limit, self.left()) if seconds is None else seconds
        if seconds < min(LEAST_SECONDS, row.limit):
            return Outcome(row, "no time", error=f"no time is left for it: {max(self.left(), 0):.0f} s")
        place = self._work / "rows" / row.name
        place.mkdir(parents=True, exist_ok=True)
        arguments = (row.call, dict(row.given), str(self._work), str(place), self._rehearsal)
        process = self._context.Process(target=enter, args=arguments, name=row.name)  # type: ignore[attr-defined]
        started = time.monotonic()
        try:
            process.start()
            process.join(seconds)
            killed = process.is_alive()
        except (OSError, EOFError) as error:  # the server is gone; the next row starts another
            return Outcome(row, "failed", time.monotonic() - started, error=f"its process could not start: {error!r}")
        finally:
            if process.pid is not None:
                _end(process)
        taken = time.monotonic() - started
        if killed:
            why = f"killed at its limit of {seconds:.0f} s\n{_end_of(place / _LOG)}"
            return Outcome(row, "killed", taken, error=why.strip(), notes=_notes(place))
        return _outcome(row, taken, place, process.exitcode)


def _outcome(row: Row, seconds: float, place: Path, exit_code: int | None) -> Outcome:
    if (place / _FINDING).exists():
        return Outcome(row, "measured", seconds, Finding(**json.loads((place / _FINDING).read_text("utf-8"))))
    if error := _end_of(place / _ERROR):
        return Outcome(row, "failed", seconds, error=error, notes=_notes(place))
    how = f"of {signal.Signals(-exit_code).name}" if exit_code and exit_code < 0 else f"with exit code {exit_code}"
    why = f"its process died {how}\n{_end_of(place / _LOG)}"
    return Outcome(row, "died", seconds, error=why.strip(), notes=_notes(place))


def _notes(place: Path) -> dict[str, Any]:
    path = place / _NOTES
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def _end_of(path: Path) -> str:
    if not path.exists():
        return ""
    text = path.read_text("utf-8", errors="replace")
    stacks = [part for part in text.split("\n\n") if "(most recent call first)" in part]  # as faulthandler writes them
    if stacks:
        return "\n\n".join("\n".join(stack.splitlines()[: TOLD_FRAMES + 1]) for stack in stacks)
    return "\n".join(text.splitlines()[-TOLD_LINES:])


def _end(process: BaseProcess) -> None:
    """End ``process``, if it runs, and whatever it has started."""
    assert process.pid is not None
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)  # it tells where it was (``enter``)
        process.join(0.5)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(_GONE_SECONDS)


def enter(call: str, given: dict[str, Any], work: str, place: str, rehearsal: bool) -> None:
    """What the process of a row does: runs ``call``, and leaves in ``place`` what it found or why it did not."""
    os.setpgid(0, 0)
    threading.Thread(target=_die_with_parent, name="watch", daemon=True).start()
    log = os.open(Path(place) / _LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    temporary = Path(work) / "tmp"
    temporary.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    try:
        module, name = call.split(":")
        bench = import_module("gpu_bench").Bench(Path(work), Path(place), rehearsal)
        finding: Finding = getattr(import_module(module), name)(bench, **given)
        put(Path(place) / _FINDING, asdict(finding))
    except BaseException:  # noqa: BLE001 - whatever it is, the row tells it
        (Path(place) / _ERROR).write_text(traceback.format_exc(), "utf-8")
    os._exit(0)  # whatever threads or a device may still be waiting for


def put(path: Path, document: dict[str, Any]) -> None:
    """Write ``document`` to ``path``, whole or not at all."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(document, default=str), "utf-8")
    beside.replace(path)


def note(place: Path, **figures: Any) -> None:
    """Keep ``figures`` for the case that the row of ``place`` does not come to its end."""
    put(place / _NOTES, {**_notes(place), **figures})


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
