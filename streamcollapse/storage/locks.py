"""Locks and leases on files.

A lock: one run at a time. The system lets go of it when its process ends, however it ends, so that none is ever left
behind; a file that is left behind means nothing.

A lease: whoever wants to write to a file that is computed with in place, or cut it short, has to wait. A mapped page
whose file ends before it cannot be used any more: touching it ends the process by SIGBUS. Linux can hold back, for some
seconds (/proc/sys/fs/lease-break-time), every process that opens the file for writing or truncates it, until the lease
is given up: time enough to stop with an error. Not for files of other users, on network file systems or while somebody
has the file open for writing: there is no lease then, and nothing else changes. Renaming and removing are not held
back, and need not be.
"""

import contextlib
import os
import signal
import sys
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
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


class FileLease:
    """A lease on the file ``path`` from now to ``close``, where the system grants one."""

    def __init__(self, path: Path) -> None:
        self._handle: int | None = None
        if sys.platform != "linux":
            return
        handle = None
        try:
            handle = os.open(path, os.O_RDONLY)
            fcntl.fcntl(handle, fcntl.F_SETSIG, signal.SIGURG)  # what tells of a break would end the process otherwise
            fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            self._handle = handle
        except OSError:
            if handle is not None:
                os.close(handle)

    def is_wanted_back(self) -> bool:
        """Whether somebody waits to write to the file."""
        if self._handle is None or sys.platform != "linux":
            return False
        return fcntl.fcntl(self._handle, fcntl.F_GETLEASE) != fcntl.F_RDLCK

    def close(self) -> None:
        """Let whoever waits go on."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
