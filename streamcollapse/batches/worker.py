"""What a worker does with a chain of tasks: each is done, or found done already, or fails alone; and what runs workers,
as processes on this machine (local.py) or on a Ray cluster (on_ray.py)."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from streamcollapse.batches.figures import FIGURES_FILE, PAGE_FILE, make_figures
from streamcollapse.batches.tasks import Chain, Convert, Describe, Liken, Predict, Prune, Task, result_key, search_key
from streamcollapse.errors import DeviceFailedError, OutputError, StreamCollapseError, printable
from streamcollapse.jobs.convert import CONVERSION_FILE, PreparedConversion, prepare_convert, run_convert
from streamcollapse.jobs.prepare import Prepared, prepare_prune
from streamcollapse.jobs.prune import run_prune
from streamcollapse.output.checkpoint import REPORT_FILE
from streamcollapse.output.files import every_file_beside
from streamcollapse.progress import Event, Listener, silent
from streamcollapse.settings.run import Calibration, Compute, Output, RunSettings, Streaming
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.disk import disk_errors, write_whole
from streamcollapse.storage.hub import local_directory

# of a worker before it does anything: Python, torch and transformers; 350 MB were seen
INTERPRETER_BYTES = 500_000_000
STATE = ".streamcollapse-batch"  # a directory in that of the results


@dataclass(frozen=True)
class Place:
    """Where results go: ``out``; and what searches find out, for each other: ``work``."""

    out: Path
    work: Path

    def record(self, task: Task) -> Path:
        """The file that says that ``task`` is done."""
        return self.out / STATE / "done" / f"{task.name}.json"


@dataclass(frozen=True)
class Machine:
    """What one worker computes with. ``threads``: of the CPU, None for all there are."""

    device: str
    streaming: Streaming
    threads: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a task. ``status`` is done, kept (from an earlier batch) or failed; ``figures`` are the result's."""

    name: str
    status: str
    out: str
    error: str | None = None
    seconds: float = 0.0
    attempts: int = 1
    figures: dict[str, Any] | None = None


@dataclass(frozen=True)
class JobStarted:
    """The worker with process id ``pid`` takes up the task ``name``."""

    name: str
    pid: int


@dataclass(frozen=True)
class JobEvent:
    """What the job of the task ``name`` says while it runs."""

    name: str
    event: Event


@dataclass(frozen=True)
class JobEnded:
    """A task came to its end."""

    outcome: Outcome


Message = JobStarted | JobEvent | JobEnded
Send = Callable[[Message], None]


def run_chain(chain: Chain, place: Place, machine: Machine, send: Send) -> None:
    """Do the tasks of ``chain`` one after the other; what comes of each is sent."""
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    for task in chain:
        send(JobStarted(task.name, os.getpid()))
        send(JobEnded(run_task(task, place, machine, _sender(task, send))))


def _sender(task: Task, send: Send) -> Listener:
    return lambda event: send(JobEvent(task.name, event))


def run_task(task: Task, place: Place, machine: Machine, listener: Listener) -> Outcome:
    """Do ``task``, unless it is done. Raises DeviceFailedError: another process may still do it."""
    start, out = time.perf_counter(), place.out / task.name
    try:
        with disk_errors(place.out):
            place.out.mkdir(parents=True, exist_ok=True)
        directory = local_directory(task.source, listener)
        version = source_version(directory)
        key = result_key(task, version)
        if not isinstance(task.work, Describe) and (known := finished(task, place, key)) is not None:
            return known
        work_dir = None
        if isinstance(task.work, Prune):
            work_dir = place.work / search_key(task.work, version, torch.device(machine.device).type)
            with disk_errors(place.work):
                place.work.mkdir(parents=True, exist_ok=True)
        if isinstance(task.work, Predict | Liken | Describe):
            is_ours(out)
            figures = make_figures(task.work, directory, out, settings_of(task, machine), listener)
        else:
            prepared = prepare_task(task, directory, out, machine, work_dir, listener)
            figures = _pruned(prepared) if isinstance(prepared, Prepared) else _converted(prepared)
        outcome = Outcome(task.name, "done", str(out), seconds=time.perf_counter() - start, figures=figures)
        _keep(place.record(task), key, outcome, _files(out))
    except DeviceFailedError:
        raise
    except (StreamCollapseError, OSError) as error:
        said = str(error) if isinstance(error, StreamCollapseError) else f"{error.filename}: {error.strerror}"
        return Outcome(task.name, "failed", str(out), printable(said), time.perf_counter() - start)
    return outcome


def prepare_task(
    task: Task, directory: Path, out: Path, machine: Machine, work_dir: Path | None, listener: Listener = silent
) -> Prepared | PreparedConversion:
    """``task``, which makes a checkpoint, on the source in ``directory``, checked. Raises what it would raise before it
    begins."""
    output = Output(task.max_shard_size, overwrite=is_ours(out))
    if isinstance(task.work, Convert):
        return prepare_convert(directory, out, task.work.dtype, output, listener)
    assert isinstance(task.work, Prune)
    settings = settings_of(task, machine)
    streaming = replace(machine.streaming, work_dir=work_dir)
    settings = replace(settings, streaming=streaming, output=output, judging=task.work.judging)
    settings = replace(settings, repair=task.work.repair, also_heal=task.work.also_heal)
    return prepare_prune(directory, out, task.work.options, settings, listener)


def settings_of(task: Task, machine: Machine) -> RunSettings:
    """What ``machine`` computes ``task`` with."""
    work = task.work
    assert not isinstance(work, Convert)
    calibration = Calibration() if isinstance(work, Predict | Describe) else work.calibration
    compute = Compute(machine.device, work.compute_dtype)
    return RunSettings(compute, calibration, machine.streaming, trust_remote_code=machine.trust_remote_code)


def finished(task: Task, place: Place, key: str) -> Outcome | None:
    """What an earlier batch made of ``task``, if it is still there."""
    try:
        record = json.loads(place.record(task).read_text(encoding="utf-8"))
        if record["key"] != key or record["files"] != _files(place.out / task.name):
            return None
        return replace(Outcome(**record["outcome"]), status="kept")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_ours(out: Path) -> bool:
    """Whether what is at ``out`` was made by this program and may be made again. Raises OutputError where it was
    not."""
    if not out.exists():
        return False
    if not any((out / name).is_file() for name in (REPORT_FILE, CONVERSION_FILE, FIGURES_FILE, PAGE_FILE)):
        raise OutputError(f"{out}: exists and is no result of this program; move it, or choose another `out`")
    return True


def _converted(prepared: PreparedConversion) -> dict[str, Any]:
    found = run_convert(prepared)
    figures: dict[str, Any] = {"bytes": {"before": sum(found.before.values()), "after": sum(found.after.values())}}
    if found.usage is not None:  # None: an earlier run had finished it but for the name
        figures |= {"bytes_read": found.usage["bytes_read"], "peak_rss": found.usage["peak_rss"]}
    return figures


def _pruned(prepared: Prepared) -> dict[str, Any]:
    pruned = run_prune(prepared)
    report, search = pruned.report, pruned.plan.search
    decisions = search.decisions if search is not None else ()
    return {
        "layers": report["layers"],
        "parameters": report["parameters"],
        "bytes": report["bytes"],
        "ratio": report["ratio"],
        "held_out": report.get("held_out"),
        "candidates": len(decisions),
        "accepted": sum(decision.accepted for decision in decisions),
        "bytes_read": report["usage"]["bytes_read"],
        "peak_rss": report["usage"]["peak_rss"],
        "peak_vram": report["usage"]["peak_vram"],
    }


def source_version(directory: Path) -> str:
    """What changes when the source in ``directory`` does, or is another one. Raises CheckpointError."""
    checkpoint = Checkpoint(directory)
    files = [path.relative_to(directory).as_posix() for path in every_file_beside(directory)]
    return f"{directory.resolve()} {checkpoint.fingerprint()} {checkpoint.state(*files)}"


def _files(out: Path) -> dict[str, list[int]]:
    """Size and time of modification of every file of a result."""
    found = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {path.relative_to(out).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns] for path in found}


def _keep(path: Path, key: str, outcome: Outcome, files: dict[str, list[int]]) -> None:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"key": key, "files": files, "outcome": asdict(outcome)}) + "\n")


@dataclass(frozen=True)
class FromChain:
    """``message`` came from the chain that was submitted as ``number``."""

    number: int
    message: Message


@dataclass(frozen=True)
class ChainEnded:
    """The chain ``number`` has come to its end, all of its tasks with it."""

    number: int


@dataclass(frozen=True)
class WorkerLost:
    """The worker of the chain ``number`` is gone, for the ``reason``: killed, out of memory, a mistake of ours."""

    number: int
    reason: str


Report = FromChain | ChainEnded | WorkerLost


class Engine(Protocol):
    """Runs chains side by side. Reports of one chain come in order."""

    def is_free(self) -> bool:
        """Whether another chain may be submitted now."""

    def submit(self, number: int, chain: Chain) -> None:
        """Run ``chain`` and call it ``number``."""

    def reports(self) -> list[Report]:
        """What has come in since the last call; waits a little if nothing has."""

    def close(self) -> None:
        """End what is still running, and let go of the workers."""
