"""What can be said of a job at once: whether its source and its output are where they should be.

Imports nothing heavy, so that a mistake in a path is told within a second. Every job checks this first
(jobs/prepare.py); the command line does so before it imports what computes.
"""

import contextlib
import shutil
from pathlib import Path

from streamcollapse.errors import OutputError
from streamcollapse.settings.run import Output, Streaming
from streamcollapse.storage.disk import Journal
from streamcollapse.storage.index import find_shards, is_file, local_path
from streamcollapse.storage.staging import check_output, check_parent, gone_of, partial_of, work_of

JOURNAL = "journal.jsonl"


def check_source(source: str | Path) -> None:
    """Raise CheckpointError unless ``source`` is a directory with weights, or looks like an id on the Hub."""
    path = local_path(source)
    if path is not None:
        find_shards(path)


def check_out(source: str | Path, out: str | Path, streaming: Streaming, output: Output) -> None:
    """Raise OutputError unless a directory may be made at ``out``, or an earlier run was killed when it had made it."""
    _clear_leftovers(Path(out))
    finished = was_publishing(Path(out), streaming)
    check_output(Path(out), local_path(source), finished or output.overwrite)


def _clear_leftovers(out: Path) -> None:
    """Remove what a run that was killed while it tidied up has left beside ``out``, which nothing can use any more.

    Only under the name of our own beside an output: a work directory that the user named is never removed, so what has
    its name and an ending is the user's.
    """
    with contextlib.suppress(OSError, RuntimeError):  # no place for an output, as will be said
        shutil.rmtree(gone_of(work_of(out)), ignore_errors=True)


def was_publishing(out: Path, streaming: Streaming) -> bool:
    """Whether a run was broken off when ``out`` had got its name already, as its work directory says."""
    try:
        path = work_of(out) if streaming.work_dir is None else Path(streaming.work_dir)
    except (OSError, RuntimeError):  # no place for an output, as will be said
        return False
    if not is_file(path / JOURNAL):
        return False
    records = Journal(path / JOURNAL).records
    return bool(records) and records[-1].get("kind") == "renaming" and not partial_of(out).exists()


def check_plan_path(path: Path, overwrite: bool, option: str = "plan") -> None:
    """Raise OutputError unless a plan may be written to ``path``, which ``option`` gave."""
    if not path.is_dir():
        _clear_leftovers(path)
    if path.is_dir() or (path.exists() and not overwrite):
        what = "is a directory" if path.is_dir() else f"exists; choose another `{option}` or pass `overwrite`"
        raise OutputError(f"{path}: {what}")
    check_parent(path, option)
