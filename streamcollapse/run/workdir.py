"""A work directory: what a run has found out, for its continuation after a crash or for the next one on the same
source.

    run.json         what the directory belongs to: nothing of another source, other samples, other versions is mixed in
    job.json         the job as it was asked for, to continue it (resume.py)
    journal.jsonl    evaluated candidates, decisions, finished shards, one record a line (storage/journal.py)
    reference.json   written once the hidden states below are complete
    boundaries-*, last_hidden-*    hidden states of the original model, one file for each batch

Evaluations do not depend on threshold, rule, C or I, so a search with other settings reads only what is new. Decisions
and shards belong to one run: those behind the last record that says which.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamcollapse.errors import OutputError
from streamcollapse.merge.plan import Decision
from streamcollapse.run.evaluations import JournalMemory
from streamcollapse.run.first_checks import JOURNAL
from streamcollapse.storage.digests import is_intact
from streamcollapse.storage.disk import disk_errors
from streamcollapse.storage.journal import Journal
from streamcollapse.storage.locks import lock
from streamcollapse.storage.rooms import OnDisk
from streamcollapse.storage.staging import gone_of, partial_of

FORMAT = "streamcollapse.work/3"
RUN, JOB, REFERENCE = "run.json", "job.json", "reference.json"
_LOCK = "lock"
_SCRATCH = ".streamcollapse-"  # what the names of temporary directories in it begin with


class WorkDirectory:
    """The directory ``path``, made if it is not there, for runs of ``key``: everything that a similarity depends on.

    Raises OutputError when it belongs to another key, another run works there, or it is no work directory.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        check_directory(path, key)
        with disk_errors(path):
            path.mkdir(exist_ok=True)
            self._lock = (path / _LOCK).open("w")
        if not lock(self._lock):
            self._lock.close()
            raise OutputError(f"{path}: in use by another run; wait for it to finish or choose another `work_dir`")
        for left in path.glob(f"{_SCRATCH}*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        if not (path / RUN).exists():
            with disk_errors(path):
                write_whole(path / RUN, key)
        self.room = OnDisk(path)
        self.journal = Journal(path / JOURNAL)
        self.memory = JournalMemory(self.journal)

    def close(self) -> None:
        """Let others work here."""
        self._lock.close()

    def begin(self, run: Mapping[str, Any], job: Mapping[str, Any]) -> None:
        """Go on with ``run`` if it is the last one here that is not complete, else begin it; ``job`` is how it was
        asked for."""
        with disk_errors(self.path):
            write_whole(self.path / JOB, job)
        current = self._current()
        if not current or current[0].get("run") != run or current[-1].get("kind") == "complete":
            self.journal.append([{"kind": "run", "run": run}])

    def _current(self) -> list[dict[str, Any]]:
        """The records of the last run, the first of which says which one it is."""
        records = self.journal.records
        last = max((i for i, record in enumerate(records) if record.get("kind") == "run"), default=len(records))
        return records[last:]

    def decided(self, number: int, decision: Decision) -> None:
        """Record decision ``number`` of the run, unless that has been done."""
        known = sum(record.get("kind") == "decision" for record in self._current())
        if number >= known:
            self.journal.append([{"kind": "decision", **vars(decision)}])

    def shards(self) -> dict[str, str]:
        """The shards that the run has finished: sha256 by file name."""
        found = (record for record in self._current() if record.get("kind") == "shard")
        return {str(record.get("name")): str(record.get("sha256")) for record in found}

    def take_up(self, stage: Path) -> set[str]:
        """The shards in ``stage`` that the run has finished; whatever else is there is removed."""
        finished = {name for name, sha256 in self.shards().items() if is_intact(stage / name, sha256)}
        for entry in stage.iterdir():
            if entry.name not in finished:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        return finished

    def shard_done(self, name: str, sha256: str) -> None:
        """Record a finished shard."""
        self.journal.append([{"kind": "shard", "name": name, "sha256": sha256}])

    def mark(self, kind: str) -> None:
        """Record that the run is ``renaming`` its output, or ``complete``."""
        self.journal.append([{"kind": kind}])

    def was_renaming(self) -> bool:
        """Whether the last run was broken off while or after its output got its name."""
        current = self._current()
        return bool(current) and current[-1].get("kind") == "renaming"

    def has_finished(self, out: Path) -> bool:
        """Whether the last run was broken off when ``out`` had got its name already."""
        return self.was_renaming() and not partial_of(out).exists()

    def is_worth_keeping(self) -> bool:
        """Whether anything has been found out here."""
        return (self.path / REFERENCE).exists() or any(
            record.get("kind") in ("evaluated", "shard") for record in self.journal.records
        )

    def remove(self) -> None:
        """Remove the directory with all that is in it: at once, as far as any other run can see."""
        gone = gone_of(self.path)
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


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
        if {entry.name for entry in path.iterdir()} - {_LOCK, f"{RUN}.partial"}:
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


def write_whole(path: Path, document: Mapping[str, Any]) -> None:
    """Write a file of a work directory so that it is there whole or not at all. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    to_disk(partial)
    partial.replace(path)


def to_disk(path: Path) -> None:
    """Return when the contents of the file ``path`` are on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
