"""Locks on files: one run at a time. The system lets go of a lock when its process ends, however it ends, so that none
is ever left behind; a file that is left behind means nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from streamcollapse.errors import OutputError

try:
    import fcntl
except ImportError:  # not a Unix: two runs on one directory are not told apart
    fcntl = None  # type: ignore[assignment]


def lock(file: TextIO) -> bool:
    """Whether ``file`` is now locked by this process; not while another has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def claimed(path: Path, whose: str) -> Iterator[None]:
    """Hold the lock file ``path``, made if it is not there and removed at the end.

    Raises OutputError, which begins with ``whose``, while another process holds it.
    """
    while True:
        try:
            file = path.open("a")
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
        with file:
            if not lock(file):
                raise OutputError(f"{whose}: in use by another run; wait for it to finish, or choose another place")
            if not _is_still(file, path):  # the one that had it before has removed it
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
            return


def _is_still(file: TextIO, path: Path) -> bool:
    import os

    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
