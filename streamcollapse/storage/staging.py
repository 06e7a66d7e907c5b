"""An output directory that appears whole or not at all: filled beside its place, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamcollapse.errors import OutputError
from streamcollapse.storage.disk import disk_errors, to_disk

_LONGEST_NAME = 200  # bytes; file systems take 255, and the staging directory's name adds to it


def check_output(out: Path, source: Path | None, overwrite: bool) -> None:
    """Raise OutputError unless a directory may be created at ``out``.

    It may not exist (unless ``overwrite``, and then only as a directory), nor equal, contain or lie inside
    ``source``; the nearest of its parents that exists must be a directory that can be written.
    """
    try:
        target, origin = out.resolve(), None if source is None else source.resolve()
        out.exists()
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long, a directory closed to us
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{out}: cannot be used: {reason}; choose another `out`") from error
    if len(target.name.encode(errors="replace")) > _LONGEST_NAME:
        raise OutputError(f"{target.name[:40]}…: the name is too long; choose another `out`")
    if origin is not None and (target == origin or origin in target.parents or target in origin.parents):
        raise OutputError(f"{out}: is, contains or lies inside the source {source}; choose another `out`")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out}: exists and is not a directory; choose another `out`")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists; choose another `out` or pass `overwrite`")
    check_parent(target, "out")


def check_parent(path: Path, option: str) -> None:
    """Raise OutputError unless what is above ``path``, which ``option`` gave, is there or can be made."""
    parent = existing_parent(path)
    if not parent.is_dir():
        raise OutputError(f"{parent}: is not a directory; choose another `{option}`")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent}: is not writable; choose another `{option}`")


def existing_parent(path: Path) -> Path:
    """The nearest directory above ``path`` that is there; the others are made with what goes into them."""
    return next(parent for parent in path.resolve().parents if os.path.lexists(parent))


def make_parents(path: Path) -> None:
    """Make the directories above ``path`` that are not there. Raises OutputError."""
    with disk_errors(path):
        path.resolve().parent.mkdir(parents=True, exist_ok=True)


def lock_of(out: Path) -> Path:
    """The file that a run holds locked while it makes ``out``."""
    return _beside(out, "lock")


def partial_of(out: Path) -> Path:
    """The directory that is filled before it becomes ``out``."""
    return _beside(out, "partial")


def staged_bytes(out: Path) -> int:
    """Bytes that ``partial_of(out)`` takes on the disk already: what an earlier run had written or reserved."""
    stage = partial_of(out)
    return sum(path.stat().st_size for path in stage.iterdir() if path.is_file()) if stage.is_dir() else 0


def work_of(out: Path) -> Path:
    """The directory for what a run finds out while it makes ``out``, unless the user names another."""
    return _beside(out, "work")


def gone_of(work: Path) -> Path:
    """The name under which the work directory ``work`` is removed."""
    return work.with_name(f"{work.name}.gone")


def _beside(out: Path, kind: str) -> Path:
    target = out.resolve()
    if not target.name:
        raise OutputError(f"{out}: is the root of the file system; choose another `out`")
    return target.with_name(f".{target.name}.{kind}")


@contextmanager
def staged_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield the directory ``partial_of(out)``; rename it to ``out`` at the end.

    It holds what an earlier run left there, and is left there for another run on any exception. With ``overwrite`` an
    older ``out`` stays in place until the new one is complete. Whoever calls this holds ``lock_of(out)``.
    """
    target, stage, retired = out.resolve(), partial_of(out), _beside(out, "replaced")
    with disk_errors(stage):
        stage.mkdir(exist_ok=True)
    try:
        yield stage
        with disk_errors(target):
            to_disk(stage)
            if overwrite and target.exists():
                shutil.rmtree(retired, ignore_errors=True)
                target.rename(retired)
            stage.rename(target)
            to_disk(target.parent)
    except BaseException:
        if retired.exists() and not target.exists():
            retired.rename(target)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def tidy_up(out: Path) -> None:
    """Remove what a run that was killed right after the renaming left beside ``out``."""
    shutil.rmtree(_beside(out, "replaced"), ignore_errors=True)
