"""Leases on files that are computed with in place: whoever wants to write to one or cut it short has to wait.

A mapped page whose file ends before it cannot be used any more: touching it ends the process by SIGBUS. Linux can hold
back, for some seconds (/proc/sys/fs/lease-break-time), every process that opens the file for writing or truncates it,
until the lease is given up: time enough to stop with an error. Not for files of other users, on network file systems
or while somebody has the file open for writing: there is no lease then, and nothing else changes. Renaming and removing
are not held back, and need not be.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

if sys.platform == "linux":
    import fcntl


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

    @property
    def is_held(self) -> bool:
        """Whether the system granted it, and it has not been closed."""
        return self._handle is not None

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
