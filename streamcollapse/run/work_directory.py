"""Where a run keeps its progress: in a work directory, from which it resumes after a crash and the next one on the same
source profits, or only as long as it lasts.

    run.json         what the directory belongs to: nothing of another source, other samples, other versions is mixed in
    job.json         the job as it was asked for, to resume it (request.py)
    journal.jsonl    evaluated candidates, decisions, finished shards, one record a line (storage/disk.py)
    reference.json   written once the hidden states below are complete
    healing.safetensors, teacher.json, teacher-*    masters and moments after a step, and what they learn from
    fits.json, repair.json, refits/     layers that a repair has fitted, the repaired plan, and their tensors
    boundaries-*, last_hidden-*    hidden states of the original model, one file for each batch

Evaluations do not depend on threshold, rule, C or I, so a search with other settings reads only what is new. Decisions
and shards belong to one run: those behind the last record that says which.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streamcollapse.errors import OutputError, StreamCollapseError, printable
from streamcollapse.merge.record import Decision
from streamcollapse.run.evaluations import JournalMemory, Memory
from streamcollapse.run.first_checks import JOURNAL
from streamcollapse.settings.run import Streaming
from streamcollapse.settings.search import SearchOptions
from streamcollapse.storage.disk import Journal, disk_errors, is_intact, write_whole
from streamcollapse.storage.locks import lock
from streamcollapse.storage.scratch import DiskScratch, Scratch
from streamcollapse.storage.staging import gone_of, make_parents, partial_of, work_of

FORMAT = "streamcollapse.work/3"
RUN, JOB, REFERENCE, HEALING = "run.json", "job.json", "reference.json", "healing.safetensors"
FITS, REPAIR = "fits.json", "repair.json"
_LOCK = "lock"
_TEMPORARY = ".streamcollapse-"  # what the names of temporary directories in it begin with


class TemporaryWork:
    """Progress that goes with the run: ``memory`` of candidates, ``scratch`` for hidden states, and the directory
    ``path`` for other temporary files; ``files``: room there."""

    def __init__(self, path: Path, scratch: Scratch, memory: Memory | None = None) -> None:
        self.path, self.scratch, self.memory = path, scratch, memory or Memory()
        self.files = DiskScratch(path)

    def decided(self, number: int, decision: Decision) -> None:
        """Decision ``number`` of the search has been taken."""


class WorkDirectory(TemporaryWork):
    """The directory ``path``, made if it is not there, for runs of ``key``: everything that a similarity depends on.

    Raises OutputError when it belongs to another key, another run works there, or it is no work directory.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        check_directory(path, key)
        with disk_errors(path):
            path.mkdir(exist_ok=True)
            self._lock = (path / _LOCK).open("w")
        if not lock(self._lock):
            self._lock.close()
            raise OutputError(f"{path}: in use by another run; wait for it to finish or choose another `work_dir`")
        for left in path.glob(f"{_TEMPORARY}*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        if not (path / RUN).exists():
            write_document(path / RUN, key)
        self._journal = Journal(path / JOURNAL)
        super().__init__(path, DiskScratch(path), JournalMemory(self._journal))

    def close(self) -> None:
        """Let others work here."""
        self._lock.close()

    def begin(self, run: Mapping[str, Any], job: Mapping[str, Any]) -> None:
        """Go on with ``run`` if it is the last one here that is not complete, else begin it; ``job`` is how it was
        asked for."""
        write_document(self.path / JOB, job)
        current = self._current()
        if not current or current[0].get("run") != run or current[-1].get("kind") == "complete":
            self._journal.append([{"kind": "run", "run": run}])

    def _current(self) -> list[dict[str, Any]]:
        """The records of the last run, the first of which says which one it is."""
        records = self._journal.records
        last = max((i for i, record in enumerate(records) if record.get("kind") == "run"), default=len(records))
        return records[last:]

    def decided(self, number: int, decision: Decision) -> None:
        """Record decision ``number`` of the run, unless that has been done."""
        known = sum(record.get("kind") == "decision" for record in self._current())
        if number >= known:
            self._journal.append([{"kind": "decision", **vars(decision)}])

    def shards(self) -> dict[str, str]:
        """The shards that the run has finished: sha256 by file name."""
        found = (record for record in self._current() if record.get("kind") == "shard")
        return {str(record.get("name")): str(record.get("sha256")) for record in found}

    def reuse_shards(self, stage: Path) -> set[str]:
        """The shards in ``stage`` that the run has finished; whatever else is there is removed."""
        finished = {name for name, sha256 in self.shards().items() if is_intact(stage / name, sha256)}
        for entry in stage.iterdir():
            if entry.name not in finished:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        return finished

    def shard_done(self, name: str, sha256: str) -> None:
        """Record a finished shard."""
        self._journal.append([{"kind": "shard", "name": name, "sha256": sha256}])

    def publishing(self) -> None:
        """Record that the output is about to get its name."""
        self._journal.append([{"kind": "renaming"}])

    def complete(self) -> None:
        """Record that the run is done."""
        self._journal.append([{"kind": "complete"}])

    def has_finished(self, out: Path) -> bool:
        """Whether the last run was interrupted when ``out`` had got its name already."""
        current = self._current()
        return bool(current) and current[-1].get("kind") == "renaming" and not partial_of(out).exists()

    def is_worth_keeping(self) -> bool:
        """Whether it holds any progress."""
        return any((self.path / name).exists() for name in (REFERENCE, HEALING, FITS, REPAIR)) or any(
            record.get("kind") in ("evaluated", "shard") for record in self._journal.records
        )

    def remove(self) -> None:
        """Remove the directory with all that is in it: at once, as far as any other run can see."""
        gone = gone_of(self.path)
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def temporary_work(spill: bool) -> Iterator[TemporaryWork]:
    """Progress that goes with the run: hidden states in memory, or with ``spill`` in temporary files."""
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY) as directory:
        path = Path(directory)
        yield TemporaryWork(path, DiskScratch(path) if spill else Scratch())


@contextmanager
def work_directory(
    path: Path,
    key: Mapping[str, Any],
    run: Mapping[str, Any],
    job: Mapping[str, Any],
    *,
    persistent: bool,
    hint: str,
    claim: AbstractContextManager[None] | None = None,
) -> Iterator[WorkDirectory]:
    """The work directory ``path`` for ``run`` while the body lasts, inside of ``claim``; ``job`` as for ``begin``.

    Unless it is ``persistent`` it is removed at the end. A run that fails leaves it if it holds progress, and its error
    then ends with ``hint``, which says how to resume. Raises OutputError.
    """
    directory = WorkDirectory(path, key)
    with closing(directory):
        try:
            with claim or nullcontext():
                directory.begin(run, job)
                yield directory
            if persistent:
                directory.complete()
        except (StreamCollapseError, OSError, KeyboardInterrupt) as error:
            if directory.is_worth_keeping():
                error.args = ("; ".join(filter(None, (str(error), hint))),)
            elif not persistent:
                directory.remove()
            raise
        if not persistent:  # last of all: while it is there, a run that was killed knows how far it had come
            directory.remove()


@contextmanager
def search_work(
    key: Mapping[str, Any], options: SearchOptions | None, streaming: Streaming, spill: bool, save_as: Path | None
) -> Iterator[TemporaryWork]:
    """The work of a search: in the directory that ``streaming`` names, or one beside ``save_as``, where its plan will
    be, until it is there; without either, work that goes with the run."""
    path = search_path(streaming, save_as)
    if path is None:
        with temporary_work(spill) as work:
            yield work
        return
    if save_as is not None:
        make_parents(save_as)
    run = {"search": None if options is None else asdict(options)}
    hint = f"progress saved in {printable(path)}; run the same command again to resume"
    with work_directory(path, key, run, {}, persistent=streaming.work_dir is not None, hint=hint) as directory:
        yield directory


def search_path(streaming: Streaming, save_as: Path | None) -> Path | None:
    """The work directory of a search whose plan will be at ``save_as``, if it has one."""
    if streaming.work_dir is not None:
        return Path(streaming.work_dir)
    return None if save_as is None else work_of(save_as)


def check_directory(path: Path, key: Mapping[str, Any]) -> None:
    """Raise OutputError unless a run of ``key`` may work in the directory ``path``; changes nothing."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is not a directory; choose another `work_dir`")
    if not path.resolve().parent.is_dir():
        raise OutputError(f"{path.parent}: does not exist; create it first")
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: cannot be written to; choose another `work_dir`")
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / RUN).exists():
        if {entry.name for entry in path.iterdir()} - {_LOCK, f".{RUN}.partial"}:
            raise OutputError(f"{path}: holds other files; choose another `work_dir`")
        return
    found = read_document(path / RUN)
    for name, value in key.items():
        if found.get(name) != value:
            raise OutputError(
                f"{path}: belongs to another run: its {name.replace('_', ' ')} is "
                f"{_short(found.get(name))}, this one's is {_short(value)}; remove it, or choose another `work_dir`"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}…"


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a work directory. Raises OutputError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{path}: cannot be read; choose another `work_dir`") from error
    if not isinstance(found, dict):
        raise OutputError(f"{path}: is not what a work directory holds; choose another `work_dir`")
    return found


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write a file of a work directory, whole or not at all. Raises OutputError."""
    write_whole(path, json.dumps(document, indent=1) + "\n")
