"""Locks on files: one run at a time. The system lets go of a lock when its process ends, however it ends."""

from __future__ import annotations

from typing import TextIO

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
