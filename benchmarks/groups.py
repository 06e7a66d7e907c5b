"""Memory cgroups (version 1) for measurements: a limit that a program and its page cache have to live within."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PARENT = Path("/sys/fs/cgroup/memory")
_LAUNCH = "import os,sys; open(sys.argv[1],'w').write(str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"


class NoGroupError(Exception):
    """A memory cgroup cannot be made here, with the reason."""


@dataclass(frozen=True)
class Group:
    """A cgroup that is there."""

    directory: Path

    def launching(self, command: list[str]) -> list[str]:
        """``command``, run inside the group from its first instruction on."""
        return [sys.executable, "-c", _LAUNCH, str(self.directory / "tasks"), *command]

    @property
    def peak_bytes(self) -> int:
        """The most that was charged to the group, page cache included."""
        return int((self.directory / "memory.max_usage_in_bytes").read_text())


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Group]:
    """A cgroup of ``limit_bytes``, removed at the end. Raises NoGroupError."""
    directory = PARENT / "streamcollapse-bench"
    try:
        directory.mkdir()
        (directory / "memory.limit_in_bytes").write_text(str(limit_bytes))
    except OSError as error:
        raise NoGroupError(
            f"a memory cgroup cannot be made here ({error.strerror}); run as root with version 1"
        ) from None
    try:
        yield Group(directory)
    finally:
        directory.rmdir()
